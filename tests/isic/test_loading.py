"""What the network is shown of an image, and in which order."""
import io
import time

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from small_data import FEATURES, WITH_ASPECT, jpeg, rows, write
from torch.utils.data import DataLoader

from timm_arl.isic import loading
from timm_arl.isic.dataset import DataError, decode, label_array, load_splits, unreadable_images
from timm_arl.isic.loading import EpochBatches, IsicSplit, IsicStream
from timm_arl.isic.transforms import eval_transform, restore_aspect, train_transform

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_augmentation_depends_on_seed_epoch_and_image_alone(tmp_path):
    colours = np.random.default_rng(0).integers(0, 255, (8, 3)).tolist()
    cells = {row: {'bytes': jpeg(tuple(c)), 'path': None} for row, c in enumerate(colours)}
    split = load_splits(write(tmp_path / 'd', train=rows(8, image=cells)))['train']
    dataset = IsicSplit(split, train_transform(16, MEAN, STD), seed=3)

    def batch(workers, epoch):
        dataset.set_epoch(epoch)
        torch.manual_seed(workers)
        return next(iter(DataLoader(dataset, batch_size=8, num_workers=workers)))[0]

    assert torch.equal(batch(0, 0), batch(2, 0))
    assert not torch.equal(batch(0, 0), batch(0, 1))
    state = torch.get_rng_state()
    dataset[0]
    assert torch.equal(torch.get_rng_state(), state)  # the caller's own randomness is left alone


def test_augmentation_does_not_depend_on_the_order_of_rows(tmp_path):
    content = rows(8, image={i: {'bytes': jpeg((20 * i, 90, 200 - 20 * i)), 'path': None} for i in range(8)})
    tensors = []
    for order in (content, content[::-1]):
        split = load_splits(write(tmp_path / str(len(tensors)), train=order))['train']
        dataset = IsicSplit(split, train_transform(16, MEAN, STD), seed=3)
        tensors.append({dataset.image_ids[i]: dataset[i][0] for i in range(8)})
        assert not torch.equal(dataset[0][0], dataset[8][0])  # shown a second time, it is changed in another way
        assert torch.equal(dataset[0][1], dataset[8][1]) and dataset[8][2] == 0
    assert all(torch.equal(tensors[0][i], tensors[1][i]) for i in tensors[0])


@pytest.mark.parametrize('images, batch_size, processes', [(20, 4, 1), (21, 4, 1), (20, 3, 2), (25, 4, 3), (3, 4, 2)])
def test_every_image_once_an_epoch(images, batch_size, processes):
    labels = torch.zeros(images, 2)
    ranks = [EpochBatches(labels, batch_size, 5, processes=processes, rank=rank) for rank in range(processes)]
    for sampler in ranks:
        sampler.set_epoch(2)
    batches = [list(sampler) for sampler in ranks]
    assert all(len(each) == len(sampler) == len(batches[0]) for each, sampler in zip(batches, ranks))
    assert all(batch for each in batches for batch in each)  # none waits for a batch that never comes
    assert sorted(row for each in batches for batch in each for row in batch) == list(range(images))
    # a step of all processes is a step of one
    alone = EpochBatches(labels, batch_size * processes, 5)
    alone.set_epoch(2)
    for step, whole in enumerate(list(alone)[:len(batches[0]) - 1]):
        assert sorted(whole) == sorted(row for each in batches for row in each[step])
    alone.set_epoch(3)
    assert images < 5 or alone.order() != ranks[0].order()


def test_patches_and_balance(tmp_path):
    labels = torch.tensor([[0., 0]] * 80 + [[1., 0]] * 15 + [[0., 1]] * 5)
    shown = EpochBatches(labels, 10, patches_per_image=3).order()
    assert sorted(shown) == list(range(300))  # row, row + 100, row + 200
    balanced = EpochBatches(labels, 10, patches_per_image=30, balanced=True).order()
    assert len(balanced) == len(set(balanced)) == 3000
    rows_shown = np.array(balanced) % 100
    shares = [np.mean(rows_shown < 80), np.mean((rows_shown >= 80) & (rows_shown < 95)), np.mean(rows_shown >= 95)]
    assert shares == pytest.approx([1 / 3] * 3, abs=0.03)


def test_masks_colour_and_squash(isic_sample):
    split = load_splits(isic_sample)['train'].select(range(12))
    plain = IsicSplit(split, None)
    cropped = IsicSplit(split, None, crop_to_lesion=True)
    grey = IsicSplit(split, None, colour_constancy=True)
    squashed = IsicSplit(split, None, keep_aspect=False)
    assert label_array(split).shape == (12, 2)
    for row in range(12):
        assert squashed.picture(row).size == (256, 256)
        assert cropped.picture(row).width <= plain.picture(row).width
        before, after = (np.ptp(np.asarray(each.picture(row), float).mean((0, 1))) for each in (plain, grey))
        assert after < 0.4 * before  # the rest was clipped
    assert any(cropped.picture(row).size != plain.picture(row).size for row in range(12))


def test_a_crop_to_the_lesion_is_not_taken_for_a_squashed_copy(tmp_path):
    features = datasets.Features({**WITH_ASPECT, 'mask': datasets.Image()})
    mask = Image.new('L', (400, 300))
    mask.paste(255, (150, 100, 250, 200))
    buffer = io.BytesIO()
    mask.save(buffer, 'PNG')
    cells = {0: {'bytes': jpeg(size=(400, 300)), 'path': None}}
    content = rows(8, image=cells, aspect_ratio={0: 400 / 300}, mask={0: {'bytes': buffer.getvalue(), 'path': None}})
    split = load_splits(write(tmp_path / 'd', features=features, train=content))['train']
    assert IsicSplit(split, None, crop_to_lesion=True).picture(0).size == (150, 150)
    content[0]['mask']['bytes'] = buffer.getvalue()[:60]  # a mask that does not decode is found, where it is needed
    split = load_splits(write(tmp_path / 'e', features=features, train=content))['train']
    assert list(unreadable_images(split, masks=True)) == [0] and unreadable_images(split) == {}
    turned = io.BytesIO()
    mask.transpose(Image.Transpose.ROTATE_90).save(turned, 'PNG')  # of a photograph that EXIF turned, and not its mask
    content[0]['mask']['bytes'] = turned.getvalue()
    split = load_splits(write(tmp_path / 'f', features=features, train=content))['train']
    assert list(unreadable_images(split, masks=True)) == [0] and unreadable_images(split) == {}
    with pytest.raises(OSError, match='its mask has 300 x 400 px, the image 400 x 300'):
        IsicSplit(split, None, crop_to_lesion=True).picture(0)


@pytest.mark.parametrize('augmentation', ['modern', 'plain'])
def test_a_mask_is_changed_as_its_image_is(tmp_path, augmentation):
    """The image is white where the mask is, and stays so."""
    features = datasets.Features({**WITH_ASPECT, 'mask': datasets.Image()})
    mask = Image.new('L', (90, 90))
    mask.paste(255, (30, 20, 60, 80))
    cells = []
    for picture in (mask.resize((300, 300)).convert('RGB'), mask):
        buffer = io.BytesIO()
        picture.save(buffer, 'PNG')
        cells.append({'bytes': buffer.getvalue(), 'path': None})
    content = rows(8, image={0: cells[0]}, aspect_ratio={0: 1.4}, mask={0: cells[1]})
    split = load_splits(write(tmp_path / 'd', features=features, train=content))['train']
    dataset = IsicSplit(split, train_transform(64, (0.,) * 3, (1.,) * 3, augmentation), with_masks=True)
    alone = IsicSplit(split, train_transform(64, (0.,) * 3, (1.,) * 3, augmentation))
    shown = set()
    for epoch in range(5):
        dataset.set_epoch(epoch)
        alone.set_epoch(epoch)
        image, _, _, found = dataset[0]
        assert torch.equal(image, alone[0][0])  # what the network sees does not depend on the mask
        white = image.mean(0, keepdim=True) > 0.5 * image.mean(0).max()
        assert ((found > 0.5) & white).sum() / ((found > 0.5) | white).sum() > 0.9
        shown.add(round(found.sum().item()))
    assert len(shown) > 2 and dataset[1][3].isnan().all()  # the second image has no mask


def test_copies_of_256_px_are_decoded_in_full_for_the_published_crops(isic_sample):
    """So that the figures of arl_cnn14.isic2017, 128 px and multiscale crops, stay what they are, bit for bit."""
    split = load_splits(isic_sample)['test'].select(range(8))
    transform = eval_transform(128, MEAN, STD, 'multiscale')
    dataset = IsicSplit(split, transform, every_epoch=False)
    for row, cells in enumerate(split):
        whole = restore_aspect(decode(cells['image']), cells['aspect_ratio'])
        assert torch.equal(dataset[row][0], transform(whole))


def test_crops_of_a_test_image_stay_the_same_all_epochs(isic_sample):
    split = load_splits(isic_sample)['test'].select(range(2))
    dataset = IsicSplit(split, eval_transform(16, MEAN, STD, 'paper'), every_epoch=False)
    first = dataset[1][0]
    dataset.set_epoch(3)  # as Accelerate does at every pass
    assert torch.equal(dataset[1][0], first)


def in_shards(folder, counts, **changes):
    """A dataset whose train images come in shards of so many; changes are of the first."""
    data = write(folder, train=None)
    for k, count in enumerate(counts):
        cells = {}
        for i, pixels in enumerate(np.random.default_rng(k).integers(0, 255, (count, 24, 24, 3), np.uint8)):
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, 'PNG')
            cells[i] = {'bytes': buffer.getvalue(), 'path': None}
        content = rows(count, first=1000 + sum(counts[:k]), **{'image': cells, **({} if k else changes)})
        datasets.Dataset.from_list(content, features=FEATURES).to_parquet(
            folder / 'data' / f'train-{k:05d}-of-{len(counts):05d}.parquet')
    return data


def stream(data, batch_size=4, patches=1, balanced=False, processes=1, rank=0, seed=3, epoch=0, workers=0, **kwargs):
    """The batches of an epoch."""
    split = load_splits(data, streaming=True)['train']
    batches = EpochBatches(
        torch.from_numpy(label_array(split.table)), batch_size, seed, patches, balanced, processes, rank)
    images = IsicStream(split, batches, train_transform(16, MEAN, STD), seed, **kwargs)
    images.set_epoch(epoch)
    loader = DataLoader(images, batch_size=None, num_workers=images.workers(workers))
    shown = list(loader)
    assert len(shown) == len(loader) == len(batches)
    assert [len(ids) for _, _, ids in shown] == [len(b) for b in batches]
    return shown


def ids_of(batches):
    return [image_id for _, _, ids in batches for image_id in ids]


def test_no_epoch_waits_where_its_stream_ends(tmp_path, monkeypatch):
    """The datasets library waits five seconds there (apache/arrow 45214), which a program that ends at once needs."""
    waits = []
    monkeypatch.setattr(time, 'sleep', lambda seconds: seconds and waits.append(seconds))
    monkeypatch.setattr(loading, 'SHUFFLE_BUFFER', 2)
    before = getattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', None)
    data = in_shards(tmp_path / 'd', [6, 6])
    stream(data, patches=2)
    split = load_splits(data, streaming=True)['train']
    few = EpochBatches(torch.from_numpy(label_array(split.table))[:4], 4, 3)  # an epoch that ends in the first shard
    assert len(list(IsicStream(split, few, train_transform(16, MEAN, STD), 3))) == 1
    assert waits == []
    assert getattr(datasets.config, 'SLEEP_TIME_ON_THREADS_SHUTDOWN', None) == before  # others still wait


@pytest.mark.parametrize('workers', [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_stream_shows_each_image_once_as_a_split_does(tmp_path, workers):
    data = in_shards(tmp_path / 'd', [7, 8, 6])
    split = load_splits(data)['train']
    reference = IsicSplit(split, train_transform(16, MEAN, STD), seed=3)
    reference.set_epoch(1)
    shown = stream(data, epoch=1, workers=workers)
    assert sorted(ids_of(shown)) == sorted(reference.image_ids)
    for images, labels, ids in shown:
        for image, label, image_id in zip(images, labels, ids):
            row = reference.image_ids.index(image_id)
            assert torch.equal(image, reference[row][0]) and torch.equal(label, reference.labels[row])
    assert ids_of(stream(data, epoch=1, workers=workers)) == ids_of(shown)  # as a resumed run sees it
    assert ids_of(stream(data, epoch=2, workers=workers)) != ids_of(shown)


@pytest.mark.slow
def test_processes_stream_shards_of_their_own(tmp_path):
    data = in_shards(tmp_path / 'd', [6, 6, 6, 6])
    ranks = [stream(data, processes=2, rank=rank, workers=rank) for rank in (0, 1)]
    first, second = (ids_of(rank) for rank in ranks)
    assert len(set(first)) == len(first) == len(second) == 12 and not set(first) & set(second)
    of_shards = {(int(image_id[5:]) - 1000) // 6 for image_id in first}
    assert len(of_shards) == 2
    # shards that are not as many as the processes are shared image by image
    data = in_shards(tmp_path / 'e', [9])
    first, second = (ids_of(stream(data, processes=2, rank=rank)) for rank in (0, 1))
    assert len(first + second) == 9 and set(first + second) == set(load_splits(data)['train']['image_id'])


@pytest.mark.slow
def test_a_stream_balances_and_repeats(tmp_path):
    data = in_shards(tmp_path / 'd', [40, 40])  # half of them nevi, a quarter of each other diagnosis
    assert len(ids_of(stream(data, patches=3))) == 240
    labels = torch.cat([labels for epoch in range(4) for _, labels, _ in stream(data, balanced=True, epoch=epoch)])
    assert len(labels) == 4 * 80
    assert labels.mean(0).tolist() == pytest.approx([1 / 3] * 2, abs=0.06)
    # copies of an image that go to several readers are changed in ways of their own
    data = in_shards(tmp_path / 'e', [8])
    ranks = [stream(data, patches=4, processes=2, rank=rank) for rank in (0, 1)]
    images = torch.cat([images for shown in ranks for images, _, _ in shown])
    assert len(images) == len({image.numpy().tobytes() for image in images}) == 32


@pytest.mark.slow
def test_readers_of_unequal_shards_start_again_with_other_changes(tmp_path):
    data = in_shards(tmp_path / 'd', [3, 21])
    shown = stream(data, processes=2, rank=0, epoch=1) + stream(data, processes=2, rank=1, epoch=1)
    ids, images = ids_of(shown), torch.cat([images for images, _, _ in shown])
    assert len(ids) == 24 and {'ISIC_0001000', 'ISIC_0001001', 'ISIC_0001002'} <= set(ids) and len(set(ids)) < 24
    assert len({image.numpy().tobytes() for image in images}) == 24
    # balanced, an epoch may by lot show none of a small shard's images at once: the next draw counts
    data = in_shards(tmp_path / 'e', [4, 40])
    for epoch in range(8):
        assert len(ids_of(stream(data, processes=2, rank=0, balanced=True, epoch=epoch))) == 22


@pytest.mark.slow
def test_shards_sorted_by_diagnosis_are_not_balanced_by_several_readers(tmp_path):
    nevi = {label: dict.fromkeys(range(8), 0.) for label in ('melanoma', 'seborrheic_keratosis')}
    data = in_shards(tmp_path / 'd', [8, 8], **nevi)
    with pytest.raises(DataError, match='do not all have every diagnosis, so that 2 readers .* --workers 1'):
        stream(data, balanced=True, workers=2)
    assert len(ids_of(stream(data, balanced=True, workers=1))) == len(ids_of(stream(data, workers=2))) == 16


@pytest.mark.slow
def test_a_bad_image_in_a_stream_is_named_and_may_be_left_out(tmp_path, capfd):
    data = in_shards(tmp_path / 'd', [6, 6], image={2: {'bytes': b'none', 'path': None}})
    with pytest.raises(DataError, match='train image ISIC_0001002 cannot be read .it is not an image.*: fix it, or'):
        stream(data, workers=1)
    shown = stream(data, workers=1, skip_bad_images=True)
    assert len(ids_of(shown)) == 12 and 'ISIC_0001002' not in ids_of(shown)
    assert capfd.readouterr().out.count('Leaving out the train image ISIC_0001002') == 1
    data = in_shards(tmp_path / 'e', [2, 6], image={i: {'bytes': b'none', 'path': None} for i in range(2)})
    with pytest.raises(DataError, match='read none of the images .* .ISIC_000100[01], ISIC_000100[01]: it is not'):
        stream(data, workers=2, skip_bad_images=True)


@pytest.mark.parametrize('make, message', [
    (lambda f: 'demo', '--streaming reads Parquet shards, and demo has none'),
    (lambda f: str(f), 'No folder|is not a dataset'),
    (lambda f: in_shards(f / 'd', [4, 4], melanoma={1: 3.}), 'melanoma must be 0 or 1, but is 3.0 for image'),
    (lambda f: in_shards(f / 'd', [4], image_id={1: 'a/b'}), "'a/b' is no usable image_id"),
    (lambda f: write(f / 'd', drop=['image']), 'train, has no column image .it has image_id, melanoma, seborrheic'),
    (lambda f: write(f / 'd', train=None), 'has no split train'),
])
def test_what_cannot_be_streamed(tmp_path, make, message):
    with pytest.raises(DataError, match=message) as raised:
        load_splits(make(tmp_path), streaming=True)
    assert '\n' not in str(raised.value)


def test_images_in_other_files_are_not_streamed(tmp_path):
    for name, first in (('train', 0), ('validation', 100), ('test', 200)):
        (tmp_path / name).mkdir()
        lines = ['file_name,image_id,melanoma,seborrheic_keratosis']
        for i in range(4):
            (tmp_path / name / f'{first + i}.jpg').write_bytes(jpeg())
            lines.append(f'{first + i}.jpg,I{first + i},{int(i == 1)},{int(i == 2)}')
        (tmp_path / name / 'metadata.csv').write_text('\n'.join(lines) + '\n')
    with pytest.raises(DataError, match='--streaming reads Parquet shards, and .* has none') as raised:
        load_splits(str(tmp_path), streaming=True)
    assert len(str(raised.value)) < 300
