"""The verbs index, similar and anomaly."""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro
from pydantic import Field

from asit.errors import AsitError, ConfigError
from asit.io import atomic
from asit.io.csv_lines import csv_line
from asit.logs import fit, width
from asit.terminal import stdout
from asit.terminal.options import (
    Batch,
    Columns,
    Device,
    OptionalModel,
    Seconds,
    Share,
    Spreadsheet,
    Threads,
    check_spreadsheet,
    model_and_inputs,
    model_or_included,
    parse,
    pick,
    recordings,
)
from asit.terminal.stdout import clock

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item
    from asit.search import Built, Neighbour
    from asit.search.anomaly import Anomaly

_NAMED = 20  # failures that are logged; all of them are in the index's failures.jsonl
_CELLS = ("similarity", "path", "start", "end", "label", "name")
_WIDEST = 48  # terminal columns of a name

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class IndexOptions:
    model: OptionalModel = None
    inputs: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """Recordings, folders, globs, catalogues, tables or tar shards; with --add there may be none."""
    out: str
    """Folder of the index."""
    add: bool = False
    """Update an index: new and changed files are read, missing ones dropped."""
    overwrite: bool = False
    """Rebuild an index that exists."""
    window: float | None = None
    """Length in seconds of the stretches that longer recordings are cut into; by default the training view's."""
    hop: float | None = None
    """Seconds from one window to the next; by default the window's length."""
    pooling: Literal["mean", "class", "class+mean"] | None = None
    """The vector that is compared: the mean of the patch tokens (default), the class token, or both."""
    layer: int | None = None
    """Block whose output is compared, 0 the first, -1 the last; by default the last."""
    columns: Columns = ""
    precision: Literal["auto", "float32", "bf16"] | None = None
    """Arithmetic of the encoder; by default what is faster here, and with --add the index's."""
    device: Device = "auto"
    threads: Threads = 0
    batch: Batch = 16


def index(prog: str, summary: str, given: list[str]) -> int:
    options = parse(IndexOptions, prog, summary, given)
    given_model, given_inputs = model_and_inputs(options.model, options.inputs)
    if not given_inputs and not options.add:
        raise ConfigError("no recordings were given", "files or folders after the model", f"see {prog} --help")
    import torch

    from asit import runtime, search
    from asit.data.catalogue.inputs import expand, named
    from asit.data.catalogue.listing import describe_ignored
    from asit.interop.loading import load

    out = Path(options.out)
    search.check_free(out, options.add, options.overwrite)  # before a model is loaded for nothing
    with runtime.world(options.device, options.threads) as world:
        if given_model is None and options.add:
            given_model = search.Index.read(out).card["model"]["path"]
        name = model_or_included(given_model)
        model = load(name, world.device)
        settings = pick(search.IndexSettings, options, threads=torch.get_num_threads())
        path = str(Path(name).resolve()) if Path(name).exists() else name
        inputs = expand(given_inputs, columns=options.columns) if options.columns else given_inputs
        built = search.build(
            model, inputs, out, settings, add=options.add, overwrite=options.overwrite, model_path=path
        )
    if built.others:
        log.info(describe_ignored(built.others))
    for name, reason in built.failures[:_NAMED]:
        log.warning(named(name, reason))
    if len(built.failures) > _NAMED:
        log.warning(f"and {len(built.failures) - _NAMED} more, in {out / 'failures.jsonl'}")
    print(_summary(built))
    return 2 if built.failures else 0


def _summary(built: Built) -> str:
    counts = [f"{built.read} read"]
    counts += [f"{count} {word}" for count, word in ((built.kept, "kept"), (built.dropped, "dropped")) if count]
    counts += [f"{len(built.failures)} could not be read"] if built.failures else []
    return (
        f"{built.folder}: {built.recordings} recordings in {built.rows} rows ({', '.join(counts)})\n"
        f"asit similar {built.folder} FILE finds what sounds most like FILE"
    )


@dataclass(kw_only=True)
class SimilarOptions:
    index: Annotated[str, tyro.conf.Positional]
    """Folder of the index."""
    files: Annotated[list[str], tyro.conf.Positional]
    """Recordings to search by; also folders, globs, catalogues and tar shards."""
    k: Annotated[int, tyro.conf.arg(aliases=("-k",)), Field(ge=1)] = 10
    """Neighbours of each."""
    at: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    """Search by the part that begins here, in seconds."""
    seconds: Seconds | None = None
    """Length of that part; by default the index's window."""
    include_self: bool = False
    """Also show the recording itself where it is in the index."""
    format: Literal["auto", "table", "json", "csv"] = "auto"
    """auto: a table on a terminal, else JSON lines, one for each recording."""
    spreadsheet: Spreadsheet = False
    columns: Columns = ""
    model: str | None = None
    """Model folder, if it has moved since the index was made."""
    device: Device = "auto"
    threads: Threads = 0


def similar(prog: str, summary: str, given: list[str]) -> int:
    options = parse(SimilarOptions, prog, summary, given)
    from asit import runtime
    from asit.interop.loading import load
    from asit.search import Index

    kind = stdout.choose(options.format)
    check_spreadsheet(options.spreadsheet, kind)
    with runtime.world(options.device, options.threads) as world:
        found = Index.read(options.index)
        queries = list(_queries(options, found.card["window"]))
        model = found.model(world.device) if options.model is None else load(options.model, world.device)
        found.check(model)
        if kind == "csv":
            print(csv_line(["query", "rank", *_CELLS]))
        failed = 0
        for i, item in enumerate(queries):
            try:
                own = None
                if not options.include_self:
                    own = found.rows_of(item.path, item.member, item.start, item.seconds)
                vector = found.vector_of(item.sound(), model, None, item.start, item.seconds)
            except AsitError as error:
                log.warning(str(error))
                failed += 1
                continue
            hits = found.nearest(vector, options.k, own)
            if kind == "table":
                print(("\n" if i else "") + _table(item.name, hits))
            elif kind == "json":
                line = {"query": item.name, "neighbours": [_fields(hit) for hit in hits]}
                print(json.dumps(line, ensure_ascii=False))
            else:
                for rank, hit in enumerate(hits, 1):
                    print(csv_line([item.name, rank, *_fields(hit).values()], spreadsheet=options.spreadsheet))
    return 2 if failed else 0


def _queries(options: SimilarOptions, window: float) -> Iterator[Item]:
    """Yield the recordings to search by, or the requested part of each."""
    for item in recordings(options.files, options.columns):
        if options.at is None and options.seconds is None:
            yield item
            continue
        at, seconds = options.at or 0.0, options.seconds or window
        if item.seconds is not None:
            seconds = max(0.0, min(seconds, item.seconds - at))
        yield dataclasses.replace(item, start=item.start + at, seconds=seconds)


def _fields(hit: Neighbour) -> dict[str, Any]:
    path = hit.path if hit.member is None else f"{hit.path}/{hit.member}"
    times = (round(hit.start, 3), round(hit.end, 3))
    return dict(zip(_CELLS, (round(hit.similarity, 4), path, *times, hit.label, hit.name), strict=True))


def _table(query: str, hits: Sequence[Neighbour]) -> str:
    lines = [fit(query, _WIDEST, middle=True)]
    names = [fit(hit.name, _WIDEST, middle=True) for hit in hits]
    wide = max(map(width, names), default=0)
    times = [f"{clock(hit.start)} - {clock(hit.end)}" for hit in hits]
    most = max(map(len, times), default=0)
    for rank, (hit, name, time) in enumerate(zip(hits, names, times, strict=True), 1):
        label = "" if hit.label is None else "  " + fit(hit.label, _WIDEST)
        lines.append(f"{rank:>4}  {hit.similarity:6.3f}  {name}{' ' * (wide - width(name))}  {time:>{most}}{label}")
    return "\n".join(lines)


@dataclass(kw_only=True)
class AnomalyOptions:
    index: Annotated[str, tyro.conf.Positional]
    """Folder of an index of normal recordings."""
    files: Annotated[list[str], tyro.conf.Positional]
    """Recordings to score; also folders, globs, catalogues, tables and tar shards. With labels, AUC is computed."""
    k: Annotated[int, tyro.conf.arg(aliases=("-k",)), Field(ge=1)] = 1
    """Nearest normal windows whose mean distance counts."""
    quantile: Share = 0.95
    """Threshold: this quantile of the normal recordings' own scores, each against the others."""
    normal: str = "normal"
    """Label of normal recordings, where the inputs have labels."""
    check: bool = False
    """End with exit status 1 where a score is above the threshold."""
    format: Literal["auto", "table", "json", "csv"] = "auto"
    """auto: a table on a terminal, else JSON lines; with --out what its name ends in (.csv, or JSON lines)."""
    out: str | None = None
    """Write to this file, atomically, instead of standard output."""
    overwrite: bool = False
    """Replace --out where it exists."""
    spreadsheet: Spreadsheet = False
    model: str | None = None
    """Model folder, if it has moved since the index was made."""
    columns: Columns = ""
    device: Device = "auto"
    threads: Threads = 0
    batch: Batch = 16


_SCORED = ("path", "score", "anomalous", "start", "end", "nearest", "label")


def anomaly(prog: str, summary: str, given: list[str]) -> int:
    options = parse(AnomalyOptions, prog, summary, given)
    import numpy as np
    import torch

    from asit import runtime
    from asit.data.catalogue.inputs import named
    from asit.interop.loading import load
    from asit.progress import counter
    from asit.search import Index
    from asit.search.anomaly import normal_scores, score

    out = None if options.out is None else Path(options.out)
    if out is not None:
        atomic.check_free(out, options.overwrite)
        kind = options.format if options.format != "auto" else "csv" if out.suffix.lower() == ".csv" else "json"
    else:
        kind = stdout.choose(options.format)
    check_spreadsheet(options.spreadsheet, kind)
    with runtime.world(options.device, options.threads) as world:
        index = Index.read(options.index)
        items = recordings(options.files, options.columns)
        model = index.model(world.device) if options.model is None else load(options.model, world.device)
        index.check(model)
        threshold = float(np.quantile(normal_scores(index, options.k), options.quantile, method="higher"))
        found: list[Anomaly] = []
        show, failed = counter("scoring"), 0
        for one in score(index, model, items, options.k, options.batch, torch.get_num_threads()):
            if isinstance(one, tuple):
                failed += 1
                log.warning(named(*one))
            else:
                found.append(one)
            show(len(found) + failed, len(items), failed)
    _tell_known(index.sources, found, options.normal)
    verdict = _verdict(found, threshold, options)
    found.sort(key=lambda one: -one.score)
    rows = [_scored(one, threshold) for one in found]
    if kind == "table":
        lines = _anomaly_table(rows)
    elif kind == "csv":
        lines = [",".join(_SCORED), *(csv_line(row.values(), spreadsheet=options.spreadsheet) for row in rows)]
    else:
        lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    text = "".join(f"{line}\n" for line in lines)
    if out is None:
        print(text, end="")
    elif found:
        with atomic.write_file(out) as draft:
            draft.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    log.info(verdict)
    above = any(one.score > threshold for one in found)
    return 2 if failed else int(options.check and above)


def _tell_known(sources: Sequence[Any], found: Sequence[Anomaly], normal: str) -> None:
    """Warn of recordings that are both normal and scored, and of an index with other labels than the normal one."""
    known = [one.name for one in found if one.known]
    if known:
        log.warning(
            f"{len(known)} recordings are in the index, such as {known[0]}: scored against its other recordings"
        )
    others = sorted({source.label for source in sources if source.label not in (None, normal)})
    if others:
        log.warning(f"the index of normal recordings holds some that are labelled {', '.join(others[:3])}")


def _scored(one: Anomaly, threshold: float) -> dict[str, Any]:
    times = round(one.start, 3), round(one.end, 3)
    cells = (one.name, round(one.score, 6), one.score > threshold, *times, one.nearest.name, one.label)
    return dict(zip(_SCORED, cells, strict=True))


def _anomaly_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    names = [fit(row["path"], _WIDEST, middle=True) for row in rows]
    wide = max(map(width, names), default=0)
    return [
        f"{row['score']:7.4f} {'!' if row['anomalous'] else ' '} {name}{' ' * (wide - width(name))}"
        f"  {clock(row['start'])} - {clock(row['end'])}" + (f"  {fit(row['label'], _WIDEST)}" if row["label"] else "")
        for row, name in zip(rows, names, strict=True)
    ]


def _verdict(found: Sequence[Anomaly], threshold: float, options: AnomalyOptions) -> str:
    """Return counts and threshold, and AUC where there are labels."""
    from asit.search.anomaly import PARTIAL, partial_auc

    above = sum(one.score > threshold for one in found)
    text = (
        f"{above} of {len(found)} recordings are above {threshold:.4f}, which {options.quantile:.0%} of the normal "
        "recordings do not exceed"
    )
    labelled = [one for one in found if one.label is not None]
    if not labelled:
        return text
    scores, truth = [one.score for one in labelled], [one.label != options.normal for one in labelled]
    if all(truth):
        names = ", ".join(sorted({str(one.label) for one in labelled})[:5])
        raise ConfigError(
            f"no recording is labelled {options.normal}; labels are {names}",
            "the label of normal recordings, for AUC",
            "pass it: --normal LABEL",
        )
    auc, part = partial_auc(scores, truth), partial_auc(scores, truth, PARTIAL)
    if auc is None or part is None:
        return text
    of = f"{sum(truth)} of {len(truth)} anomalous"
    return f"{text}\nAUC {auc:.3f}, pAUC {part:.3f} (up to {PARTIAL:.0%} false alarms), {of}"
