"""The verb catalogue."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from asit.config import FinetuneSettings, FrontEndSettings, presets
from asit.errors import ConfigError
from asit.terminal.options import parse

if TYPE_CHECKING:
    from asit.data.catalogue.catalogue import Catalogue
    from asit.data.corpora import Corpus


@dataclass
class CatalogueOptions:
    source: Annotated[str, tyro.conf.Positional]
    """Folder of recordings, searched through all its levels, or a table (CSV, TSV, JSONL) with a path column; or, with
    ROOT, a known data set: audioset, esc50, speech-commands-v1, speech-commands-v2, voxceleb1."""
    out: str
    """The catalogue to write, such as c.jsonl."""
    root: Annotated[str | None, tyro.conf.Positional] = None
    """Where the data set was unpacked."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """Of a folder. folder: each recording's label is the sub-folder it lies in (CLASS, SPLIT/CLASS or CLASS/SPLIT);
    auto and none: no labels."""
    incomplete: bool = False
    """Of a data set: go on where clips are missing."""
    most_missing: float | None = None
    """Of audioset: largest share of a split's segments without a clip; 0.3 if not given."""
    test_root: str | None = None
    """Of speech-commands-v1: folder of the test archive, where it is neither in ROOT nor beside it."""
    workers: int | Literal["auto"] = "auto"
    """Processes; auto: one for each core."""
    check: Literal["full", "header"] = "full"
    """full: decode every file, which finds truncated, silent and non-finite ones; header: only open it."""
    checksum: bool = False
    """Store each file's SHA-256."""
    bad_files: float = 0.1
    """Share of unusable files above which this fails."""
    statistics_clips: int = 1000
    """Files that mean and std are measured on; 0: not measured."""
    seed: int = 0
    """Of the draw of these files."""
    restart: bool = False
    """Forget what an earlier scan left."""
    front_end: FrontEndSettings = field(default_factory=FrontEndSettings)


def catalogue(prog: str, summary: str, given: list[str]) -> int:
    options = parse(CatalogueOptions, prog, summary, given)
    from asit.data.catalogue import scan
    from asit.data.catalogue.listing import describe_ignored
    from asit.progress import counter

    corpus = _corpus(options, prog)
    what: dict[str, Any] = {"labels": options.labels}
    if corpus:
        print(corpus.table(), flush=True)
        # A test set is scored whole, and Speech Commands and AudioSet have classes of silence.
        what = {"rows": corpus.rows(), "facts": corpus.header(), "silence_db": None}
    made = scan.build(
        corpus.root if corpus else options.source,
        options.out,
        front_end=options.front_end,
        workers=options.workers,
        check=options.check,
        checksum=options.checksum,
        bad_files=options.bad_files,
        statistics_clips=options.statistics_clips,
        restart=options.restart,
        seed=options.seed,
        progress=counter("checking files"),
        **what,
    )
    header = made.header
    print(f"{options.out}: {len(made)} clips, {header['seconds'] / 3600:.2f} h")
    if "folders" in header and (column := made.column("split")) is not None:
        print(f"{header['folders']}: {', '.join(f'{count} {name}' for name, count in column.counts().items())}")
    skipped = {reason: count for reason, count in header.get("skipped", {}).items() if count}
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"left out: {counts}; named in {Path(options.out).with_suffix('')}.skipped.jsonl")
    if passed := describe_ignored(header.get("ignored", {})):
        print(passed)
    if header.get("mean") is not None:
        clips = header.get("statistics_clips")
        print(f"log-mel mean {header['mean']:.4f}, std {header['std']:.4f}, measured on {clips} clips")
    print(f"next: asit {_next(made)} --data {shlex.quote(options.out)} --out RUN")
    return 0


def _next(made: Catalogue) -> str:
    """The verb, and for clips with labels the recipe and the model, that a catalogue is usually made for."""
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
    """The known data set that is asked for, if one is.

    Raises:
        ConfigError: options of data sets for something else, or a data set without its folder.
        CatalogueError: as :func:`asit.data.corpora.read`.
    """
    from asit.data import corpora

    if options.root is None:
        if options.source in corpora.NAMES and not Path(options.source).exists():
            raise ConfigError(
                f"{options.source} is the name of a data set, and ROOT is not given",
                "the folder it was unpacked into",
                f"{prog} {options.source} ROOT --out {options.out}",
            )
    else:
        corpora.check_name(options.source)
    given = {"most_missing": options.most_missing, "test_root": options.test_root}
    belongs = {"most_missing": "audioset", "test_root": "speech-commands-v1"}
    for name, value in given.items():
        if value is not None and (options.root is None or options.source != belongs[name]):
            raise ConfigError(
                f"--{name.replace('_', '-')} for {options.source}", f"only for {belongs[name]}", "drop it"
            )
    if options.root is None:
        if options.incomplete:
            raise ConfigError(
                f"--incomplete for {options.source}",
                "one of " + ", ".join(corpora.NAMES) + " and its ROOT",
                "drop --incomplete",
            )
        return None
    if options.labels != "auto":
        raise ConfigError(f"--labels {options.labels} for {options.source}", "a folder", "it has labels of its own")
    of_its_own = {name: value for name, value in given.items() if value is not None}
    return corpora.read(options.source, options.root, incomplete=options.incomplete, **of_its_own)
