"""Miniatures of data sets."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asit import cli
from asit.data.catalogue.catalogue import Catalogue

Lay = Callable[..., None]


@pytest.fixture(scope="session")
def lay() -> Lay:
    """Writes a short recording to each path below a folder."""

    def write(root: Path, paths: Iterable[str], seconds: float = 0.1, silent: bool = False) -> None:
        wave = np.random.default_rng(0).normal(0, 0.0 if silent else 0.1, round(seconds * 16000)).clip(-1, 1)
        for path in paths:
            content = io.BytesIO()
            kind = {"flac": "FLAC", "ogg": "OGG", "mp3": "MP3"}.get(path.rsplit(".", 1)[1], "WAV")
            soundfile.write(content, wave, 16000, format=kind)
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content.getvalue())

    return write


@pytest.fixture
def catalogue(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str, Catalogue]]:
    """Catalogue a miniature by the verb: why it is refused, and with --incomplete what is printed and made."""

    def make(name: str, root: Path, *more: str) -> tuple[str, str, Catalogue]:
        out = tmp_path / "c.jsonl"
        run = ["catalogue", name, str(root), "--out", str(out), "--workers", "1", "--front-end.mels", "32", *more]
        assert cli.main(run) == 2
        refused = capsys.readouterr().err
        assert not out.exists()
        assert cli.main([*run, "--incomplete"]) == 0
        return refused, capsys.readouterr().out, Catalogue.read(out)

    return make
