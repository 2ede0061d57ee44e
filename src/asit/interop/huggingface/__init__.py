"""Hugging Face: write a model as a folder that transformers loads, and read one back.

`register` registers ASiT with transformers' Auto classes; an import alone does not.
"""

from __future__ import annotations

from asit.errors import missing_extra
from asit.interop.huggingface.folder import MODEL_TYPE, check, read, write

__all__ = ["MODEL_TYPE", "check", "read", "register", "write"]


def register() -> None:
    """Register ASiT with transformers' Auto classes; may be called repeatedly.

    Raises:
        ConfigError: transformers is not installed.
    """
    try:
        import transformers
    except ModuleNotFoundError as error:
        raise missing_extra("register", "transformers", "huggingface") from error
    from asit.interop.huggingface.configuration_asit import ASiTConfig
    from asit.interop.huggingface.feature_extraction_asit import ASiTFeatureExtractor
    from asit.interop.huggingface.modeling_asit import ASiTForAudioClassification, ASiTModel

    transformers.AutoConfig.register(ASiTConfig.model_type, ASiTConfig, exist_ok=True)
    transformers.AutoModel.register(ASiTConfig, ASiTModel, exist_ok=True)
    transformers.AutoModelForAudioClassification.register(ASiTConfig, ASiTForAudioClassification, exist_ok=True)
    transformers.AutoFeatureExtractor.register(ASiTConfig, ASiTFeatureExtractor, exist_ok=True)
