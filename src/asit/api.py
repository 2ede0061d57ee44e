"""The Python entry points: `asit.pretrain`, `asit.finetune`, `asit.create_encoder`, and `asit.Embedder`."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from asit.config import EncoderSettings, FinetuneSettings, PretrainSettings, presets, yaml
from asit.config.presets import Resume
from asit.errors import ConfigError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    from asit.audio.stream import Sound
    from asit.finetune.cross_validation import CrossValidation
    from asit.finetune.finetune_run import FinetuneResult
    from asit.model.audio_model import AudioModel
    from asit.model.vit import Encoder
    from asit.pretrain.pretrain_run import PretrainResult


def pretrain(
    data: Any,
    out: str | Path,
    *,
    model: str | Path = "",
    preset: str | None = None,
    config: str | Path | None = None,
    budget: str | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    **settings: Any,
) -> PretrainResult:
    """Pretrain an encoder on recordings without labels.

    The same as `asit pretrain` on the command line: `asit.pretrain("recordings", "run", epochs=50,
    encoder={"size": "small"})`.

    Args:
        data: folder of recordings, table or catalogue; or a table in memory: DataFrame of pandas or polars,
            `datasets.Dataset`, or a list of dicts, see `asit.data.catalogue.frames.stored`.
        out: the run's folder, new or empty.
        model: to continue from, as for `asit.load`, such as RUN/model; or a file of ImageNet ViT weights.
        preset: "default", "speech", "paper", "official-v2" or "adapt", the default with a model.
        config: YAML file of settings.
        budget: time that the run may take, such as "45m", "8h" or "3d": encoder, batch, epochs and warm-up that are not
            given are chosen for it. Without it and without preset, config and epochs: an hour on a CPU, a day on a GPU.
        resume: resume the run in `out`, with its own settings; "auto": where there is one.
        overwrite: delete the run in `out` first.
        settings: any of `PretrainSettings`; groups as mappings.

    Returns:
        PretrainResult: `.model` is the folder for `asit.load`.

    Raises:
        AsitError: the settings, the data or the folder do not fit; its text says how to fix it.
    """
    from asit.pretrain import pretrain_run as runs
    from asit.tools import time_budget

    began = time.perf_counter()
    given = {**_taken(data, settings), "model": str(model)}
    chosen = presets.build_for(PretrainSettings, out, preset, config, given, resume=resume)
    names = {name for name, _ in yaml.flat(settings)} | ({"preset"} if preset else set())
    chosen = time_budget.apply(chosen, budget, names, config=config, resume=resume, overwrite=overwrite, began=began)
    return runs.pretrain(chosen, resume=resume, overwrite=overwrite)


def finetune(
    data: Any,
    out: str | Path,
    model: str | Path,
    *,
    task: str | None = None,
    config: str | Path | None = None,
    resume: Resume = False,
    overwrite: bool = False,
    **settings: Any,
) -> FinetuneResult | CrossValidation:
    """Fine-tune and score a classifier on labelled recordings.

    The same as `asit finetune` on the command line: `asit.finetune("table.csv", "run", "pretrained/model", epochs=30,
    sides={"hold_out": 0.2})`.

    Args:
        data: catalogue with labels, labelled table, folder with one sub-folder a class, annotations (with window); or
            a table in memory, as for `pretrain`.
        out: the run's folder, new or empty.
        model: as for `asit.load`, such as RUN/model; a file of ImageNet ViT weights; or "none".
        task: the recipe; "any" if not given.
        config: YAML file of settings.
        resume: resume the run in `out`, with its own settings; "auto": where there is one.
        overwrite: delete the run in `out` first.
        settings: any of `FinetuneSettings`; groups as mappings.

    Returns:
        FinetuneResult: `.model` is the folder for `asit.load`, `.results` the scores; with `sides={"fold": "all"}` a
        CrossValidation over all folds.

    Raises:
        AsitError: the settings, the data or the folder do not fit; its text says how to fix it.
    """
    from asit.finetune import cross_validation

    given = {**_taken(data, settings), "model": str(model)}
    chosen = presets.build_for(FinetuneSettings, out, task, config, given, resume=resume)
    return cross_validation.run(chosen, resume=resume, overwrite=overwrite)


def create_encoder(
    size: Literal["tiny", "small", "base", "large", "custom"] = "base",
    *,
    frames: int = 592,
    mels: int = 128,
    weights: str | Path | None = None,
    seed: int = 0,
    **settings: Any,
) -> Encoder:
    """Return an encoder as a plain `torch.nn.Module`, to train or to build into a network of one's own.

    `encoder(x)` takes normalised log-mel spectrograms (R, 1, T, F) and returns `Tokens`: `cls` (R, D), `patches`
    (R, P, D) in time-major order (all mel patches of the first time column, then the next), and `grid`, the
    (time, mel) patches, whose product is P. T is a whole number of patch columns; other lengths than `frames` get
    resized positions. `encoder(x, layer=2)` returns another block's output, `layer=(0, 5)` several, concatenated.

    Args:
        size: width D, depth and heads by name; "custom" with `width`, `depth` and `heads`.
        frames: T of the training view.
        mels: F.
        weights: a model as for `asit.load`, whose encoder is returned with its own settings; None: random weights.
        seed: of the random weights.
        settings: others of `EncoderSettings`, such as patch_frames and patch_mels.

    Returns:
        In training mode, all parameters trainable.

    Raises:
        ConfigError: settings that do not fit, or any together with `weights`.
        AsitError: the model cannot be loaded.
    """
    import torch

    from asit.interop.loading import load
    from asit.model.encoders import new_encoder

    given = {"size": size, "frames": frames, "mels": mels, **settings}
    if weights is not None:
        differing = [name for name, value in given.items() if value != _ENCODER_DEFAULTS.get(name)]
        if differing:
            raise ConfigError(
                f"weights of {weights}, and {', '.join(differing)}",
                "weights alone: they fix size, patches and input",
                "leave the others out",
            )
        return load(weights).encoder.train().requires_grad_(True)
    chosen = yaml.build(EncoderSettings, {"size": size, **settings}, "encoder")
    encoder = new_encoder(chosen, frames, mels)
    encoder.init_weights(torch.Generator().manual_seed(seed))
    return encoder


_ENCODER_DEFAULTS = {"size": "base", "frames": 592, "mels": 128}


class Embedder:
    """A transformer for scikit-learn's pipelines: recordings to one vector each, by a frozen model.

    It has the methods that scikit-learn asks for, so that clones, pipelines, grid searches and pickles work, and does
    not import it. Nothing is learned in `fit`.

    Args:
        model: as for `asit.load`, or an `AudioModel`.
        pooling: "class", "mean", "class+mean", "class+mean+std" or "mean+std"; None: "class+mean+std", or "mean+std"
            for an encoder without a class token.
        layers: blocks whose outputs are concatenated, 0 the first, -1 the last; none: the last.
        rate: of arrays in Hz; None: the model's.
        batch: windows per forward pass.
        precision: of the encoder.
        device: that a model is loaded to; an `AudioModel` stays where it is.
    """

    _names = ("model", "pooling", "layers", "rate", "batch", "precision", "device")

    def __init__(
        self,
        model: str | Path | AudioModel,
        *,
        pooling: str | None = None,
        layers: Sequence[int] = (),
        rate: int | None = None,
        batch: int = 16,
        precision: Literal["auto", "float32", "bf16"] = "float32",
        device: str = "cpu",
    ) -> None:
        self.model, self.pooling, self.layers, self.rate = model, pooling, layers, rate
        self.batch, self.precision, self.device = batch, precision, device

    def fit(self, X: Iterable[Sound], y: object = None) -> Self:
        """Load the model; X and y are not used."""
        self._load()
        return self

    def transform(self, X: Iterable[Sound]) -> npt.NDArray[np.float32]:
        """Return the vectors (n, features) of n recordings: paths, bytes, open files, or arrays (n, S).

        Long recordings are read in windows, whose tokens are pooled together (`AudioModel.embed`).

        Raises:
            AudioError: a recording is empty, not finite or unreadable.
            ConfigError: no such pooling or layer, or no recording.
        """
        import numpy as np

        from asit.evaluate.feature_readers import choose, pool
        from asit.evaluate.saved_probe import poolings_of

        model = self._load()
        allowed = poolings_of(model)
        kind = self.pooling or allowed[-1]
        choose("pooling", (kind,), allowed)
        layer, sounds, rows = (list(self.layers) or None), iter(X), []
        while some := list(itertools.islice(sounds, 4 * self.batch)):
            for found in model.embed_batch(some, self.rate, batch=self.batch, layer=layer, precision=self.precision):
                assert found.patches is not None
                rows.append(pool(found.class_token[None], found.patches[None], found.grid, kind)[0].numpy())  # type: ignore[arg-type]
        if not rows:
            raise ConfigError("no recording to embed", "at least one path or array", "check the list")
        return np.stack(rows)

    def fit_transform(self, X: Iterable[Sound], y: object = None) -> npt.NDArray[np.float32]:
        """Return `transform(X)`."""
        return self.fit(X, y).transform(X)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return the arguments by name."""
        return {name: getattr(self, name) for name in self._names}

    def set_params(self, **params: Any) -> Self:
        """Set arguments by name, and return this object.

        Raises:
            ValueError: an unknown name.
        """
        wrong = set(params) - set(self._names)
        if wrong:
            raise ValueError(f"{', '.join(sorted(wrong))}: parameters are {', '.join(self._names)}")
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def __sklearn_is_fitted__(self) -> bool:
        return True

    def __getstate__(self) -> dict[str, Any]:
        return self.get_params()

    def __repr__(self) -> str:
        return f"Embedder({', '.join(f'{name}={value!r}' for name, value in self.get_params().items())})"

    def _load(self) -> AudioModel:
        """Return the model, loaded once for each value of `model` and `device`."""
        from asit.interop.loading import load

        if not isinstance(self.model, str | os.PathLike):
            return self.model
        wanted = (str(self.model), self.device)
        if getattr(self, "_held", (None,))[0] != wanted:
            self._held: tuple[Any, ...] = wanted, load(self.model, self.device)
        held: AudioModel = self._held[1]
        return held


def _taken(data: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with the path of the data; a table in memory is stored, under our names of columns."""
    if isinstance(data, str | Path):
        return {**settings, "data": str(data)}
    from asit.config import TableSettings
    from asit.data.catalogue import frames

    columns = TableSettings(columns=settings.get("columns", "")).columns
    return {**settings, "data": frames.stored(data, columns), "columns": ""}
