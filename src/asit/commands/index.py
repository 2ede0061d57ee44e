"""The verbs index and similar."""

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
from asit.io.csv_lines import csv_line
from asit.logs import fit, width
from asit.terminal import stdout
from asit.terminal.options import (
    Batch,
    Device,
    Seconds,
    Spreadsheet,
    Threads,
    check_spreadsheet,
    parse,
    pick,
    recordings,
)
from asit.terminal.stdout import clock

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item
    from asit.search import Built, Neighbour

_NAMED = 20  # failures that are logged; all of them are in the index's failures.jsonl
_CELLS = ("similarity", "path", "start", "end", "label", "name")
_WIDEST = 48  # terminal columns of a name

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class IndexOptions:
    model: Annotated[str, tyro.conf.Positional]
    """Model folder, such as RUN/model."""
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
    precision: Literal["auto", "float32", "bf16"] | None = None
    """Arithmetic of the encoder; by default what is faster here, and with --add the index's."""
    device: Device = "auto"
    threads: Threads = 0
    batch: Batch = 16


def index(prog: str, summary: str, given: list[str]) -> int:
    options = parse(IndexOptions, prog, summary, given)
    if not options.inputs and not options.add:
        raise ConfigError("no recordings were given", "files or folders after the model", f"see {prog} --help")
    import torch

    from asit import runtime, search
    from asit.data.catalogue.inputs import named
    from asit.data.catalogue.listing import describe_ignored
    from asit.interop.loading import load

    out = Path(options.out)
    search.check_free(out, options.add, options.overwrite)  # before a model is loaded for nothing
    with runtime.world(options.device, options.threads) as world:
        model = load(options.model, world.device)
        settings = pick(search.IndexSettings, options, threads=torch.get_num_threads())
        path = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
        built = search.build(
            model, options.inputs, out, settings, add=options.add, overwrite=options.overwrite, model_path=path
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
    for item in recordings(options.files):
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
