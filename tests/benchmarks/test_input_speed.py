"""The path of images, timed."""
import torch
from PIL import Image

from timm_arl.files import read_rows


def test_input_speed(call, tmp_path):
    Image.new('RGB', (2500, 1900), (200, 150, 120)).save(tmp_path / 'i.jpg')
    done = call('input_speed', '--image', tmp_path / 'i.jpg', '--workers', '1', '--images', '2', '--batch-size', '2',
                '--model', 'test_resnet', '--steps', '1', '--img-size', '64', '--precision', 'bf16', '--results-file',
                tmp_path / 'r.csv')
    assert done.returncode == 0, done.stderr
    table = read_rows(tmp_path / 'r.csv')
    assert [(r['path'], r['decoded']) for r in table] == [
        ('training, modern', '2500 x 1900'), ('training, modern', '313 x 238'),
        ('evaluation, multiscale', '2500 x 1900'), ('evaluation, multiscale', '313 x 238')]
    assert all(float(r['images_per_sec']) > 0 and float(r['train_samples_per_sec']) > 0 for r in table)
    assert (table[0]['train_device'], table[0]['train_precision']) == ('cpu', 'bf16')
    (tmp_path / 'no.jpg').write_bytes(b'no picture')
    done = call('input_speed', '--image', tmp_path / 'no.jpg', cwd=tmp_path)
    assert done.returncode == 2 and 'is not a picture' in done.stderr
    device = 'mps' if torch.cuda.is_available() else 'cuda'
    done = call('input_speed', '--device', device, cwd=tmp_path)
    assert done.returncode == 2 and f'PyTorch finds no {device} device here' in done.stderr
