"""A registered name -> a verified weights file on this disk."""
import os
from pathlib import Path
from typing import Any, Dict, List, Optional

import safetensors
import timm
from timm.models import resolve_pretrained_cfg

from .download import LOCAL_FILE, WeightsError, fetch_weights, is_whole, say

__all__ = [
    'HUB', 'OWN_WEIGHTS', 'check_file', 'local_weights', 'only_file', 'pinned_sha256', 'safe_name', 'shipped_weights',
    'tags_of',
]

HUB = os.environ.get('TIMM_ARL_HUB') or 'timm-arl'  # whose repos on the Hub this project's own are
# sha256 of model.safetensors in them: other content is refused, whoever has the name there
OWN_WEIGHTS = {
    'arl_cnn14.isic2017': '3dbce88df54dd412c145ce1a0a288c4b7cc6b08d0451430e924cef027d5bb9a1',
}
ANEW = 'write the weights anew with safetensors.torch.save_file'


def safe_name(file: Optional[str]) -> str:
    return 'model.safetensors' if file in (None, '', 'pytorch_model.bin') else str(file)  # as timm has it


def tags_of(variant: str) -> List[str]:
    return [name.partition('.')[2] for name in timm.list_pretrained(f'{variant}.*')]


def local_weights(variant: str, kwargs: Dict[str, Any]) -> Dict[str, Any]:
    """Keyword arguments of a timm entry point, with weights of the Hub replaced by their verified file on this disk.

    Args:
        variant: Model name.
        kwargs: What the entry point was called with, pretrained=True apart.

    Raises:
        WeightsError: No such weights, a file that cannot be read, or as fetch_weights.
    """
    overlay = dict(kwargs.get('pretrained_cfg_overlay') or {})
    cfg = resolve_pretrained_cfg(variant, kwargs.get('pretrained_cfg'), overlay)
    tags = tags_of(variant)
    if not cfg.has_weights and not cfg.state_dict:
        raise WeightsError(f'No pretrained weights exist for {variant}' + (
            f' without a tag: choose {" or ".join(f"{variant}.{tag}" for tag in tags)}.' if tags else
            f': leave pretrained out, or {LOCAL_FILE}.'))
    by_config = cfg.source in ('hf-hub', 'local-dir')  # a config.json, whose own file and state_dict count for nothing
    if overlay.get('state_dict') if by_config else cfg.state_dict:
        return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'source': ''}}
    file = overlay.get('file') if by_config else cfg.file
    if file or cfg.source == 'local-dir':
        path = check_file(Path(file or Path(cfg.file, 'model.safetensors')))
        return {**kwargs, 'pretrained_cfg_overlay': {**overlay, **only_file(path)}}
    if not cfg.hf_hub_id:
        raise WeightsError(f'The weights of {variant} are a pickle at {cfg.url}, and only safetensors are opened: '
                           f'{ANEW}, and {LOCAL_FILE}.')
    repo, _, revision = cfg.hf_hub_id.partition('@')
    name = f'{variant}.{cfg.tag}'
    own = cfg.source != 'hf-hub' and repo == f'{HUB}/{name}'  # the registered weights, not a repo that was asked for
    sha256 = OWN_WEIGHTS.get(name) if own else pinned_sha256(repo)
    shipped = shipped_weights(name) if own else None
    if shipped is not None and is_whole(shipped / 'model.safetensors', sha256):
        path = shipped / 'model.safetensors'
    else:
        if shipped is not None:
            say(f'{shipped / "model.safetensors"} is damaged: asking the Hub for it.')
        path = fetch_weights(repo, safe_name(cfg.hf_hub_filename), revision or None, sha256, kwargs.get('cache_dir'))
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, **only_file(path)}}


def only_file(path: Path) -> Dict[str, Any]:
    """What has timm load this file, whatever else a config names."""
    return {'file': str(path), 'source': '', 'state_dict': None}


def pinned_sha256(repo: str) -> Optional[str]:
    return OWN_WEIGHTS.get(repo.removeprefix('timm-arl/'))


def check_file(path: Path) -> Path:
    path = path / 'model.safetensors' if path.is_dir() else path
    if not path.is_file():
        raise WeightsError(f'No weights at {path}: pass a .safetensors file, or a folder that holds model.safetensors.')
    if path.suffix != '.safetensors':  # which timm would open as a pickle
        raise WeightsError(f'{path} is no .safetensors file, and only those are opened: {ANEW}.')
    try:
        with safetensors.safe_open(path, 'pt'):
            pass
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f'{path} is not a readable safetensors file ({error}): fetch or write it anew.') from error
    return path


def shipped_weights(name: str) -> Optional[Path]:
    """Folder of weights that came with this package, a model repo with its results, or None.

    Args:
        name: Model and tag.
    """
    folder = Path(__file__).with_name('weights') / name
    return folder if name in OWN_WEIGHTS and (folder / 'model.safetensors').is_file() else None
