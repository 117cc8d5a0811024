"""How fast photographs become the network's input, beside how fast training takes them.

    python benchmarks/input_speed.py --results-file benchmarks/results/input.csv

Each image is a JPEG of 12 megapixels and takes the path of training (one augmented image) and that of evaluation (its
crops) through a DataLoader, once decoded in full and once at the size that these need, as the programs decode it.
Without --image it is a synthetic lesion.
"""
import argparse
import io
import statistics
import sys
import time
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import datasets
import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

import timm_arl
from timm_arl.files import check_writable, git_commit, write_rows
from timm_arl.isic.loading import IsicSplit
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.isic.task import LABELS
from timm_arl.isic.transforms import AUGMENTATIONS, CROPS, eval_transform, train_transform

WARMUP = 2  # steps
MEAN_STD = timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD


def photographs(jpeg: bytes, count: int) -> datasets.Dataset:
    """A split with the same photograph in each row."""
    return datasets.Dataset.from_dict({
        'image': [{'bytes': jpeg, 'path': None}] * count, 'image_id': [f'I{i}' for i in range(count)],
        **{label: [0.] * count for label in LABELS},
    }, features=datasets.Features({
        'image': datasets.Image(decode=False), 'image_id': datasets.Value('string'),
        **{label: datasets.Value('float32') for label in LABELS}}))


def synthetic_photograph(seed: int) -> bytes:
    """A drawn lesion of 4000 x 3000 pixels with the noise of a camera, about as many bytes as a real one."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(draw_lesion('melanoma', rng, 1000).resize((4000, 3000), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=90)
    return file.getvalue()


def images_per_second(dataset: IsicSplit, workers: int) -> float:
    iterator = iter(DataLoader(dataset, batch_size=1, num_workers=workers))
    for _ in range(workers):  # processes are up
        next(iterator)
    start = time.perf_counter()
    count = sum(1 for _ in iterator)
    return count / (time.perf_counter() - start)


def training_speed(args: argparse.Namespace) -> float:
    """Images a second of forward, loss, backward and SGD, channels_last, on all cores of a CPU: the median step."""
    model = timm.create_model(args.model, num_classes=len(LABELS)).train().to(
        args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(args.batch_size, 3, args.img_size, args.img_size).to(
        args.device, memory_format=torch.channels_last)
    y = torch.randint(2, (args.batch_size, len(LABELS))).float().to(args.device)
    times = []
    for _ in range(WARMUP + args.steps):
        start = time.perf_counter()
        optimizer.zero_grad()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == 'bf16'):
            logits = model(x)
        torch.nn.functional.binary_cross_entropy_with_logits(logits.float(), y).backward()
        optimizer.step()
        if args.device != 'cpu':
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return args.batch_size / statistics.median(times[WARMUP:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--image', metavar='FILE', help='a JPEG; by default a synthetic one of 12 megapixels')
    parser.add_argument('--workers', nargs='+', type=int, default=[1, 2], help='processes of the DataLoader')
    parser.add_argument('--images', type=int, default=32, help='images decoded for each row')
    parser.add_argument('--img-size', type=int, default=224, help="side of the network's input")
    parser.add_argument('--augmentation', choices=AUGMENTATIONS, default='modern', help='of training')
    parser.add_argument('--crops', choices=CROPS, default='multiscale', help='of evaluation')
    parser.add_argument('--model', default='arl_cnn14', help='timm model whose training to compare with')
    parser.add_argument('--device', default='cpu', choices=['cpu', 'cuda', 'mps'], help='of that training')
    parser.add_argument('--precision', default='fp32', choices=['fp32', 'bf16'], help='of that training')
    parser.add_argument('--batch-size', type=int, default=32, help='of that training')
    parser.add_argument('--steps', type=int, default=5, help='measured steps of that training')
    parser.add_argument('--seed', type=int, default=0, help='of the synthetic image')
    parser.add_argument('--results-file', default='input.csv', help='CSV to write')
    args = parser.parse_args()
    if '' in (args.image, args.results_file):
        parser.error('--image and --results-file need a value: leave them out for the defaults.')
    if args.seed < 0:
        parser.error('--seed must be at least 0.')
    if min(*args.workers, args.images, args.img_size, args.batch_size, args.steps) < 1:
        parser.error('--workers, --images, --img-size, --batch-size and --steps must be at least 1.')
    if not timm.is_model(args.model):
        parser.error(f'timm has no model named {args.model!r}; timm.list_models() lists those it has.')
    available = dict(cpu=True, cuda=torch.cuda.is_available(), mps=torch.backends.mps.is_available())
    if not available[args.device]:
        parser.error(f'PyTorch finds no {args.device} device here; --device cpu always runs.')
    try:
        jpeg = Path(args.image).read_bytes() if args.image else synthetic_photograph(args.seed)
        with Image.open(io.BytesIO(jpeg)) as picture:
            size, kind = picture.size, picture.format
    except (OSError, Image.DecompressionBombError) as error:
        parser.error(f'--image {args.image} is not a picture that can be read: {error}')

    try:
        check_writable(args.results_file)
    except OSError as error:
        parser.error(f'--results-file: {error}')

    torch.manual_seed(args.seed)
    what = f'{"" if args.image else "synthetic "}{kind} {size[0]} x {size[1]}, {len(jpeg) / 1e6:.1f} MB'
    consumed = training_speed(args)
    rows = []
    split = photographs(jpeg, args.images + max(args.workers))
    paths = {f'training, {args.augmentation}': (train_transform, args.augmentation),
             f'evaluation, {args.crops}': (eval_transform, args.crops)}
    settings = [(path, workers, reduced) for path in paths for workers in args.workers for reduced in (False, True)]
    for path, workers, reduced in tqdm(settings, unit='row'):
        make, kind_of_path = paths[path]
        transform = make(args.img_size, *MEAN_STD, kind_of_path)
        if not reduced:
            transform.shorter_side = None
        dataset = IsicSplit(split.select(range(args.images + workers)), transform)
        produced = images_per_second(dataset, workers)
        rows.append({
            'image': what, 'path': path, 'decoding': 'reduced' if reduced else 'full',
            'decoded': '{} x {}'.format(*dataset.picture(0).size), 'workers': workers,
            'images_per_sec': round(produced, 1), 'images_per_sec_and_worker': round(produced / workers, 1),
            'train_model': args.model, 'train_samples_per_sec': round(consumed, 2),
            'times_what_training_takes': round(produced / consumed, 1), 'img_size': args.img_size,
            'train_batch_size': args.batch_size, 'threads': torch.get_num_threads(),
            'versions': f'timm_arl {timm_arl.__version__}, timm {timm.__version__}, torch {torch.__version__}, '
                        f'pillow {Image.__version__}', 'commit': git_commit(__file__),
            'train_device': args.device, 'train_precision': args.precision})
    write_rows(args.results_file, rows)
    print(f'{what}; {args.model} trains on {consumed:.1f} images/s ({args.device}, {args.precision})')
    for row in rows:
        print('{path}, {workers} worker(s), decoded at {decoded}: {images_per_sec} images/s, '
              '{times_what_training_takes} times what training takes'.format(**row))
    print(f'written: {args.results_file}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
