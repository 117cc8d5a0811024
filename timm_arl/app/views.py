"""The parts of the page as HTML. Whatever comes from a file or a model is escaped."""
from html import escape
from typing import Any, Dict, List, Optional, Sequence, Tuple

import torch
from PIL import Image
from torchvision.transforms.v2.functional import to_pil_image

from ..isic.crops import Box
from ..isic.task import DIAGNOSES, ISIC2017, label_words, words_list
from ..pictures import REMARKS
from ..predictor import Predictor
from .analysis import MAX_BYTES, MAX_PIXELS, NOT_FOR, Analysis, accepted_words, data_url, synthetic_picture

__all__ = [
    'about', 'attention', 'drop_zone', 'found', 'head', 'maps', 'nothing_yet', 'problem', 'what_alpha_does',
]

POINTS = {  # what an operating point is, by the beginning of its name
    'youden': 'chosen on validation images: the largest sum of sensitivity and specificity among them',
    'sensitivity': 'chosen on validation images: the highest threshold that finds at least this share of those with '
                   'the diagnosis among them; of other images it can find more or fewer',
    'official': "the challenge's",
}
HOW_TO_READ = (
    'The network sees crops of the image, whose probabilities are averaged. In a class activation map yellow speaks '
    'for the diagnosis and blue against it; grey is 0. It shows what the network used, which need not be medically '
    'relevant: a blob in the centre of the image, which has not seen it, finds outlined lesions better than the '
    'class activation maps of ARL-CNN14 did in our measurements (docs/explain.md).')
NEARLY_FLAT = 0.9  # the effective share above which a mask is called so
THUMBNAIL = 160  # pixels


def head(predictor: Predictor) -> str:
    """Title, what the page is and what it is not for."""
    count = {1: 'one probability', 2: 'two probabilities'}.get(
        len(predictor.labels), f'{len(predictor.labels)} probabilities')
    notes = ''.join(f'<p class="arl-note">{escape(remark)}</p>' for remark in predictor.remarks)
    return (
        f'<header class="arl-head"><h1>What does the network see?</h1>'
        f'<p>Give <code>{escape(predictor.name)}</code> a dermoscopic image. It answers with {count}, '
        f'{words_list(predictor.labels)}, and shows where they come from.</p>'
        f'<p class="arl-warning" role="note"><strong>{NOT_FOR.partition(". ")[0]}.</strong> '
        f'{NOT_FOR.partition(". ")[2]} Its errors are many: see <a href="#about">what is known about it</a>.</p>'
        f'{notes}</header>')


def drop_zone() -> str:
    """Where a file is dropped or chosen, and generated pictures to click on."""
    examples = ''.join(
        f'<button type="button" data-example="{diagnosis}"><img alt="" src="'
        f'{data_url(synthetic_picture(diagnosis).resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS))}">'
        f'<span>{label_words(diagnosis)}</span></button>' for diagnosis in DIAGNOSES)
    return (
        f'<div class="arl-drop"><label class="arl-zone"><input type="file" accept="image/*,.dcm,.dicom" '
        f'aria-describedby="arl-limits"><strong>Drop an image here</strong><span class="arl-choose">or choose a file'
        f'</span></label>'
        f'<p id="arl-limits" class="arl-small">{accepted_words()}; up to {MAX_BYTES / 1e6:.0f} MB and '
        f'{MAX_PIXELS / 1e6:.0f} megapixels. Nothing is written to a disk: a small copy stays in '
        f'memory until your next image, for an hour at most. For many images: <code>python -m timm_arl.predict</code>.'
        f'</p>'
        f'<p class="arl-status" role="status"></p>'
        f'<h2>No image at hand?</h2><p class="arl-small">These are <strong>SYNTHETIC</strong>: drawn by a program, not '
        f'dermoscopy. What the network says of them means nothing.</p>'
        f'<div class="arl-examples">{examples}</div></div>')


def nothing_yet() -> str:
    return '<div class="arl-empty"><p>The probabilities will appear here.</p></div>'


def problem(sentence: str) -> str:
    return f'<div class="arl-problem" role="alert"><p>{escape(sentence)}</p></div>'


def found(analysis: Analysis, predictor: Predictor, measured: Optional[Dict[str, Any]]) -> str:
    """A card for each label: its probability and what that means at each operating point."""
    synthetic = ('<p class="arl-note"><strong>SYNTHETIC</strong> image, not dermoscopy: these numbers mean nothing.</p>'
                 if analysis.synthetic else '')
    remark = f'<p class="arl-note">The image {escape(analysis.remark)}</p>' if analysis.remark else ''
    if analysis.remark == REMARKS['square']:
        remark = ('<p class="arl-note">The image is exactly square, so it may be a copy that was squashed. Such a copy '
                  'gets other probabilities: use an image in its original shape.</p>')
    points = list(predictor.thresholds)
    points.sort(key=lambda point: point != predictor.point)
    cards = ''.join(_card(label, p, points, analysis, predictor, measured)
                    for label, p in zip(predictor.labels, analysis.probabilities.tolist()))
    texts = {**POINTS, **({} if predictor.task.is_challenge else {'official': 'chosen on no images'})}
    words = ''.join(f'<li><em>{_point_words(point, predictor)}</em>: {text}{_elsewhere(point, predictor, measured)}'
                    f'{" (default)" if point == predictor.point else ""}</li>'
                    for point in points for start, text in texts.items() if point.startswith(start))
    share = (f' Sensitivity and specificity are those on {escape(str(measured["images"]))} {measured["split"]} images '
             f'of {escape(measured["data"])}.' if measured else '')
    exclusive = predictor.task.kind == 'multiclass'
    called = (f'<p>Most probable: <strong>{label_words(predictor.most_probable(analysis.probabilities))}</strong></p>'
              if exclusive else '')
    adding = ('An image has one of them, so that they exclude each other: the most probable one is what the network '
              'calls it' if exclusive else
              'Each probability is against everything else, so they need not add up to 1')
    return (
        f'<section class="arl-found" aria-label="Result"><h2>{escape(analysis.name)}</h2>'
        f'<p class="arl-small">{analysis.size[0]} x {analysis.size[1]} px</p>{synthetic}{remark}{called}'
        f'<div class="arl-cards">{cards}</div>'
        f'<details class="arl-small"><summary>What the thresholds are</summary>'
        f'<ul>{words}</ul><p>A diagnosis is called where its probability is above the threshold. {adding}. They are '
        f'not risks.{share}</p></details></section>')


def _card(
        label: str,
        p: float,
        points: Sequence[str],
        analysis: Analysis,
        predictor: Predictor,
        measured: Optional[Dict[str, Any]],
) -> str:
    marks = ''.join(f'<i style="left:{100 * predictor.thresholds[point][label]:.1f}%"'
                    f'{" class=arl-default" if point == predictor.point else ""}></i>' for point in points)
    scores = _point_scores(measured, label)
    rows = []
    equal: Dict[float, List[str]] = {}  # points of one threshold share a row
    for point in points:
        equal.setdefault(predictor.thresholds[point][label], []).append(point)
    for point, *others in equal.values():
        above = predictor.decide(analysis.probabilities, point)[label]
        score = f'<td>{scores[point][0]:.2f}/{scores[point][1]:.2f}</td>' if point in scores else '<td></td>'
        rows.append(
            f'<tr{" class=arl-default" if point == predictor.point else ""}>'
            f'<th scope="row">{"; ".join(_point_words(each, predictor) for each in (point, *others))}</th>'
            f'<td>{predictor.thresholds[point][label]:.3f}</td>'
            f'<td class="arl-{"above" if above else "below"}">{"above" if above else "not above"}</td>'
            f'{score if scores else ""}</tr>')
    heads = ['<span class="arl-hidden">operating point</span>', 'threshold', 'here',
             *(['<abbr title="sensitivity / specificity">sens./spec.</abbr>'] if scores else [])]
    return (
        f'<article class="arl-card"><div class="arl-top"><h3>{label_words(label)}</h3>'
        f'<p class="arl-p">{p:.3f}</p></div>'
        f'<div class="arl-bar" role="img" aria-label="Probability of {label_words(label)}: {p:.3f} of 1"><span '
        f'style="width:{100 * p:.1f}%"></span>{marks}</div>'
        f'<table><thead><tr>{"".join(f"<th scope=col>{each}</th>" for each in heads)}</tr></thead>'
        f'<tbody>{"".join(rows)}</tbody></table></article>')


def _point_words(point: str, predictor: Predictor) -> str:
    """An operating point as readers call it."""
    if point == 'official':
        return predictor.task.usual_point
    kind, _, rest = point.removesuffix(' on validation').partition(' ')
    if kind == 'sensitivity' and rest:
        return f'aimed at a sensitivity of {escape(rest)} (on validation)'
    return "Youden's" if (kind, rest) == ('youden', '') else escape(point)


def _elsewhere(point: str, predictor: Predictor, measured: Optional[Dict[str, Any]]) -> str:
    """What sensitivity a threshold that aims at one has on the images of the card."""
    found = [f'{_point_scores(measured, label)[point][0]:.2f} of {label_words(label)}' for label in predictor.labels
             if point in _point_scores(measured, label)]
    if not point.startswith('sensitivity') or not found or not measured:
        return ''
    return f' ({" and ".join(found)} on the {measured["split"]} images below)'


def _point_scores(measured: Optional[Dict[str, Any]], label: str) -> Dict[str, Tuple[float, float]]:
    """Sensitivity and specificity by operating point."""
    scores = (measured or {}).get(label) or {}
    points = [{'name': 'official', **scores}, *scores.get('operating_points', ())]
    return {point['name']: (point['sensitivity'], point['specificity']) for point in points
            if point.get('sensitivity') is not None and point.get('specificity') is not None}


def _shown(analysis: Analysis) -> str:
    """The picture with a frame around each crop, and the crops."""
    width, height = analysis.picture.size
    frames = ''.join(_frame([str(number) for number, other in enumerate(analysis.boxes, 1) if other == box], box, width)
                     for box in dict.fromkeys(analysis.boxes))  # in a square picture some are the same
    count = len(analysis.boxes)
    same: Dict[int, List[str]] = {}  # number of the first -> numbers of those equal to it
    for number, crop in enumerate(analysis.crops, 1):
        first = next((k for k in same if torch.equal(analysis.crops[k - 1], crop)), number)
        same.setdefault(first, []).append(str(number))
    cut = ''.join(
        f'<figure><img alt="Crop {", ".join(numbers)} of {count}" src="'
        f'{data_url(to_pil_image(analysis.crops[first - 1]))}"><figcaption>{", ".join(numbers)}</figcaption></figure>'
        for first, numbers in same.items())
    alike = ''.join(
        f'<p class="arl-small">Crops {", ".join(numbers)} are the same, shown once here. They count {len(numbers)} '
        f'times in the mean.</p>' for numbers in same.values() if len(numbers) > 1)
    return (
        f'<figure><figcaption>What the network was shown: {count} {"crop" if count == 1 else "crops"}</figcaption>'
        f'<div class="arl-framed"><img alt="{escape(analysis.name)}, with a frame around each crop" src="'
        f'{data_url(analysis.picture)}"><svg viewBox="0 0 {width} {height}" aria-hidden="true">{frames}</svg></div>'
        f'<div class="arl-thumbs">{cut}</div>{alike}</figure>')


def _frame(numbers: Sequence[str], box: Box, width: int) -> str:
    left, top, right, bottom = box
    line, size = width / 240, width / 26
    text = ', '.join(numbers)
    plate = (0.7 * len(text) + 0.9) * size
    frame = (f'<rect x="{left + line:.1f}" y="{top + line:.1f}" width="{right - left - 2 * line:.1f}" '
             f'height="{bottom - top - 2 * line:.1f}" fill="none"')
    return (f'<g>{frame} stroke="#000" stroke-opacity=".55" stroke-width="{2.2 * line:.1f}"/>'
            f'{frame} stroke="#ffe838" stroke-width="{line:.1f}"/>'
            f'<rect x="{left + line:.1f}" y="{top + line:.1f}" width="{plate:.1f}" height="{1.6 * size:.1f}" '
            f'fill="#ffe838"/><text x="{left + line + plate / 2:.1f}" y="{top + line + 1.25 * size:.1f}" '
            f'font-size="{1.25 * size:.1f}" text-anchor="middle" fill="#00224e">{text}</text></g>')


def maps(pictures: Dict[str, Image.Image], analysis: Analysis, predictor: Predictor) -> str:
    """Class activation maps, the mask of a block, and what the network was shown, side by side."""
    figures = []
    for name, picture in pictures.items():
        label = name in predictor.labels
        words, colours = ((f'Class activation map of {label_words(name)}', 'yellow speaks for it, blue against it')
                          if label else (f'Attention mask of {name}', _lighter(name, analysis)))
        figures.append(
            f'<figure><figcaption>{f"For and against {label_words(name)}" if label else words}</figcaption>'
            f'<img alt="{words} on {escape(analysis.name)}, which is in grey: {colours}" src="{data_url(picture)}">'
            f'{"" if label else _block_words(name, analysis, predictor)}</figure>')
        if name == predictor.labels[-1]:
            figures.append(f'<p class="arl-small">{HOW_TO_READ}</p>')
    none = '<p class="arl-note">This network has no class activation map.</p>'
    none *= predictor.labels[0] not in pictures
    return f'{none}<div class="arl-maps">{"".join(figures)}{_shown(analysis)}</div>'


def _lighter(name: str, analysis: Analysis) -> str:
    alpha = analysis.blocks[name].alpha
    return f'lighter is {"weakened" if alpha < 0 else "strengthened"} more' if alpha else 'it changes nothing'


def _block_words(name: str, analysis: Analysis, predictor: Predictor) -> str:
    """What the mask of a block weighs: a mask may look interesting where it changes nothing."""
    block = analysis.blocks[name]
    of = 'channel' if getattr(predictor.network, 'attention', '') == 'channel' else 'position'
    spread = (f'The mask is nearly flat: it prefers almost no {of}.' if block.effective_share > NEARLY_FLAT else
              f'The mask has most of its weight on {100 * block.effective_share:.0f} % of the {of}s.')
    return (f'<p class="arl-small">Its alpha is {block.alpha:.3g}: {_lighter(name, analysis)}. The attention term '
            f'changes what the block gives by <strong>{100 * block.contribution:.1f} %</strong> on average. {spread}'
            f'</p>')


def what_alpha_does() -> str:
    return (
        '<h2>What does attention change?</h2><p>Alpha is the weight of a block\'s attention mask: above 0 it '
        'strengthens what the mask marks, below 0 it weakens that, and at 0 attention is off. Scale all alphas and '
        'watch the probabilities: a large change means that the network relies on attention for this image.</p>')


def attention(analysis: Analysis, predictor: Predictor, factor: float, probabilities: torch.Tensor) -> str:
    """Probabilities without attention, as trained, and with the alphas times a factor."""
    assert analysis.without is not None
    rows = ''.join(
        f'<tr><th scope="row">{label_words(label)}</th><td>{none:.3f}</td><td>{trained:.3f}</td>'
        f'<td><strong>{chosen:.3f}</strong></td><td>{chosen - trained:+.3f}</td></tr>' for label, none, trained, chosen
        in zip(predictor.labels, analysis.without.tolist(), analysis.probabilities.tolist(), probabilities.tolist()))
    return (
        f'<table class="arl-table"><thead><tr><th scope="col"><span class="arl-hidden">label</span></th>'
        f'<th scope="col">no attention<br><small>alpha x 0</small></th><th scope="col">as trained<br><small>alpha x 1'
        f'</small></th><th scope="col">chosen<br><small>alpha x {factor:g}</small></th><th scope="col">change<br>'
        f'<small>from trained</small></th></tr></thead><tbody>{rows}</tbody></table>')


def about(predictor: Predictor, measured: Optional[Dict[str, Any]], repo: Optional[str]) -> str:
    """The figures of the card, and its caveats."""
    name = escape(predictor.name)
    if measured:
        data = f'{escape(str(measured["images"]))} {measured["split"]} images of {escape(measured["data"])}'
        scores = ''.join(
            f'<tr><th scope="row">{label_words(label)}</th><td>{_interval(measured[label], "auc")}</td>'
            f'<td>{escape(str(measured[label]["positives"]))}</td></tr>' for label in predictor.labels)
        figures = (
            f'<p class="arl-figure">Mean AUC <strong>{_interval(measured, "mean_auc")}</strong> on {data}, at '
            f'{predictor.img_size} px.</p><table class="arl-table"><thead><tr><th scope="col">diagnosis</th>'
            f'<th scope="col">AUC [95 % interval]</th><th scope="col">images with it</th></tr></thead>'
            f'<tbody>{scores}</tbody></table>')
        if measured['split'] == 'validation':
            figures += '<p>These images chose the weights that were kept: the figures are too good.</p>'
    elif repo:
        figures = f'<p>Its scores are in its model card, that of <code>{escape(repo)}</code> on the Hub.</p>'
    else:
        figures = '<p>There are no scores beside these weights: how good they are is not known.</p>'
    return (
        f'<section class="arl-about" id="about" aria-label="About the network"><h2>What is known about {name}</h2>'
        f'{figures}<ul>{"".join(f"<li>{each}</li>" for each in _caveats(predictor, measured))}</ul></section>')


def _caveats(predictor: Predictor, measured: Optional[Dict[str, Any]]) -> List[str]:
    gaps = [(label_words(label), scores['mean_probability'] - scores['positives'] / scores['images'])
            for label in predictor.labels for scores in [(measured or {}).get(label) or {}]
            if 'mean_probability' in scores]
    return [
        *(f'Probabilities of {label} are too {"high" if gap > 0 else "low"} on those images, by {abs(gap):.3f} on '
          f'average.' for label, gap in gaps if abs(gap) > 0.05),
        'Do not use it on patients, in any setting. That holds for clinicians and for patients themselves.',
        f'It knows {words_list(predictor.task.known)}, and answers to anything else as if it were one of them. '
        'Photographs that were not taken with a dermatoscope are such a thing.',
        *['The images of ISIC 2017 come from a few clinics with mostly light-skinned patients. Skin types were not '
          'recorded, so nobody knows how scores differ between them.'] * (predictor.task.name == ISIC2017.name),
        'Probabilities are not risks in any practice: they follow the mix of diagnoses in training.',
        'A map shows what the network used, not what matters in medicine. It may look plausible and be wrong.',
    ]


def _interval(scores: Dict[str, Any], key: str) -> str:
    low, high = scores.get(f'{key}_ci95') or (None, None)
    return f'{scores[key]:.3f}' + (f' [{low:.3f}, {high:.3f}]' if low is not None else '')
