"""Model card for the hub: README.md of an exported folder, from the model's card and its run's results.

Every number is read from a file of the model or its run; unknown facts are left out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from asit.errors import CheckpointError
from asit.io import parsing
from asit.model.audio_model import AudioModel

_FOLDERS = re.compile(r"(?<![\w.:/\\])(?:[A-Za-z]:)?[/\\](?:[^\s/\\]+[/\\])*(?=[^\s/\\])")
"""Folders of an absolute path within a text."""
_ABSOLUTE = re.compile(r"(?:~\w*|[A-Za-z]:)?[/\\].*[^/\\]")
"""A text that starts with an absolute path."""
_HUB_LICENSE = re.compile(r"[a-z0-9][a-z0-9.\-]*")
_HUB_DATASET = re.compile(r"[A-Za-z0-9][\w.\-]*/[\w.\-]+")


_PIPELINE = """from transformers import pipeline

name = "FOLDER_OR_ID"
classify = pipeline("audio-classification", name, feature_extractor=name, trust_remote_code=True)
classify({{"raw": samples, "sampling_rate": {rate}}}{applied})  # mono floats in [-1, 1]"""
_ENCODER = """from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained("FOLDER_OR_ID", trust_remote_code=True)
model = AutoModel.from_pretrained("FOLDER_OR_ID", trust_remote_code=True)
inputs = extractor(samples, sampling_rate={rate}, return_tensors="pt")  # mono floats in [-1, 1]
clip_vector = model(**inputs).pooler_output"""
_README = """---
{matter}---

# {title}

{kind}: a vision transformer over log-mel patches, {encoder.width} wide, {encoder.depth} blocks, \
{encoder.heads} heads, {parameters:,} parameters.{many} Written by asit, a toolkit for ASiT (arXiv:2211.13189).

## Use with transformers

```python
{code}
```

The folder contains its own code, which needs torch and numpy. With asit installed, it loads without \
`trust_remote_code` after `from asit.interop.huggingface import register; register()`.

## Use with asit

```python
import asit

asit.load("FOLDER_OR_ID").{call}("clip.wav")
```

This reads files of any rate and length without running the folder's code.

## Input

{input}

{classes}## Training

{training}
{evaluation}"""


def readme(model: AudioModel, title: str, license: str | None, run: Path | None) -> str:
    """Return the text of README.md with YAML front matter; see `write` for the arguments.

    Raises:
        CheckpointError: the run's results.json cannot be read.
    """
    scores = [] if run is None else _scores(model, Path(run))
    front = _front_matter(model, title, license or model.training.get("license"), scores)
    facts, names = public(model.training), model.classes
    rows = [(name, v if isinstance(v, str) else json.dumps(v, ensure_ascii=False)) for name, v in facts.items()]
    # transformers 4 uses a softmax unless specified, and 5 follows the configuration.
    applied = ', function_to_apply="sigmoid"' if model.multi else ""
    # Each class is quoted on one line, whatever its name contains.
    quoted = ", ".join(f"`{' '.join(name.split()).replace('`', chr(39))}`" for name in names or ())
    return _README.format(
        matter=yaml.safe_dump(front, sort_keys=False, allow_unicode=True, width=120),
        title=title,
        kind="An audio encoder" if names is None else f"An audio classifier of {len(names)} classes",
        encoder=model.encoder,
        parameters=sum(p.numel() for part in (model.encoder, model.head) if part for p in part.parameters()),
        many=" A clip may have several of them." if model.multi else "",
        code=(_ENCODER if names is None else _PIPELINE).format(rate=model.rate, applied=applied),
        call="embed" if names is None else "tag",
        input=_input(model),
        classes=f"## Classes\n\n{quoted}\n\n" if names else "",
        training=_table(("", "value"), rows) if facts else "Not recorded.",
        evaluation=f"\n## Evaluation\n\n{_evaluation(scores)}\n" if scores else "",
    )


def public(facts: Any) -> Any:
    """Return facts of a card (JSON) with absolute paths reduced to their last part, for publication."""
    if isinstance(facts, dict):
        return {name: public(value) for name, value in facts.items()}
    if isinstance(facts, list):
        return [public(value) for value in facts]
    if not isinstance(facts, str):
        return facts
    if _ABSOLUTE.match(facts):  # folders may have spaces in their names
        return re.split(r"[/\\]", facts.rstrip("/\\"))[-1]
    return _FOLDERS.sub("", facts)


def _scores(model: AudioModel, run: Path) -> list[dict[str, Any]]:
    """Return the run's results for these weights, one per split."""
    path = run / "results.json"
    if not path.is_file():
        return []
    remedy = "export without the run's folder"
    found = parsing.json_object(path, CheckpointError, "the results of a fine-tuning run", remedy)
    fits = list(found["classes"]) == list(model.classes or ())
    records = [record for record in found["results"] if fits and record["step"] == model.training.get("step")]
    # Last and best weights are the same if their steps are.
    return list({record["split"]: record for record in records}.values())


def _front_matter(
    model: AudioModel, title: str, license: str | None, scores: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Return the YAML fields of a model card that the hub reads."""
    task = "feature-extraction" if model.classes is None else "audio-classification"
    front: dict[str, Any] = {}
    if license:
        known = _HUB_LICENSE.fullmatch(license)
        front |= {"license": license} if known else {"license": "other", "license_name": license}
    front |= {
        "library_name": "transformers",
        "pipeline_tag": task,
        "tags": ["asit", "audio", "audio-spectrogram-transformer", "self-supervised-learning"],
    }
    data = model.training.get("data")
    named = [data] if isinstance(data, str) else data if isinstance(data, list) else []
    if datasets := [name for name in named if isinstance(name, str) and _HUB_DATASET.fullmatch(name)]:
        front["datasets"] = datasets
    if not scores:
        return front
    front["metrics"] = list(dict.fromkeys(name for record in scores for name in _values(record)))
    results = [
        {
            "task": {"type": task},
            "dataset": {"name": f"{record['task']}, {record['split']} split", "type": str(record["task"])},
            "metrics": [{"type": name, "value": value} for name, value in _values(record).items()],
        }
        for record in scores
    ]
    front["model-index"] = [{"name": title, "results": results}]
    return front


def _values(record: Mapping[str, Any]) -> dict[str, float]:
    return {name: held["value"] for name, held in record["metrics"].items() if held["value"] is not None}


def _input(model: AudioModel) -> str:
    s, encoder = model.front_end.settings, model.encoder
    seconds = model.front_end.samples_for(model.frames) / model.rate
    rows = {
        "sample rate": f"{s.rate} Hz, resampled by {s.resampler}",
        "spectrogram": f"{s.mels} log-mel bins, {s.window_ms:g} ms windows every {s.shift_ms:g} ms",
        "normalised by": f"mean {s.mean}, standard deviation {s.std}: (x - mean) / (2 std)",
        "length in training": f"{model.frames} frames ({seconds:.3f} s)",
        "shorter clips": {
            "silence": "zeros in the waveform",
            "zero": "0.0 in the log-mel before normalisation",
            "repeat": "the waveform repeated",
        }[s.padding],
        "patches": f"{encoder.patch[0]} frames x {encoder.patch[1]} bins, every {encoder.stride[0]} x "
        f"{encoder.stride[1]}; {encoder.grid[0]} x {encoder.grid[1]} of them",
    }
    return _table(("", "value"), rows.items())


def _evaluation(scores: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for record in scores:
        for name, held in record["metrics"].items():
            if held["value"] is not None:
                low_high = held.get("interval")
                spread = f"{low_high[0]:.4f} to {low_high[1]:.4f}" if low_high else ""
                rows.append((record["split"], name, f"{held['value']:.4f}", spread, record["clips"], record["list"]))
    head = ("split", "metric", "value", "95 % interval", "clips", "hash of their list")
    return f"Task: {scores[0]['task']}.\n\n" + _table(head, rows)


def _table(head: Sequence[str], rows: Any) -> str:
    cells = [[str(cell).replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [list(head), ["---"] * len(head), *cells])
