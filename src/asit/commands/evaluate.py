"""The verbs evaluate and probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from asit.errors import ConfigError
from asit.terminal.options import parse

if TYPE_CHECKING:
    from asit.data.catalogue.catalogue import Catalogue
    from asit.evaluate.feature_cache import Store
    from asit.model.audio_model import AudioModel
    from asit.runtime import World

V = TypeVar("V")


@dataclass
class ProbeOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model."""
    table: Annotated[str, tyro.conf.Positional]
    """Labelled table (CSV, TSV, JSONL) with path, label, split (train, test); or a catalogue or shards with these."""
    clips: int = 1_000_000
    """At most this many clips on each side."""
    seed: int = 0
    """Of the draw of clips and of the folds that choose the regularisation."""
    cache: str = "none"
    """Folder that features are kept in, such as one given to asit evaluate; none: not kept."""
    out: str | None = None
    """Also write the numbers as JSON."""


def probe(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ProbeOptions, prog, summary, given)
    import asit
    from asit.evaluate import quick_probe
    from asit.evaluate.feature_cache import open_store

    clips = quick_probe.labelled(options.table, options.clips, options.seed)
    store = open_store(options.cache)
    model = asit.load(options.model)
    compared = quick_probe.compare(model, clips, seed=options.seed, store=store)
    print(compared.text())
    _write(options.out, compared.record())
    return 0


@dataclass
class EvaluateOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model: of pretraining (an encoder) or of fine-tuning (with a head)."""
    data: str
    """Catalogue, table (CSV, TSV, JSONL), or folder with a folder for each class."""
    probe: str | None = None
    """Probes of the frozen encoder, parted by commas: linear, knn, prototype. By default linear,knn for an encoder; a
    model with a head is scored by its head."""
    pooling: str = "class+mean"
    """What linear, knn and --verify read, parted by commas: class, mean, class+mean, time-mean, mel-mean, mean+std."""
    shares: str = ""
    """Few labels: shares of the training labels, parted by commas, such as 0.01,0.1,1."""
    per_class: str = ""
    """Few labels: training clips of each class, parted by commas, such as 1,5,20."""
    seeds: int = 1
    """Draws of the labels, and trainings of a probe that is trained."""
    seed: int = 0
    """The first of these; also of folds, bootstrap, drawn trials and untrained weights."""
    baselines: bool = False
    """Beside the model: the same architecture untrained, and statistics of the log-mel."""
    verify: bool = False
    """Verification instead of probes: EER and minDCF of the cosine of two clips' embeddings."""
    trials: str | None = None
    """List of trials for --verify, lines such as: 1 a.wav b.wav; by default drawn from the test side."""
    trials_root: str | None = None
    """Folder that the list's paths count from; by default the catalogue's."""
    most_trials: int = 100_000
    """Trials drawn where there is no list."""
    verify_by: Literal["auto", "group", "label"] = "auto"
    """What the two clips of a trial share; auto: the group (speaker) where there are groups, else the label."""
    train: str = ""
    """Splits to fit on, parted by commas; by default train, and AudioSet's balanced and unbalanced."""
    validation: str = ""
    """Splits that choose the regularisation; by default validation."""
    test: str = ""
    """Splits to score; by default test."""
    fold: str | None = None
    """A fold as the test side, or all: each in turn. By default all, where the data have folds and no splits. A model
    with a head scores one fold."""
    labels: Literal["auto", "single", "multi"] = "auto"
    """One label a clip or several; auto: several where any clip has them."""
    missing_labels: Literal["error", "skip"] = "error"
    """What to do with clips that have no label."""
    unseen_classes: Literal["error", "skip"] = "error"
    """What to do with test clips of a class that no training clip has: stop, or leave them out and say so."""
    allow_shared_groups: bool = False
    """A group may be on both sides, as speakers are in speaker identification."""
    clips: int | None = None
    """About so many clips on each side, drawn with the seed."""
    seconds: float | None = None
    """Cut or pad every clip to this length; by default clips are taken whole, long ones in windows."""
    window_overlap: float = 0.0
    """Of a model with a head: overlap of the windows over which a long clip is scored, as a share."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Arithmetic of the encoder; auto: of a model with a head the one it was trained with, else float32."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where the encoder runs."""
    threads: int = 0
    """CPU threads of a process; 0: torch's choice."""
    bad_files: float = 0.1
    """Share of unreadable clips above which this fails."""
    cache: str | None = None
    """Folder that features are kept in; by default the user's cache folder; none: not kept."""
    cache_limit_gb: float = 20.0
    """Size that this folder is kept to; what has not been used for longest goes first."""
    out: str | None = None
    """Also write all results as JSON, with per-class rows, confusions and mistakes."""


def evaluate(prog: str, summary: str, given: list[str]) -> int:
    options = parse(EvaluateOptions, prog, summary, given)
    import asit
    from asit import runtime
    from asit.evaluate.feature_cache import open_store
    from asit.evaluate.frozen import open_data

    if (options.trials or options.trials_root) and not options.verify:
        raise ConfigError("--trials without --verify", "both", "add --verify")
    if options.verify and options.probe is not None:
        raise ConfigError("--verify and --probe", "one of them", "run it twice: features come from the cache")
    with runtime.world(options.device, options.threads) as world:
        model = asit.load(options.model, world.device)
        catalogue = open_data(options.data, model, world, bad_files=options.bad_files)
        if model.head is not None and options.probe is None and not options.verify:
            return _scored(options, model, catalogue, world)
        store = open_store(options.cache, options.cache_limit_gb)
        if options.verify:
            return _verified(options, model, catalogue, world, store)
        return _probed(options, model, catalogue, world, store)


def _scored(options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World) -> int:
    """The score of a model with a head."""
    from asit import runtime
    from asit.evaluate import scoring
    from asit.evaluate.trained_head import score_model

    card = str(model.training.get("precision", "float32"))
    trained_in = card if options.precision == "auto" else options.precision
    records = score_model(
        model,
        catalogue,
        splits=_words(options.test) or ("test",),
        world=world,
        precision=runtime.precision(trained_in, world),
        fold=options.fold,
        overlap=options.window_overlap,
        bad_files=options.bad_files,
        missing=options.missing_labels,
        shared_groups=options.allow_shared_groups,
        seed=options.seed,
    )
    if world.main:
        print("\n".join(scoring.sentence(record) for record in records))
        first = records[0]
        facts = {"task": first["task"], "kind": first["kind"], "classes": list(model.classes or ())}
        _write(options.out, {**facts, "model": options.model, "results": records})
    return 0


def _probed(
    options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World, store: Store | None
) -> int:
    from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION
    from asit.evaluate import frozen
    from asit.evaluate.probe_scores import Ask

    ask = Ask(
        probes=_words(options.probe or "linear,knn"),  # type: ignore[arg-type]  # checked there
        pooling=_words(options.pooling),  # type: ignore[arg-type]
        shares=_numbers(options.shares, float, "--shares", "0.01,0.1,1"),
        per_class=_numbers(options.per_class, int, "--per-class", "1,5,20"),
        seeds=options.seeds,
        seed=options.seed,
        baselines=options.baselines,
        fold=options.fold,
        train=_words(options.train) or TRAIN,
        validation=_words(options.validation) or VALIDATION,
        test=_words(options.test) or TEST,
        kind=options.labels,
        missing=options.missing_labels,
        unseen=options.unseen_classes,
        allow_shared_groups=options.allow_shared_groups,
        clips=options.clips,
        seconds=options.seconds,
        precision="bf16" if options.precision == "bf16" else "float32",
        bad_files=options.bad_files,
    )
    found = frozen.evaluate(model, catalogue, ask, world=world, store=store)
    if found is not None:
        print("\n".join([*found.notes, found.text()]))
        facts = {"task": found.task, "kind": found.kind, "classes": list(found.classes), "model": options.model}
        _write(options.out, {**facts, "results": found.records, "summary": found.summary()})
    return 0


def _verified(
    options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World, store: Store | None
) -> int:
    from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION
    from asit.evaluate.verification import AskVerify, verify

    ask = AskVerify(
        pooling=_words(options.pooling),  # type: ignore[arg-type]  # checked there
        trials=options.trials,
        root=options.trials_root,
        most=options.most_trials,
        seed=options.seed,
        by=options.verify_by,
        baselines=options.baselines,
        seconds=options.seconds,
        precision="bf16" if options.precision == "bf16" else "float32",
        bad_files=options.bad_files,
        train=_words(options.train) or TRAIN,
        validation=_words(options.validation) or VALIDATION,
        test=_words(options.test) or TEST,
    )
    found = verify(model, catalogue, ask, world=world, store=store)
    if found is not None:
        print("\n".join([*found.notes, found.text()]))
        facts = {"task": str(catalogue.header.get("task") or ""), "kind": "verification", "model": options.model}
        _write(options.out, {**facts, "results": found.records})
    return 0


def _write(out: str | None, value: Any) -> None:
    if out is not None:
        from asit.io.atomic import write_json

        write_json(Path(out), value)


def _words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str, kind: Callable[[str], V], name: str, example: str) -> tuple[V, ...]:
    try:
        return tuple(kind(word) for word in _words(text))
    except ValueError:
        raise ConfigError(f"{name} {text}", "numbers parted by commas", f"write them as in {name} {example}") from None
