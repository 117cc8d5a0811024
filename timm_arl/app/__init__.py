"""A page to try a network on a picture, in the browser: ``python -m timm_arl.app``. Needs the extra `app`."""
from ..extras import require

require('app', __name__)
