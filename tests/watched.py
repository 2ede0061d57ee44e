"""Files opened by every entry point in a process of its own, under a watch on its time and memory.

`python tests/watched.py FOLDER` is that process: it reads one JSON line a case and answers with one. `Watched` starts
it, kills it beyond the limits and starts the next one. `python tests/watched.py FOLDER COUNT KEEP` sends COUNT damaged
sounds through it, and keeps those that fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from damaging import RATE, cases, recordings

CPU_SECONDS = 10.0
"""Processor time that one case may take; the watch over wall time is longer, for a machine that is busy."""
WALL_SECONDS = 600.0
BYTES = 2 << 30
"""Resident memory that the process may reach, torch included."""


def models(folder: Path) -> None:
    """A tiny encoder and a tiny classifier, for the process to load."""
    import torch

    from asit.config import EncoderSettings, FrontEndSettings
    from asit.model.audio_model import AudioModel
    from asit.model.classifier import Head, Labelling
    from asit.model.vit import Encoder

    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
    encoder = Encoder(settings, 48, 32)
    labels = Labelling(("low", "high"), False, "class+mean", 0.495)
    head = Head(32, 2, labels.pooling)
    with torch.no_grad():
        for i, parameter in enumerate([*encoder.parameters(), *head.parameters()]):
            parameter.normal_(0.0, 0.3, generator=torch.Generator().manual_seed(i))
    front_end = FrontEndSettings(mels=32, mean=-6.0, std=3.0)
    AudioModel.from_parts(encoder, front_end, settings, 48, {"step": 7}).save(folder / "encoder")
    AudioModel.from_parts(encoder, front_end, settings, 48, {"step": 7}, head, labels).save(folder / "tagger")


class EntryPoints:
    """All entry points, each returning a word for the outcome or raising."""

    def __init__(self, folder: Path) -> None:
        import asit
        from asit.serve.analysis import Analyser
        from asit.serve.app import application
        from asit.serve.limits import RequestLimits

        self.folder = folder
        self.encoder, self.tagger = asit.load(folder / "encoder"), asit.load(folder / "tagger")
        self.app = application(Analyser(self.tagger, "tagger"), RequestLimits())

    def read(self, path: Path) -> str:
        """The header, all samples at 16 kHz, a part of them, and the verdict of a scan."""
        from asit.audio import files
        from asit.errors import AsitError

        wave = np.zeros(0, np.float32)
        refused: AsitError | None = None
        for call in (
            lambda: files.probe(path),
            lambda: files.read(path, rate=RATE),
            lambda: files.read(path, rate=RATE, start=0.1, seconds=0.1),
            lambda: files.inspect(path, keep=(0.0, 0.3)).fault,
        ):
            try:
                found = call()
            except AsitError as error:
                refused = refused or error
                continue
            if isinstance(found, np.ndarray):
                wave = found
                assert np.isfinite(wave).all(), "read gives samples that are not finite"
        return "refused" if refused is not None else "read"

    def vectors(self, path: Path) -> str:
        """The vector and the labels of a file."""
        found = self.encoder.embed(path)
        assert all(np.isfinite(np.asarray(x)).all() for x in (found.clip, found.frames)), "a vector is not finite"
        tags = self.tagger.tag(path)
        assert all(np.isfinite(np.asarray(x)).all() for x in (tags.clip, tags.windows)), "a score is not finite"
        return "read"

    def page(self, path: Path) -> str:
        """The bytes sent to the page."""
        import httpx

        async def ask() -> httpx.Response:
            transport = httpx.ASGITransport(self.app)  # type: ignore[arg-type]
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=60) as client:
                return await client.post("/api/analyse", content=path.read_bytes())

        answer = asyncio.run(ask())
        assert answer.status_code in (200, 400, 413, 422), f"the page answers {answer.status_code}: {answer.text[:300]}"
        json.loads(answer.text, parse_constant=_no_number)
        return "read" if answer.status_code == 200 else "refused"

    def tar(self, path: Path) -> str:
        """The recordings of a tar, with their labels."""
        from asit.data.catalogue.inputs import expand

        return "refused" if any(item.fault for item in expand([str(path)])) else "read"

    def run(self, path: Path) -> str:
        """Python code, for tests of the watch itself."""
        exec(path.read_text())
        return "read"

    def folders(self, path: Path) -> str:
        """catalogue, embed, tag, index and shard over a folder; the good recordings come out as they do alone."""
        from asit import cli

        out = path.with_name(path.name + "-out")
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        mels = ["--front-end.mels", "32"]
        verbs = [
            ["catalogue", str(path), "--out", f"{out}/c.jsonl", "--workers", "1", "--bad-files", "1", *mels],
            ["embed", f"{self.folder}/encoder", str(path), "--out", f"{out}/e.npz"],
            ["tag", f"{self.folder}/tagger", str(path), "--out", f"{out}/t.csv"],
            ["index", f"{self.folder}/encoder", str(path), "--out", f"{out}/i"],
        ]
        for verb in verbs:
            words = io.StringIO()
            with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
                status = cli.main(verb)
            text = words.getvalue()
            assert status in (0, 2), f"asit {verb[0]} ends with {status}: {text[-500:]}"
            assert "Traceback" not in text, text[-2000:]
        assert all((out / name).exists() for name in ("c.jsonl", "e.npz", "t.csv", "i")), text[-500:]
        self._finite(out, path)
        shutil.rmtree(out)
        return "read"

    @staticmethod
    def _finite(out: Path, path: Path) -> None:
        with np.load(out / "e.npz") as held:
            assert np.isfinite(held["vectors"]).all(), "embed writes vectors that are not finite"
            names = {Path(name).name for name in held["paths"].tolist()}
        good = {p.name for p in path.rglob("good*")}
        listed = (out / "c.jsonl").read_text("utf-8")
        assert good <= names, f"embed lost {sorted(good - names)}"
        assert not (lost := [name for name in good if name not in listed]), f"catalogue lost {lost}"
        header = json.loads(listed.splitlines()[0])
        assert all(header[name] is not None and np.isfinite(header[name]) for name in ("mean", "std")), "mean, std"
        assert np.isfinite(np.load(out / "i" / "vectors.npy").astype(np.float32)).all(), (
            "index keeps non-finite vectors"
        )
        assert "nan" not in (out / "t.csv").read_text("utf-8").lower(), "tag writes nan"


def _no_number(text: str) -> None:
    raise AssertionError(f"the page answers {text}")


def serve_cases(folder: Path) -> None:
    """Cases from the standard input, one a line, until it ends."""
    from asit.errors import AsitError

    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    entry_points = EntryPoints(folder)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        case = json.loads(line)
        began = time.process_time()
        try:
            found: dict[str, Any] = {"outcome": getattr(entry_points, case["entry"])(Path(case["path"]))}
        except AsitError as error:
            found = {"outcome": "refused", "words": str(error)[:300]}
        except BaseException as error:
            found = {"outcome": "fault", "words": "".join(traceback.format_exception(error))[-3000:]}
        found["seconds"] = time.process_time() - began
        answers.write(json.dumps(found) + "\n")


class Watched:
    """The process above, started, watched and started again.

    Args:
        folder: for the models.
        bytes_, cpu, wall: what a case may take.
    """

    def __init__(self, folder: Path, bytes_: int = BYTES, cpu: float = CPU_SECONDS, wall: float = WALL_SECONDS) -> None:
        self.folder, self.limits = folder, (bytes_, cpu, wall)
        if not (folder / "tagger").exists():
            models(folder)
        self.process: subprocess.Popen[bytes] | None = None
        self.peak = 0

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """End the process."""
        if self.process is not None:
            self.process.kill()
            self.process.communicate()
            self.process = None

    def ask(self, entry: str, path: Path, scale: float = 1.0) -> dict[str, Any]:
        """What became of one file at one entry point: an outcome of read, refused, fault, hang, memory or crash."""
        if self.process is None:
            environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(self.folder / "cache")}
            self.process = subprocess.Popen(
                [sys.executable, __file__, str(self.folder)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment,
            )  # fmt: skip
            assert "ready" in (self._answer(time.monotonic() + WALL_SECONDS, float("inf")) or {}), (
                "the process does not start"
            )
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps({"entry": entry, "path": str(path)}).encode() + b"\n")
        self.process.stdin.flush()
        cpu = _cpu(self.process.pid) + self.limits[1] * scale
        found = self._answer(time.monotonic() + self.limits[2] * scale, cpu)
        return found

    def _answer(self, wall: float, cpu: float) -> dict[str, Any]:
        process = self.process
        assert process is not None
        assert process.stdout is not None
        while not select.select([process.stdout], [], [], 0.02)[0]:
            held = _resident(process.pid)
            self.peak = max(self.peak, held)
            if held > self.limits[0]:
                self.stop()
                return {"outcome": "memory", "words": f"{held / 1e9:.1f} GB"}
            if _cpu(process.pid) > cpu or time.monotonic() > wall:
                self.stop()
                return {"outcome": "hang", "words": "no answer within the limit of time"}
        line = process.stdout.readline()
        if not line:
            status = process.wait()
            self.stop()
            return {"outcome": "crash", "words": f"the process ended with {status}"}
        return dict(json.loads(line))


def _resident(pid: int) -> int:
    with contextlib.suppress(OSError, ValueError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def _cpu(pid: int) -> float:
    with contextlib.suppress(OSError, IndexError):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return 0.0


def sweep(
    folder: Path, count: int, keep: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Damaged sounds through every entry point; gives the counts and the failures.

    Args:
        folder: to work in.
        count: mutants.
        keep: where files that fail are kept.
        say: called with the progress.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []
    group = folder / "group"
    with Watched(folder) as watched:

        def ask(entry: str, path: Path, case: str, scale: float = 1.0) -> None:
            found = watched.ask(entry, path, scale)
            counts[f"{entry} {found['outcome']}"] += 1
            if found["outcome"] not in ("read", "refused"):
                lines = found.get("words", "").strip().splitlines() or [""]
                failures.append(f"{case} {entry}: {found['outcome']}: {lines[-1]}")
                say("\n".join([failures[-1], *lines[-8:]]))
                if keep is not None:
                    target = keep / f"{entry}-{case.replace(' ', '-')}{path.suffix}"
                    keep.mkdir(parents=True, exist_ok=True)
                    (shutil.copytree if path.is_dir() else shutil.copyfile)(
                        path, target, **({"dirs_exist_ok": True} if path.is_dir() else {})
                    )

        for at, (name, number, what, data) in enumerate(cases(count)):
            if at % 1000 == 0:
                say(f"{at} of {count}: {dict(sorted(counts.items()))}")
            if at % 40 == 0:
                if at:
                    ask("folders", group, f"folder {at // 40}", 6.0)
                shutil.rmtree(group, ignore_errors=True)
                group.mkdir()
                for i, kind in enumerate(("pcm16.wav", "mono.flac", "vorbis.ogg")):
                    (group / f"good{i}{Path(kind).suffix}").write_bytes(recordings()[kind])
            stem, _, suffix = name.rpartition(".")
            path = group / f"{stem}-{number:05d}.{suffix}"
            path.write_bytes(data)
            for entry in ("read", "vectors", "page"):
                ask(entry, path, f"{name} {number} {what}")
        peak = watched.peak
    return {"counts": dict(sorted(counts.items())), "failures": failures, "peak": peak}


if __name__ == "__main__":
    if len(sys.argv) == 2:
        serve_cases(Path(sys.argv[1]))
    else:  # python tests/damaging.py FOLDER COUNT KEEP: a long run by hand
        print(
            json.dumps(
                sweep(Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), lambda t: print(t, flush=True)), indent=1
            )
        )
