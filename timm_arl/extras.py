"""The extras of `pip install timm-arl`, and one sentence where one of their packages is missing."""
import importlib.util
import sys

__all__ = ['EXTRAS', 'missing', 'require']

EXTRAS = {  # what pip installs
    'train': ('accelerate', 'datasets', 'jinja2', 'matplotlib', 'psutil', 'pyyaml', 'scikit-learn', 'scipy',
              'segmentation-models-pytorch', 'tensorboard', 'tqdm'),
    'export': ('onnx', 'onnxruntime', 'onnxscript'),
    'explain': ('grad-cam',),
    'dicom': ('pydicom',),
    'app': ('gradio',),
}
MODULES = {'grad-cam': 'pytorch_grad_cam', 'pyyaml': 'yaml', 'scikit-learn': 'sklearn',
           'segmentation-models-pytorch': 'segmentation_models_pytorch'}  # where the import has another name


def missing(extra: str) -> str:
    """The sentence that names a package of an extra that is not installed and the remedy, or ''.

    Args:
        extra: Key of EXTRAS.
    """
    for package in EXTRAS[extra]:
        if importlib.util.find_spec(MODULES.get(package, package)) is None:
            return (f"{package} is not installed: in a checkout, pip install -e '.[{extra}]'; without one, pip install "
                    f"'timm-arl[{extra}]'.")
    return ''


def require(extra: str, name: str) -> None:
    """Called above the imports of a module or program that needs an extra.

    Args:
        extra: Key of EXTRAS.
        name: `__name__` of the module.

    Raises:
        ImportError: A package of the extra is not installed; the message is that of `missing`.
        SystemExit: The same where a program starts, after the message on stderr: status 2, no traceback.
    """
    message = missing(extra)
    if not message:
        return
    if name == '__main__' or sys.argv[:1] == ['-m']:  # so it is while `python -m NAME` imports the packages of NAME
        print(f'error: {message}', file=sys.stderr)
        sys.exit(2)
    raise ImportError(message)
