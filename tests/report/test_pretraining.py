"""Pages of pretraining runs: complete, incomplete, damaged and hostile ones; charts."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from pretraining_runs import HOSTILE, full_lines, line, write_run

from asit.config import FrontEndSettings, PretrainSettings
from asit.errors import AsitError, ConfigError
from asit.report import probe_table_html, report
from asit.report.charts import chart, thin
from asit.report.run_reader import RunFolder
from asit.training.figures import write_figure


def add_figures(run: Path, steps: tuple[int, ...], n: int = 1, frames: int = 40) -> None:
    """The arrays alone, as `write_figure` keeps them: its picture takes longer to draw than the page to make."""
    (run / "figures").mkdir()
    rng = np.random.default_rng(0)
    for step in steps:
        clean = rng.normal(size=(n, frames, 128)).astype(np.float32) / 2
        mask = rng.random(clean.shape) < 0.4
        half = {"clean": clean, "corrupted": np.where(mask, 0, clean), "reconstructed": clean * 0.8}
        arrays: dict[str, Any] = {name: x.astype(np.float16) for name, x in half.items()}
        np.savez(run / "figures" / f"step-{step:08d}.npz", **arrays, mask=mask, ids=np.array([HOSTILE] * n))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", full_lines())


def test_a_finished_run(run: Path, parse: Any) -> None:
    path = report(run)
    assert path == run / "report.html"
    assert not list(run.glob(".*"))
    html = path.read_text()
    page = parse(html)
    for text in ("Finished: 200 steps in 7 min.", "7,200", "2.01 h",
                 "left out: silent", "torch", "2.13.0", "abc123", "12.5 clips",
                 "No figures yet", "started <now>", "7 min", "62.5%"):  # fmt: skip
        assert text in page.text, text
    charts = {a["aria-label"].split(".")[0]: a["aria-label"] for a in page.all("svg") if a.get("aria-label")}
    assert {"Total loss", "Global loss", "Local loss", "Reconstruction loss", "Learning rate", "Weight decay",
            "Teacher momentum", "Teacher temperature", "Feature spread", "Gradient norm", "Throughput",
            "Waiting for data", "Probe accuracy"} <= set(charts)  # fmt: skip
    assert "from 8.9 at step 10 to 7 at step 200" in charts["Global loss"]
    assert f"log 8,192 = {math.log(8192):.2f}" in html
    assert f"log 1,024 = {math.log(1024):.2f}" in html


def test_the_page_is_self_contained_and_escapes_names(run: Path, page_of: Any) -> None:
    add_figures(run, (100,))
    (run / "log.txt").write_text(HOSTILE)
    (run / "environment.json").write_text(json.dumps({HOSTILE: HOSTILE}))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "event", "step": 200, "text": HOSTILE}) + "\n")
        file.write(json.dumps({"kind": "probe", "step": 200, "accuracy": 1.0, "features": {HOSTILE: 1.0}}) + "\n")
    page = page_of(run)
    page.check_offline()
    assert "<script>alert" not in page.html
    assert page.text.count(HOSTILE) >= 5


def test_sections_come_first_and_out_is_taken(run: Path, tmp_path: Path) -> None:
    path = report(run, tmp_path / "new" / "page.html", sections=[("A & B", "<p id=mine>hello</p>")])
    assert path == tmp_path / "new" / "page.html"
    html = path.read_text()
    assert "<h2>A &amp; B</h2><p id=mine>hello</p>" in html
    assert html.index("id=mine") < html.index("<h2>Losses</h2>")
    assert not (run / "report.html").exists()
    stated = re.search(r"Size: ([\d.]+) MB", html)
    assert stated is not None
    assert float(stated[1]) == pytest.approx(path.stat().st_size / 1e6, abs=0.06)


def test_settings_that_differ_are_marked(run: Path) -> None:
    html = report(run).read_text()
    # what auto became (mean, std), masking.drop and epochs; never the paths
    changed = re.findall(r'<tr class="changed"><td>([^<]*)</td><td>([^<]*)</td>', html)
    assert dict(changed) == {"masking.drop": "0.55", "epochs": "4", "front_end.mean": "-6.0", "front_end.std": "4.0"}
    preset = PretrainSettings(epochs=4).model_dump()  # tuples, where YAML has lists
    preset["front_end"] |= {"mean": -6, "std": 4}
    changed = re.findall(r'<tr class="changed"><td>([^<]*)</td>', report(run, preset=preset).read_text())
    assert changed == ["masking.drop"]


def event(step: int, text: str) -> dict[str, Any]:
    return {"kind": "event", "step": step, "text": text}


UNLOGGED = [line(step, 51) for step in range(10, 204, 10)]  # of 204 steps: the last one is no logged one


@pytest.mark.parametrize(
    ("lines", "state", "sentence"),
    [
        ([line(step) for step in range(10, 120, 10)], "unfinished", "the last record is of step 110 of 200."),
        ([line(30), event(30, "stopped by SIGTERM at step 30 of 200")], "stopped", "by SIGTERM at step 30 of 200."),
        ([line(20), event(20, "left out: stopped finished.wav")], "unfinished", "of step 20 of 200."),
        (UNLOGGED, "unfinished", "of step 200 of 204."),
        ([*UNLOGGED, event(204, "finished: 204 steps")], "finished", "Finished: 204 steps."),
    ],
)
def test_the_verdict(tmp_path: Path, lines: list[dict[str, Any]], state: str, sentence: str, page_of: Any) -> None:
    run = write_run(tmp_path / "run", lines, json.dumps(line(120))[:70])  # a run that is running may be writing a line
    found = RunFolder.read(run).verdict
    assert found[0] == state
    assert found[1].endswith(sentence)
    page = page_of(run)
    assert found[1] in page.text
    assert "unreadable" not in page.text


@pytest.mark.parametrize("text", ["resumed from step 20", "goes on from step 20"])  # the second of earlier versions
def test_a_resumed_run_keeps_the_repeated_steps(tmp_path: Path, text: str) -> None:
    lines = [line(10), line(20), line(30) | {"loss": 99.0}, event(20, text), line(30), line(40)]
    held = RunFolder.read(write_run(tmp_path / "run", lines))
    assert [x["step"] for x in held.train] == [10, 20, 30, 40]
    assert held.train[2]["loss"] < 17
    assert held.verdict[0] == "unfinished"
    assert held.resumes == [20]


def test_damaged_parts_are_named(run: Path, page_of: Any) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[3] = lines[3][:40]
    lines[5] = lines[5].replace('"local": 6.5', '"local": NaN')
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    add_figures(run, (50,))
    (run / "figures" / "step-00000050.npz").write_bytes(b"PK\x03\x04 torn")
    text = page_of(run).text
    assert "1 unreadable lines of metrics.jsonl" in text
    assert "step-00000050.npz cannot be read" in text
    (run / "report.html").unlink()
    (run / "config.yaml").write_text("a: [1\nb: 2")
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read"):
        report(run)
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("kept", ["config.yaml", "metrics.jsonl"])
def test_parts_that_are_missing_are_named(run: Path, kept: str, page_of: Any) -> None:
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    text = page_of(run).text
    assert "environment.json is not there" in text
    assert "No figures yet" in text
    assert "holds no catalogue" in text
    assert ("config.yaml is not there" in text) == (kept == "metrics.jsonl")
    assert ("Nothing trained yet" in text) == (kept == "config.yaml")


def test_a_folder_that_is_not_a_run(tmp_path: Path, run: Path) -> None:
    with pytest.raises(AsitError, match=r"nowhere is not there\n  expected: a run's folder"):
        report(tmp_path / "nowhere")
    with pytest.raises(AsitError, match=r"log\.txt is a file"):
        report(run / "log.txt")
    other = tmp_path / "other"
    other.mkdir()
    with pytest.raises(AsitError, match="other is not a run: it holds nothing"):
        report(other)
    for index in range(11):
        (other / f"{index:02d}.wav").touch()
    with pytest.raises(AsitError, match=r"it holds 00\.wav, .*, 07\.wav and 3 more"):
        report(other)
    with pytest.raises(AsitError, match=r"fix:      this looks like a run: .*/run"):
        report(tmp_path)
    (run / "model").mkdir()
    with pytest.raises(AsitError, match=r"this looks like a run: .*/run$"):
        report(run / "model")


def test_first_middle_and_last_figure_with_sound(run: Path, page_of: Any) -> None:
    pytest.importorskip("asit.audio.griffin_lim")
    add_figures(run, (50, 100, 150, 200))
    page = page_of(run)
    assert [s in page.text for s in ("Step 50", "Step 100", "Step 150", "Step 200")] == [True, False, True, True]
    assert len(page.all("img")) == 3 * 5
    players = page.all("audio")
    assert [p["aria-label"] for p in players[:4]] == [
        f"{kind}, {HOSTILE}" for kind in ("clean", "corrupted", "reconstructed", "composite")
    ]
    assert len(players) == 3 * 4
    kind, data = str(players[0]["src"]).split(";base64,")
    assert kind == "data:audio/mpeg"
    wave, rate = soundfile.read(io.BytesIO(base64.b64decode(data)))
    assert rate == 16000
    assert len(wave) == pytest.approx(40 * 160, abs=2500)  # an MP3 is padded to whole frames
    assert 0.05 < np.abs(wave).max() <= 1.0


def test_composite_keeps_the_clean_values_outside_the_mask(run: Path, page_of: Any) -> None:
    clean = np.full((1, 64, 128), -0.5, np.float32)
    clean[:, :, :64] = 0.5
    mask = np.zeros(clean.shape, bool)
    mask[:, 32:] = True
    write_figure(run / "figures", 7, clean, np.where(mask, 0, clean), -clean, mask, ["x"], FrontEndSettings())
    (run / "config.yaml").unlink()  # no front end: no sound, but the pictures stay
    (run / "catalogue.jsonl").unlink()
    page = page_of(run)
    assert "No sound: the run's folder does not record the mean" in page.text
    from matplotlib.image import imread

    sources = [str(a["src"]).split(";base64,")[1] for a in page.all("img")]
    jpegs = [imread(io.BytesIO(base64.b64decode(s)), format="jpeg").astype(int).sum(-1) for s in sources[:4]]
    light, dark = 600, 200
    composite = jpegs[3]
    assert composite.shape == (128, 64)
    assert composite[96, 16] > light  # low band, outside: clean
    assert composite[32, 16] < dark
    assert composite[96, 48] < dark  # low band, masked: the reconstruction, which is upside down
    assert composite[32, 48] > light


def test_a_page_replaces_nothing_but_a_page(run: Path, tmp_path: Path) -> None:
    (tmp_path / "clip.wav").write_text("mine")
    for out, found in ((tmp_path, "is a folder"), (tmp_path / "clip.wav", "is a file, and not an HTML page")):
        with pytest.raises(ConfigError, match=rf"{found}(.|\n)*\.html"):
            report(run, out)
    assert (tmp_path / "clip.wav").read_text() == "mine"
    page = report(run, tmp_path / "page.html")
    assert report(run, page) == page


def test_a_failed_write_leaves_the_old_page(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = report(run).read_text()

    def full(*args: object, **options: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        report(run)
    assert (run / "report.html").read_text() == before
    assert not list(run.glob(".*"))


@pytest.mark.slow
def test_size_of_a_page_with_six_second_views(run: Path) -> None:
    pytest.importorskip("asit.audio.griffin_lim")
    small = report(run).stat().st_size
    add_figures(run, (200,), n=1, frames=592)
    # noise compresses worst; nine such examples and the rest stay under 3 MB
    assert small + 9 * (report(run).stat().st_size - small) < 3e6


def test_probe_table(parse: Any) -> None:
    html = probe_table_html(
        {"pretrained <1>": {"mean": 0.81, "kNN": 0.5}, "log-mel": {"mean": 0.33}},
        {"pretrained <1>": {"mean": (0.79, 0.83)}},
    )
    page = parse(html)
    assert "<b>81.0%</b> <small>79.0% to 83.0%</small>" in html
    assert page.row("log-mel") == ["log-mel", "33.0%", "not measured"]
    assert "pretrained <1>" in page.text
    assert [bar["style"] for bar in page.all("i")] == ["width:81.0%", "width:50.0%", "width:33.0%"]
    assert "No probe results" in probe_table_html({})


def test_thinning_keeps_extremes_and_means() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(10_007.0), rng.normal(size=10_007)
    y[5000], y[17] = 50.0, np.nan
    steps, mean, low, high = thin(x, y)
    assert len(steps) == 240
    assert (np.diff(steps) > 0).all()
    assert high.max() == 50.0
    assert low.min() == np.nanmin(y)
    assert ((low <= mean) & (mean <= high)).all()
    assert mean.mean() == pytest.approx(np.nanmean(y), abs=0.01)
    assert thin([1, 2], [3, 4])[1].tolist() == [3, 4]


def test_a_chart_without_finite_values_is_drawn() -> None:
    assert "to nan at step 2" in chart("Loss", "", {"Loss": ([1, 2], [1.0, math.nan])})
    assert "<svg" in chart("Loss", "", {"Loss": ([1, 2], [math.nan, math.inf])})
    assert chart("Loss", "", {"Loss": ([], [])}) == ""
