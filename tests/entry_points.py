"""Damaged sounds and tars given to one entry point of asit, in a process whose memory and time are bounded.

`python tests/entry_points.py FOLDER ENTRY COUNT` gives COUNT mutants to it and prints how they ended; those that fail
stay in FOLDER, and so does the one that ended the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from damaging import RATE, cases, recordings, tar_mutant, tars

SECONDS, MEMORY = 10, 3 << 30
"""Processor time that one case may take, and bytes of the process, torch included."""
GROUP = 40
"""Mutants in a folder."""


def save_models(folder: Path) -> None:
    """A tiny encoder and a tiny classifier."""
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
    """Each returns a word for the outcome, or raises."""

    def __init__(self, folder: Path) -> None:
        import asit
        from asit.serve.analysis import Analyser
        from asit.serve.app import application
        from asit.serve.request_queue import RequestLimits

        self.folder = folder
        save_models(folder)
        self.encoder, self.tagger = asit.load(folder / "encoder"), asit.load(folder / "tagger")
        self.app = application(Analyser(self.tagger, "tagger"), RequestLimits())

    def read(self, path: Path) -> str:
        """The header, all samples at 16 kHz from the file and its bytes, a part of them, and the verdict of a scan."""
        from asit.audio import files
        from asit.errors import AudioError

        refused = list[AudioError]()
        for call in (
            lambda: files.probe(path),
            lambda: files.read(path, rate=RATE),
            lambda: files.read(path.read_bytes(), rate=RATE),
            lambda: files.read(path, rate=RATE, start=0.1, seconds=0.1),
            lambda: files.inspect(path, keep=(0.0, 0.3)).fault,
        ):
            try:
                found = call()
            except AudioError as error:
                refused.append(error)
                continue
            if isinstance(found, np.ndarray):
                assert np.abs(found).max() <= 40, "samples that are not finite or far out of range"  # false for NaN
        assert all(error.expected and error.remedy for error in refused), refused
        return "refused" if refused else "read"

    def vectors(self, path: Path) -> str:
        """The vector and the labels of a file."""
        found, tags = self.encoder.embed(path), self.tagger.tag(path)
        for array in (found.clip, found.frames, tags.clip, tags.windows):
            assert np.isfinite(np.asarray(array)).all(), "a vector or a score is not finite"
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

    def folders(self, path: Path) -> str:
        """catalogue, embed, tag and index over a folder; the good recordings come out as they do alone."""
        from asit import cli

        out = self.folder / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        mels = ["--front-end.mels", "32"]
        for verb in (
            ["catalogue", str(path), "--out", f"{out}/c.jsonl", "--workers", "1", "--bad-files", "1", *mels],
            ["embed", f"{self.folder}/encoder", str(path), "--out", f"{out}/e.npz"],
            ["tag", f"{self.folder}/tagger", str(path), "--out", f"{out}/t.csv"],
            ["index", f"{self.folder}/encoder", str(path), "--out", f"{out}/i"],
        ):
            words = io.StringIO()
            with contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
                status = cli.main(verb)
            assert status in (0, 2), f"asit {verb[0]} ends with {status}: {words.getvalue()[-500:]}"
            assert "Traceback" not in words.getvalue(), words.getvalue()[-2000:]
        good = {p.name for p in path.glob("good*")}
        with np.load(out / "e.npz") as held:
            assert np.isfinite(held["vectors"]).all(), "embed writes vectors that are not finite"
            assert good <= {Path(name).name for name in held["paths"].tolist()}, "embed lost a recording"
        listed = (out / "c.jsonl").read_text("utf-8")
        assert all(name in listed for name in good), "catalogue lost a recording"
        header = json.loads(listed.splitlines()[0])
        assert all(header[name] is not None and np.isfinite(header[name]) for name in ("mean", "std")), "mean, std"
        assert np.isfinite(np.load(out / "i" / "vectors.npy").astype(np.float32)).all(), "index: vectors not finite"
        assert "nan" not in (out / "t.csv").read_text("utf-8").lower(), "tag writes nan"
        return "read"


def inputs(entry: str, folder: Path, count: int) -> Iterator[Path]:
    """Write the mutants, one at a time or in folders of `GROUP` with three good recordings."""
    if entry == "tar":
        originals = tars()
        for number in range(count):
            path = folder / f"{number}.tar"
            path.write_bytes(tar_mutant(originals[number % 2], number))
            yield path
        return
    for at, (name, number, what, data) in enumerate(cases(count)):
        path = folder / f"{number}-{what}-{name}"
        if entry == "folders":
            path = folder / f"group-{at // GROUP}" / path.name
            path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        if entry != "folders":
            yield path
        elif at % GROUP == GROUP - 1:
            for good in ("pcm16.wav", "mono.flac", "vorbis.ogg"):
                (path.parent / f"good-{good}").write_bytes(recordings()[good])
            yield path.parent


def _no_number(text: str) -> NoReturn:
    raise AssertionError(f"the page answers {text}")


def _ring(*_: Any) -> NoReturn:
    raise TimeoutError(f"more than {SECONDS} s of the processor")


def main(folder: Path, entry: str, count: int) -> None:
    """Give `count` mutants to an entry point, and print how they ended as JSON."""
    import resource  # not on Windows

    from asit.errors import AsitError

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    signal.signal(signal.SIGPROF, _ring)
    call, ends, wrong = getattr(EntryPoints(folder), entry), Counter[str](), []
    for path in inputs(entry, folder, count):
        signal.setitimer(signal.ITIMER_PROF, SECONDS * (6 if path.is_dir() else 1))
        try:
            ends[call(path)] += 1
        except AsitError:
            ends["refused"] += 1
        except BaseException as error:
            wrong.append(f"{path.name}: {type(error).__name__}: {error}")
            continue
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        (shutil.rmtree if path.is_dir() else Path.unlink)(path)
    print(json.dumps({"ends": ends, "wrong": wrong}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))
