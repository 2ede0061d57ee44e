"""The verb: what it prints, how it ends, and what it refuses before anything is loaded."""

from __future__ import annotations

import builtins
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest

from asit.cli import main
from asit.model.audio_model import AudioModel
from asit.search import build
from asit.serve import server


@pytest.fixture(scope="module")
def model_folder(tagger: AudioModel, wav: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder, with an index of one clip beside it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    tagger.save(folder)
    (folder.parent / "a.wav").write_bytes(wav(0.3))
    build(tagger, [str(folder.parent / "a.wav")], folder.parent / "index")
    return folder


def test_it_serves_until_it_is_stopped(model_folder: Path, wav: Any) -> None:
    given = [str(model_folder), "--index", str(model_folder.parent / "index"), "--port", "0", "--max-seconds", "5"]
    command = [sys.executable, "-m", "asit", "serve", *given]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"at (http://127\.0\.0\.1:\d+)/ \(Ctrl-C stops it\)", line)
        assert found, line
        with httpx.Client(base_url=found[1], trust_env=False, timeout=20) as ask:
            assert "</html>" in ask.get("/").text
            assert ask.get("/api/model").json()["name"] == model_folder.parent.name
            assert len(ask.post("/api/tag?top=2", content=wav(1.0)).json()["tags"]) == 2
            assert len(ask.post("/api/analyse", content=wav(1.0)).json()["neighbours"]) == 1
            assert ask.post("/api/tag", content=wav(6.0)).status_code == 422
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    assert (process.returncode, out.strip()) == (130, "")
    assert error.strip() == "asit: stopped"


def test_a_port_in_use_is_reported_at_once(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with server.listen("127.0.0.1", 0) as first:
        assert main(["serve", "nowhere", "--port", str(first.getsockname()[1])]) == 2
    assert "is taken" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["nowhere"], "nowhere"),
        (["MODEL", "--index", "nowhere"], "nowhere does not exist"),
        (["MODEL", "--concurrency", "0"], "a limit of 0 concurrency"),
        (["MODEL", "--waiting", "-1"], "-1 waiting"),
        (["MODEL", "--max-seconds", "nan"], "a limit of nan seconds"),
        (["MODEL", "--threads", "-1"], "--threads -1"),
        (["MODEL", "--port", "70000"], "--port 70000"),
        (["MODEL", "--host", "nowhere.invalid"], "nowhere.invalid"),
        (["MODEL", "--host", "192.0.2.1"], "an address of this machine"),
    ],
)
def test_mistakes_are_explained(
    model_folder: Path, capsys: pytest.CaptureFixture[str], given: list[str], message: str
) -> None:
    arguments = [str(model_folder) if one == "MODEL" else one for one in given]
    extra = [] if "--port" in given else ["--port", "0"]
    assert main(["serve", *arguments, *extra]) == 2
    assert message in capsys.readouterr().err


def test_a_warning_about_other_machines(
    model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(server, "run", lambda app, listening: seen.append((app, listening.getsockname())))
    assert main(["serve", str(model_folder), "--port", "0", "--host", "0.0.0.0", "--allow-host", "a.example"]) == 0
    out, error = capsys.readouterr()
    assert "http://127.0.0.1:" in out
    assert "warning: 0.0.0.0 can be reached from other machines" in error
    assert not seen[0][0].local
    assert "a.example" in seen[0][0].names


def test_without_the_web_libraries_the_install_command_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name == "uvicorn":
            raise ModuleNotFoundError("No module named 'uvicorn'", name="uvicorn")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "nowhere"]) == 2
    assert "pip install 'asit-audio[serve]'" in capsys.readouterr().err


def test_the_files_of_the_pages_are_in_the_wheel(repository: Path) -> None:
    """Hatch packs every file of the package that git does not ignore."""
    script = ["app.js", "draw.js", "icon.svg", "index.html", "lists.js", "recorder.js", "server.js", "sound.js"]
    for package, expected in (
        ("serve", [*script, "style.css"]),
        ("report", ["parts.html.j2", "report.css", "report.html.j2", "report.js"]),
    ):
        page = repository / "src" / "asit" / package / "page"
        assert sorted(path.name for path in page.iterdir()) == expected
        names = [str(page / name) for name in expected]
        ignored = subprocess.run(["git", "check-ignore", *names], cwd=repository, capture_output=True, text=True)
        assert not ignored.stdout
        assert all(os.access(name, os.R_OK) for name in names)
