"""The verbs: their options, and what they print. Torch is imported only by the verb that needs it."""

from __future__ import annotations

import json
import os
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import ValidationError

from asit import recipes
from asit.config import annotated, read_yaml
from asit.errors import AsitError, ConfigError
from asit.settings import FrontEndSettings, PretrainSettings

if TYPE_CHECKING:
    from asit.runs.dryrun import DryRun


def _parse(kind: Any, prog: str, summary: str, given: list[str], **options: Any) -> Any:
    try:
        description = summary[0].upper() + summary[1:] + "."
        return tyro.cli(kind, prog=prog, args=given, description=description, **options)
    except ValidationError as error:
        lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}, found {e['input']!r}" for e in error.errors()]
        raise ConfigError("options do not fit:\n    " + "\n    ".join(lines), remedy=f"see {prog} --help") from None


@dataclass
class CatalogueOptions:
    source: Annotated[str, tyro.conf.Positional]
    """Folder of recordings, searched through all its levels, or a table (CSV, TSV, JSONL) with a path column."""
    out: str
    """The catalogue to write, such as c.jsonl."""
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
    options = _parse(CatalogueOptions, prog, summary, given)
    from asit.data import scan
    from asit.engine.records import counter

    made = scan.build(
        options.source,
        options.out,
        front_end=options.front_end,
        workers=options.workers,
        check=options.check,
        checksum=options.checksum,
        bad_files=options.bad_files,
        statistics_clips=options.statistics_clips,
        restart=options.restart,
        seed=options.seed,
        progress=counter(sys.stderr, "checking files"),
    )
    header = made.header
    print(f"{options.out}: {len(made)} clips, {header['seconds'] / 3600:.2f} h")
    skipped = {reason: count for reason, count in header.get("skipped", {}).items() if count}
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        print(f"left out: {counts}; named in {Path(options.out).with_suffix('')}.skipped.jsonl")
    if header.get("mean") is not None:
        clips = header.get("statistics_clips")
        print(f"log-mel mean {header['mean']:.4f}, std {header['std']:.4f}, measured on {clips} clips")
    print(f"next: asit pretrain --data {shlex.quote(options.out)} --out RUN")
    return 0


class PretrainOptions(PretrainSettings):
    """Every setting of the run, and how to run it."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags go over it."""
    resume: bool = False
    """Go on with the run in --out from its last checkpoint."""
    overwrite: bool = False
    """Delete the run in --out and start again."""
    dry_run: bool = False
    """Take a few steps, write nothing, and print the resolved settings, shapes, memory and time to expect."""


def pretrain(prog: str, summary: str, given: list[str]) -> int:
    early = _early(given, ("--preset", "--config", "--out"))
    chosen = (early.get("--out", ""), early.get("--preset"), early.get("--config"))
    base = recipes.settings_for(*chosen, {}, resume="--resume" in given)
    options = _parse(PretrainOptions, prog, summary, given, default=PretrainOptions(**base.model_dump()))
    settings = PretrainSettings(**options.model_dump(include=set(PretrainSettings.model_fields)))
    resume, overwrite = options.resume, options.overwrite
    if options.dry_run:
        from asit.runs.dryrun import dry_run

        _tell(dry_run(settings, stream=sys.stderr))
        return 0
    from asit.runs import pretrain as runs

    result = runs.pretrain(settings, resume=resume, overwrite=overwrite, stream=sys.stderr)
    if int(os.environ.get("RANK", "0")) != 0:
        return _signal_status(result.stopped_by)
    print(f"{result.step} of {result.total} steps, {result.clips_per_second:.1f} clips/s; the run is in {result.out}")
    if not result.finished:
        print(f"go on:  asit pretrain --out {shlex.quote(str(result.out))} --resume")
        if result.stopped_by:
            return _signal_status(result.stopped_by)
    print(f"page:   asit report {shlex.quote(str(result.out))}")
    print(f'python: import asit; model = asit.load("{result.model}"); model.embed("clip.wav").clip')
    return 0


def _signal_status(name: str | None) -> int:
    return {None: 0, "SIGINT": 130, "SIGTERM": 143}[name]


def _early(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Values of options that decide the defaults of all others, read before those are parsed."""
    out = {}
    for i, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name in names:
            out[name] = value if equals else (given[i + 1] if i + 1 < len(given) else "")
    return out


def _tell(found: DryRun) -> None:
    from asit.engine.records import duration

    print(found.settings)
    for note in found.notes:
        print(note)
    for name, shape in found.shapes.items():
        print(f"{name}: {shape}")
    how = "from two smaller sizes measured" if found.extrapolated else "measured"
    for name, size in found.memory_gb.items():
        print(f"peak memory of a process, {name}: {size:.1f} GB ({how})")
        if size > found.machine_gb.get(name, size):
            there = found.machine_gb[name]
            print(f"warning: that is more than the {there:.1f} GB there are; raise accumulate, or lower batch_size")
    print(f"a step: {found.seconds_per_step:.2f} s, {found.clips_per_second:.1f} clips/s ({how})")
    print(f"loading: {1 / found.seconds_per_clip:.0f} clips/s in one process, the first time (measured)")
    print(f"the whole run: {duration(found.total_seconds)} at that rate; nothing was written")


@dataclass
class ProbeOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model."""
    table: Annotated[str, tyro.conf.Positional]
    """Labelled table (CSV, TSV, JSONL) with path, label and split (train, test)."""
    clips: int = 1_000_000
    """At most this many clips on each side."""
    seed: int = 0
    """Of the draw of clips and of the folds that choose the regularisation."""
    out: str | None = None
    """Also write the numbers as JSON."""


def probe(prog: str, summary: str, given: list[str]) -> int:
    options = _parse(ProbeOptions, prog, summary, given)
    import asit
    from asit.runs import probe

    clips = probe.labelled(options.table, options.clips, options.seed)
    compared = probe.compare(asit.load(options.model), clips, seed=options.seed)
    print(compared.text())
    if options.out:
        from asit.runs.folder import write_json

        write_json(Path(options.out), compared.record())
    return 0


@dataclass
class EmbedOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model."""
    files: Annotated[list[str], tyro.conf.Positional]
    """Recordings."""


def embed(prog: str, summary: str, given: list[str]) -> int:
    options = _parse(EmbedOptions, prog, summary, given)
    import asit

    model = asit.load(options.model)
    failed = 0
    for path in options.files:
        try:
            found = model.embed(path)
        except AsitError as error:
            print(f"asit: {error}", file=sys.stderr)
            failed += 1
            continue
        vector = [round(value, 6) for value in found.clip.tolist()]
        print(json.dumps({"path": path, "patches": list(found.grid), "clip": vector}))
    return 2 if failed else 0


@dataclass
class ReportOptions:
    run: Annotated[str, tyro.conf.Positional]
    """The run's folder."""
    out: str | None = None
    """The page; by default RUN/report.html."""


def report(prog: str, summary: str, given: list[str]) -> int:
    options = _parse(ReportOptions, prog, summary, given)
    from asit.report import report as write

    config = Path(options.run) / "config.yaml"
    name = str(read_yaml(config).get("preset", "default")) if config.is_file() else "default"
    base = recipes.pretrain_settings(name).model_dump(mode="json") if name in recipes.presets() else None
    print(write(options.run, options.out, preset=base))
    return 0


@dataclass
class SettingsOptions:
    preset: str = "default"
    """default, paper or official-v2."""


def settings(prog: str, summary: str, given: list[str]) -> int:
    options = _parse(SettingsOptions, prog, summary, given)
    print(annotated(recipes.pretrain_settings(options.preset)), end="")
    return 0


@dataclass
class DemoOptions:
    out: str = "demo-run"
    """Folder for the data, the run and the page."""
    toy: bool = False
    """A few steps on few clips, to see that every part works."""
    seed: int = 0
    """Of the data and the run."""


def demo(prog: str, summary: str, given: list[str]) -> int:
    options = _parse(DemoOptions, prog, summary, given)
    from asit.demo.walk import walk

    print(walk(Path(options.out), seed=options.seed, toy=options.toy, stream=sys.stderr).text)
    return 0
