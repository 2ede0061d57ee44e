"""Hugging Face: folders that transformers loads by itself, written from a model and read back into one.

`register` makes transformers know ASiT where asit is installed; nothing is registered by an import alone.
"""

from __future__ import annotations

from asit.interop.huggingface.fields import MODEL_TYPE
from asit.interop.huggingface.folder import check, read, write
from asit.interop.huggingface.registration import register

__all__ = ["MODEL_TYPE", "check", "read", "register", "write"]
