"""Load a model by its name: a folder, a file of weights, a repository of the Hugging Face hub, or a registered model.

No code of a model is executed. What is of another project is converted once and cached.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

from asit.interop import converted_models, huggingface, model_names
from asit.interop.hub_files import OWN
from asit.interop.model_names import ModelFiles
from asit.model.audio_model import AudioModel


def load(source: str | os.PathLike[str], device: str | torch.device = "cpu") -> AudioModel:
    """Load a model.

    Args:
        source: one of these, tried in this order:

            - a model folder (RUN/model), a run's folder, a folder written by `asit export --to huggingface`, or
              a Hugging Face folder of AST or EAT;
            - a file of weights of another project that `asit convert` reads (docs/convert.md);
            - a short name of the registry (`asit.list_models`), such as "ast";
            - the hub's "owner/name" or "owner/name@revision" (branch, tag or commit), with ":FILE" behind it where
              the repository has several files of weights.

            Files of the hub are fetched once into huggingface_hub's cache and then used offline; other downloads and
            converted models are cached under XDG_CACHE_HOME.
        device: of the model.

    Raises:
        CheckpointError: nothing has this name, no access, no network, no model that asit can read, or damaged files.
        ConfigError: huggingface_hub is needed and not installed, or the conversion needs options.
        DownloadError: a registered file cannot be downloaded, or is not the published one.
    """
    folder = locate(source)
    model = AudioModel.load(folder) if (folder / OWN[0]).is_file() else huggingface.read(folder)
    return model.to(device)


def locate(source: str | os.PathLike[str]) -> Path:
    """Return the folder of a model's files, fetched and converted if necessary; source and errors as for `load`."""
    return folder_of(model_names.find(source))


def folder_of(files: ModelFiles) -> Path:
    """Return the model folder of files that `model_names.find` found, converted if necessary; errors as for `load`."""
    return converted_models.folder_of(files) if files.convertible else files.path
