"""Images read one by one: what is wrong with an image is its own, what is wrong with the machine is not."""
import os
import resource

import numpy as np
import pytest

from timm_arl.isic.images import decode
from timm_arl.isic.synthetic import draw_lesion
from timm_arl.pictures import Pictures
from timm_arl.predictor import Cutter


@pytest.fixture
def pictures(tmp_path):
    draw_lesion('nevus', np.random.default_rng(0), 96).save(tmp_path / 'a.jpg')
    (tmp_path / 'bad.jpg').write_bytes(b'\xff\xd8\xff')
    return Pictures(Cutter(64, 'center', False, 0), str(tmp_path), False)


def test_an_image_is_not_damaged_because_the_machine_has_no_room(pictures):
    assert len(pictures['a.jpg', 'a'].crops) == 1
    bad = pictures['bad.jpg', 'bad']
    assert bad.reason and not bad.stop
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, limits[1]))  # no file can be opened now
    try:
        found = pictures['a.jpg', 'a']
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert found.stop and found.reason == 'Too many open files'


def test_no_other_program_is_started_for_an_image():
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    with pytest.raises(OSError, match='it is EPS, which is not opened'):
        decode({'bytes': b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n%%EndComments\n', 'path': None})
