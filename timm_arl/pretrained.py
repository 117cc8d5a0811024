"""Finding, checking and loading weights."""
import difflib
import hashlib
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Union, cast

import huggingface_hub
import safetensors
import safetensors.torch
import timm
import torch.nn as nn
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from timm.models import clean_state_dict, get_deprecated_models, resolve_pretrained_cfg

from .hub_errors import LOCAL_FILE, diagnose_hub_error, is_of_network, plain_http

__all__ = [
    'HUB', 'WeightsError', 'create_for_task', 'create_trained', 'fetch_weights', 'load_weights_file', 'local_weights',
    'shipped_weights',
]

HUB = os.environ.get('TIMM_ARL_HUB', 'timm-arl')  # whose repos on the Hub this project's own are
# sha256 of model.safetensors in them: other content is refused, whoever has the name there
OWN_WEIGHTS = {
    'arl_cnn14.isic2017': '3dbce88df54dd412c145ce1a0a288c4b7cc6b08d0451430e924cef027d5bb9a1',
}
ATTEMPTS = 4
PATIENCE = 30  # seconds after which nothing is tried again
OTHERWISE = f'set HF_ENDPOINT to a mirror, or {LOCAL_FILE}'


class WeightsError(RuntimeError):
    """Weights that cannot be had or do not fit; the message names them, the cause and the remedy.

    Attributes:
        repo, file, revision: Where they were looked for on the Hub, or None.
        cause: What went wrong.
        remedy: What to do.
    """

    def __init__(
            self,
            message: str = '',
            *,
            repo: Optional[str] = None,
            file: Optional[str] = None,
            revision: Optional[str] = None,
            cause: str = '',
            remedy: str = '',
    ) -> None:
        super().__init__(message or f'{file} of {repo} (revision {revision}) cannot be had from '
                                    f'{huggingface_hub.constants.ENDPOINT}: {cause}; {remedy}.')
        self.repo, self.file, self.revision = repo, file, revision
        self.cause, self.remedy = cause or message, remedy


def create_for_task(name: str, pretrained: bool = False, **kwargs) -> nn.Module:
    """`timm.create_model` whose failures are one sentence, and which has weights of any model fetched and verified.

    Args:
        name: Any timm model name, with or without a tag, or one of timm's ``hf-hub:`` and ``local-dir:`` names.
        pretrained: Load the weights of that name, a safetensors file.
        **kwargs: Passed to `timm.create_model`, num_classes among them.

    Raises:
        WeightsError: An unknown model or tag, a model without weights, or weights that cannot be had.
    """
    if name.startswith(('hf-hub:', 'hf_hub:')):
        repo, _, revision = name.partition(':')[2].partition('@')
        for file in ('config.json', 'model.safetensors')[:1 + pretrained]:
            # timm reads them from the cache, whole or not, and would ask for a pickle where there is no other file
            fetch_weights(repo, file, revision or None, cache_dir=kwargs.get('cache_dir'))
    if pretrained and name.startswith('local-dir:') and not Path(name[10:], 'model.safetensors').is_file():
        raise WeightsError(f'No weights at {Path(name[10:], "model.safetensors")}: only that format is opened.')
    name = get_deprecated_models().get(name, name)  # tv_resnet50 has no weights of its own, but is resnet50.tv_in1k
    variant, _, tag = name.partition('.')
    if ':' not in name and not timm.is_model(name):
        raise WeightsError(f'Unknown model {name}: ' + (
            f'that is on this disk; a folder that timm reads is named local-dir:{name}.' if Path(name).exists() else
            _near(name) + "timm.list_models('arl_*') lists the family."))
    tags = _tags(variant)
    if pretrained and ':' not in name and tag and tags and tag not in tags:
        raise WeightsError(f'No weights {name}: choose {" or ".join(f"{variant}.{each}" for each in tags)}.')
    try:
        if pretrained and ':' not in name:
            kwargs = local_weights(variant, {**kwargs, **({'pretrained_cfg': tag} if tag else {})})
        with plain_http():
            return timm.create_model(name, pretrained=pretrained, **kwargs)
    except WeightsError:
        raise
    except Exception as error:  # the same
        if not (isinstance(error, (OSError, RuntimeError, ValueError, TypeError, KeyError, safetensors.SafetensorError))
                or is_of_network(error)):
            raise
        raise WeightsError(f'Model {name} cannot be created{" with its weights" if pretrained else ""}: '
                           f'{" ".join(str(error).split())}') from error


def create_trained(source: str) -> nn.Module:
    """The network of an output folder of finetune_isic.py, or of a timm name, with its weights.

    Args:
        source: Folder with config.json and model.safetensors, or what create_for_task takes.

    Raises:
        WeightsError: Neither, or as create_for_task.
    """
    folder = Path(source)
    if (folder / 'runs.csv').is_file():
        raise WeightsError(f'{source} holds several runs: choose one of the folders in it that runs.csv names.')
    missing = [name for name in ('config.json', 'model.safetensors') if not (folder / name).is_file()]
    if folder.is_dir() and missing:
        raise WeightsError(f'{source} holds no {" and no ".join(missing)}: pass the output folder of finetune_isic.py, '
                           f'or the name of a model.')
    if folder.is_file():
        raise WeightsError(f'{source} is a file: pass the folder that holds it, beside its config.json.')
    if not folder.is_dir() and ':' not in source and not timm.is_model(source):
        raise WeightsError(f'No folder {source}, and no model of that name: {_near(source)}pass the output folder of '
                           f'finetune_isic.py, or a name like {next(iter(OWN_WEIGHTS))}.')
    return create_for_task(f'local-dir:{folder}' if folder.is_dir() else source, pretrained=True)


def _near(name: str) -> str:
    near = difflib.get_close_matches(name, timm.list_models(), n=3)
    return f'did you mean {" or ".join(near)}? ' if near else ''


def _tags(variant: str) -> List[str]:
    return [name.partition('.')[2] for name in timm.list_pretrained(f'{variant}.*')]


def load_weights_file(model: nn.Module, path: Union[str, Path]) -> List[str]:
    """Load a safetensors file, or the model.safetensors of a folder, into a model.

    A ResNet checkpoint fits an ARL-CNN of the same depth, whose alphas it leaves as they are. Apart from that and from
    a classifier of another size, which is left as it is too, every tensor must find its place.

    Args:
        model: A timm model.
        path: A .safetensors file, or a folder that holds model.safetensors.

    Returns:
        Names of the parameters that were left as they are: the classifier's, or none.

    Raises:
        WeightsError: No such file, another format, tensors that do not fit the model, or another kind of attention.
    """
    from .arl_cnn import ARLCNN, checkpoint_filter_fn  # which fetches its weights by this module
    path = Path(path)
    file = path / 'model.safetensors' if path.is_dir() else path
    if not file.is_file():
        raise WeightsError(f'No weights at {file}: pass a .safetensors file or a folder that holds model.safetensors.')
    try:
        state_dict = safetensors.torch.load_file(file)
    except (OSError, safetensors.SafetensorError) as error:
        raise WeightsError(f'{file} is not a readable safetensors file ({error}): only that format is opened; write '
                           f'others anew with safetensors.torch.save_file.') from error
    state_dict = dict(clean_state_dict(state_dict))
    if isinstance(model, ARLCNN):
        state_dict = checkpoint_filter_fn(state_dict, model)
        _check_attention(model, file)

    own = model.state_dict()
    classifiers = cast(Any, model).pretrained_cfg.get('classifier') or ()
    classifiers = (classifiers,) if isinstance(classifiers, str) else tuple(classifiers)
    left = [k for k in own.keys() | state_dict.keys() if k.rpartition('.')[0] in classifiers]
    if all(k in own and k in state_dict and own[k].shape == state_dict[k].shape for k in left):
        left = []
    for key in left:
        state_dict.pop(key, None)
    wrong = [k for k in own.keys() ^ state_dict.keys() if k not in left]
    wrong += [k for k in own.keys() & state_dict.keys() if own[k].shape != state_dict[k].shape]
    if wrong:
        raise WeightsError(f'{file} does not fit {type(model).__name__}: {len(wrong)} tensors are missing, unexpected '
                           f'or of another shape, {sorted(wrong)[0]} among them; choose the model it was saved from.')
    model.load_state_dict(state_dict, strict=False)
    return sorted(own.keys() & set(left), reverse=True)


def _check_attention(model: Any, file: Path) -> None:
    """Refuse weights whose config.json beside them tells of another mask: every tensor would fit, and mean another."""
    config = file.with_name('config.json')
    if not config.is_file():
        return
    saved = create_for_task(f'local-dir:{file.parent}', device='meta')
    kind = getattr(saved, 'attention', None), getattr(saved, 'mask_scale', None)
    if isinstance(saved, type(model)) and kind != (model.attention, model.mask_scale):
        raise WeightsError(f'{file} was trained with {kind[0]} attention and mask_scale {kind[1]}, not '
                           f'{model.attention} and {model.mask_scale}: choose the model it was saved from.')


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
    tags = _tags(variant)
    if not cfg.has_weights and not cfg.state_dict:
        raise WeightsError(f'No pretrained weights exist for {variant}' + (
            f' without a tag: choose {" or ".join(f"{variant}.{tag}" for tag in tags)}.' if tags else
            f': leave pretrained out, or {LOCAL_FILE}.'))
    if cfg.file and cfg.source != 'local-dir':
        _check_file(Path(cfg.file))
    if cfg.state_dict or cfg.file or cfg.source not in (None, '', 'hf-hub'):
        return kwargs
    if not cfg.hf_hub_id:
        raise WeightsError(f'The weights of {variant} are a pickle at {cfg.url}, and only safetensors are opened: '
                           f'write them anew with safetensors.torch.save_file, and {LOCAL_FILE}.')
    repo, _, revision = cfg.hf_hub_id.partition('@')
    name = f'{variant}.{cfg.tag}'
    own = cfg.source != 'hf-hub' and repo == f'{HUB}/{name}'  # the registered weights, not a repo that was asked for
    sha256 = OWN_WEIGHTS.get(name if own else repo.removeprefix('timm-arl/'))
    shipped = shipped_weights(name) if own else None
    if shipped is not None and _is_whole(shipped / 'model.safetensors', sha256):
        path = shipped / 'model.safetensors'
    else:
        if shipped is not None:
            _say(f'{shipped / "model.safetensors"} is damaged: asking the Hub for it.')
        path = fetch_weights(repo, cfg.hf_hub_filename or 'model.safetensors', revision or None, sha256,
                             cache_dir=kwargs.get('cache_dir'))
    return {**kwargs, 'pretrained_cfg_overlay': {**overlay, 'file': str(path), 'source': ''}}


def _check_file(path: Path) -> None:
    if not path.is_file():
        raise WeightsError(f'No weights at {path}: pass a .safetensors file.')
    if path.suffix == '.safetensors':
        try:
            with safetensors.safe_open(path, 'pt'):
                pass
        except (OSError, safetensors.SafetensorError) as error:
            raise WeightsError(
                f'{path} is not a readable safetensors file ({error}): fetch or write it anew.') from error


def shipped_weights(name: str) -> Optional[Path]:
    """Folder of weights that came with this package, a model repo with its results, or None.

    Args:
        name: Model and tag.
    """
    folder = Path(__file__).with_name('weights') / name
    return folder if name in OWN_WEIGHTS and (folder / 'model.safetensors').is_file() else None


def fetch_weights(
        repo: str,
        file: str = 'model.safetensors',
        revision: Optional[str] = None,
        sha256: Optional[str] = None,
        cache_dir: Union[str, Path, None] = None,
) -> Path:
    """A file of a Hub repo in the local cache, from there if it is whole, else downloaded.

    What is in the cache is used without asking the Hub. Either way the content must have the digest that the Hub gave
    for it (sha256, or git's of a small file) and `sha256` where that is known; a damaged copy is fetched anew, once.
    A cache without links (some file systems, Windows) does not hold the Hub's digests: there, only downloads are
    compared with them.

    Args:
        repo: Repo id.
        file: File in it; never a pickle.
        revision: Branch, tag or commit, by default main.
        sha256: Digest that the file must have.
        cache_dir: Instead of huggingface_hub's own.

    Returns:
        Path in the cache.

    Raises:
        WeightsError: It cannot be had; with repo, file, revision, cause and remedy.
    """
    where: Dict[str, Any] = dict(repo=repo, file=file, revision=revision or 'main')
    if not file.endswith(('.safetensors', '.json')):
        raise WeightsError(**where, cause='it is no .safetensors file', remedy='only those are opened, never a pickle')
    request: Dict[str, Any] = dict(repo_id=repo, filename=file, revision=revision, cache_dir=cache_dir)
    force = False
    try:
        path = Path(huggingface_hub.hf_hub_download(**request, local_files_only=True))
        if _is_whole(path, sha256):
            return path
        if huggingface_hub.constants.HF_HUB_OFFLINE:
            raise WeightsError(**where, cause='its copy in the cache is damaged, and HF_HUB_OFFLINE is set',
                               remedy=f'unset that, or {LOCAL_FILE}')
        force = True
        _say(f'{file} of {repo} in the cache is damaged: downloading it again.')
    except (LocalEntryNotFoundError, OSError):
        pass
    except HFValidationError as error:
        cause, remedy, _ = diagnose_hub_error(error, repo)
        raise WeightsError(**where, cause=cause, remedy=remedy) from error
    start = time.monotonic()
    for attempt in range(1, ATTEMPTS + 1):
        try:
            # asked for by itself, since hf_hub_download retries a failing request for half a minute without a word
            etag = huggingface_hub.get_hf_file_metadata(
                huggingface_hub.hf_hub_url(repo, file, revision=revision)).etag
            if force and not path.is_symlink():
                path.unlink(missing_ok=True)  # huggingface_hub would keep it
            with plain_http():
                path = Path(huggingface_hub.hf_hub_download(**request, force_download=force))
        except Exception as error:  # of an HTTP library that depends on huggingface_hub's version; others go on
            cause, remedy, again = diagnose_hub_error(error, repo, OTHERWISE)
            if not cause:
                raise
            if not again or attempt == ATTEMPTS or time.monotonic() - start > PATIENCE:
                raise WeightsError(**where, cause=cause, remedy=remedy) from error
            _say(f'{file} of {repo}: {cause}; trying again ({attempt} of {ATTEMPTS - 1}).')
            time.sleep(2 ** (attempt - 1) / 2)
            continue
        if _is_whole(path, sha256, etag):
            return path
        if force:
            _blob(path).unlink(missing_ok=True)  # or others that use the cache would load it
            break
        force = True
        _say(f'{file} of {repo} came damaged: downloading it again.')
    raise WeightsError(**where, cause='what was downloaded has another digest than it should have', remedy=(
        f'the file or the way to it was tampered with or is faulty: try another network or mirror (HF_ENDPOINT), or '
        f'{LOCAL_FILE}'))


def _is_whole(path: Path, sha256: Optional[str], etag: Optional[str] = None) -> bool:
    """Whether a file has the digest it should have, and the one that the Hub gave, which is the name of its blob."""
    if sha256 is not None and _digest(path, hashlib.sha256()) != sha256:
        return False
    given = etag or _blob(path).name
    if not set(given) <= set('0123456789abcdef'):  # nor has a file a name of this kind where links are not possible
        return True
    if len(given) == 40:
        git = hashlib.sha1(b'blob %d\0' % path.stat().st_size, usedforsecurity=False)  # of a file not in LFS
        return given in (_digest(path, git), _digest(path, hashlib.sha1(usedforsecurity=False)))  # the other on mirrors
    return len(given) != 64 or given == sha256 or given == _digest(path, hashlib.sha256())


def _digest(path: Path, digest: Any) -> str:
    with path.open('rb') as stream:
        while block := stream.read(2 ** 20):
            digest.update(block)
    return digest.hexdigest()


def _blob(path: Path) -> Path:
    """What a file in the cache links to, by one step: that may be a link too, to a store named by other digests."""
    return path.parent / os.readlink(path) if path.is_symlink() else path


def _say(line: str) -> None:
    print(f'timm_arl: {line}', file=sys.stderr, flush=True)
