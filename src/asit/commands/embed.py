"""The verb embed."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from asit.errors import ConfigError
from asit.terminal.options import (
    Batch,
    Columns,
    Device,
    Inputs,
    OptionalModel,
    Precision,
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

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item
    from asit.infer.embed_rows import EmbedSettings
    from asit.model.audio_model import AudioModel

log = logging.getLogger(__name__)


@dataclass
class EmbedOptions:
    model: OptionalModel = None
    inputs: Inputs = field(default_factory=list)
    out: str | None = None
    """File to write: .parquet, .npz, or .csv for one vector a file. Without it JSON lines go to standard output."""
    level: Literal["clip", "frames", "patches"] = "clip"
    """clip: one vector a file; frames: one for each step in time; patches: one for each patch."""
    pooling: Literal["mean", "class", "class+mean"] = "mean"
    """The vector of a clip: mean of its patches, class token, or both."""
    layer: int | None = None
    """Block whose output is taken, 0 the first, -1 the last, through the final norm; by default the last."""
    window: Seconds | None = None
    """At level clip one vector for each window of so many seconds, with its start and end."""
    hop: float | None = None
    """Seconds between windows, by default end to end; without --window between frames, a whole part of the patch
    columns' own step, which is the default."""
    precision: Precision = "auto"
    columns: Columns = ""
    device: Device = "auto"
    threads: Threads = 0
    batch: Batch = 16
    shard: str | None = None
    """i/n, i from 0: only the i-th of n parts of the inputs, into NAME-0000i-of-0000n."""
    spreadsheet: Spreadsheet = False
    overwrite: bool = False
    """Replace --out if it exists, and the blocks of a different call beside it."""
    bad_files: Share = 1.0
    """Share of unreadable inputs above which this fails; up to there they are listed in OUT.failures.jsonl."""


def embed(prog: str, summary: str, given: list[str]) -> int:
    options = parse(EmbedOptions, prog, summary, given)
    shard = _shard(options.shard)
    from asit.infer import embed_files as run
    from asit.infer.embed_rows import EmbedSettings

    settings = pick(EmbedSettings, options)
    if options.out is not None:
        run.check_free(run.numbered(Path(options.out), shard), settings.level, options.overwrite)
    check_spreadsheet(options.spreadsheet, options.out)
    if options.out is None and (shard is not None or options.overwrite):
        raise ConfigError("--shard or --overwrite without --out", "a file to write", "add --out emb.parquet")
    from asit import runtime
    from asit.data.catalogue.inputs import named
    from asit.interop.loading import load

    given_model, inputs = model_and_inputs(options.model, options.inputs)
    with runtime.world(options.device, options.threads) as world:
        if world.size > 1 and options.out is None:
            raise ConfigError(f"{world.size} processes and no --out", "a file to write", "add --out emb.parquet")
        model = load(model_or_included(given_model), world.device)
        items = recordings(inputs, options.columns)
        if options.out is None:
            return _print(model, items, settings)
        output = pick(run.OutputSettings, options, shard=shard)
        written = run.embed_files(model, items, options.out, settings, output, world=world)
    if written is None:
        return 0
    print(f"{written.out}: {written.rows} vectors of {written.width} values from {written.files} files")
    if written.failures:
        for name, reason in written.failures[:3]:
            log.warning(named(name, reason))
        listed = run.failures_of(written.out)
        count = f"{len(written.failures)} of {written.files + len(written.failures)} inputs"
        log.warning(f"{count} failed and were left out; all are in {listed}")
    return 2 if written.failures else 0


def _print(model: AudioModel, items: Sequence[Item], settings: EmbedSettings) -> int:
    """Print a JSON line for each clip, frame or patch."""
    from asit.data.catalogue.inputs import named
    from asit.infer.embed_rows import embed_items, rows_of
    from asit.model.inference.batching import Done

    failed = 0
    for one in embed_items(model, items, settings):
        name = items[one.index].text
        if isinstance(one, Done):
            if one.fault is not None:
                log.warning(named(name, one.fault))
                failed += 1
            continue
        vectors = [[round(value, 6) for value in vector] for vector in rows_of(one.found, settings).tolist()]
        if settings.level == "clip":
            end = one.start + (one.seconds or 0.0)
            span = {} if settings.window is None else {"start": round(one.start, 4), "end": round(end, 4)}
            print(json.dumps({"path": name, **span, "patches": list(one.found.grid), "clip": vectors[0]}))
            continue
        times = one.found.times.double() + one.start
        bands = len(vectors) // len(times)
        for i, vector in enumerate(vectors):
            time = round(float(times[i // bands]), 4)
            where = {"path": name, "time": time} if bands == 1 else {"path": name, "time": time, "band": i % bands}
            print(json.dumps({**where, "vector": vector}))
    return 2 if failed else 0


def _shard(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()) or int(index) >= int(count):
        raise ConfigError(f"--shard {text}", "i/n with i from 0 to n - 1", "write it as in --shard 3/8")
    return int(index), int(count)
