"""Folders as fine-tuning writes them, made by hand: records, scores, curves and recordings of a few classes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile
import yaml
from numpy.typing import NDArray

from asit.config import FinetuneSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import list_hash
from asit.evaluate import metrics
from asit.report import class_results, finetune_page, pretrain_page, report
from asit.report.charts import chart

HOSTILE = '<script>alert("x")</script>&'
RATE = 16000


class Page(HTMLParser):
    """The tags of a page, which must be balanced, its text, and the cells of its tables."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.html, self.text, self.rows = html, "", [[""]]
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text += data + " "
            if {"td", "th"} & set(self.open):
                self.rows[-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]

    def check_offline(self) -> None:
        """Nothing is loaded from elsewhere, and what is not text can be read aloud."""
        assert not re.search(r"https?:|//[a-z]+\.|@import|url\((?!#)", self.html)
        for tag, attributes in self.found:
            assert tag not in ("link", "iframe", "object")
            for name in ("src", "href", "xlink:href"):
                assert str(attributes.get(name, "#")).startswith(("data:", "#")), (tag, name)
        assert all(attributes.get("alt") for attributes in self.all("img"))
        assert all(attributes.get("aria-label") for attributes in self.all("audio"))
        assert len(self.all("script")) == 1

    def row(self, first: str) -> list[str]:
        return next(row for row in self.rows if row and row[0] == first)


def settings(**changes: Any) -> dict[str, Any]:
    made = FinetuneSettings(data="clips", out="out", model="runs/a/model", task="words", epochs=4)
    return FinetuneSettings.model_validate(made.model_dump() | changes).model_dump(mode="json")


def train_line(step: int) -> dict[str, Any]:
    return {"kind": "train", "step": step, "epoch": step / 50, "loss": 3 - step / 100, "lr": 1e-4,
            "clips_per_second": 40.0, "data_wait": 0.01, "seconds": 3.0 * step,
            "parts": {"gradient_norm": 1.5, "train_accuracy": step / 250}}  # fmt: skip


def validation_line(step: int, name: str) -> dict[str, Any]:
    return {"kind": "validation", "step": step, "loss": 2.5 - step / 100, "metrics": {name: step / 400},
            "clips": 100, "best": True}  # fmt: skip


class Example:
    """What a model scores on a made-up test split; better with a larger `skill`.

    Args:
        classes: names.
        clips: number of clips.
        multi: whether clips have one or two labels, or exactly one.
        prefix: of the clips' names, so that lists can differ.
    """

    def __init__(
        self, classes: Sequence[str], clips: int, skill: float, seed: int = 0, multi: bool = False, prefix: str = "t"
    ) -> None:
        self.classes, self.multi, self.skill = list(classes), multi, skill
        rng = np.random.default_rng([7, clips, len(classes)])  # the same truth for every seed and skill
        self.ids = [f"{prefix}/{i:03d}.wav" for i in range(clips)]
        first = np.arange(clips) % len(classes)
        second = (first + 1 + rng.integers(0, len(classes) - 1, clips)) % len(classes)
        rows = [[a, b] if multi and i % 3 == 0 else [a] for i, (a, b) in enumerate(zip(first, second, strict=True))]
        self.indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
        self.indices = np.array([label for row in rows for label in row])
        self.truth: NDArray[np.int64] = first
        noise = np.random.default_rng([8, seed]).normal(size=(clips, len(classes)))
        logits = noise.astype(np.float32)
        for i, row in enumerate(rows):
            logits[i, row] += skill
        if multi:
            self.scores = 1 / (1 + np.exp(1 - logits))
        else:
            self.scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)

    def record(
        self, weights: str = "last", step: int | None = 200, split: str = "test", root: Path = Path("/nowhere")
    ) -> dict[str, Any]:
        """The result record; root: where the recordings lie."""
        made: dict[str, Any]
        if self.multi:
            targets = np.zeros(self.scores.shape, bool)
            targets[np.repeat(np.arange(len(targets)), np.diff(self.indptr)), self.indices] = True
            made = metrics.multi_label(self.scores, targets, self.classes, draws=50)
        else:
            made = metrics.single_label(self.scores, self.truth, self.classes, draws=50)
            answers = self.scores.argmax(1)
            made["mistakes"] = [
                {"path": str(root / self.ids[i]), "start": 0.0, "seconds": 0.5,
                 "truth": self.classes[self.truth[i]], "predicted": self.classes[answers[i]],
                 "score": float(self.scores[i].max())}
                for i in np.flatnonzero(answers != self.truth)
            ]  # fmt: skip
        kind = "multi" if self.multi else "single"
        about = {"task": "words", "kind": kind, "split": split, "weights": weights, "step": step}
        return {**about, "list": list_hash(self.ids), **made}

    def write_scores(self, folder: Path, weights: str = "last", order: NDArray[np.int64] | None = None) -> None:
        """scores/test-WEIGHTS.npz, the clips in another order where one is given."""
        assert order is None or not self.multi
        rows = np.arange(len(self.ids)) if order is None else order
        (folder / "scores").mkdir(exist_ok=True)
        np.savez(
            folder / "scores" / f"test-{weights}.npz",
            ids=np.array(self.ids)[rows],
            scores=self.scores[rows].astype(np.float32),
            indptr=self.indptr,
            indices=self.indices if order is None else self.indices[rows],
            weights=np.ones(len(self.indices), np.float32),
        )


def write_run(
    folder: Path, example: Example | None, *, root: Path | None = None, best: bool = False, **changes: Any
) -> Path:
    """A run's folder; without an example one that has not got to its scores.

    Args:
        folder: to make.
        example: what was scored.
        root: where its recordings are to be written; None: they are nowhere.
        best: whether weights chosen by validation were scored as well.
        changes: of the settings.
    """
    folder.mkdir(parents=True)
    config = settings(**changes)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "steps": 200}))
    name = "mAP" if example is not None and example.multi else "accuracy"
    steps = range(10, 210, 10) if example is not None else range(10, 60, 10)
    lines = [train_line(step) for step in steps]
    lines += [validation_line(step, name) for step in range(50, steps[-1] + 1, 50)]
    if example is not None:
        lines += [{"kind": kind, "step": 200, "weights": "last", "metrics": {name: 0.9}} for kind in ("final", "test")]
        lines.append({"kind": "event", "step": 200, "text": "finished: 200 steps in 10 min"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "log.txt").write_text("started\n")
    if example is None:
        return folder
    audio = root or folder / "nowhere"
    clips = [Clip(str(audio / name), 1.0, RATE, 1, group=f"speaker {i % 5}") for i, name in enumerate(example.ids)]
    Catalogue.from_clips(clips, root=audio).write(folder / "catalogue.jsonl")
    if root is not None:
        tone = 0.1 * np.sin(np.arange(RATE // 2) * 0.2)
        for clip in clips:
            if not Path(clip.path).exists():
                Path(clip.path).parent.mkdir(parents=True, exist_ok=True)
                soundfile.write(clip.path, tone, RATE)
    found = [example.record(root=audio)]
    example.write_scores(folder)
    if best:
        found.append(example.record("best", 150, root=audio))
        example.write_scores(folder, "best")
    kind = "multi" if example.multi else "single"
    held = {"task": "words", "kind": kind, "classes": example.classes, "model": config["model"], "results": found}
    (folder / "results.json").write_text(json.dumps(held))
    return folder


def write_folds(folder: Path, examples: Sequence[Example], finished: bool = True, **changes: Any) -> Path:
    """A cross-validation's folder, one fold for each example."""
    folder.mkdir(parents=True)
    sides = settings()["sides"] | {"fold": "all"}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings(**changes) | {"sides": sides}))
    written = []
    for number, example in enumerate(examples, 1):
        write_run(folder / f"fold-{number}", example)
        written.append({"fold": str(number), "results": [example.record()]})
    held = {"task": "words", "kind": "single", "classes": examples[0].classes, "folds": written, "summary": {}}
    if finished:
        (folder / "results.json").write_text(json.dumps(held))
    return folder


@pytest.fixture(autouse=True, scope="session")
def one_drawing_a_chart() -> Iterator[None]:
    """Draw each chart once in all tests: 18 charts of a page take most of its time, and most tests have the same."""
    drawn: dict[str, Any] = {}

    def kept(*arguments: Any, **options: Any) -> Any:
        key = repr((arguments, options))
        if key not in drawn:
            drawn[key] = chart(*arguments, **options)
        return drawn[key]

    with pytest.MonkeyPatch.context() as patch:
        for module in (class_results, finetune_page, pretrain_page):
            patch.setattr(module, "chart", kept)
        yield


@pytest.fixture
def parse() -> type[Page]:
    """The parser of a page."""
    return Page


@pytest.fixture
def page_of() -> Callable[..., Page]:
    """`page_of(run)`: the page that `report(run)` writes."""
    return lambda *arguments, **options: Page(report(*arguments, **options).read_text())


@pytest.fixture
def make() -> SimpleNamespace:
    """Makers of examples: make.example(...), make.run(...), make.folds(...)."""
    return SimpleNamespace(example=Example, run=write_run, folds=write_folds)


@pytest.fixture
def words() -> list[str]:
    """Ten class names, one of them hostile."""
    return ["yes", "no", "up", "down", "left", "right", "on", "off", "stop", HOSTILE]
