"""Damaged sound files by the thousand: each is read or refused, in time, in bounded memory, and never gives NaN."""

from __future__ import annotations

import contextlib
import io
import json
import resource
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

KINDS = (
    *(("WAV", "PCM_16"), ("WAV", "FLOAT"), ("WAV", "IMA_ADPCM"), ("WAV", "MS_ADPCM"), ("RF64", "PCM_24")),
    *(("W64", "PCM_16"), ("AIFF", "PCM_16"), ("AU", "FLOAT"), ("CAF", "PCM_16"), ("FLAC", "PCM_16")),
    *(("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")),
    *(("ipod", "aac"), ("adts", "aac"), ("webm", "libopus"), ("mov", "pcm_s16le"), ("ogg", "flac"), ("asf", "wmav2")),
)
ODD = (0, 1, 0x7F, 0x80, 0xFF)
FLOOR, MEMORY = 5.0, 2 << 30  # s and bytes: most for one file of half a second


def seeds(form: str, codec: str) -> bytes:
    x = 0.2 * np.sin(np.arange(12_000)[:, None] * [0.1, 0.13])
    out = io.BytesIO()
    if form.isupper():
        soundfile.write(out, x, 24000, format=form, subtype=codec)
        return out.getvalue()
    import av

    with av.open(out, "w", format=form) as file:
        stream = file.add_stream(codec, rate=24000)
        stream.layout, stream.bit_rate = "stereo", 96_000
        wanted = stream.codec_context.codec.audio_formats[0].name
        resampler = av.AudioResampler(format=wanted, layout="stereo", rate=24000, frame_size=stream.frame_size or 1024)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(x.T, np.float32), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 24000, 0
        for part in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(part))
        file.mux(stream.encode(None))
    return out.getvalue()


def mutant(content: bytes, rng: np.random.Generator) -> bytes:
    """One damage of several kinds, most of them near the beginning, where headers are."""
    out = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        near = min(len(out), 200 if rng.random() < 0.7 else len(out))
        at = int(rng.integers(max(1, near)))
        how = int(rng.integers(7))
        if how == 0:
            out[at] = int(rng.integers(256))
        elif how == 1:
            out[at] ^= 1 << int(rng.integers(8))
        elif how == 2:
            out[at : at + 4] = bytes([ODD[int(rng.integers(len(ODD)))]]) * 4
        elif how == 3:
            del out[at : at + int(rng.integers(1, 64))]
        elif how == 4:
            out[at:at] = rng.bytes(int(rng.integers(1, 64)))
        elif how == 5:
            del out[int(rng.integers(len(out) + 1)) :]
        else:
            begin = int(rng.integers(max(1, len(out))))
            out[at:at] = out[begin : begin + int(rng.integers(1, 2000))]
        out = out or bytearray(b"\0")
    return bytes(out)


def run(form: str, codec: str, count: int) -> dict[str, object]:
    """Read mutants; what went wrong, and how they ended."""
    from asit.audio.stream import read_sound
    from asit.errors import AudioError

    content, ends, wrong = seeds(form, codec), Counter[str](), list[str]()
    for number in range(count):
        rng = np.random.default_rng([number, len(content)])
        damaged, begun = mutant(content, rng), time.monotonic()
        try:
            wave = read_sound(damaged, None, 16000)
            ends["read"] += 1
            if not np.isfinite(wave).all() or np.abs(wave).max() > 40:
                wrong.append(f"{number}: {np.abs(wave).max()}")
        except AudioError as error:
            ends[getattr(error, "reason", "other")] += 1
            if not (error.expected and error.remedy):
                wrong.append(f"{number}: {error}")
        except Exception as error:  # the point of this test
            wrong.append(f"{number}: {type(error).__name__}: {error}")
        if time.monotonic() - begun > FLOOR:
            wrong.append(f"{number}: {time.monotonic() - begun:.1f} s")
    return {"ends": ends, "wrong": wrong}


@pytest.mark.slow
@pytest.mark.parametrize(("form", "codec"), KINDS)
def test_damaged_files_are_read_or_refused(form: str, codec: str) -> None:
    if not form.isupper():
        pytest.importorskip("av", reason="PyAV is not installed (the extra asit-audio[av])")
    arguments = [sys.executable, __file__, form, codec, "600"]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert sum(found["ends"].values()) == 600


def long_searches() -> dict[str, bytes]:
    """Bytes that a careless search would go through for minutes."""
    many = 1_000_000
    mp3, wav, flac, opus = (seeds(*kind) for kind in (KINDS[12], KINDS[0], KINDS[9], KINDS[11]))
    head = wav[: wav.index(b"data")]
    page = b"OggS\0\2" + bytes(20) + b"\1\x13OpusHead" + bytes(11)
    chunks = b"LIST\0\0\0\0" * many + b"LIST\xff\0\0\0x"
    return {
        "mp3": mp3 + b"\xff\xfb\x90\0" * 4 * many,
        "wav": head + b"JUNK\0\0\0\0" * many,
        "wav stream": head + b"data\xff\xff\xff\xff" + bytes(1000) + b"\1" * 1000 + chunks,
        "wav half": head + b"data\x10\0\0\0" + b"\1" * 1000 + chunks,
        "aiff": b"FORM\0\0\0\0AIFF" + b"JUNK\0\0\0\0" * many,
        "flac": flac + b"fLaC\0\0\0\x22" * many,
        "flac tail": flac + b"\xff\xf8\x12\x08\0\0" * 20_000,
        "ogg": opus * 4000,
        "ogg pages": page * (many // 2),
        "mp4": b"\0\0\0\x08ftyp" + b"\0\0\0\x08free" * many,
        "id3": b"ID3\4\0\0\0\0\0\0" * many + mp3,
    }


@pytest.mark.slow
def test_no_search_in_a_file_is_long() -> None:
    from asit.audio.files import probe
    from asit.errors import AudioError

    for name, content in long_searches().items():
        begun = time.process_time()
        with contextlib.suppress(AudioError):
            probe(content)
        assert time.process_time() - begun < FLOOR, name


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2] / "src"))
    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
