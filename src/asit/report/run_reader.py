"""Read the folder of a run, whether it is finished, stopped or still being written."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from asit.errors import AsitError, ConfigError
from asit.io import parsing

Line = dict[str, Any]
Kind = Literal["pretraining", "fine-tuning", "cross-validation"]


@dataclass
class RunFolder:
    """The content of a run's folder; parts that are missing are empty.

    Attributes:
        folder: the run's folder.
        config: the resolved settings, nested.
        environment: versions, device, precision and the like.
        train, probes, validation, events: lines of metrics.jsonl by kind, ordered by step. Of steps that were repeated
            after a resume only the later lines are kept. Final scores are in `results` instead.
        damaged: unreadable lines of metrics.jsonl, except the last one, which may be incomplete in a running run.
        catalogue: the header line of the catalogue.
        figures: step -> npz file.
        log: the last lines of log.txt.
        checkpoints: names in checkpoints/.
        model: whether model/card.json exists.
        results: results.json, which fine-tuning and cross-validation write at their end.
        folds: fold folders of a cross-validation in natural order.
    """

    folder: Path
    config: Line = field(default_factory=dict)
    environment: Line = field(default_factory=dict)
    train: list[Line] = field(default_factory=list)
    probes: list[Line] = field(default_factory=list)
    validation: list[Line] = field(default_factory=list)
    events: list[Line] = field(default_factory=list)
    damaged: int = 0
    catalogue: Line = field(default_factory=dict)
    figures: dict[int, Path] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    checkpoints: list[str] = field(default_factory=list)
    model: bool = False
    results: Line = field(default_factory=dict)
    folds: list[Path] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> RunFolder:
        """Read a run's folder.

        Raises:
            AsitError: there is no such folder, or it holds neither config.yaml nor metrics.jsonl.
            ConfigError: config.yaml, environment.json or results.json cannot be parsed.
        """
        _check_is_run(folder)
        run = cls(folder, config=_mapping(folder / "config.yaml"), environment=_mapping(folder / "environment.json"))
        run._read_metrics(folder / "metrics.jsonl")
        run.catalogue = _header(folder / "catalogue.jsonl")
        steps = ((re.fullmatch(r"step-(\d+)", path.stem), path) for path in folder.glob("figures/step-*.npz"))
        run.figures = dict(sorted((int(match[1]), path) for match, path in steps if match))
        if (folder / "log.txt").is_file():
            with (folder / "log.txt").open("rb") as file:
                file.seek(max(0, file.seek(0, 2) - 8192))
                run.log = file.read().decode("utf-8", "replace").splitlines()[-40:]
        run.checkpoints = sorted(p.name for p in folder.glob("checkpoints/*") if not p.name.startswith("."))
        run.model = (folder / "model" / "card.json").is_file()
        run.results = _mapping(folder / "results.json")
        folds = [path for path in folder.glob("fold-*") if (path / "config.yaml").is_file()]
        run.folds = sorted(folds, key=lambda path: _natural(path.name))
        return run

    @property
    def kind(self) -> Kind:
        """The kind of run, by its settings and its folder."""
        if "task" not in self.config:
            return "pretraining"
        return "cross-validation" if self.folds or "folds" in self.results else "fine-tuning"

    @property
    def step(self) -> int:
        """Optimiser steps done, by the last line of any kind."""
        return max((int(line["step"]) for lines in (self.train, self.events) for line in lines[-1:]), default=0)

    @property
    def steps(self) -> int | None:
        """Steps of the whole schedule: as recorded, else estimated from the epochs; None if unknown."""
        recorded = self.environment.get("steps")
        if isinstance(recorded, int) and recorded > 0:
            return recorded
        epochs = self.config.get("epochs")
        last = self.train[-1] if self.train else {}
        if not epochs or not last.get("epoch") or not last.get("step"):
            return None
        return round(last["step"] / last["epoch"]) * int(epochs)

    @property
    def verdict(self) -> tuple[str, str]:
        """State (finished, stopped, unfinished or empty), and a sentence about it."""
        if not self.train:
            return "empty", "Nothing trained yet: no step has been recorded."
        done, total = self.step, self.steps
        of = f"step {done:,}" + (f" of {total:,}" if total else "")
        # The last step need not be a logged one, so the final event counts too.
        last = self.events[-1] if self.events else {}
        text = str(last.get("text", ""))
        for state in ("finished", "stopped"):
            if text.startswith(state) and int(last["step"]) >= done:
                return state, f"{text[0].upper()}{text[1:]}."
        if total and done >= total:
            return "finished", f"Finished: {of}."
        return "unfinished", f"Still running, or cut off: the last record is of {of}."

    @property
    def resumes(self) -> list[float]:
        """Steps from which the run was resumed."""
        starts = ("resumed", "goes on")  # the second in runs of earlier versions
        return [float(event["step"]) for event in self.events if str(event.get("text", "")).startswith(starts)]

    def _read_metrics(self, path: Path) -> None:
        if not path.is_file():
            return
        kinds: dict[str, list[Line]] = {
            "train": self.train,
            "probe": self.probes,
            "validation": self.validation,
            "test": [],
            "event": self.events,
        }
        with path.open("rb") as file:
            raw = file.read().split(b"\n")
        for number, text in enumerate(raw):
            try:
                line = parsing.from_json(text)
                lines, step = kinds[line["kind"]], line["step"]
                if type(step) is not int or (line["kind"] in ("train", "validation") and not _of_numbers(line)):
                    raise ValueError("a line with other values than a run writes")
            except (ValueError, KeyError, TypeError):
                self.damaged += bool(text.strip()) and number < len(raw) - 1
                continue
            if line["kind"] != "event":  # a resumed run repeats some steps
                while lines and int(lines[-1]["step"]) >= step:
                    lines.pop()
            lines.append(line)


def _check_is_run(folder: Path) -> None:
    expected = "a run's folder: config.yaml and metrics.jsonl, as `asit pretrain` and `asit finetune` write them"
    remedy = "pass the folder that was given to the run as --out"
    if not folder.is_dir():
        raise AsitError(f"{folder} is {'a file' if folder.exists() else 'not there'}", expected, remedy)
    if _holds_run(folder, any):
        return
    names = sorted(p.name + "/" * p.is_dir() for p in folder.iterdir())
    seen = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "nothing"
    runs = [p.parent for p in sorted(folder.glob("*/metrics.jsonl"))]
    if not runs and _holds_run(folder.parent, all):  # such as RUN/model
        runs = [folder.parent]
    if runs:
        remedy = "this looks like a run: " + ", ".join(map(str, runs[:3]))
    raise AsitError(f"{folder} is not a run: it holds {seen}", expected, remedy)


def _holds_run(folder: Path, enough: Any) -> bool:
    return bool(enough((folder / name).is_file() for name in ("config.yaml", "metrics.jsonl")))


def _mapping(path: Path) -> Line:
    if not path.is_file():
        return {}
    try:
        text = path.read_bytes()
        content = parsing.from_json(text) if path.suffix == ".json" else parsing.from_yaml(text)
    except (OSError, parsing.Malformed) as error:
        remedy = "restore it, or delete it and report again"
        raise ConfigError(f"{path} cannot be read: {error}", "the file as the run wrote it", remedy) from error
    return content if isinstance(content, dict) else {}


def _of_numbers(line: Mapping[str, Any], depth: int = 3) -> bool:
    """Whether all values are numbers or nested groups of numbers; texts are allowed for "kind" alone."""
    return all(
        value is None
        or isinstance(value, int | float)
        or (isinstance(value, str) and depth == 3 and name == "kind")
        or (isinstance(value, Mapping) and depth > 0 and _of_numbers(value, depth - 1))
        for name, value in line.items()
    )


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key that puts fold-2 before fold-10."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


def _header(path: Path) -> Line:
    if not path.is_file():
        return {}
    with path.open("rb") as file:
        try:
            line = parsing.from_json(file.readline())
        except parsing.Malformed:
            return {}
    return line if isinstance(line, dict) else {}
