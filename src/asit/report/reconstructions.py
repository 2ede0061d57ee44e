"""What the student reconstructs, to look at and to listen to.

Letters: n examples, T frames, F mel bins.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.image import imsave
from numpy.typing import NDArray
from pydantic import ValidationError

from asit.config import FrontEndSettings
from asit.io import parsing
from asit.report.audio_player import AUDIO_SECONDS, player
from asit.report.charts import number
from asit.report.run_reader import Run

Floats = NDArray[np.float32]

EXAMPLES = 3
"""Examples shown for each figure."""
_NOTES = {
    "clean": "what the teacher sees",
    "corrupted": "what the student sees",
    "reconstructed": "the student's output; only its masked area is trained",
    "composite": "clean, with the masked area replaced by the reconstruction",
    "mask": "white: corrupted",
}


def reconstructions(run: Run) -> str:
    """HTML of the first, the middle and the last figure of a run, or a sentence that says why there is none."""
    if not run.figures:
        return (
            '<p class="missing">No figures yet: the run writes one every <code>records.figure_every</code> steps '
            "(0 switches them off).</p>"
        )
    settings, reason = _front_end(run)
    steps = list(run.figures)
    chosen = sorted({steps[0], steps[len(steps) // 2], steps[-1]}, reverse=True)
    parts = [
        "<p>Log-mel spectrograms, normalised: time from left to right, low frequencies at the bottom. The latest step "
        "comes first. One colour scale serves each example's four pictures. "
        + (
            "Sound is made from the log-mels by Griffin-Lim, so even the clean one has lost its phases: judge the "
            "others against the clean one, not against the recording."
            if settings
            else escape(reason)
        )
        + "</p>"
    ]
    for step in chosen:
        parts.append(f"<h3>Step {step:,}</h3>")
        try:
            loaded = parsing.npz(run.figures[step], ("clean", "corrupted", "reconstructed", "mask", "ids"))
        except parsing.Malformed as error:
            reason = f"{run.figures[step].name} cannot be read: {error}"
            parts.append(f'<p class="missing">{escape(reason)}</p>')
            continue
        parts += [_example(loaded, index, settings) for index in range(min(EXAMPLES, len(loaded["mask"])))]
    return "".join(parts)


def _example(arrays: Mapping[str, NDArray[Any]], index: int, settings: FrontEndSettings | None) -> str:
    mask = arrays["mask"][index].astype(bool)
    pictures: dict[str, Floats] = {
        name: arrays[name][index].astype(np.float32) for name in ("clean", "corrupted", "reconstructed")
    }
    pictures["composite"] = np.where(mask, pictures["reconstructed"], pictures["clean"])
    name = str(arrays["ids"][index])
    low, high = np.nanquantile(pictures["clean"], [0.01, 0.995])
    error = float(np.abs(pictures["reconstructed"] - pictures["clean"])[mask].mean()) if mask.any() else float("nan")
    seconds = f", {len(mask) * settings.shift_ms / 1000:.2g} s" if settings else ""
    waves = _waves(pictures, settings) if settings else {}
    figures = []
    for kind in (*pictures, "mask"):
        if kind == "mask":
            source = _picture(mask, 0, 1, "gray", "png")
        else:
            source = _picture(pictures[kind], low, high, "magma", "jpeg")
        sound = player(waves[kind], settings.rate, f"{kind}, {name}") if settings and kind in waves else ""
        figures.append(
            f'<figure class="spectrogram"><img src="{source}" width="{mask.shape[0]}" height="128" loading="lazy" '
            f'alt="{escape(kind)} log-mel spectrogram of {escape(name)}"><figcaption><b>{kind}</b> '
            f"<small>{_NOTES[kind]}</small></figcaption>{sound}</figure>"
        )
    return (
        f'<section class="example"><h4>{escape(Path(name).name)} <small>{mask.mean():.0%} masked{seconds}; mean '
        f"absolute error there {number(error)}</small></h4>"
        f'<div class="strip">{"".join(figures)}</div></section>'
    )


def _picture(values: NDArray[Any], low: float, high: float, colours: str, kind: str) -> str:
    """A (T, F) array as an image's data URI, low bins at the bottom."""
    buffer = io.BytesIO()
    extra = {"quality": 68} if kind == "jpeg" else {"optimize": True}
    imsave(buffer, values.T, vmin=low, vmax=high, cmap=colours, format=kind, origin="lower", pil_kwargs=extra)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _waves(pictures: Mapping[str, Floats], settings: FrontEndSettings) -> dict[str, Floats]:
    """Sound (S,) of each normalised log-mel (T, F), all with one gain, so that they can be compared."""
    import torch  # a report without sound need not wait for it

    from asit.audio.griffin_lim import griffin_lim

    assert settings.mean != "auto"
    assert settings.std != "auto"
    frames = int(AUDIO_SECONDS * 1000 / settings.shift_ms)
    waves = {
        kind: griffin_lim(torch.from_numpy(x[:frames] * 2 * settings.std + settings.mean), settings)
        for kind, x in pictures.items()
        if np.isfinite(x[:frames]).all()
    }
    peak = max((float(np.abs(wave).max()) for wave in waves.values()), default=0.0)
    return {kind: wave * np.float32(0.8 / max(peak, 1e-4)) for kind, wave in waves.items()}


def _front_end(run: Run) -> tuple[FrontEndSettings | None, str]:
    """The front end with its mean and std, from the settings or the catalogue; or None and the reason."""
    try:
        settings = FrontEndSettings.model_validate(run.config.get("front_end") or {})
        for name in ("mean", "std"):
            if getattr(settings, name) == "auto" and isinstance(run.catalogue.get(name), float):
                setattr(settings, name, run.catalogue[name])
    except ValidationError:
        return None, "No sound: the front end's settings in config.yaml are not those of this version."
    if "auto" in (settings.mean, settings.std):
        return None, "No sound: the run's folder does not say the mean and standard deviation of its log-mels."
    return settings, ""
