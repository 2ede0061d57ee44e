"""Show what the student reconstructs, as pictures and as sound.

Letters in shapes: n examples, T frames, F mel bins, S samples.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.image import imsave
from numpy.typing import NDArray
from pydantic import ValidationError

from asit.config import FrontEndSettings
from asit.io import parsing
from asit.report.audio_player import AUDIO_SECONDS, player
from asit.report.run_reader import RunFolder
from asit.report.score_records import number
from asit.report.templates import part

Floats = NDArray[np.float32]

EXAMPLES = 3
"""Examples of each figure."""
_NOTES = {
    "clean": "what the teacher sees",
    "corrupted": "what the student sees",
    "reconstructed": "the student's output; only its masked area is trained",
    "composite": "clean, with the masked area replaced by the reconstruction",
    "mask": "white: corrupted",
}


def reconstructions(run: RunFolder) -> Markup:
    """Return the first, the middle and the last figure of a run, the latest first."""
    if not run.figures:
        return part("missing", "No figures yet: the run writes one every records.figure_every steps (0 disables them).")
    settings, reason = _front_end(run)
    steps = list(run.figures)
    shown = []
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}, reverse=True):
        try:
            loaded = parsing.npz(run.figures[step], ("clean", "corrupted", "reconstructed", "mask", "ids"))
        except parsing.Malformed as error:
            shown.append((step, [part("missing", f"{run.figures[step].name} cannot be read: {error}")]))
            continue
        count = min(EXAMPLES, len(loaded["mask"]))
        shown.append((step, [_example(loaded, index, settings) for index in range(count)]))
    return part("reconstructions", reason, shown)


def _example(arrays: Mapping[str, NDArray[Any]], index: int, settings: FrontEndSettings | None) -> Markup:
    mask = arrays["mask"][index].astype(bool)
    mels: dict[str, Floats] = {
        name: arrays[name][index].astype(np.float32) for name in ("clean", "corrupted", "reconstructed")
    }
    mels["composite"] = np.where(mask, mels["reconstructed"], mels["clean"])
    name = str(arrays["ids"][index])
    low, high = np.nanquantile(mels["clean"], [0.01, 0.995])
    error = float(np.abs(mels["reconstructed"] - mels["clean"])[mask].mean()) if mask.any() else float("nan")
    seconds = f", {len(mask) * settings.shift_ms / 1000:.2g} s" if settings else ""
    sounds = _sounds(mels, settings, name) if settings else {}
    pictures = []
    for kind, note in _NOTES.items():
        if kind == "mask":
            source = _picture(mask, 0, 1, "gray", "png")
        else:
            source = _picture(mels[kind], low, high, "magma", "jpeg")
        alternative = f"{kind} log-mel spectrogram of {name}"
        pictures.append((kind, note, source, len(mask), alternative, sounds.get(kind, "")))
    about = f"{mask.mean():.0%} masked{seconds}; mean absolute error there {number(error)}"
    return part("reconstruction", Path(name).name, about, pictures)


def _picture(values: NDArray[Any], low: float, high: float, colours: str, kind: str) -> str:
    """A (T, F) array as an image's data URI, low bins at the bottom."""
    buffer = io.BytesIO()
    extra = {"quality": 68} if kind == "jpeg" else {"optimize": True}
    imsave(buffer, values.T, vmin=low, vmax=high, cmap=colours, format=kind, origin="lower", pil_kwargs=extra)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _sounds(mels: Mapping[str, Floats], settings: FrontEndSettings, name: str) -> dict[str, Markup]:
    """Players of the sound (S,) of each normalised log-mel (T, F), all with the same gain so that they compare."""
    import torch  # takes seconds, and a report without sound does not need it

    from asit.audio.griffin_lim import griffin_lim

    assert settings.mean != "auto"
    assert settings.std != "auto"
    frames = int(AUDIO_SECONDS * 1000 / settings.shift_ms)
    waveforms = {
        kind: griffin_lim(torch.from_numpy(x[:frames] * 2 * settings.std + settings.mean), settings)
        for kind, x in mels.items()
        if np.isfinite(x[:frames]).all()
    }
    peak = max((float(np.abs(waveform).max()) for waveform in waveforms.values()), default=0.0)
    gain = np.float32(0.8 / max(peak, 1e-4))
    return {kind: player(x * gain, settings.rate, f"{kind}, {name}") for kind, x in waveforms.items()}


def _front_end(run: RunFolder) -> tuple[FrontEndSettings | None, str]:
    """The front end with its mean and std, from the settings or the catalogue; or None and the reason."""
    try:
        settings = FrontEndSettings.model_validate(run.config.get("front_end") or {})
        for name in ("mean", "std"):
            if getattr(settings, name) == "auto" and isinstance(run.catalogue.get(name), float):
                setattr(settings, name, run.catalogue[name])
    except ValidationError:
        return None, "No sound: the front end's settings in config.yaml are not those of this version."
    if "auto" in (settings.mean, settings.std):
        return None, "No sound: the run's folder does not record the mean and standard deviation of its log-mels."
    return settings, ""
