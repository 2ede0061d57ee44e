"""What is answered: the model's own results, pictures that fit the sound, and limits noticed while decoding."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import soundfile
import torch
from starlette.testclient import TestClient

from asit.audio.stream import OpenSound
from asit.model.audio_model import AudioModel
from asit.search import Index, build
from asit.serve import analysis, answers
from asit.serve.analysis import Analyser, Recording
from asit.serve.app import application
from asit.serve.guard import Guard
from asit.serve.request_queue import GoneError, Job, RequestLimits, TooLongError

Wav = Callable[..., bytes]


def client(analyser: Analyser, **limits: Any) -> TestClient:
    return TestClient(application(analyser, RequestLimits(**limits)), base_url="http://localhost")


def u8(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), np.uint8)


@pytest.fixture(scope="module")
def analyser(tagger: AudioModel) -> Analyser:
    return Analyser(tagger, "tiny", precision="float32")


def test_tags_are_the_models(analyser: Analyser, wav: Wav) -> None:
    body = wav(2.1)
    expected = analyser.model.tag(body, precision="float32")
    with client(analyser) as ask:
        got = ask.post("/api/tag?top=2&threshold=0.3", content=body).json()
    assert [tag["label"] for tag in got["tags"]] == [tag.label for tag in expected.top(2)]
    assert [tag["score"] for tag in got["tags"]] == pytest.approx([tag.score for tag in expected.top(2)], abs=1e-5)
    assert [(one["label"], one["start"], one["end"]) for one in got["segments"]] == [
        (one.label, pytest.approx(one.start, abs=1e-4), pytest.approx(one.end, abs=1e-4))
        for one in expected.segments(0.3)
    ]
    assert len(got["starts"]) == len(got["ends"]) == len(expected.windows) > 1
    for track in got["tracks"]:
        i = expected.classes.index(track["label"])
        np.testing.assert_allclose(track["scores"], expected.windows[:, i], atol=1e-5)
        assert got["scores"][track["label"]]["highest"] == pytest.approx(float(expected.windows[:, i].max()), abs=1e-5)
    assert {name: got[name] for name in ("seconds", "rate", "channels", "format", "multi")} == {
        **{"seconds": 2.1, "rate": 16000, "channels": 1, "format": "WAV/PCM_16", "multi": False}
    }


def test_vectors_are_the_models(analyser: Analyser, wav: Wav) -> None:
    body = wav(5.0, rate=22050, kind="FLAC", channels=2)  # stretches of 8 windows are joined
    with client(analyser) as ask:
        got = ask.post("/api/embed?level=frames&layer=0", content=body).json()
        short = ask.post("/api/embed", content=body).json()
        refused = ask.post("/api/embed?layer=7", content=body)
    expected = analyser.model.embed(body, layer=0, precision="float32")
    np.testing.assert_allclose(got["clip"], expected.clip, atol=2e-5)
    np.testing.assert_allclose(got["frames"], expected.frames, atol=2e-5)
    np.testing.assert_allclose(got["times"], expected.times, atol=1e-4)
    assert (got["rate"], got["channels"], got["dimension"]) == (22050, 2, 32)
    assert "frames" not in short
    assert refused.status_code == 400
    assert "layer 7" in refused.json()["found"]


def test_answers_that_would_be_too_long_are_refused(analyser: Analyser, wav: Wav) -> None:
    with client(analyser, numbers=2000) as ask:
        refused = ask.post("/api/embed?level=frames&hop=0.01", content=wav(1.0))
        assert refused.status_code == 422
        assert refused.json()["found"] == "1.0 s with 32 numbers every 0.01 s: 3200"
        assert refused.json()["expected"] == "2000 numbers at most"
        assert ask.post("/api/embed?level=frames&hop=0.02", content=wav(1.0)).status_code == 200


def test_everything_of_the_page(analyser: Analyser, wav: Wav) -> None:
    with client(analyser) as ask:
        got = ask.post("/api/analyse?k=3", content=wav(1.5)).json()
        facts = ask.get("/api/model").json()
    picture = got["spectrogram"]
    assert len(u8(picture["values"])) == picture["columns"] * picture["mels"]
    assert picture["first"] + picture["columns"] * picture["seconds"] == pytest.approx(1.5, abs=0.02)
    assert len(u8(got["embedding"]["colours"])) == 3 * len(got["embedding"]["times"])
    assert got["neighbours"] is None
    assert facts["classes"] == list(analyser.model.classes or ())
    assert facts["card"]["kind"] == "audio-classifier"


def test_a_tone_is_where_it_belongs_in_the_picture(analyser: Analyser) -> None:
    front_end = analyser.model.front_end
    t = np.arange(32000) / 16000
    wave = (0.5 * np.sin(2 * np.pi * 1000 * t) * (t > 1)).astype(np.float32)
    picture = answers.spectrogram(front_end, wave, lambda: None)
    values = u8(picture["values"]).reshape(picture["columns"], picture["mels"])
    late = values[picture["columns"] * 3 // 4]
    assert abs(picture["hz"][int(late.argmax())] - 1000) < 120
    assert late.max() > 250
    assert values[picture["columns"] // 4].max() < 5
    # Hertz of the bins: the middle of each triangle of the bank.
    bank = front_end.bank
    peaks = [16000 / 512 * float(bank[:, i].argmax()) for i in range(5, 32)]
    np.testing.assert_allclose(peaks, picture["hz"][5:], atol=16000 / 512)


def test_long_sounds_have_no_wider_pictures_and_keep_their_onsets(
    analyser: Analyser, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "COLUMNS", 50)
    monkeypatch.setattr(answers, "_BLOCK", 64)
    wave = np.zeros(48000, np.float32)
    wave[24000:24160] = 0.5
    picture = answers.spectrogram(analyser.model.front_end, wave, lambda: None)
    values = u8(picture["values"]).reshape(picture["columns"], -1)
    assert picture["columns"] <= 50
    onset = picture["first"] + (int(values.max(1).argmax()) + 0.5) * picture["seconds"]
    assert onset == pytest.approx(1.505, abs=2 * picture["seconds"])
    logmel = analyser.model.front_end.fbank(torch.from_numpy(wave)[None])[0].numpy()
    assert picture["high"] == pytest.approx(10 * logmel.max() / np.log(10), abs=0.01)


def test_frames_that_are_alike_have_one_colour() -> None:
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((3, 16)).astype(np.float32)
    order = [0, 0, 1, 2, 1, 0]
    colours = u8(answers.colours(kinds[order])).reshape(-1, 3).astype(int)
    for i, a in enumerate(order):
        for j, b in enumerate(order):
            assert (np.abs(colours[i] - colours[j]).max() <= 1) == (a == b)
    many = u8(answers.colours(np.repeat(kinds[order], 10, 0))).reshape(-1, 10, 3).astype(int)
    assert np.abs(many - many[:, :1]).max() <= 1
    assert set(u8(answers.colours(np.ones((4, 16), np.float32)))) == {128}


def test_an_even_sound_is_not_striped_by_its_windows() -> None:
    rng = np.random.default_rng(1)
    place, kinds = rng.standard_normal((10, 16)), 0.3 * rng.standard_normal((2, 16))
    frames = np.tile(place, (12, 1)) + np.repeat(kinds, 60, 0)  # what a frame's place adds is more than the sounds'
    striped = u8(answers.colours(frames.astype(np.float32))).reshape(2, 60, 3).astype(int)
    even = u8(answers.colours(frames.astype(np.float32), 10)).reshape(2, 60, 3).astype(int)
    assert np.ptp(striped, 1).min() > 50
    assert np.ptp(even, 1).max() <= 1
    assert np.abs(even[0] - even[1]).max() > 100
    # Of a few windows the sounds themselves would be taken away.
    assert answers.colours(frames[:50].astype(np.float32), 10) == answers.colours(frames[:50].astype(np.float32))


def test_attention_of_a_long_sound_is_that_of_its_windows(analyser: Analyser, wav: Wav) -> None:
    model, body = analyser.model, wav(2.0)
    with client(analyser) as ask:
        got = ask.post("/api/attention?layer=0", content=body).json()
    maps = u8(got["values"]).reshape(got["heads"], -1, got["bands"]) / 255 * np.array(got["peaks"])[:, None, None]
    view = model.front_end.samples_for(model.frames)
    first = model.attention(soundfile.read(io.BytesIO(body), dtype="float32")[0][:view], layer=0)
    even = first.grid[0] * first.grid[1]
    np.testing.assert_allclose(maps[:, : first.grid[0]], first.map.numpy() * even, atol=max(got["peaks"]) / 250)
    assert len(got["times"]) == maps.shape[1]
    np.testing.assert_allclose(np.diff(got["times"]), got["column"], atol=1e-3)
    assert got["times"][-1] == pytest.approx(2.0, abs=2 * got["column"])


def test_an_encoder_has_views_but_no_labels(encoder: AudioModel, wav: Wav) -> None:
    with client(Analyser(encoder, "enc")) as ask:
        got = ask.post("/api/analyse", content=wav(0.05)).json()
        refused = ask.post("/api/tag", content=wav())
        assert ask.get("/api/model").json()["classes"] is None
    assert got["labels"] is None
    assert got["spectrogram"]["columns"] >= 1
    assert refused.status_code == 400
    assert "no labels: it is an encoder" in refused.json()["found"]


def test_without_an_index_there_are_no_clips(analyser: Analyser, wav: Wav) -> None:
    with client(analyser) as ask:
        for answer in (
            ask.get("/api/clip/0"),
            ask.get("/api/neighbours/0"),
            ask.post("/api/neighbours", content=wav()),
        ):
            assert answer.status_code == 404
            assert "no index" in answer.json()["found"]


NO_AUDIO = (
    b"x",
    b"RIFF",
    bytes(5000),
    b"<html>no audio</html>",
    b"\xff\xfb" * 500,
    b"fLaC" + bytes(3000),
    b"OggS" * 300,
)


def test_bodies_that_are_no_recordings(analyser: Analyser, wav: Wav, monkeypatch: pytest.MonkeyPatch) -> None:
    """Errors address the sender."""
    odd = io.BytesIO()
    soundfile.write(odd, np.array([0.0, np.nan, 0.1] * 4000), 16000, format="WAV", subtype="FLOAT")
    with client(analyser) as ask:
        for body in NO_AUDIO:
            answer = ask.post("/api/analyse", content=body)
            assert answer.status_code == 400, answer.text
            words = answer.json()
            assert words["found"].startswith("no audio that can be read: it ")
            assert words["expected"].startswith("a recording: WAV, FLAC, ")
            assert words["remedy"] == "convert it to one of these, and send all of its bytes"
        for body in (wav()[:20000], wav(kind="FLAC")[:-400], odd.getvalue(), wav(0.0)):
            assert ask.post("/api/analyse", content=body).status_code == 400
        form = ask.post("/api/tag", files={"file": wav()}).json()
        assert form["remedy"] == "send the file alone, not a form: curl --data-binary @clip.wav instead of -F"
        truncated = ask.post("/api/tag", content=wav()[:20000]).json()
        assert truncated["found"].startswith("the recording (WAV/PCM_16) is truncated: ")
        assert truncated["remedy"].startswith("send all of its bytes")
        monkeypatch.setitem(sys.modules, "av", None)  # as if it were not installed
        monkeypatch.setattr(analysis, "formats", lambda: ["WAV"])
        needs = ask.post("/api/tag", content=b"\x00\x00\x00\x20ftypM4A " + bytes(100)).json()
        assert "PyAV is not installed" in needs["found"]
        assert "where asit serve runs, pip install 'asit-audio[av]'" in needs["remedy"]


def test_too_long_by_the_header_or_when_decoded(analyser: Analyser, wav: Wav) -> None:
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(400 * 16000, np.int16), 16000, format="FLAC")
    assert len(silence.getvalue()) < 60_000  # compressed 200 times and more
    day = bytearray(wav(20.0, kind="FLAC"))  # a header of 24 hours: total samples are 36 bits from byte 21
    assert (day[:4], struct.unpack(">I", day[22:26])) == (b"fLaC", (20 * 16000,))
    day[22:26] = struct.pack(">I", 24 * 3600 * 16000)
    with client(analyser, seconds=10) as ask:
        answer = ask.post("/api/tag", content=bytes(day))
        assert (answer.status_code, "claims 24.0 hours in" in answer.json()["found"]) == (400, True)
        for body in (silence.getvalue(), wav(10.7)):
            answer = ask.post("/api/tag", content=body)
            assert answer.status_code == 422, answer.text
            assert "10 s at most" in answer.json()["expected"]
        assert ask.post("/api/tag", content=wav(10.2)).status_code == 200


def test_an_unknown_length_is_limited_while_decoding(
    analyser: Analyser, wav: Wav, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def counted(self: OpenSound) -> Any:
        self.seconds = None
        for _ in range(1000):
            seen.append(1)
            yield np.zeros(16000, np.float32)

    monkeypatch.setattr(OpenSound, "blocks", counted)
    with pytest.raises(TooLongError, match="more than 3 s of sound"):
        analysis.decode(Job(RequestLimits(seconds=3)), wav(1.0), analyser.model)
    assert len(seen) == 4  # not a second more is decoded
    job = Job(RequestLimits(compute=1e-9))
    job.begin()
    with pytest.raises(TooLongError, match="more than 1e-09 s of computing"):
        analysis.decode(job, wav(1.0), analyser.model)


def test_many_channels_and_a_stopped_job(analyser: Analyser, wav: Wav) -> None:
    job = Job(RequestLimits())
    with pytest.raises(TooLongError, match="33 channels"):
        analysis.decode(job, wav(0.1, channels=33), analyser.model)
    job.stop()
    with pytest.raises(GoneError):
        analysis.decode(job, wav(), analyser.model)


class StoppedJob(Job):
    """Is stopped at its n-th check."""

    def __init__(self, checks: int) -> None:
        super().__init__(RequestLimits())
        self.checks = checks

    def check(self) -> None:
        self.checks -= 1
        if not self.checks:
            self.stop()
        super().check()


def test_a_job_is_checked_while_the_model_computes(
    tagger: AudioModel, wav: Wav, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.wav").write_bytes(wav())
    build(tagger, [str(tmp_path / "a.wav")], tmp_path / "index")
    asked = Analyser(tagger, "tiny", Index.read(tmp_path / "index"), "float32")
    wave = np.zeros(16000 * 20, np.float32)
    seen: list[int] = []
    hook = tagger.encoder.patch_embed.register_forward_pre_hook(lambda _, given: seen.append(len(given[0])))
    monkeypatch.setattr(analysis, "decode", lambda *_: Recording(wave, 20.0, 16000, 1, "WAV"))

    def windows(work: Callable[[Job], object], checks: int) -> int:
        seen.clear()
        with pytest.raises(GoneError):
            work(StoppedJob(checks))
        return sum(seen)

    try:
        assert windows(lambda job: asked.embed(job, b"", level="clip", layer=None, hop=None), 2) <= 16
        assert windows(lambda job: asked.attention(job, b"", layer=0), 4) == 3
        assert windows(lambda job: asked.neighbours(job, b"", k=1, start=0.0, seconds=None), 1) == 0
    finally:
        hook.remove()


def test_many_at_once_get_what_each_alone_gets(analyser: Analyser, wav: Wav, served: Callable[[Guard], Any]) -> None:
    bodies = [wav(0.3 + 0.1 * i) for i in range(10)]
    alone = [
        json.loads(analyser.embed(Job(RequestLimits()), body, level="clip", layer=None, hop=None)) for body in bodies
    ]
    with served(application(analyser, RequestLimits())) as address:

        async def all_of_them() -> list[httpx.Response]:
            pool = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(base_url=address, timeout=60, limits=pool, trust_env=False) as ask:
                wrong = [ask.post("/api/embed", content=b"no audio at all") for _ in range(20)]
                right = [ask.post("/api/embed", content=bodies[i % 10]) for i in range(100)]
                return await asyncio.gather(*right, *wrong)

        answers = asyncio.run(all_of_them())
        assert [answer.status_code for answer in answers] == [200] * 100 + [400] * 20
        for i, answer in enumerate(answers[:100]):
            np.testing.assert_allclose(answer.json()["clip"], alone[i % 10]["clip"], atol=1e-5)
        assert httpx.get(f"{address}/api/health", trust_env=False).json() == {"status": "ok", "inside": 0}
