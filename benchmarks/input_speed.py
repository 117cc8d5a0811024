"""How fast photographs become patches, beside how fast training takes them.

    python benchmarks/input_speed.py --results-file benchmarks/results/input.csv

Each image is a JPEG of 12 megapixels, cut into the paper's nine patches of 224 px, normalised and batched by a
DataLoader, once decoded in full and once at the reduced size that the smallest patch needs. Without --image it is a
synthetic lesion.
"""
import argparse
import io
import statistics
import sys
import time
from pathlib import Path

from timm_arl.extras import require

require('train', __name__)

import numpy as np
import timm
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import timm_arl
from timm_arl.files import git_commit, write_rows
from timm_arl.isic.crops import patch_boxes, patches, shorter_side_for
from timm_arl.isic.dataset.demo import draw_lesion
from timm_arl.isic.images import open_reduced

PATCHES = 9


class Photographs(Dataset):
    """The same photograph, again and again, each time in other patches: (9, 3, H, W)."""

    def __init__(self, jpeg: bytes, length: int, img_size: int, reduced: bool):
        self.jpeg, self.length, self.img_size, self.reduced = jpeg, length, img_size, reduced
        self.normalise = v2.Compose([
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(timm.data.IMAGENET_DEFAULT_MEAN, timm.data.IMAGENET_DEFAULT_STD)])

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, i: int) -> torch.Tensor:
        shorter_side = shorter_side_for(self.img_size) if self.reduced else 10 ** 6
        picture = open_reduced(io.BytesIO(self.jpeg), shorter_side)
        boxes = patch_boxes(picture.size, PATCHES, np.random.default_rng(i))
        return torch.stack([self.normalise(p) for p in patches(picture, boxes, self.img_size)])


def synthetic_photograph(seed: int) -> bytes:
    """A drawn lesion of 4000 x 3000 pixels with the noise of a camera, about as many bytes as a real one."""
    rng = np.random.default_rng(seed)
    pixels = np.asarray(draw_lesion('melanoma', rng, 1000).resize((4000, 3000), Image.Resampling.BICUBIC), np.float32)
    pixels = np.clip(pixels + rng.normal(0, 5, pixels.shape), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, 'JPEG', quality=90)
    return file.getvalue()


def patches_per_second(dataset: Dataset, workers: int) -> float:
    loader = DataLoader(dataset, batch_size=1, num_workers=workers)
    iterator = iter(loader)
    for _ in range(workers):  # processes are up
        next(iterator)
    start = time.perf_counter()
    count = sum(batch.shape[0] * PATCHES for batch in iterator)
    return count / (time.perf_counter() - start)


def training_speed(model_name: str, batch_size: int, img_size: int, steps: int) -> float:
    """Images a second of forward, loss, backward and SGD in float32, channels_last, on all cores: the median step."""
    model = timm.create_model(model_name, num_classes=2).train().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    x = torch.randn(batch_size, 3, img_size, img_size).to(memory_format=torch.channels_last)
    y = torch.randint(2, (batch_size, 2)).float()
    times = []
    for _ in range(steps + 1):
        start = time.perf_counter()
        optimizer.zero_grad()
        torch.nn.functional.binary_cross_entropy_with_logits(model(x), y).backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return batch_size / statistics.median(times[1:])


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__.split('\n\n')[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--image', metavar='FILE', help='a JPEG; by default a synthetic one of 12 megapixels')
    parser.add_argument('--workers', nargs='+', type=int, default=[1, 2], help='processes of the DataLoader')
    parser.add_argument('--images', type=int, default=32, help='images decoded for each row')
    parser.add_argument('--img-size', type=int, default=224, help='side of a patch')
    parser.add_argument('--model', default='arl_cnn14', help='timm model whose training to compare with')
    parser.add_argument('--batch-size', type=int, default=32, help='of that training')
    parser.add_argument('--steps', type=int, default=5, help='measured steps of that training')
    parser.add_argument('--seed', type=int, default=0, help='of the synthetic image')
    parser.add_argument('--results-file', default='input.csv', help='CSV to write')
    args = parser.parse_args()
    if min(*args.workers, args.images, args.img_size, args.batch_size, args.steps) < 1:
        parser.error('--workers, --images, --img-size, --batch-size and --steps must be at least 1.')
    if not timm.is_model(args.model):
        parser.error(f'timm has no model named {args.model!r}; timm.list_models() lists those it has.')
    try:
        jpeg = Path(args.image).read_bytes() if args.image else synthetic_photograph(args.seed)
        with Image.open(io.BytesIO(jpeg)) as picture:
            size, kind = picture.size, picture.format
    except OSError as error:
        parser.error(f'--image {args.image} is not a picture that can be read: {error}')

    torch.manual_seed(args.seed)
    what = f'{"" if args.image else "synthetic "}{kind} {size[0]} x {size[1]}, {len(jpeg) / 1e6:.1f} MB'
    consumed = training_speed(args.model, args.batch_size, args.img_size, args.steps)
    rows = []
    for workers in tqdm(args.workers, unit='row'):
        for reduced in (False, True):
            dataset = Photographs(jpeg, args.images + workers, args.img_size, reduced)
            produced = patches_per_second(dataset, workers)
            rows.append({
                'image': what, 'decoding': 'reduced' if reduced else 'full', 'workers': workers,
                'patches_per_sec': round(produced, 1), 'patches_per_sec_and_worker': round(produced / workers, 1),
                'train_model': args.model, 'train_samples_per_sec': round(consumed, 2),
                'times_what_training_takes': round(produced / consumed, 1), 'img_size': args.img_size,
                'train_batch_size': args.batch_size, 'threads': torch.get_num_threads(),
                'versions': f'timm_arl {timm_arl.__version__}, timm {timm.__version__}, torch {torch.__version__}, '
                            f'pillow {Image.__version__}', 'commit': git_commit(__file__)})
    Path(args.results_file).parent.mkdir(parents=True, exist_ok=True)
    write_rows(args.results_file, rows)
    print(f'{what}; {args.model} trains on {consumed:.1f} images/s')
    for row in rows:
        print('{decoding:8} {workers} worker(s): {patches_per_sec} patches/s, {times_what_training_takes} times what '
              'training takes'.format(**row))
    print(f'written: {args.results_file}')
    return 0


if __name__ == '__main__':
    sys.exit(main())
