/* The gate on a CPU: relu(x + F + alpha n(F) x) and its gradients, Eq. 3 to 9 of the ARL-CNN paper.
 *
 * F and x may still be inputs of their batch norms, which are then applied here: F = scale z + shift.
 * n is a softmax over one dimension of a matrix, or a sigmoid. In memory that dimension is one of
 *   columns  `steps` elements, `apart` from each other: spatial in NHWC, channel in NCHW
 *   rows     contiguous: spatial in NCHW, channel in NHWC, and whatever is handy for the sigmoid
 * A task is a few columns of a sample, or a few rows. It goes over its part twice, once for the sums and once for the
 * result, while the part is still in the caches; to compute an exponential again takes less time than to write it.
 *
 * Arithmetic is in float32; bfloat16 is read, and rounded to nearest even, here. The innermost loops are over `W`
 * neighbours in memory and have no branches, for compilers to make vectors of. There is no state, no allocation and
 * no library: safe in threads and after fork. The file is compiled once for each kind of processor (hatch_build.py);
 * native.py chooses among them.
 */
#include <stdint.h>
#include <string.h>

#define W 32       /* neighbours that are worked on together: a cache line of bfloat16, two of float32 */
#define AHEAD 16   /* steps that memory is asked for in advance, where it is read in strides: a quarter faster */
#define ROWS 16384 /* elements in the rows of a task */
#define PART 64    /* steps that are summed before they are added to the sum of all: of 16,000, float32 would lose 1e-4 */
#define INLINE static inline __attribute__((always_inline))
#define PUBLIC __attribute__((visibility("default")))

enum { SPATIAL, CHANNEL, MIXED };

/* What a call is about. Every field has 64 bits, so that compilers and ctypes agree on the layout. */
struct call {
    void *y;               /* the result; in backward, the forward result, or whatever where there was no ReLU */
    const void *f, *x;     /* F and x, or what their norms are given */
    const void *dy;        /* gradient of y */
    void *df, *dx;         /* gradients of F and x */
    float *top, *total;    /* of each softmax: what was subtracted from F, and the sum of the exponentials */
    float *inner;          /* of each softmax, or of each task of a sigmoid: its part of alpha's gradient */
    const float *scale, *shift, *x_scale, *x_shift; /* F = scale f + shift, for each channel; NULL if F is f */
    const float *mean, *x_mean; /* of the inputs of the norms, for each channel; NULL where `sums` are not wanted */
    float *sums;           /* for each sample and channel, what the norms' gradients need: struct sums */
    const float *alpha;
    int64_t samples, channels, positions;
    int64_t channels_last, attention, mean1, add_shortcut, relu, half; /* half: bfloat16, else float32 */
    int64_t threads, next; /* next: the first task that no thread has taken */
    void (*parallel)(void (*)(void *), void *, unsigned, unsigned); /* GOMP_parallel of the OpenMP in use, or NULL */
};

/* ---- numbers ---- */

/* Written out, and not left to compilers: F must be what PyTorch's batch norm gives, bit for bit. */
#if defined __FMA__ || defined __ARM_FEATURE_FMA
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

INLINE uint32_t bits_of(float v) {
    uint32_t bits;
    memcpy(&bits, &v, sizeof bits);
    return bits;
}

INLINE float of_bits(uint32_t bits) {
    float v;
    memcpy(&v, &bits, sizeof v);
    return v;
}

/* bits of v, rounded to nearest even in the upper 16; NaN stays NaN, since the lower bits of bfloat16's are 0 */
INLINE uint32_t rounded(float v) { return bits_of(v) + 0x7fff + ((bits_of(v) >> 16) & 1); }

/* v or 0, without a branch around the load of v */
INLINE float v_if(int wanted, float v) { return of_bits(bits_of(v) & -(uint32_t)wanted); }

INLINE float get(const void *p, int64_t i, int half) {
    return half ? of_bits((uint32_t)((const uint16_t *)p)[i] << 16) : ((const float *)p)[i];
}

INLINE void put(void *p, int64_t i, int half, float v) {
    if (half) ((uint16_t *)p)[i] = (uint16_t)(rounded(v) >> 16);
    else ((float *)p)[i] = v;
}

/* F from what its norm is given, rounded to bfloat16 as the norm's result would be */
INLINE float normed(float z, float scale, float shift, int norm, int half) {
    if (!norm) return z;
    const float f = FMA(z, scale, shift);
    return half ? of_bits(rounded(f) & 0xffff0000) : f;
}

/* e^v between 2^-126 and 2^127, NaN of NaN; within 3e-7 of it, or 1e-4, which is little beside bfloat16's 4e-3.
 * It is 2^k times a polynomial, minimax for the relative error, of what k leaves. */
INLINE float exponential(float v, int half) {
    const float round = 12582912.f + 127; /* 1.5 * 2^23: added, it leaves k + 127 in the lowest bits */
    const float log2_e = 1.44269504f;
    if (half) {
        float t = v * log2_e;
        t = t > 127 ? 127 : t;
        t = t < -126 ? -126 : t;
        const float whole = t + round, r = t - (whole - round);
        const float p = FMA(FMA(FMA(5.5171336e-2f, r, 2.4261349e-1f), r, 6.9326121e-1f), r, 9.9992793e-1f);
        return p * of_bits(bits_of(whole) << 23);
    }
    v = v > 88.02969f ? 88.02969f : v;
    v = v < -87.336544f ? -87.336544f : v;
    const float whole = FMA(v, log2_e, round), k = whole - round;
    const float r = FMA(k, 2.12194440e-4f, FMA(k, -0.693359375f, v)); /* ln(2) in two parts */
    float p = FMA(r, 8.3125e-3f, 4.189033e-2f);
    p = FMA(p, r, 1.6667115e-1f);
    p = FMA(p, r, 4.999923e-1f);
    p = FMA(p, r, 1.f);
    p = FMA(p, r, 1.f);
    return p * of_bits(bits_of(whole) << 23);
}

INLINE float sigmoid(float v, int half) { return 1.f / (1.f + exponential(-v, half)); }

INLINE float larger(float a, float b) { return a > b || a != a ? a : b; } /* NaN of NaN, if a is it */

/* a sum outside of this is computed again with the largest F subtracted; a NaN is outside */
INLINE int fits(float sum) { return sum > 0x1p-32f && sum < 0x1p32f; }

INLINE int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

/* ---- the shape of a call ---- */

INLINE int by_columns(const struct call *c) {
    return c->attention != MIXED && (c->attention == SPATIAL) == (c->channels_last != 0);
}

/* elements of a softmax; for the sigmoid, of a row */
INLINE int64_t length(const struct call *c) {
    if (c->attention == MIXED) return c->channels_last ? c->channels : c->positions;
    return c->attention == SPATIAL ? c->positions : c->channels;
}

/* columns of a sample: how far the elements of one are apart */
INLINE int64_t columns(const struct call *c) { return c->attention == SPATIAL ? c->channels : c->positions; }

INLINE int64_t rows_of(const struct call *c) { return c->samples * c->channels * c->positions / length(c); }

/* neighbours, which do not depend on each other */
#ifdef __clang__
#define APART _Pragma("clang loop vectorize(assume_safety)")
#else
#define APART _Pragma("GCC ivdep")
#endif
#define EACH APART for (int i = 0; i < n; i++)

struct norms { float scale[W], shift[W], x_scale[W], x_shift[W]; };

/* over positions: of df, of df (z - mean), and both for x */
struct sums { float df[W], df_z[W], dx[W], dx_z[W], mean[W], x_mean[W]; };

/* of n neighbours, whose channels start at `channel` and are `next` apart */
INLINE void load_norms(const struct call *c, int64_t channel, int next, int n, struct norms *to) {
    EACH {
        to->scale[i] = c->scale[channel + i * next], to->shift[i] = c->shift[channel + i * next];
        to->x_scale[i] = c->x_scale[channel + i * next], to->x_shift[i] = c->x_shift[channel + i * next];
    }
}

INLINE void start_sums(const struct call *c, int64_t channel, int next, int n, struct sums *to, int fold) {
    EACH {
        to->df[i] = to->df_z[i] = to->dx[i] = to->dx_z[i] = 0;
        if (fold > 0) to->mean[i] = c->mean[channel + i * next];
        if (fold > 1) to->x_mean[i] = c->x_mean[channel + i * next];
    }
}

#define F_HERE normed(get(c->f, at + i, half), norms.scale[i], norms.shift[i], norm, half)
#define X_HERE normed(get(c->x, at + i, half), norms.x_scale[i], norms.x_shift[i], norm, half)

/* gradient of the sum, which is y before the ReLU */
#define G_HERE v_if(!((get(c->y, at + i, half) <= 0) & relu), get(c->dy, at + i, half))

/* the gradients to memory, and to the sums of `fold` norms */
#define PUT_GRADIENTS(to_f, to_x) \
    const float df = to_f, dx = to_x; \
    put(c->df, at + i, half, df), put(c->dx, at + i, half, dx); \
    if (fold > 0) sums.df[i] += df, sums.df_z[i] = FMA(df, get(c->f, at + i, half) - sums.mean[i], sums.df_z[i]); \
    if (fold > 1) sums.dx[i] += dx, sums.dx_z[i] = FMA(dx, get(c->x, at + i, half) - sums.x_mean[i], sums.dx_z[i]);

/* ---- columns ---- */

INLINE void ask_for(const void *p, int64_t i, int half) {
    __builtin_prefetch((const char *)p + i * (half ? 2 : 4));
    if (!half) __builtin_prefetch((const char *)p + i * 4 + 64);
}

#define STEPS(first, last, ...) \
    for (int64_t s = first, at = base + s * apart; s < last; s++, at += apart) { \
        ask_for(c->f, at + AHEAD * apart, half), ask_for(c->x, at + AHEAD * apart, half); \
        if (back) ask_for(c->dy, at + AHEAD * apart, half), ask_for(c->y, at + AHEAD * apart, half); \
        if (norm && c->attention == CHANNEL) load_norms(c, s, 0, n, &norms); \
        EACH { __VA_ARGS__ } \
    }
#define EACH_STEP(...) STEPS(0, steps, __VA_ARGS__)
#define EACH_PART for (int64_t first = 0, last; last = smaller(first + PART, steps), first < steps; first = last)

/* `more` is the sum of the part with one step more */
#define EACH_SUM(sum, more) \
    EACH_PART { \
        float part[W]; \
        EACH part[i] = 0; \
        STEPS(first, last, part[i] = more;) \
        EACH sum[i] += part[i]; \
    }

INLINE void forward_columns(
        const struct call *c, int64_t sample, int64_t lane, const int n, const int half, const int norm) {
    const int64_t steps = length(c), apart = columns(c), base = sample * steps * apart + lane;
    const int relu = c->relu != 0, back = 0;
    const float one = c->add_shortcut ? 1.f : 0.f;
    float *const top = c->top + sample * apart + lane, *const total = c->total + sample * apart + lane;
    float sum[W], factor[W], most[W];
    struct norms norms;
    int again = 0;
    if (norm && c->attention == SPATIAL) load_norms(c, lane, 1, n, &norms);
    EACH sum[i] = most[i] = 0;
    EACH_SUM(sum, part[i] + exponential(F_HERE, half))
    EACH again |= !fits(sum[i]);
    if (again) {
        EACH sum[i] = 0, most[i] = -__builtin_inff();
        EACH_STEP(most[i] = larger(F_HERE, most[i]);)
        EACH_SUM(sum, part[i] + exponential(F_HERE - most[i], half))
    }
    EACH {
        factor[i] = *c->alpha * (c->mean1 ? (float)steps : 1.f) / sum[i];
        top[i] = most[i], total[i] = sum[i];
    }
    EACH_STEP(
        const float f = F_HERE, y = FMA(X_HERE, FMA(factor[i], exponential(f - most[i], half), one), f);
        put(c->y, at + i, half, (y < 0) & relu ? 0.f : y);
    )
}

INLINE void backward_columns(
        const struct call *c, int64_t sample, int64_t lane, const int n, const int half, const int fold) {
    const int64_t steps = length(c), apart = columns(c), base = sample * steps * apart + lane;
    const int relu = c->relu != 0, norm = 1, back = 1;
    const float one = c->add_shortcut ? 1.f : 0.f;
    const float *const top = c->top + sample * apart + lane, *const total = c->total + sample * apart + lane;
    float *const alphas = c->inner + sample * apart + lane;
    float inner[W], factor[W], most[W], all[W][4] = {{0}};
    struct norms norms;
    struct sums sums;
    if (c->attention == SPATIAL) load_norms(c, lane, 1, n, &norms);
    EACH inner[i] = 0, most[i] = top[i];
    EACH_SUM(inner, FMA(G_HERE * X_HERE, exponential(F_HERE - most[i], half), part[i]))
    EACH {
        const float scaled = (c->mean1 ? (float)steps : 1.f) / total[i];
        alphas[i] = inner[i] * scaled;
        inner[i] /= total[i];
        factor[i] = *c->alpha * scaled;
    }
    EACH_PART {
        start_sums(c, lane, 1, n, &sums, fold);
        STEPS(
            first, last,
            const float g = G_HERE, m = factor[i] * exponential(F_HERE - most[i], half), u = FMA(g, X_HERE, -inner[i]);
            PUT_GRADIENTS(FMA(m, u, g), g * (one + m))
        )
        EACH all[i][0] += sums.df[i], all[i][1] += sums.df_z[i], all[i][2] += sums.dx[i], all[i][3] += sums.dx_z[i];
    }
    if (fold) memcpy(c->sums + (sample * apart + lane) * 4, all, n * sizeof *all);
}

/* ---- rows ---- */

/* whole blocks of neighbours, of which compilers make more, and what is left; channels are along a row, or it has one */
#define BLOCK(count, ...) { \
        const int n = (int)(count); \
        const int64_t at = base + s; \
        if (norm && c->channels_last) load_norms(c, s, 1, n, &norms); \
        EACH { __VA_ARGS__ } \
    }
#define EACH_BLOCK(...) { \
        int64_t s = 0; \
        if (norm && !c->channels_last) load_norms(c, row % c->channels, 0, W, &norms); \
        for (; s + W <= steps; s += W) BLOCK(W, __VA_ARGS__) \
        if (s < steps) BLOCK(steps - s, __VA_ARGS__) \
    }

INLINE float sum_of(const float *v) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += v[i];
    return sum;
}

/* sum of the exponentials of a row and what was subtracted from F; or of the sigmoids of a row */
INLINE float row_sum(const struct call *c, int64_t row, float *top, const int half, const int norm) {
    const int64_t steps = length(c), base = row * steps;
    float sum[W] = {0}, most[W];
    struct norms norms;
    if (c->attention == MIXED) {
        EACH_BLOCK(sum[i] += sigmoid(F_HERE, half);)
        return sum_of(sum);
    }
    EACH_BLOCK(sum[i] += exponential(F_HERE, half);)
    *top = 0;
    if (fits(sum_of(sum))) return sum_of(sum);
    for (int i = 0; i < W; i++) sum[i] = 0, most[i] = -__builtin_inff();
    EACH_BLOCK(most[i] = larger(F_HERE, most[i]);)
    float largest = most[0];
    for (int i = 1; i < W; i++) largest = larger(most[i], largest);
    EACH_BLOCK(sum[i] += exponential(F_HERE - largest, half);)
    *top = largest;
    return sum_of(sum);
}

INLINE void forward_row(const struct call *c, int64_t row, const float factor, const int half, const int norm) {
    const int64_t steps = length(c), base = row * steps;
    const int relu = c->relu != 0;
    const float one = c->add_shortcut ? 1.f : 0.f;
    struct norms norms;
    if (c->attention == MIXED) {
        EACH_BLOCK(
            const float f = F_HERE, y = FMA(X_HERE, FMA(factor, sigmoid(f, half), one), f);
            put(c->y, at + i, half, (y < 0) & relu ? 0.f : y);
        )
        return;
    }
    float top;
    const float total = row_sum(c, row, &top, half, norm), share = factor / total, most = top;
    EACH_BLOCK(
        const float f = F_HERE, y = FMA(X_HERE, FMA(share, exponential(f - most, half), one), f);
        put(c->y, at + i, half, (y < 0) & relu ? 0.f : y);
    )
    c->top[row] = most, c->total[row] = total;
}

/* a sigmoid's sums of g x m and of m */
INLINE void backward_row_sums(const struct call *c, int64_t row, double sums[2], const int half) {
    const int64_t steps = length(c), base = row * steps;
    const int relu = c->relu != 0, norm = 1;
    float inner[W] = {0}, all[W] = {0};
    struct norms norms;
    EACH_BLOCK(
        const float m = sigmoid(F_HERE, half);
        inner[i] = FMA(G_HERE * X_HERE, m, inner[i]);
        all[i] += m;
    )
    sums[0] += sum_of(inner), sums[1] += sum_of(all);
}

/* the gradients; of a sigmoid, `factor` and the `mean` of g x under the mask are those of its task */
INLINE void backward_row(
        const struct call *c, int64_t row, float factor, float mean, const int half, const int fold) {
    const int64_t steps = length(c), base = row * steps;
    const int relu = c->relu != 0, norm = 1;
    const float one = c->add_shortcut ? 1.f : 0.f;
    struct norms norms;
    struct sums sums;
    if (c->attention == MIXED) {
        EACH_BLOCK(
            const float g = G_HERE, m = sigmoid(F_HERE, half), share = factor * m;
            put(c->df, at + i, half, FMA(share * (1.f - m), FMA(g, X_HERE, -mean), g));
            put(c->dx, at + i, half, g * (one + share));
        )
        return;
    }
    const float top = c->top[row], scaled = (c->mean1 ? (float)steps : 1.f) / c->total[row];
    float inner[W] = {0};
    start_sums(c, row % c->channels, 0, W, &sums, fold);
    EACH_BLOCK(inner[i] = FMA(G_HERE * X_HERE, exponential(F_HERE - top, half), inner[i]);)
    c->inner[row] = sum_of(inner) * scaled;
    factor = *c->alpha * scaled, mean = sum_of(inner) / c->total[row];
    EACH_BLOCK(
        const float g = G_HERE, m = factor * exponential(F_HERE - top, half);
        PUT_GRADIENTS(FMA(m, FMA(g, X_HERE, -mean), g), g * (one + m))
    )
    if (!fold) return;
    float *const to = c->sums + row * 4;
    to[0] = sum_of(sums.df), to[1] = sum_of(sums.df_z), to[2] = sum_of(sums.dx), to[3] = sum_of(sums.dx_z);
}

/* gradient of a norm's input over that of its output: scale (d - shift - x_scale (z - x_shift)) */
INLINE void norm_row(const struct call *c, int64_t row, const int half) {
    const int64_t steps = length(c), base = row * steps;
    const int norm = 1;
    struct norms norms;
    EACH_BLOCK(
        const float z = get(c->f, at + i, half) - norms.x_shift[i], d = get(c->df, at + i, half) - norms.shift[i];
        put(c->df, at + i, half, norms.scale[i] * FMA(-norms.x_scale[i], z, d));
    )
}

/* ---- tasks ---- */

/* rows in a task: those of a sample, where the mask is divided by its mean over it */
INLINE int64_t rows_in_task(const struct call *c) {
    if (c->attention == MIXED && c->mean1) return rows_of(c) / c->samples;
    const int64_t rows = ROWS / length(c);
    return rows > 0 ? rows : 1;
}

static int64_t tasks_of(const struct call *c) {
    if (!by_columns(c)) return (rows_of(c) + rows_in_task(c) - 1) / rows_in_task(c);
    return c->samples * ((columns(c) + W - 1) / W);
}

INLINE void forward_task(const struct call *c, int64_t task, const int half, const int norm) {
    if (by_columns(c)) {
        const int64_t parts = (columns(c) + W - 1) / W, lane = task % parts * W, left = columns(c) - lane;
        if (left >= W) forward_columns(c, task / parts, lane, W, half, norm);
        else forward_columns(c, task / parts, lane, (int)left, half, norm);
        return;
    }
    const int64_t from = task * rows_in_task(c), to = smaller(from + rows_in_task(c), rows_of(c)), steps = length(c);
    float factor = *c->alpha * (c->mean1 && c->attention != MIXED ? (float)steps : 1.f);
    if (c->attention == MIXED && c->mean1) {
        double sum = 0; /* of up to a million sigmoids */
        for (int64_t row = from; row < to; row++) sum += row_sum(c, row, 0, half, norm);
        factor *= (float)((double)((to - from) * steps) / sum);
    }
    for (int64_t row = from; row < to; row++) forward_row(c, row, factor, half, norm);
}

INLINE void backward_task(const struct call *c, int64_t task, const int half, const int fold) {
    if (by_columns(c)) {
        const int64_t parts = (columns(c) + W - 1) / W, lane = task % parts * W, left = columns(c) - lane;
        if (left >= W) backward_columns(c, task / parts, lane, W, half, fold);
        else backward_columns(c, task / parts, lane, (int)left, half, fold);
        return;
    }
    const int64_t from = task * rows_in_task(c), to = smaller(from + rows_in_task(c), rows_of(c));
    float factor = *c->alpha, mean = 0;
    if (c->attention == MIXED) {
        double sums[2] = {0};
        for (int64_t row = from; row < to; row++) backward_row_sums(c, row, sums, half);
        const double scaled = c->mean1 ? (double)((to - from) * length(c)) / sums[1] : 1;
        c->inner[task] = (float)(sums[0] * scaled);
        factor *= (float)scaled;
        if (c->mean1) mean = (float)(sums[0] / sums[1]);
    }
    for (int64_t row = from; row < to; row++) backward_row(c, row, factor, mean, half, fold);
}

INLINE void norm_task(const struct call *c, int64_t task, const int half) {
    const int64_t from = task * rows_in_task(c), to = smaller(from + rows_in_task(c), rows_of(c));
    for (int64_t row = from; row < to; row++) norm_row(c, row, half);
}

#define WORKER(name, each)                                                             \
    static void name(void *p) {                                                        \
        struct call *c = p;                                                            \
        const int64_t tasks = tasks_of(c);                                             \
        int64_t task;                                                                  \
        while ((task = __atomic_fetch_add(&c->next, 1, __ATOMIC_RELAXED)) < tasks) each; \
    }

WORKER(forward_float, forward_task(c, task, 0, 0))
WORKER(forward_half, forward_task(c, task, 1, 0))
WORKER(forward_float_norm, forward_task(c, task, 0, 1))
WORKER(forward_half_norm, forward_task(c, task, 1, 1))
WORKER(backward_float, backward_task(c, task, 0, 0))
WORKER(backward_half, backward_task(c, task, 1, 0))
WORKER(backward_float_norm, backward_task(c, task, 0, 1))
WORKER(backward_half_norm, backward_task(c, task, 1, 1))
WORKER(backward_float_norms, backward_task(c, task, 0, 2))
WORKER(backward_half_norms, backward_task(c, task, 1, 2))
WORKER(norm_float, norm_task(c, task, 0))
WORKER(norm_half, norm_task(c, task, 1))

static void run(struct call *c, void (*worker)(void *)) {
    c->next = 0;
    if (c->parallel && c->threads > 1 && tasks_of(c) > 1) c->parallel(worker, c, (unsigned)c->threads, 0);
    else worker(c);
}

/* of this file, by hatch_build.py: a library of another source has another struct call */
PUBLIC const uint32_t arl_source = SOURCE;

/* how many numbers `inner` must hold */
PUBLIC int64_t arl_gate_inner(const struct call *c) {
    if (by_columns(c)) return c->samples * columns(c);
    return c->attention == MIXED ? tasks_of(c) : rows_of(c);
}

PUBLIC void arl_gate_forward(struct call *c) {
    if (c->scale) run(c, c->half ? forward_half_norm : forward_float_norm);
    else run(c, c->half ? forward_half : forward_float);
}

PUBLIC void arl_gate_backward(struct call *c) {
    if (c->x_mean) run(c, c->half ? backward_half_norms : backward_float_norms);
    else if (c->mean) run(c, c->half ? backward_half_norm : backward_float_norm);
    else run(c, c->half ? backward_half : backward_float);
}

/* df in place; the call is that of a sigmoid */
PUBLIC void arl_norm_backward(struct call *c) { run(c, c->half ? norm_half : norm_float); }
