"""Completion scripts: what the shells complete with them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from asit import cli
from asit.commands import SUMMARIES
from asit.terminal.completion import SHELLS


@pytest.fixture(scope="module")
def scripts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("completion")
    for shell in SHELLS:
        with pytest.MonkeyPatch.context() as patch, (folder / shell).open("w") as file:
            patch.setattr("sys.stdout", file)
            assert cli.main(["completion", shell]) == 0
    return folder


def bash(script: Path, *words: str) -> list[str]:
    """What bash completes the last of these words with."""
    quoted = " ".join(f"'{word}'" for word in words)
    commands = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; _asit; echo ${{COMPREPLY[@]}}"
    return subprocess.run(["bash", "-c", commands], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash")
def test_bash_completes_verbs_and_flags(scripts: Path) -> None:
    assert bash(scripts / "bash", "asit", "pre") == ["pretrain"]
    assert set(bash(scripts / "bash", "asit", "")) == set(SUMMARIES)
    assert bash(scripts / "bash", "asit", "pretrain", "--heads.b") == ["--heads.bottleneck"]
    assert {"--out", "--data", "--help", "--resume", "--no-resume"} <= set(
        bash(scripts / "bash", "asit", "pretrain", "--")
    )
    assert bash(scripts / "bash", "asit", "tag", "recordings/") == []  # files are the shell's own


@pytest.mark.parametrize("shell", SHELLS)
def test_a_script_is_valid_and_has_every_verb(shell: str, scripts: Path) -> None:
    text = (scripts / shell).read_text()
    for name in SUMMARIES:
        assert name in text
    assert "heads.bottleneck" in text
    if shutil.which(shell):
        subprocess.run([shell, "-n", str(scripts / shell)], check=True)


def test_another_shell(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["completion", "tcsh"])
    assert "bash" in capsys.readouterr().err
