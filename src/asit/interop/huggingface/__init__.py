"""Hugging Face: write a model as a folder that transformers loads, and read one back.

`register` registers ASiT with transformers' Auto classes; an import alone does not.
"""

from __future__ import annotations

from asit.interop.huggingface.fields import MODEL_TYPE
from asit.interop.huggingface.folder import check, read, write
from asit.interop.huggingface.registration import register

__all__ = ["MODEL_TYPE", "check", "read", "register", "write"]
