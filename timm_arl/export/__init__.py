"""A model as an ONNX file: checked against what it was made from, in 8 bits, with what surrounds it (python -m)."""
from ..onnx_file import ExportError, OnnxModel, export_onnx, fold_batch_norm
from .preprocessing import add_preprocessing
from .quantize import quantize_onnx

__all__ = ['ExportError', 'OnnxModel', 'add_preprocessing', 'export_onnx', 'fold_batch_norm', 'quantize_onnx']
