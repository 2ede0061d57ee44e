"""ONNX export: one file from waveform to output for onnxruntime and NumPy, in float32 or int8.

session = onnxruntime.InferenceSession("model.onnx")
scores = session.run(None, {"waveform": waveforms})[0]  # (B, S) float32 at the model's rate
"""

from __future__ import annotations

from asit.interop.onnx.onnx_file import TOLERANCE, Measure, Run, agreement, export
from asit.interop.onnx.trace import INPUT, OPSETS

__all__ = ["INPUT", "OPSETS", "TOLERANCE", "Measure", "Run", "agreement", "export"]
