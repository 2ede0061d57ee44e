"""Damaged sound files and tars, and a process that opens them by every door under a watch on its time and memory.

`python tests/damaging.py` is that process: it reads one JSON line a case and answers with one. `Watched` starts it,
kills it beyond the limits and starts the next one. A mutant follows from its file and a number alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import io
import json
import os
import select
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

RATE = 16000
CPU_SECONDS = 10.0
"""Processor time that one case may take; the watch over wall time is longer, for a machine that is busy."""
WALL_SECONDS = 600.0
BYTES = 2 << 30
"""Resident memory that the process may reach, torch included."""
BLOCK = 512

Mutate = Callable[[bytearray, np.random.Generator], bytearray]


def chirp(seconds: float = 0.4, channels: int = 1) -> np.ndarray:
    """A rising tone with some noise, (S, channels)."""
    t = np.arange(round(seconds * RATE)) / RATE
    wave = 0.3 * np.sin(2 * np.pi * (300 + 900 * t) * t) + 0.02 * np.random.default_rng(7).standard_normal(len(t))
    return np.stack([wave * 0.9**c for c in range(channels)], 1).astype(np.float32)


@functools.cache
def recordings() -> dict[str, bytes]:
    """An undamaged file of each kind that can be written here; the name's suffix is the file's.

    libsndfile puts the time into some headers and draws the numbers of Ogg streams: they are the same in one process.
    """
    import soundfile

    kinds = {
        "pcm16.wav": ("WAV", "PCM_16", 1), "pcm24.wav": ("WAV", "PCM_24", 2), "float.wav": ("WAV", "FLOAT", 1),
        "double.wav": ("WAV", "DOUBLE", 1), "ulaw.wav": ("WAV", "ULAW", 1), "adpcm.wav": ("WAV", "IMA_ADPCM", 1),
        "extensible.wav": ("WAVEX", "PCM_16", 6), "rf64.wav": ("RF64", "PCM_16", 1), "mono.flac": ("FLAC", "PCM_16", 1),
        "stereo.flac": ("FLAC", "PCM_24", 2), "layer3.mp3": ("MP3", "MPEG_LAYER_III", 1),
        "vorbis.ogg": ("OGG", "VORBIS", 2), "opus.opus": ("OGG", "OPUS", 1), "pcm.aiff": ("AIFF", "PCM_16", 1),
        "pcm.au": ("AU", "PCM_16", 1), "float.au": ("AU", "FLOAT", 1), "pcm.caf": ("CAF", "PCM_16", 2),
        "pcm.w64": ("W64", "PCM_16", 1),
    }  # fmt: skip
    found = {}
    for name, (kind, subtype, channels) in kinds.items():
        buffer = io.BytesIO()
        try:
            soundfile.write(buffer, chirp(channels=channels), RATE, format=kind, subtype=subtype)
        except soundfile.LibsndfileError:  # an older libsndfile writes no MP3
            continue
        found[name] = buffer.getvalue()
    for name, container, codec in (
        ("aac.m4a", "mp4", "aac"),
        ("opus.webm", "webm", "libopus"),
        ("raw.aac", "adts", "aac"),
    ):
        if (data := _by_av(container, codec)) is not None:
            found[name] = data
    return found


def _by_av(container: str, codec: str) -> bytes | None:
    try:
        import av
    except ImportError:
        return None
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        rate = 48000 if codec == "libopus" else RATE
        stream = file.add_stream(codec, rate=rate, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.repeat(chirp().T, rate // RATE, 1), format="flt", layout="mono")
        frame.sample_rate = rate
        resampler = av.AudioResampler(format=stream.codec_context.format, layout="mono", rate=rate)
        for part in resampler.resample(frame):
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return buffer.getvalue()


# Mutators -----------------------------------------------------------------------------------------------------------

_EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    1 << 62,
    (1 << 64) - 1,
)
_MARKS = (
    b"fmt ", b"data", b"fact", b"ds64", b"LIST", b"COMM", b"SSND", b"desc", b"pakt", b"kuki", b"mdhd", b"mvhd", b"tkhd",
    b"stts", b"stsz", b"stsc", b"stco", b"stsd", b"esds", b"elst", b"moov", b"mdat", b"OpusHead", b"vorbis", b"Xing",
    b"Info", b"OggS", b"ustar",
)  # fmt: skip


def flip_bits(data: bytearray, rng: np.random.Generator) -> bytearray:
    """One to 64 bits, half of the time all of them in the first bytes."""
    end = min(len(data), 200) if rng.random() < 0.5 else len(data)
    for _ in range(int(2 ** rng.uniform(0, 6))):
        data[int(rng.integers(end))] ^= 1 << int(rng.integers(8))
    return data


def truncate(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Cut off anywhere, half of the time within the header."""
    return data[: int(rng.integers(1, min(len(data), 200) if rng.random() < 0.5 else len(data)))]


def insert(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Noise, zeros or a part of the file itself, put in anywhere."""
    at, size = int(rng.integers(len(data))), int(2 ** rng.uniform(0, 12))
    first = int(rng.integers(len(data)))
    what = (rng.bytes(size), bytes(size), bytes(data[first : first + size]))[int(rng.integers(3))]
    return data[:at] + what + data[at:]


def delete(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A part taken out."""
    at = int(rng.integers(len(data)))
    return data[:at] + data[at + int(2 ** rng.uniform(0, 12)) :]


def set_field(data: bytearray, rng: np.random.Generator) -> bytearray:
    """One to three numbers of the header, or near a chunk's mark, set to an extreme value."""
    places = [at for mark in _MARKS if (at := data.find(mark)) >= 0]
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(64))
        if places and rng.random() < 0.6:
            at = places[int(rng.integers(len(places)))] + 4 + int(rng.integers(32))
        size = int(rng.choice([1, 2, 4, 8]))
        value = _EXTREMES[int(rng.integers(len(_EXTREMES)))] & ((1 << 8 * size) - 1)
        if at + size <= len(data):
            data[at : at + size] = value.to_bytes(size, "little" if rng.random() < 0.5 else "big")
    return data


def swap(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Two stretches of equal length change places."""
    size = int(rng.integers(1, max(2, len(data) // 3)))
    a, b = sorted(int(x) for x in rng.integers(0, max(1, len(data) - size), 2))
    if b - a >= size:
        data[a : a + size], data[b : b + size] = data[b : b + size], data[a : a + size]
    return data


def overwrite(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A stretch of zeros, of ones or of noise."""
    at, size = int(rng.integers(len(data))), int(2 ** rng.uniform(2, 11))
    size = min(size, len(data) - at)
    data[at : at + size] = (bytes(size), b"\xff" * size, rng.bytes(size))[int(rng.integers(3))]
    return data


def extreme_samples(data: bytearray, rng: np.random.Generator) -> bytearray:
    """Floats that are huge, infinite or no number, somewhere behind the header."""
    values = (3e38, -3e38, float("inf"), float("nan"), 1e30, 1e-42, 32767.0)
    for _ in range(int(rng.integers(1, 6))):
        form = ("<f", ">f", "<d")[int(rng.integers(3))]
        at = int(rng.integers(44, max(45, len(data) - 8))) // 4 * 4
        data[at : at + struct.calcsize(form)] = struct.pack(form, values[int(rng.integers(len(values)))])
    return data


def append(data: bytearray, rng: np.random.Generator) -> bytearray:
    """A copy of itself, noise or zeros behind the end."""
    return data + (bytes(data), rng.bytes(3000), bytes(3000))[int(rng.integers(3))]


MUTATORS: tuple[Mutate, ...] = (
    flip_bits, truncate, insert, delete, set_field, swap, overwrite, extreme_samples, append, set_field,
)  # fmt: skip


def mutant(data: bytes, name: str, number: int) -> tuple[str, bytes]:
    """What was done, and the damaged file; one mutator, or now and then two."""
    rng = np.random.default_rng([number, *name.encode()])
    chosen = [MUTATORS[number % len(MUTATORS)]]
    if rng.random() < 0.25:
        chosen.append(MUTATORS[int(rng.integers(len(MUTATORS)))])
    out = bytearray(data)
    for mutate in chosen:
        if len(out) > 8:
            out = mutate(out, rng)
    if out[:4] == b"OggS" and rng.random() < 0.7:  # else nearly every mutant ends at a page's checksum
        out = _with_page_sums(out)
    return "+".join(mutate.__name__ for mutate in chosen), bytes(out)


def tars() -> list[bytes]:
    """Undamaged tars: with sidecars and long names, in the formats of PAX and of GNU."""
    made, found = recordings(), []
    for kind in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        buffer = io.BytesIO()
        names = {
            "a.wav": made["pcm16.wav"],
            "a.cls": b"dog",
            "b.flac": made["mono.flac"],
            "b.json": b'{"label": "cat"}',
        }
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as archive:
            for name, data in (names | {"c" * 150 + ".wav": made["float.wav"]}).items():
                header = tarfile.TarInfo(name)
                header.size = len(data)
                archive.addfile(header, io.BytesIO(data))
        found.append(buffer.getvalue())
    return found


def tar_mutant(data: bytes, number: int) -> bytes:
    """A damaged tar: a mutant as of sounds, or a header with an extreme size, another type or a name of noise."""
    rng = np.random.default_rng([number, 5])
    if number % 3 == 0:
        out = bytearray(mutant(data, "tar", number)[1])
    else:
        out = bytearray(data)
        heads = [at for at in range(0, len(out) - BLOCK + 1, BLOCK) if out[at + 257 : at + 262] == b"ustar"]
        for _ in range(int(rng.integers(1, 3))):
            at, kind = heads[int(rng.integers(len(heads)))], int(rng.integers(6))
            if kind == 3:
                out[at + 156] = int(rng.choice(list(b"LKxgSXV01234567")))
            elif kind == 4:
                out[at : at + 100] = rng.bytes(100)
            else:  # numbers are octal, or after 0x80 or 0xff in base 256
                size = (b"\xff" * 12, b"\xff" * 4 + (-512).to_bytes(8, "big", signed=True))[int(rng.integers(2))]
                if kind == 2:
                    size = b"\x80" + (1 << int(rng.integers(20, 80))).to_bytes(11, "big")
                elif kind == 5:
                    size = b"%011o\0" % int(rng.integers(0, 1 << 33))
                out[at + 124 : at + 136] = size
    if rng.random() < 0.8:  # else most end at a header's sum
        for at in range(0, len(out) - BLOCK + 1, BLOCK):
            if out[at + 257 : at + 262] == b"ustar":
                out[at + 148 : at + 156] = b" " * 8
                out[at + 148 : at + 156] = b"%06o\0 " % sum(out[at : at + BLOCK])
    return bytes(out)


def _crc_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x04C11DB7 if value & 0x80000000 else 0)
        table.append(value & 0xFFFFFFFF)
    return table


_CRC = _crc_table()


def _with_page_sums(data: bytearray) -> bytearray:
    """Ogg pages with the checksums of what is in them now (RFC 3533)."""
    at = 0
    while (at := data.find(b"OggS", at)) >= 0 and at + 27 <= len(data):
        count = data[at + 26]
        end = at + 27 + count + sum(data[at + 27 : at + 27 + count])
        data[at + 22 : at + 26] = bytes(4)
        value = 0
        for byte in data[at:end]:
            value = ((value << 8) & 0xFFFFFFFF) ^ _CRC[(value >> 24) ^ byte]
        data[at + 22 : at + 26] = value.to_bytes(4, "little")
        at = max(at + 1, min(end, len(data)))
    return data


# The process that opens them ----------------------------------------------------------------------------------------


def models(folder: Path) -> None:
    """A tiny encoder and a tiny classifier, for the process to load."""
    import torch

    from asit.model.audio_model import AudioModel
    from asit.model.classifier import Head, Labelling
    from asit.model.vit import Encoder
    from asit.settings import EncoderSettings, FrontEndSettings

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


class Doors:
    """Every way in, each giving a word for the outcome or raising."""

    def __init__(self, folder: Path) -> None:
        import asit
        from asit.serve.analysis import Analyst
        from asit.serve.app import application
        from asit.serve.limits import Limits

        self.folder = folder
        self.encoder, self.tagger = asit.load(folder / "encoder"), asit.load(folder / "tagger")
        self.app = application(Analyst(self.tagger, "tagger"), Limits())

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
        from asit.data.inputs import expand

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
    doors = Doors(folder)
    answers.write(json.dumps({"ready": True}) + "\n")
    for line in sys.stdin:
        case = json.loads(line)
        began = time.process_time()
        try:
            found: dict[str, Any] = {"outcome": getattr(doors, case["door"])(Path(case["path"]))}
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

    def ask(self, door: str, path: Path, scale: float = 1.0) -> dict[str, Any]:
        """What became of one file at one door: an outcome of read, refused, fault, hang, memory or crash."""
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
        self.process.stdin.write(json.dumps({"door": door, "path": str(path)}).encode() + b"\n")
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


def cases(count: int) -> Iterator[tuple[str, int, str, bytes]]:
    """(name, number, what was done, damaged bytes), the kinds of files in turn."""
    originals = recordings()
    names = sorted(originals)
    for at in range(count):
        name, number = names[at % len(names)], at // len(names)
        yield name, number, *mutant(originals[name], name, number)


def sweep(
    folder: Path, count: int, keep: Path | None = None, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """Damaged sounds through every door; gives the counts and the failures.

    Args:
        folder: to work in.
        count: mutants.
        keep: where files that fail are kept.
        say: hears how it goes.
    """
    counts: Counter[str] = Counter()
    failures: list[str] = []
    group = folder / "group"
    with Watched(folder) as watched:

        def ask(door: str, path: Path, told: str, scale: float = 1.0) -> None:
            found = watched.ask(door, path, scale)
            counts[f"{door} {found['outcome']}"] += 1
            if found["outcome"] not in ("read", "refused"):
                lines = found.get("words", "").strip().splitlines() or [""]
                failures.append(f"{told} {door}: {found['outcome']}: {lines[-1]}")
                say("\n".join([failures[-1], *lines[-8:]]))
                if keep is not None:
                    target = keep / f"{door}-{told.replace(' ', '-')}{path.suffix}"
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
            for door in ("read", "vectors", "page"):
                ask(door, path, f"{name} {number} {what}")
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
