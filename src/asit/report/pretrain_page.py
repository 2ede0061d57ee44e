"""Make the page of a pretraining run: losses, probe, reconstructions, collapse gauges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from numpy.typing import NDArray
from pydantic import ValidationError

from asit.config import FrontEndSettings, PretrainSettings
from asit.io import parsing
from asit.report.audio_player import AUDIO_SECONDS, picture, player
from asit.report.charts import chart
from asit.report.findings import gauge_guide
from asit.report.run_reader import RunFolder
from asit.report.run_sections import Series, curves, data, environment, events, progress, settings
from asit.report.score_records import number
from asit.report.templates import Section, part

_LOSSES = {
    "global": (
        "Global loss",
        "class token, cross-entropy with the teacher on the other view; may rise while the teacher sharpens",
    ),
    "local": (
        "Local loss",
        "patch tokens, cross-entropy with the teacher on the same view; may rise, as the global loss",
    ),
    "reconstruction": ("Reconstruction loss", "mean absolute error where the mask is, in normalised log-mel"),
}
_SCHEDULES = {
    "lr": ("Learning rate", "warm-up, then the schedule"),
    "weight_decay": ("Weight decay", "cosine; none on biases and norms"),
    "teacher_momentum": ("Teacher momentum", "of the moving average (EMA) that is the teacher"),
    "teacher_temperature": ("Teacher temperature", "lower is sharper"),
}
_ENTROPY = "dashed: no preference at all; shaded: sound; 0: certain of one prototype"
_CENTRE = "grows without bound where one prototype wins everywhere"
_GAUGES = {
    "teacher_entropy_class": ("Teacher entropy, class", _ENTROPY),
    "teacher_entropy_patch": ("Teacher entropy, patches", _ENTROPY),
    "centre_norm_class": ("Centre norm, class", _CENTRE),
    "centre_norm_patch": ("Centre norm, patches", _CENTRE),
    "feature_spread": ("Feature spread", "shaded: sound; towards 0: all clips look alike to the encoder"),
    "mask_share": ("Masked share", "of the student's input"),
    "gradient_norm": ("Gradient norm", "before clipping"),
}
_SPEED = {
    "clips_per_second": ("Throughput", "clips a second"),
    "data_wait": ("Waiting for data", "share of time without a batch to train on"),
}


def sections(
    run: RunFolder, preset: Mapping[str, Any] | None, own: Mapping[str, Series], overlaid: Mapping[str, RunFolder]
) -> list[Section]:
    """Return the parts of the page in order; `preset` as for `asit.report.report`, `own` the curves of the run, and
    `overlaid` other runs by name."""
    missing = part("missing", "Not recorded.")
    drawn = {run.folder.resolve().name if overlaid else "": own}
    drawn |= {name: curves(other.train) for name, other in overlaid.items()}
    return [
        Section("Losses", _losses(run, drawn)),
        *([Section("Probe", _probe(run))] if run.probes or run.config.get("probe", {}).get("table") else []),
        Section("Reconstructions", reconstructions(run)),
        *(
            Section(title, part("charts", made) if any(made := _charts(run, drawn, entries)) else missing, folded)
            for title, entries, folded in (
                ("Collapse gauges", _GAUGES, False),
                ("Schedules", _SCHEDULES, True),
                ("Speed", _SPEED, True),
            )
        ),
        data(run),
        settings(run, PretrainSettings, preset, "preset"),
        environment(run),
        events(run),
    ]


def facts(run: RunFolder) -> dict[str, str]:
    """Return the short facts at the top."""
    found = progress(run)
    if run.train:
        found["loss"] = number(float(run.train[-1].get("loss", math.nan)))
    if run.probes:
        found["probe accuracy"] = f"{run.probes[-1]['accuracy']:.1%}"
    if clips := run.catalogue.get("clips"):
        found["clips"] = f"{clips:,}"
    encoder, views = run.config.get("encoder", {}), run.config.get("views", {})
    if encoder:
        custom = f"{encoder.get('width')} wide, {encoder.get('depth')} deep"
        found["encoder"] = custom if encoder.get("size") == "custom" else str(encoder.get("size"))
    if isinstance(views.get("seconds"), int | float):
        found["view"] = f"{views['seconds']:g} s"
    return found | {"model": "written" if run.model else "not written yet"}


def _losses(run: RunFolder, drawn: Mapping[str, Mapping[str, Series]]) -> Markup:
    if not run.train:
        return part("missing", "No training step has been recorded yet.")
    weights = run.config.get("losses", {})
    entries = {"loss": ("Total loss", "the weighted sum of the parts")}
    for name, (title, note) in _LOSSES.items():
        weight = weights.get(f"{name}_weight")
        entries[name] = (title, f"{note}; weight {weight:g}" if isinstance(weight, int | float) else note)
    others = [n for n in run.train[-1].get("parts", {}) if n not in {*entries, *_GAUGES}]
    entries |= {name: (name.replace("_", " "), "") for name in others}
    return part("charts", _charts(run, drawn, entries), curves=True)


def _charts(
    run: RunFolder, drawn: Mapping[str, Mapping[str, Series]], entries: Mapping[str, tuple[str, str]]
) -> list[Markup]:
    """Charts of the curves drawn, by run and quantity; a single run's curve is named after the quantity."""
    made = []
    for name, (title, note) in entries.items():
        series = {which or title: held[name] for which, held in drawn.items() if name in held}
        percent = name in ("mask_share", "data_wait")
        if series:
            made.append(chart(title, note, series, gauge_guide(run, name), percent, resumes=run.resumes))
    return made


def _probe(run: RunFolder) -> Markup:
    if not run.probes:
        table = run.config.get("probe", {}).get("table")
        return part("missing", "No probe has been run yet." if table else "No probe was requested (probe.table).")
    features: dict[str, Series] = {}
    for line in run.probes:
        for name, accuracy in line.get("features", {}).items():
            steps, values = features.setdefault(name, ([], []))
            steps.append(float(line["step"]))
            values.append(float(accuracy))
    overall = {"accuracy": ([float(p["step"]) for p in run.probes], [float(p["accuracy"]) for p in run.probes])}
    clips = run.probes[-1].get("clips")
    note = "frozen features, by kind; " + (f"{clips:,} test clips" if isinstance(clips, int) else "test clips")
    rows = []
    for line in run.probes:
        held = line.get("features", {})
        shares = [f"{held[name]:.1%}" if held.get(name) is not None else "" for name in features]
        rows.append((f"{line['step']:,}", f"{line['accuracy']:.1%}", *shares))
    drawn = chart("Probe accuracy", note, features or overall, percent=True)
    table = part("table", ["step", "accuracy", *features], rows, "")
    return part("charts", [drawn]) + part("details", "All probes", table)


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
            source = picture(mask, 0, 1, "gray", "png")
        else:
            source = picture(mels[kind], low, high, "magma", "jpeg")
        alternative = f"{kind} log-mel spectrogram of {name}"
        pictures.append((kind, note, source, len(mask), alternative, sounds.get(kind, "")))
    about = f"{mask.mean():.0%} masked{seconds}; mean absolute error there {number(error)}"
    return part("reconstruction", Path(name).name, about, pictures)


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
