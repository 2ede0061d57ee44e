"""What a page says about a run in words, the commands to go on with, and curves of several runs."""

from __future__ import annotations

import math
import shlex
from pathlib import Path
from typing import Any

import pytest
from pretraining_runs import full_lines, line, write_run

from asit.commands.report import report as verb
from asit.errors import ConfigError
from asit.report import probe_table_html
from asit.report.charts import Guide, chart
from asit.report.findings import next_commands
from asit.report.run_reader import RunFolder


def with_parts(**parts: float) -> list[dict[str, Any]]:
    lines = full_lines()
    for each in lines:
        if each["kind"] == "train":
            each["parts"] |= parts
    return lines


def test_a_sound_run(tmp_path: Path, page_of: Any) -> None:
    page = page_of(write_run(tmp_path / "run", full_lines()))
    classes, patches = 8.0 / math.log(8192), 6.0 / math.log(1024)
    assert "The loss fell: 16.35 to 14.55." in page.text  # means of the first and the last 2 of 20 lines
    assert f"No sign of collapse: teacher entropy (class token) at {classes:.0%} of its maximum" in page.text
    assert f"(patches) at {patches:.0%} of its maximum, feature spread 0.3." in page.text
    assert "The probe reads 50.0% off the frozen encoder." in page.text
    assert not [li for li in page.all("li") if li.get("class") == "bad"]


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (
            {"teacher_entropy_class": 0.99 * math.log(8192)},
            "no preference among its prototypes (class token): try fewer",
        ),
        ({"teacher_entropy_patch": 0.99 * math.log(1024)}, "try fewer heads.patch_prototypes"),
        ({"feature_spread": 0.05}, "all clips look alike to the encoder (feature spread 0.05): lower optim.lr"),
    ],
)
def test_signs_of_collapse(tmp_path: Path, parts: dict[str, float], sentence: str, page_of: Any) -> None:
    page = page_of(write_run(tmp_path / "run", with_parts(**parts)))
    assert "Signs of collapse: " in page.text
    assert sentence in page.text
    assert "No sign of collapse" not in page.text


def test_slow_loading_and_a_loss_that_rises(tmp_path: Path, page_of: Any) -> None:
    lines = [line(step) | {"loss": float(step), "data_wait": 0.5} for step in range(10, 210, 10)]
    page = page_of(write_run(tmp_path / "run", lines))
    assert "The loss did not fall: 15 to 195." in page.text
    assert "Training waited for data 50% of the time" in page.text


def test_commands_by_state(tmp_path: Path) -> None:
    finished = write_run(tmp_path / "with space", full_lines())
    assert next_commands(RunFolder.read(finished)) == []  # no model was written
    (finished / "model").mkdir()
    (finished / "model" / "card.json").write_text("{}")
    commands = [shlex.split(command) for command, _ in next_commands(RunFolder.read(finished))]
    assert [command[:2] for command in commands] == [["asit", verb] for verb in ("evaluate", "finetune", "index")]
    assert all(str(finished / "model") in command for command in commands)
    stopped = write_run(
        tmp_path / "stopped", [*full_lines()[:-1], {"kind": "event", "step": 200, "text": "stopped: x"}]
    )
    assert next_commands(RunFolder.read(stopped)) == [(f"asit pretrain --out {stopped} --resume", "resume it")]


def test_runs_are_overlaid(tmp_path: Path, parse: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [write_run(tmp_path / name, full_lines()) for name in ("one", "other")]
    (tmp_path / "deeper").mkdir()
    runs.append(write_run(tmp_path / "deeper" / "one", full_lines()[:11]))
    assert verb("asit report", "writes a page", [str(runs[0]), "--overlay", *map(str, runs[1:])]) == 0
    page = parse((runs[0] / "report.html").read_text())
    [label] = [a["aria-label"] for a in page.all("svg") if str(a.get("aria-label")).startswith("Global loss")]
    assert [part.split(":")[0] for part in label.split(". ")[1:]] == ["one", "other", "one (2)"]
    assert "one (2): from 8.9 at step 10 to 8 at step 100" in label
    (runs[1] / "config.yaml").write_text("task: own\n")
    with pytest.raises(ConfigError, match="is a fine-tuning run"):
        verb("asit report", "writes a page", [str(runs[0]), "--overlay", str(runs[1])])
    capsys.readouterr()


def test_a_band_is_drawn_where_the_curve_is(parse: Any) -> None:
    inside = chart("Spread", "", {"Spread": ([1, 2, 3], [0.7, 0.8, 0.9])}, Guide(band=(0.1, 1.0)))
    assert "var(--good)" in inside
    assert "var(--good)" not in chart("Spread", "", {"Spread": ([1, 2, 3], [0.7, 0.8, 0.9])})


def test_labels_of_an_axis_have_room(parse: Any) -> None:
    """Each tick's text, about 0.6 em a character, starts inside the picture."""
    html = str(chart("Rate", "", {"Rate": ([1, 2, 3], [0.000155, 0.00012345, 0.00017])}))
    texts = [a for a in parse(html).all("text") if "text-anchor: end" in str(a.get("style"))]
    assert texts
    for attributes in texts:
        assert float(attributes["x"]) > 0


def test_headline_bars(parse: Any) -> None:
    html = probe_table_html(
        {"pretrained": {"mean": 0.81, "class": 0.5}, "log-mel": {"statistics": 0.33}},
        {"pretrained": {"mean": (0.79, 0.83)}},
        "mean",
    )
    bars = html[: html.index("<details")]
    assert "width:81.0%" in bars
    assert "left:79.0%;width:4.0%" in bars
    assert "log-mel <small>statistics</small>" in bars
    assert "50.0%" not in bars
    assert "50.0%" in html
