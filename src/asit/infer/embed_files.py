"""`asit embed`: vectors of many recordings into one file, in their order; a stopped call resumes."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

from asit import runtime
from asit.data.catalogue.inputs import Item
from asit.errors import CatalogueError, CheckpointError, ConfigError
from asit.evaluate.feature_readers import weights_digest
from asit.infer import embed_blocks
from asit.infer.embed_blocks import PLAN, BlockFolder, EmbeddedBlock, item_blocks
from asit.infer.embed_rows import EmbedSettings, Level, embed_items, layout_of, rows_of
from asit.io import atomic, lock
from asit.io.atomic import disk_errors, write_text
from asit.model.audio_model import AudioModel
from asit.model.inference.batching import Result
from asit.progress import counter
from asit.runtime import World
from asit.training.block_rounds import BlockRounds

FORMAT = 1
"""Version of the blocks' contents."""


@dataclass(frozen=True)
class OutputSettings:
    """How the output of `embed_files` is written.

    Attributes:
        shard: (i, n): only the i-th of n parts of the recordings, i from 0, into NAME-0000i-of-0000n.
        overwrite: replace a file that exists, and blocks of a different call.
        spreadsheet: of CSV: guard names that a spreadsheet program would run, see `asit.io.csv_lines.csv_line`.
        bad_files: share of the recordings that may be unreadable.
    """

    shard: tuple[int, int] | None = None
    overwrite: bool = False
    spreadsheet: bool = False
    bad_files: float = 1.0


@dataclass(frozen=True)
class Summary:
    """What `embed_files` wrote.

    Attributes:
        out: the file.
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
    settings: EmbedSettings | None = None,
    output: OutputSettings | None = None,
    *,
    threads: int = 0,
    world: World | None = None,
) -> Summary | None:
    """Write the vectors of recordings into one file; every process calls this, and the main one returns a summary.

    Finished blocks are kept in OUT.parts until the file is written: the same call resumes from them, and gives the same
    file. Recordings that cannot be read are left out and listed in OUT.failures.jsonl.

    Args:
        items: the recordings; rows are in their order.
        out: the file: .parquet, .npz, or at level clip .csv.
        settings: what to compute; None: one vector a recording.
        output: how to write it.
        threads: that decode; 0: as many as torch computes with.
        world: the processes that share the work; None: this one alone.

    Raises:
        ConfigError: an output that exists, cannot be written or is being written by another process, blocks of a
            different call, settings that do not fit.
        CatalogueError: more unreadable recordings than `bad_files` allows, or none that is readable.
        CheckpointError: the disk is full, or the output may not be written.
    """
    settings, output = settings or EmbedSettings(), output or OutputSettings()
    world = world or World(0, 1, torch.device("cpu"), "")
    items, out = _shard(items, Path(out), output.shard)
    run = _EmbedRun(model, items, out, settings=settings, output=output, world=world)
    with run.lock, disk_errors(out, run.kept):
        try:
            run.begin()
            run.compute(threads)
            return run.merge() if world.main else None
        except KeyboardInterrupt:
            raise KeyboardInterrupt(f"{run.kept()}; the same command resumes") from None


def numbered(out: Path, shard: tuple[int, int] | None) -> Path:
    """Return the name of a shard's output: emb.parquet is emb-00003-of-00008.parquet for (3, 8)."""
    return out if shard is None else out.with_name(f"{out.stem}-{shard[0]:05d}-of-{shard[1]:05d}{out.suffix}")


def check_free(out: Path, level: Level, overwrite: bool) -> None:
    """Raise ConfigError for an output that exists or cannot be written; cheap, so done before the model is loaded."""
    embed_blocks.check_out(out, level)
    atomic.check_free(out, overwrite)


def failures_of(out: Path) -> Path:
    """Return the file that lists the recordings that could not be read."""
    return out.with_name(f"{out.name}.failures.jsonl")


class _EmbedRun:
    """One call: its blocks, which of them are finished, and the file they become."""

    def __init__(
        self,
        model: AudioModel,
        items: Sequence[Item],
        out: Path,
        settings: EmbedSettings,
        output: OutputSettings,
        world: World,
    ) -> None:
        self.model, self.items, self.out, self.world = model, items, out, world
        self.settings, self.output = settings, output
        self.folder = BlockFolder(out.with_name(f"{out.name}.parts"), layout_of(model, settings))
        self.ends, fingerprints = item_blocks(items)
        self.starts = [0, *self.ends[:-1]]
        self.facts = {
            "format": FORMAT,
            "asit": metadata.version("asit-audio"),
            "model": weights_digest(model.encoder),
            "front_end": model.front_end.settings.model_dump(mode="json"),
            "inputs": _digest(items, fingerprints),
            "count": len(items),
            "device": world.device.type,
            **{name: value for name, value in asdict(settings).items() if name != "window" or value is not None},
        }
        self.lock = ExitStack()

    def kept(self) -> str:
        """Say how many of the inputs are in finished blocks, and where."""
        finished = [n for n in range(len(self.ends)) if self.folder.finished(n) is not None]
        return f"{sum(map(self._size, finished))} of {len(self.items)} inputs are kept in {self.folder.folder}"

    def begin(self) -> None:
        """Find the blocks of an earlier call, or make the folder; "auto" is resolved for every process."""

        def claim(own: Sequence[int]) -> tuple[dict[str, Any], str]:
            if not own:
                return {}, self.facts["inputs"]
            self.lock.enter_context(lock.writing(self.out))
            check_free(self.out, self.settings.level, self.output.overwrite)  # another process may have written it
            return self.folder.begin(self.facts, self.ends, self.output.overwrite), self.facts["inputs"]

        (everyone,) = BlockRounds(self.world, range(1)).run(claim)
        facts = everyone[0][0]
        if len({inputs for _, inputs in everyone}) > 1:
            raise ConfigError("the processes see other inputs", "the same files for each", "check what each one mounts")
        name = runtime.precision(facts["precision"], self.world).name
        self.facts = {**facts, "precision": name}
        self.settings = EmbedSettings(**{**asdict(self.settings), "precision": name})
        if self.world.main:
            atomic.write_json(self.folder.folder / PLAN, {"facts": self.facts, "ends": list(self.ends)})

    def compute(self, threads: int) -> None:
        """Compute the blocks that are missing, distributed over the processes."""
        found: dict[int, int] = {}
        if self.world.main:
            blocks = {number: self.folder.finished(number) for number in range(len(self.ends))}
            found = {number: len(block.faults) for number, block in blocks.items() if block is not None}
        found = self.world.gather(found)[0]
        kept, clean, done, bad = sum(map(self._size, found)), sum(found.values()), 0, 0
        rounds = BlockRounds(self.world, [number for number in range(len(self.ends)) if number not in found])
        show = counter(f"embed, {kept} done before" if kept else "embed", "files")

        def tick(files: int, failed: int) -> None:
            if self.world.main and kept < len(self.items):
                show(done + files, len(self.items) - kept, bad + failed)

        with closing(self._blocks(rounds.own, threads, tick if self.world.size == 1 else None)) as computed:
            for parts in rounds.run(lambda share: [next(computed) for _ in share]):
                faults = [fault for blocks in parts for block in blocks for fault in block.faults]
                done += len(faults) + sum(len(block.entries) for blocks in parts for block in blocks)
                bad += len(faults)
                tick(0, 0)
                self._check_bad(faults, clean + bad)

    def _size(self, number: int) -> int:
        return self.ends[number] - self.starts[number]

    def _blocks(
        self, numbers: Sequence[int], threads: int, tick: Callable[[int, int], None] | None
    ) -> Generator[EmbeddedBlock]:
        """Compute blocks, one after the other; calls `tick` after each recording with counts of the current block."""
        indices = [index for number in numbers for index in range(self.starts[number], self.ends[number])]
        items = [self.items[index] for index in indices]
        ends = set(np.cumsum([self._size(number) for number in numbers]).tolist())
        with closing(embed_items(self.model, items, self.settings, threads=threads, ends=ends)) as results:
            for number in numbers:
                with self.folder.writing(number) as writer:
                    done, seconds = 0, 0.0
                    while done < self._size(number):
                        result = next(results)
                        if isinstance(result, Result):
                            writer.add(rows_of(result.found, self.settings))
                            seconds = result.start - items[result.index].start + (result.seconds or 0.0)
                            continue
                        if result.fault is None:
                            writer.finish(indices[result.index], seconds)
                        else:
                            writer.fail(indices[result.index], result.fault)
                        done += 1
                        if tick is not None:
                            tick(done, len(writer.block.faults))
                yield writer.block

    def merge(self) -> Summary:
        """Write the file and the list of failures, and remove the blocks."""
        blocks: list[EmbeddedBlock] = []
        for number in range(len(self.ends)):
            block = self.folder.finished(number)
            if block is None:
                raise CheckpointError(
                    f"block {number} in {self.folder.folder} has changed", "what was written", "give the command again"
                )
            blocks.append(block)
        faults = [fault for block in blocks for fault in block.faults]
        files = sum(len(block.entries) for block in blocks)
        if not files:
            self.folder.remove()
            raise CatalogueError(
                f"all {len(faults)} inputs failed, the first: {faults[0][1]}", "one that can be read", "mend them"
            )
        self._check_bad(faults, len(faults))
        failures = [(self.items[index].text, reason) for index, reason in faults]
        lines = (json.dumps({"path": name, "reason": reason}, ensure_ascii=False) + "\n" for name, reason in failures)
        if failures:
            write_text(failures_of(self.out), "".join(lines))
        else:
            failures_of(self.out).unlink(missing_ok=True)
        about = {name: value for name, value in self.facts.items() if name != "format"}
        embed_blocks.write(
            self.out, embed_blocks.TableContents(self.folder, blocks, self.items, about, self.output.spreadsheet)
        )
        self.folder.remove()
        rows = sum(block.columns for block in blocks) * self.folder.layout.rows
        return Summary(self.out, files, rows, self.folder.layout.width, failures)

    def _check_bad(self, faults: Sequence[tuple[int, str]], bad: int) -> None:
        """Raise CatalogueError where too many inputs cannot be read; `faults` are some of them."""
        allowed = self.output.bad_files
        if bad > allowed * len(self.items):
            reasons = "".join(f"\n    {reason}" for _, reason in faults[:3])
            raise CatalogueError(
                f"{bad} of {len(self.items)} inputs cannot be read, such as:{reasons}",
                f"at most {int(allowed * len(self.items))} (--bad-files {allowed:g})",
                "mend these files, leave them out, or raise --bad-files; what was finished is kept",
            )


def _shard(items: Sequence[Item], out: Path, shard: tuple[int, int] | None) -> tuple[Sequence[Item], Path]:
    if shard is None:
        return items, out
    index, count = shard
    first, end = len(items) * index // count, len(items) * (index + 1) // count
    if first == end:
        raise ConfigError(
            f"shard {index} of {count} of {len(items)} inputs is empty", "an input for each", "take fewer"
        )
    return items[first:end], numbered(out, shard)


def _digest(items: Sequence[Item], fingerprints: Sequence[tuple[int, int]]) -> str:
    """Return the SHA-256 of the recordings: names, locations, parts, and their files' fingerprints."""
    digest = hashlib.sha256()
    names = sorted(set(Item.__slots__) - {"label", "listed"})
    for item, fingerprint in zip(items, fingerprints, strict=True):
        facts = [(name, getattr(item, name)) for name in names]
        digest.update(repr((facts, fingerprint)).encode("utf-8", "surrogateescape"))
    return digest.hexdigest()
