"""docs/research.md: its classes are those of examples/research, its public names are there, and the walk runs."""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

import asit

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = REPOSITORY / "examples" / "research"
PAGE = (REPOSITORY / "docs" / "research.md").read_text("utf-8")
DOTTED = re.compile(r"`(asit(?:\.\w+)+)`")


def test_every_dotted_name_of_the_documentation_is_there() -> None:
    docs = REPOSITORY / "docs"
    pages = {path.relative_to(docs).as_posix(): path.read_text("utf-8") for path in docs.rglob("*.md")}
    found = {(page, name) for page, text in pages.items() for name in DOTTED.findall(text)}
    assert len([name for page, name in found if page == "research.md"]) > 25
    missing = []
    for page, name in sorted(found):
        at: object = asit
        try:
            for part in name.split(".")[1:]:
                at = getattr(at, part)
        except AttributeError:
            missing.append((page, name))
    assert missing == []


def test_what_is_public_is_documented() -> None:
    for name in re.findall(r"^\| (`asit\..*?) \|", PAGE, re.MULTILINE):
        for dotted in DOTTED.findall(name):
            at: object = asit
            for part in dotted.split(".")[1:]:
                at = getattr(at, part)
            assert inspect.getdoc(at), dotted


def plain(code: str) -> str:
    """Code without annotations of arguments, asserts and line breaks, as the page has it."""
    code = re.sub(r"^\s*assert .*\n", "", code, flags=re.MULTILINE)
    kinds = (
        r"np\.random\.Generator|int|float|Spectrogram|Tensor( \| None)?|bool|Tokens( \| None)?|EncoderSettings|"
        r"PretrainBatch|torch\.Generator|tuple\[int, int\]"
    )
    code = re.sub(rf": ({kinds})(?=[,)\n]| = )", "", code)
    code = re.sub(r"\) -> [\w.\[\], |]+:", "):", code)
    return re.sub(r"\s+|,(?=\s*\))", "", code)


def test_the_classes_of_the_page_are_those_of_the_example() -> None:
    source = plain((EXAMPLES / "parts.py").read_text("utf-8"))
    for name in ("Spans", "Tilt", "TeacherTokens", "ConvStem"):
        (block,) = re.findall(rf"^((?:@dataclass\n)?class {name}\b.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
        assert plain(block) in source, name


@pytest.mark.slow
def test_the_walk(tmp_path: Path) -> None:
    rng, rows = np.random.default_rng(0), ["path,label,split"]
    for i in range(32):
        t = np.arange(8000) / 8000
        wave = 0.2 * np.sin(2 * np.pi * (400, 1600)[i % 2] * t) + 0.1 * rng.standard_normal(len(t))
        soundfile.write(tmp_path / f"{i:02d}.wav", wave.astype(np.float32), 8000)
        rows.append(f"{i:02d}.wav,{('low', 'high')[i % 2]},{('train', 'test')[i // 24]}")
    (tmp_path / "notes.csv").write_text("\n".join(rows) + "\n")
    command = tmp_path / "bin" / "asit"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m asit "$@"\n')
    command.chmod(0o755)
    given = ["--epochs", "1", "--batch-size", "8", "--views.seconds", "0.5", "--encoder.width", "32", "--workers", "0"]
    given += ["--encoder.depth", "1", "--encoder.heads", "1", "--device", "cpu", "--threads", "1"]
    environment = {**os.environ, "PATH": f"{command.parent}:{os.environ['PATH']}", "COLUMNS": "120"}
    environment["PYTHONPATH"] = str(REPOSITORY / "src")
    bash = shutil.which("bash") or pytest.skip("needs bash")
    walk = [bash, str(EXAMPLES / "walk.sh"), "notes.csv", *given]
    done = subprocess.run(walk, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "own" in done.stdout
    lines = [json.loads(line) for line in (tmp_path / "own" / "metrics.jsonl").read_text().splitlines()]
    assert all("objective" in line["parts"] for line in lines if line["kind"] == "train")
    assert "  mask: parts:Spans(share=0.6, columns=4)\n" in (tmp_path / "own" / "config.yaml").read_text()
    commands = re.findall(r"^asit ", (EXAMPLES / "walk.sh").read_text("utf-8"), re.MULTILINE)
    assert len(commands) <= 5
