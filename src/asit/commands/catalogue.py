"""The verb catalogue."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from asit.config import FinetuneSettings, FrontEndSettings, TableSettings, presets
from asit.errors import ConfigError
from asit.terminal.options import Table, parse

if TYPE_CHECKING:
    from asit.data.catalogue.catalogue import Catalogue
    from asit.data.corpora import Corpus


@dataclass
class CatalogueOptions:
    source: Annotated[str, tyro.conf.Positional]
    """Folder of recordings, searched at all levels, a table (CSV, TSV, JSONL, Parquet) with a path
    column, or annotations (Raven, Audacity, Praat); or, with ROOT, a
    known data set: audioset, esc50, speech-commands-v1, speech-commands-v2, voxceleb1."""
    out: str
    """The catalogue to write, such as c.jsonl."""
    root: Annotated[str | None, tyro.conf.Positional] = None
    """Where the data set was unpacked."""
    labels: Literal["auto", "folder", "annotations", "none"] = "auto"
    """Of a folder. folder: label each recording by its sub-folder (CLASS, SPLIT/CLASS or CLASS/SPLIT); annotations: the
    parts that the files of Raven, Audacity or Praat in it annotate; auto: these with --window, else no labels; none: no
    labels."""
    table: Table = field(default_factory=TableSettings)
    incomplete: bool = False
    """Of a data set: accept missing clips."""
    most_missing: float | None = None
    """Of audioset: largest share of a split's segments without a clip; 0.3 if not given."""
    test_root: str | None = None
    """Of speech-commands-v1: folder of the test archive, if it is neither in ROOT nor beside it."""
    workers: int | Literal["auto"] = "auto"
    """Processes; auto: one per CPU."""
    check: Literal["full", "header"] = "full"
    """full: decode every file, which finds truncated, silent and non-finite ones; header: only open it."""
    checksum: bool = False
    """Store each file's SHA-256."""
    bad_files: float = 0.1
    """Largest share of unusable files."""
    statistics_clips: int = 1000
    """Files that mean and std are measured on; 0: not measured."""
    seed: int = 0
    """Of the sample of these files."""
    restart: bool = False
    """Discard the results of an interrupted scan."""
    front_end: FrontEndSettings = field(default_factory=FrontEndSettings)


def catalogue(prog: str, summary: str, given: list[str]) -> int:
    options = parse(CatalogueOptions, prog, summary, given)
    from asit.data.catalogue import scan
    from asit.data.catalogue.listing import describe_ignored
    from asit.progress import counter

    corpus = _corpus(options, prog)
    names = (
        "front_end",
        "workers",
        "check",
        "checksum",
        "bad_files",
        "statistics_clips",
        "restart",
        "seed",
        "labels",
        "table",
    )
    settings: dict[str, Any] = {name: getattr(options, name) for name in names}
    if corpus:
        print(corpus.table(), flush=True)
        # Test sets are scored completely, and Speech Commands and AudioSet have classes of silence.
        settings |= {"rows": corpus.rows(), "facts": corpus.header(), "silence_db": None}
    source = corpus.root if corpus else options.source
    made = scan.build(source, options.out, progress=counter("checking files"), **settings)
    header = made.header
    print(f"{options.out}: {len(made)} clips, {header['seconds'] / 3600:.2f} h")
    if "folders" in header and (column := made.column("split")) is not None:
        print(f"{header['folders']}: {', '.join(f'{count} {name}' for name, count in column.counts().items())}")
    skipped = {reason: count for reason, count in header.get("skipped", {}).items() if count}
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"left out: {counts}; listed in {Path(options.out).with_suffix('')}.skipped.jsonl")
    if ignored := describe_ignored(header.get("ignored", {})):
        print(ignored)
    if header.get("mean") is not None:
        clips = header.get("statistics_clips")
        print(f"log-mel mean {header['mean']:.4f}, std {header['std']:.4f}, measured on {clips} clips")
    print(f"next: asit {_next(made)} --data {shlex.quote(options.out)} --out RUN")
    return 0


def _next(made: Catalogue) -> str:
    """Return the next command: pretraining, or for clips with labels fine-tuning with the recipe of the data set."""
    labels = made.column("label")
    if labels is None or not any(labels.counts().values()):
        return "pretrain"
    task = made.header.get("task")
    if task == "audioset":
        splits = made.column("split")
        task = "audioset-2m" if splits is not None and splits.counts().get("unbalanced") else "audioset-20k"
    known = f" --task {task}" if task in presets.recipes(FinetuneSettings) else ""
    return f"finetune{known} --model PRETRAINED/model"


def _corpus(options: CatalogueOptions, prog: str) -> Corpus | None:
    """Read the requested data set, if any; refuse options of data sets for anything else."""
    from asit.data import corpora

    source, known = options.source, options.root is not None
    if known:
        corpora.check_name(source)
    elif source in corpora.NAMES and not Path(source).exists():
        found = f"{source} is the name of a data set, and ROOT is not given"
        raise ConfigError(found, "the folder it was unpacked into", f"{prog} {source} ROOT --out {options.out}")
    own: dict[str, Any] = {}
    owners = {"most_missing": ("audioset",), "test_root": ("speech-commands-v1",), "incomplete": corpora.NAMES}
    for name, sets in owners.items():
        if (value := getattr(options, name)) not in (None, False):
            own[name] = value
            if not known or source not in sets:
                expected = f"only for {', '.join(sets)} and its ROOT"
                raise ConfigError(f"--{name.replace('_', '-')} for {source}", expected, "remove it")
    if known and options.labels != "auto":
        raise ConfigError(f"--labels {options.labels} for {source}", "a folder", "remove it; data sets have labels")
    return corpora.read(source, options.root, **own) if options.root is not None else None
