"""Publishing: a model repo from a training output, with a card, pushed to a Hub or a folder and verified."""
from .publish import push, verify
from .staging import HubError, card, stage

__all__ = ['HubError', 'card', 'push', 'stage', 'verify']
