"""Publishing: a model repo from a training output, with a card, pushed to a Hub or a folder and verified."""
from ..extras import require

require('train', __name__)

from .publish import check_target, push, verify
from .results import HubError, check_tag
from .staging import card, stage

__all__ = ['HubError', 'card', 'check_tag', 'check_target', 'push', 'stage', 'verify']
