"""Vectors of many recordings into one file: one or many for each, in their order, stopped and gone on with at will."""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch

from asit import runtime
from asit.data.catalogue.inputs import Item
from asit.errors import AsitError, CatalogueError, CheckpointError, ConfigError
from asit.evaluate.feature_readers import weights_digest
from asit.infer import embed_writers
from asit.infer.embed_blocks import Block, Parts, Writer, block_ends
from asit.infer.embed_rows import EmbedSettings, Level, embed_items, layout_of, rows_of
from asit.io import lock
from asit.io.atomic import write_text
from asit.model.audio_model import AudioModel
from asit.model.inference.batching import Done, Result
from asit.model.inference.overlap import Embedding
from asit.runtime import World
from asit.training.metrics_log import counter

FORMAT = 1
"""Version of what the blocks hold."""
ROUND = 4
"""Blocks that each of several processes makes before they tell one another how far they are."""


@dataclass(frozen=True)
class Summary:
    """What became of the recordings.

    Attributes:
        out: the file that was written.
        files: recordings in it.
        rows: vectors in it.
        width: values of each.
        failures: (name, reason) of the recordings that could not be read.
    """

    out: Path
    files: int
    rows: int
    width: int
    failures: list[tuple[str, str]]


def embed_files(
    model: AudioModel,
    items: Sequence[Item],
    out: str | os.PathLike[str],
    ask: EmbedSettings | None = None,
    *,
    shard: tuple[int, int] | None = None,
    overwrite: bool = False,
    spreadsheet: bool = False,
    bad_files: float = 1.0,
    threads: int = 0,
    world: World | None = None,
    stream: TextIO | None = None,
) -> Summary | None:
    """Write the vectors of recordings into one file; every process calls this, the main one gets a summary.

    Finished blocks are kept in OUT.parts until the file is written: the same call goes on from them, and gives the same
    file. What cannot be read is left out and listed in OUT.failures.jsonl.

    Args:
        items: the recordings; rows come in their order.
        out: the file: .parquet, .npz, or at level clip .csv.
        ask: what is wanted; by default one vector a recording.
        shard: (i, n): of the recordings only the i-th of n parts, i from 0; OUT is called NAME-0000i-of-0000n then.
        overwrite: replace a file that is there, and blocks of another call.
        spreadsheet: of CSV: guard names that a spreadsheet program would run, see `asit.io.csv_lines.csv_line`.
        bad_files: share of the recordings that may be unreadable.
        threads: that decode; 0: as many as compute.
        world: the processes that share the work.
        stream: where progress goes.

    Raises:
        ConfigError: an output that exists, cannot be or is being written by another process, blocks of another call,
            settings that do not fit.
        CatalogueError: more unreadable recordings than `bad_files` allows, or none that is readable.
        CheckpointError: the disk is full, or the place may not be written.
    """
    ask, world = ask or EmbedSettings(), world or World(0, 1, torch.device("cpu"), "")
    items, out = _shard(items, Path(out), shard)
    work = _Work(model, items, out, ask, world)
    try:
        work.begin(overwrite)
        work.run(bad_files, threads, stream if world.main else None)
        return work.merge(bad_files, spreadsheet) if world.main else None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"{work.kept()}; the same command goes on") from None
    except OSError as error:
        raise _unwritable(error, out, work.kept()) from error
    finally:
        work.alone.close()


def numbered(out: Path, shard: tuple[int, int] | None) -> Path:
    """The name of a shard's output: emb.parquet is emb-00003-of-00008.parquet for (3, 8)."""
    return out if shard is None else out.with_name(f"{out.stem}-{shard[0]:05d}-of-{shard[1]:05d}{out.suffix}")


def check_free(out: Path, level: Level, overwrite: bool) -> None:
    """Refuse an output that exists or cannot be written; costs nothing, so it comes before the model is loaded.

    Raises:
        ConfigError: as `embed_files`.
    """
    embed_writers.check_out(out, level)
    if out.exists() and (not overwrite or out.is_dir()):
        raise ConfigError(f"{out} already exists", "a name that is free", "give another --out, or --overwrite")


def failures_of(out: Path) -> Path:
    """Where the recordings that could not be read are listed."""
    return out.with_name(f"{out.name}.failures.jsonl")


class _Work:
    """One call: its blocks, which of them are done, and the file they become."""

    def __init__(self, model: AudioModel, items: Sequence[Item], out: Path, ask: EmbedSettings, world: World) -> None:
        self.model, self.items, self.out, self.ask, self.world = model, items, out, ask, world
        model.embedder(ask.layer, "float32", ask.hop)  # refuses a hop or a layer that it has not
        self.parts = Parts(out.with_name(f"{out.name}.parts"), layout_of(model, ask))
        self.ends, stamps = block_ends(items)
        self.starts = [0, *self.ends[:-1]]
        self.facts = {
            "format": FORMAT,
            "asit": metadata.version("asit-audio"),
            "model": weights_digest(model.encoder),
            "front_end": model.front_end.settings.model_dump(mode="json"),
            "inputs": _digest(items, stamps),
            "count": len(items),
            "device": world.device.type,
            **asdict(ask),
        }
        self.finished = 0
        self.alone = ExitStack()

    def kept(self) -> str:
        """How many of the inputs are in finished blocks, and where."""
        return f"{self.finished} of {len(self.items)} inputs are kept in {self.parts.folder}"

    def begin(self, overwrite: bool) -> None:
        """Find what an earlier call left, or make the folder; what was "auto" is settled for every process."""
        facts: Any = None
        if self.world.main:
            try:
                self.alone.enter_context(lock.writing(self.out))
                check_free(self.out, self.ask.level, overwrite)  # again: another process may have written it since
                facts = self.parts.begin(self.facts, self.ends, overwrite)
            except (AsitError, OSError) as error:
                facts = error
        told = self.world.gather((facts, self.facts["inputs"]))
        found = _agreed(told[0][0])
        if len({inputs for _, inputs in told}) > 1:
            raise ConfigError("the processes see other inputs", "the same files for each", "check what each one mounts")
        name = runtime.precision(found["precision"], self.world).name
        self.facts = {**found, "precision": name}
        self.ask = EmbedSettings(**{**asdict(self.ask), "precision": name})
        if self.world.main:
            self.parts.settle(self.facts, self.ends)

    def run(self, bad_files: float, threads: int, stream: TextIO | None) -> None:
        """Make the blocks that are missing, shared out among the processes."""
        world, bad = self.world, 0
        missing: list[int] = []
        if world.main:
            for number in range(len(self.ends)):
                if (block := self.parts.done(number)) is None:
                    missing.append(number)
                else:
                    self.finished, bad = self.finished + self._size(number), bad + len(block.faults)
        missing, self.finished, bad = world.gather((missing, self.finished, bad))[0]
        kept, clean = self.finished, bad
        show = counter(stream, f"embed, {kept} done before" if kept else "embed", "files")

        def tick(done: int, failed: int) -> None:
            if show is not None and missing:
                show(self.finished + done - kept, len(self.items) - kept, bad + failed - clean)

        rounds = range(0, len(missing), world.size * ROUND if world.size > 1 else 1)
        mine = [number for first in rounds for number in missing[first : first + rounds.step][world.rank :: world.size]]
        with closing(self._blocks(mine, threads, tick if world.size == 1 else None)) as blocks:
            for first in rounds:
                count = len(missing[first : first + rounds.step][world.rank :: world.size])
                told = world.gather(_made(blocks, count, world.size > 1))
                for files, faults, trouble in told:
                    _agreed(trouble)
                    self.finished, bad = self.finished + files, bad + len(faults)
                tick(0, 0)
                if bad > bad_files * len(self.items):
                    raise self._too_many([fault for _, faults, _ in told for fault in faults], bad, bad_files)

    def _size(self, number: int) -> int:
        return self.ends[number] - self.starts[number]

    def _blocks(
        self, numbers: Sequence[int], threads: int, tick: Callable[[int, int], None] | None
    ) -> Generator[Block]:
        """Make blocks, one after the other; `tick` is told of each recording of the one at hand."""
        places = [place for number in numbers for place in range(self.starts[number], self.ends[number])]
        items = [self.items[place] for place in places]
        ends = np.cumsum([self._size(number) for number in numbers]).tolist()
        with closing(embed_items(self.model, items, self.ask, threads=threads, ends=ends)) as rows:
            for number in numbers:
                with self.parts.writer(number) as writer:
                    self._fill(writer, rows, places, self._size(number), tick)
                yield writer.block

    def _fill(
        self,
        writer: Writer,
        rows: Iterator[Result[Embedding] | Done],
        places: Sequence[int],
        size: int,
        tick: Callable[[int, int], None] | None,
    ) -> None:
        """The next `size` recordings into a block."""
        seconds = 0.0
        for done in range(1, size + 1):
            for one in rows:
                if isinstance(one, Result):
                    writer.add(*rows_of(one, self.ask))
                    seconds = one.seconds or 0.0
                    continue
                if one.fault is None:
                    writer.finish(places[one.index], seconds)
                else:
                    writer.fail(places[one.index], one.fault)
                break
            if tick is not None:
                tick(done, len(writer.block.faults))

    def merge(self, bad_files: float, spreadsheet: bool = False) -> Summary:
        """Write the file and the list of failures, and remove the blocks."""
        blocks: list[Block] = []
        for number in range(len(self.ends)):
            block = self.parts.done(number)
            if block is None:
                raise CheckpointError(
                    f"block {number} in {self.parts.folder} has changed", "what was written", "give the command again"
                )
            blocks.append(block)
        faults = [fault for block in blocks for fault in block.faults]
        entries = [entry for block in blocks for entry in block.entries]
        if not entries:
            self.parts.remove()
            raise CatalogueError(
                f"all {len(faults)} inputs failed, the first: {faults[0][1]}", "one that can be read", "mend them"
            )
        if len(faults) > bad_files * len(self.items):
            raise self._too_many(faults, len(faults), bad_files)
        failures = [(self.items[place].text, reason) for place, reason in faults]
        lines = (json.dumps({"path": name, "reason": reason}, ensure_ascii=False) for name, reason in failures)
        listed = failures_of(self.out)
        if failures:
            write_text(listed, "".join(line + "\n" for line in lines))
        else:
            listed.unlink(missing_ok=True)
        about = {name: value for name, value in self.facts.items() if name != "format"}
        embed_writers.write(self.out, embed_writers.Result(self.parts, blocks, self.items, about, spreadsheet))
        self.parts.remove()
        rows = sum(entry.columns for entry in entries) * self.parts.layout.rows
        return Summary(self.out, len(entries), rows, self.parts.layout.width, failures)

    def _too_many(self, faults: Sequence[tuple[int, str]], bad: int, allowed: float) -> CatalogueError:
        told = "".join(f"\n    {reason}" for _, reason in faults[:3])
        return CatalogueError(
            f"{bad} of {len(self.items)} inputs cannot be read, such as:{told}",
            f"at most {int(allowed * len(self.items))} (--bad-files {allowed:g})",
            "mend these files, leave them out, or raise --bad-files; what was finished is kept",
        )


def _shard(items: Sequence[Item], out: Path, shard: tuple[int, int] | None) -> tuple[Sequence[Item], Path]:
    if shard is None:
        return items, out
    index, count = shard
    if not 0 <= index < count:
        raise ConfigError(f"--shard {index}/{count}", "i/n with i from 0 to n - 1", f"say 0/{count}, for instance")
    first, end = len(items) * index // count, len(items) * (index + 1) // count
    if first == end:
        raise ConfigError(
            f"shard {index} of {count} of {len(items)} inputs is empty", "an input for each", "take fewer"
        )
    return items[first:end], numbered(out, shard)


def _digest(items: Sequence[Item], stamps: Sequence[tuple[int, int]]) -> str:
    """SHA-256 of what the recordings are: names, places, parts, and their files' sizes and times of change."""
    whole = hashlib.sha256()
    names = [name for name in Item.__slots__ if name not in ("label", "listed")]
    for item, stamp in zip(items, stamps, strict=True):
        facts: Mapping[str, Any] = {name: getattr(item, name) for name in names}
        whole.update(repr((sorted(facts.items()), stamp)).encode("utf-8", "surrogateescape"))
    return whole.hexdigest()


def _made(
    blocks: Iterator[Block], count: int, catch: bool
) -> tuple[int, list[tuple[int, str]], AsitError | OSError | None]:
    """Make the next `count` blocks: recordings, faults, and the error that all processes are to hear of."""
    files, faults = 0, list[tuple[int, str]]()
    try:
        for _ in range(count):
            block = next(blocks)
            files += len(block.entries) + len(block.faults)
            faults += block.faults
    except (AsitError, OSError) as error:
        if not catch:
            raise
        return files, faults, error
    return files, faults, None


def _agreed(found: Any) -> Any:
    """What the processes settled; raises where that is an error."""
    if isinstance(found, AsitError | OSError):
        raise found
    return found


def _unwritable(error: OSError, out: Path, kept: str) -> AsitError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return CheckpointError(
            f"the disk is full: {out} was not written; {kept}",
            "room for the vectors twice, as blocks and as the file",
            "free some and give the same command again",
        )
    return CheckpointError(
        f"{error.filename or out}: {error.strerror or error}", "a place that may be written", "give another --out"
    )
