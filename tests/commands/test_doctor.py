"""asit doctor reports what works, whatever is broken."""

from __future__ import annotations

import builtins
import importlib
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from asit import cli
from asit.io import safe_load
from asit.tools import diagnostics


@pytest.fixture(scope="module")
def findings() -> dict[tuple[str, str], diagnostics.Finding]:
    return {(one.part, one.name): one for one in diagnostics.examine()}


def test_what_is_installed_here_works(findings: dict[tuple[str, str], diagnostics.Finding]) -> None:
    assert diagnostics.works(list(findings.values()))
    for name in ("torch", "numpy", "soundfile", "soxr", "pydantic", "tyro", "model"):
        assert findings["packages", name].state == "ok", findings["packages", name]
    for name in ("wav", "flac", "mp3", "ogg", "opus"):
        assert findings["decoders", name].state == "ok", findings["decoders", name]
    assert "libsndfile" in findings["packages", "soundfile"].text
    assert "on this CPU (measured)" in findings["devices", "precision"].text
    assert findings["folders", "temporary"].state == "ok"
    assert {"av", "parquet", "huggingface", "onnx", "serve"} <= {name for part, name in findings if part == "extras"}


def blocked(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    """Make these packages fail to be imported, as a broken installation does."""
    real: Callable[..., Any] = builtins.__import__
    real_module = importlib.import_module

    def refuse(name: str) -> None:
        if name.split(".")[0] in packages:
            raise ImportError(f"lib{name}.so: cannot open shared object file")

    def imported(name: str, *rest: Any, **named: Any) -> Any:
        refuse(name)
        return real(name, *rest, **named)

    def by_name(name: str, package: str | None = None) -> Any:
        refuse(name)
        return real_module(name, package)

    for name in [name for name in sys.modules if name.split(".")[0] in packages]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", imported)
    monkeypatch.setattr(importlib, "import_module", by_name)


def test_a_broken_core_is_reported_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked(monkeypatch, "soundfile")
    assert cli.main(["doctor", "--json"]) == 1
    out = json.loads(capsys.readouterr().out)
    by_name = {(one["part"], one["name"]): one for one in out["findings"]}
    assert out["works"] is False
    broken = by_name["packages", "soundfile"]
    assert broken["state"] == "broken"
    assert "libsoundfile.so: cannot open shared object file" in broken["text"]
    assert broken["remedy"].startswith("pip install --upgrade 'soundfile>=")
    assert by_name["decoders", "wav"]["state"] == "broken"
    assert by_name["packages", "numpy"]["state"] == "ok", "the rest is still checked"


def test_reports_whether_pickles_are_read(
    findings: dict[tuple[str, str], diagnostics.Finding], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert findings["packages", "pickles"].state == "ok"
    monkeypatch.setattr(safe_load, "pickle_fault", lambda: "torch 2.9 can be made to corrupt memory (CVE-2026-24747)")
    found = diagnostics._pickles()
    assert found.state == "broken"
    assert "refused: torch 2.9 can be made to corrupt memory (CVE-2026-24747)" in found.text
    assert found.remedy == "pip install --upgrade 'torch>=2.10'"


def test_starts_without_the_option_parser_of_other_verbs() -> None:
    code = """
import sys

class Broken:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tyro", "pydantic", "yaml", "torch", "numpy", "transformers", "pyarrow"):
            raise OSError(f"lib{name}.so is cut off")

sys.meta_path.insert(0, Broken())
from asit.commands.doctor import doctor
sys.exit(doctor("asit doctor", "tell what is there", []))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "OSError: libtyro.so is cut off" in done.stdout
    assert "-> pip install --upgrade 'torch>=" in done.stdout
    ending = done.stdout.splitlines()[-1]
    assert ending.startswith("asit does not work: ")
    assert {"numpy", "pydantic", "pyyaml", "torch", "tyro"} <= set(re.split(r"[:;,] ", ending))
    assert done.stderr == ""


def test_a_missing_extra_is_not_broken(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    blocked(monkeypatch, "pyarrow", "av")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "pip install 'asit-audio[parquet]'" in out
    assert "pip install 'asit-audio[av]'" in out
    missing = out.rsplit("not installed: ", 1)[1].split("\n")[0].split(", ")
    assert {"m4a", "av", "parquet"} <= set(missing)
    assert all(len(line) <= 100 or line.strip().startswith("->") for line in out.splitlines())


def test_a_check_that_fails_as_a_whole_is_one_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Any:
        raise RuntimeError("no such thing\nand more")

    monkeypatch.setattr(diagnostics, "_devices", fail)
    monkeypatch.setattr(diagnostics, "_packages", lambda: iter([]))
    monkeypatch.setattr(diagnostics, "_extras", lambda: iter([]))
    found = [one for one in diagnostics.examine() if one.part == "devices"]
    assert [(one.state, one.text) for one in found] == [("broken", "check failed: RuntimeError: no such thing")]


def test_a_folder_that_may_not_be_written_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "asit").write_text("a file where the folder should be")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = {one.name: one for one in diagnostics._folders()}
    assert found["cache"].state == "note"
    assert "XDG_CACHE_HOME" in found["cache"].remedy


@pytest.mark.parametrize(
    ("version", "least", "fits"),
    [("2.13.0+cpu", "2.6", True), ("2.5.1", "2.6", False), ("1.0", "1.0.0", True), ("3.10", "3.9", True)],
)
def test_versions_are_compared_as_numbers(version: str, least: str, fits: bool) -> None:
    assert diagnostics._at_least(version, least) is fits
