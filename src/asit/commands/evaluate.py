"""The verbs evaluate and probe: options, and what they print and write."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro

from asit.config import TableSettings
from asit.errors import ConfigError
from asit.terminal.options import Device, Model, Table, Threads, model_or_included, parse, pick

if TYPE_CHECKING:
    from asit.data.catalogue.catalogue import Catalogue
    from asit.evaluate.feature_cache import Store
    from asit.evaluate.frozen_scores import FrozenSettings
    from asit.model.audio_model import AudioModel
    from asit.runtime import World

V = TypeVar("V")


@dataclass
class ProbeOptions:
    model: Model
    table: Annotated[str, tyro.conf.Positional]
    """Labelled table (CSV, TSV, JSONL) with path, label, split (train, test); or a catalogue or shards with these."""
    clips: int = 1_000_000
    """At most this many clips of each split."""
    seed: int = 0
    """Of the draw of clips and of the folds that choose the regularisation."""
    cache: str = "none"
    """Folder that features are kept in, such as one given to asit evaluate; none: not kept."""
    out: str | None = None
    """Also write the numbers as JSON."""
    table_settings: Table = field(default_factory=TableSettings)


def probe(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ProbeOptions, prog, summary, given)
    import asit
    from asit.evaluate.feature_cache import open_store
    from asit.evaluate.frozen import accuracies, labelled_clips, linear_probes

    clips = labelled_clips(options.table, options.clips, options.seed, options.table_settings)
    store = open_store(options.cache)
    found = linear_probes(asit.load(options.model), clips, seed=options.seed, baselines=True, store=store)
    print(found.text())
    _write(options.out, accuracies(found))
    return 0


@dataclass
class EvaluateOptions:
    models: Annotated[tuple[str, ...], tyro.conf.Positional]
    """Model folder, run folder or file of weights; the hub's owner/name[@revision]; or a name of asit models. Several
    are compared by probes of their frozen encoders; none: the encoder that is part of asit."""
    data: str
    """Catalogue, table (CSV, TSV, JSONL), or folder with a folder for each class."""
    probe: str | None = None
    """Probes of the frozen encoder, separated by commas: linear, knn, prototype. By default linear,knn for an encoder;
    a model with a head is scored by its head."""
    pooling: str | None = None
    """Features of linear, knn and --verify, separated by commas: class, mean, class+mean, class+mean+std, time-mean,
    mel-mean or mean+std. By default class+mean+std, of --verify class+mean."""
    layers: str = ""
    """Blocks whose outputs are concatenated, separated by commas, such as 0,2,5 (-1 the last); by default the last."""
    shares: str = ""
    """Few labels: shares of the training labels, separated by commas, such as 0.01,0.1,1."""
    per_class: str = ""
    """Few labels: training clips of each class, separated by commas, such as 1,5,20."""
    seeds: int = 1
    """Draws of the labels, and trainings of the prototype probe."""
    seed: int = 0
    """The first of these seeds; also of folds, bootstrap, drawn trials and untrained weights."""
    baselines: bool = False
    """Also evaluate the same architecture untrained, and log-mel statistics."""
    verify: bool = False
    """Verification instead of probes: EER and minDCF of the cosine of two clips' embeddings."""
    trials: str | None = None
    """List of trials for --verify, lines such as: 1 a.wav b.wav; by default drawn from the test split."""
    trials_root: str | None = None
    """Folder that the list's paths are relative to; by default the catalogue's."""
    most_trials: int = 100_000
    """Trials drawn where there is no list."""
    verify_by: Literal["auto", "group", "label"] = "auto"
    """What the two clips of a trial share; auto: the group (speaker) where there are groups, else the label."""
    train: str = ""
    """Splits to fit on, separated by commas; by default train, and AudioSet's balanced and unbalanced."""
    validation: str = ""
    """Splits that choose the regularisation; by default validation."""
    test: str = ""
    """Splits to score; by default test."""
    fold: str | None = None
    """A fold to test on, or all: each in turn. By default all, where the data have folds and no splits. A model with a
    head is scored on one fold."""
    labels: Literal["auto", "single", "multi"] = "auto"
    """One label a clip or several; auto: several where any clip has them."""
    missing_labels: Literal["error", "skip", "background"] = "error"
    """What to do with clips that have no label: stop, leave them out, or make them the class background."""
    unseen_classes: Literal["error", "skip"] = "error"
    """What to do with test clips of a class without training clips: stop, or leave them out."""
    allow_shared_groups: bool = False
    """A group may be in several splits, as speakers are in speaker identification."""
    clips: int | None = None
    """About so many clips of each split, drawn with the seed."""
    seconds: float | None = None
    """Cut or pad every clip to this length; by default all of a clip is used, in windows where it is long."""
    window_overlap: float = 0.0
    """For a model with a head: overlap of the windows of a long clip, as a share."""
    precision: Literal["auto", "float32", "bf16"] = "auto"
    """Arithmetic of the encoder; auto: for a model with a head the one it was trained with, else float32."""
    device: Device = "auto"
    threads: Threads = 0
    bad_files: float = 0.1
    """Share of unreadable clips above which this fails."""
    cache: str | None = None
    """Folder that features are kept in; by default the user's cache folder; none: not kept."""
    cache_limit_gb: float = 20.0
    """Maximum size of this folder; the least recently used features are deleted first."""
    save: str | None = None
    """Fit one linear head (logistic regression), score it, and save it with the encoder in this folder as a model that
    asit tag, export and serve take."""
    overwrite: bool = False
    """Replace what --save names."""
    out: str | None = None
    """Also write all results as JSON, with per-class metrics, confusions and mistakes. Of several models: a folder for
    results.json, table.csv, table.md and figure.png, of which asit report makes a page."""
    table: Table = field(default_factory=TableSettings)


def evaluate(prog: str, summary: str, given: list[str]) -> int:
    options = parse(EvaluateOptions, prog, summary, given)
    import asit
    from asit import runtime
    from asit.evaluate.feature_cache import open_store
    from asit.evaluate.frozen import open_catalogue

    if (options.trials or options.trials_root) and not options.verify:
        raise ConfigError("--trials without --verify", "both", "add --verify")
    if options.verify and options.probe is not None:
        raise ConfigError("--verify and --probe", "one of them", "run it twice: features come from the cache")
    if len(options.models) > 1 and options.save is not None:
        raise ConfigError("--save with several models", "one model", "compare them first, then save a head of the best")
    if len(options.models) > 1:
        return _rank(options)
    if not options.models:
        options = replace(options, models=(model_or_included(None),))
    (named,) = options.models
    if options.save is not None and (options.verify or options.probe is not None):
        other = "--verify" if options.verify else "--probe"
        raise ConfigError(f"--save and {other}", "one of them", f"leave {other} out: a linear head is saved")
    if options.save is not None and Path(options.save).exists() and not options.overwrite:
        raise ConfigError(f"--save {options.save} exists", "a folder that is free", "name another, or pass --overwrite")
    with runtime.world(options.device, options.threads) as world:
        model = asit.load(named, world.device)
        catalogue = open_catalogue(options.data, model, world, bad_files=options.bad_files, table=options.table)
        if model.head is not None and options.probe is None and not options.verify and options.save is None:
            found = _score_classifier(options, model, catalogue, world)
        else:
            store = open_store(options.cache, options.cache_limit_gb)
            how = _verify if options.verify else _probe if options.save is None else _save
            found = how(options, model, catalogue, world, store)
    if found is not None:
        text, facts = found
        print(text)
        _write(options.out, {"model": named, **facts})
    return 0


def _rank(options: EvaluateOptions) -> int:
    from asit import runtime
    from asit.evaluate.encoder_ranking import rank_encoders
    from asit.evaluate.feature_cache import open_store
    from asit.report import ranking_table

    if options.verify:
        raise ConfigError("--verify with several models", "one model", "verify with each of them in turn")
    out = None if options.out is None else Path(options.out)
    if out is not None and not ranking_table.may_write(out):
        raise ConfigError(
            f"--out {out} is a file, or a folder of something else",
            "for several models: a new folder, or one that asit evaluate wrote",
            "name another one",
        )
    store = open_store(options.cache, options.cache_limit_gb)
    with runtime.world(options.device, options.threads) as world:
        settings, table = _frozen_settings(options), options.table
        found = rank_encoders(options.models, options.data, settings, world=world, store=store, table=table)
    if found is not None:
        print(ranking_table.markdown(found), end="")
        if out is not None:
            ranking_table.write(found, out)
    return 0


Found = tuple[str, dict[str, Any]] | None
"""What is printed, and what is written; None in all processes but the main one."""


def _score_classifier(options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World) -> Found:
    from asit import runtime
    from asit.evaluate.classifier_scoring import score_classifier
    from asit.evaluate.result_records import summary_line

    trained_in = str(model.training.get("precision", "float32"))
    settings = replace(_frozen_settings(options), test=_split_words(options.test) or ("test",))
    precision = runtime.precision(trained_in if options.precision == "auto" else options.precision, world)
    how: dict[str, Any] = {"world": world, "precision": precision, "overlap": options.window_overlap}
    records = score_classifier(model, catalogue, settings, **how)
    if not world.main:
        return None
    facts = {"task": records[0]["task"], "kind": records[0]["kind"], "classes": list(model.classes or ())}
    return "\n".join(summary_line(record) for record in records), {**facts, "results": records}


def _probe(
    options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World, store: Store | None
) -> Found:
    from asit.evaluate.frozen import evaluate_frozen

    found = evaluate_frozen(model, catalogue, _frozen_settings(options), world=world, store=store)
    if found is None:
        return None
    facts = {"task": found.task, "kind": found.kind, "classes": list(found.classes)}
    return found.text(), {**facts, "results": found.records, "summary": found.summary()}


def _save(
    options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World, store: Store | None
) -> Found:
    from asit.evaluate.saved_probe import fit_classifier

    assert options.save is not None
    settings = _frozen_settings(options)
    if options.pooling is None and not model.encoder.prefix:
        settings = replace(settings, pooling=("mean+std",))
    found = fit_classifier(model, catalogue, settings, world=world, store=store, name=options.models[0])
    if found is None:
        return None
    found.model.save(options.save, options.overwrite)
    text = f"{found.text()}\n{options.save}: saved; asit tag {options.save} FILE labels recordings"
    scores = found.scores
    facts = {"task": scores.task, "kind": scores.kind, "classes": list(scores.classes), "saved": options.save}
    return text, {**facts, "results": scores.records, "summary": scores.summary()}


def _frozen_settings(options: EvaluateOptions) -> FrozenSettings:
    from asit.evaluate.frozen_scores import FrozenSettings

    return pick(
        FrozenSettings,
        options,
        probes=_split_words(options.probe or "linear,knn"),  # checked there
        shares=_numbers(options.shares, float, "--shares", "0.01,0.1,1"),
        per_class=_numbers(options.per_class, int, "--per-class", "1,5,20"),
        kind=options.labels,
        missing=options.missing_labels,
        unseen=options.unseen_classes,
        **_feature_settings(options),
    )


def _verify(
    options: EvaluateOptions, model: AudioModel, catalogue: Catalogue, world: World, store: Store | None
) -> Found:
    from asit.evaluate.verification import VerificationSettings, verification_text, verify

    settings = pick(
        VerificationSettings,
        options,
        root=options.trials_root,
        most=options.most_trials,
        by=options.verify_by,
        **_feature_settings(options),
    )
    found = verify(model, catalogue, settings, world=world, store=store)
    task = str(catalogue.header.get("task") or "")
    facts = {"task": task, "kind": "verification", "results": found}
    return None if found is None else (verification_text(found), facts)


def _feature_settings(options: EvaluateOptions) -> dict[str, Any]:
    """Return the fields of `FeatureSettings` whose options are written differently; splits only where given."""
    from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION

    default = "class+mean" if options.verify else "class+mean+std"
    return {
        "pooling": _split_words(default if options.pooling is None else options.pooling),
        "layers": _numbers(options.layers, int, "--layers", "0,2,5"),
        "precision": "bf16" if options.precision == "bf16" else "float32",
        "train": _split_words(options.train) or TRAIN,
        "validation": _split_words(options.validation) or VALIDATION,
        "test": _split_words(options.test) or TEST,
    }


def _write(out: str | None, value: Any) -> None:
    if out is not None:
        from asit.io import atomic

        atomic.write_json(Path(out), value)


def _split_words(text: str) -> tuple[str, ...]:
    return tuple(word.strip() for word in text.split(",") if word.strip())


def _numbers(text: str, kind: Callable[[str], V], name: str, example: str) -> tuple[V, ...]:
    try:
        return tuple(kind(word) for word in _split_words(text))
    except ValueError:
        raise ConfigError(
            f"{name} {text}", "numbers separated by commas", f"write them as in {name} {example}"
        ) from None
