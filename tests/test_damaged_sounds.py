"""Damaged sound files and tars through every entry point: a result or a message, within bounds of time and memory.

The quick test takes some mutants of each kind of file; the slow one ASIT_MUTANTS of them (600 by default), and
`python tests/watched.py FOLDER COUNT KEEP` any number, with the failing files kept.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from asit.audio import files
from asit.data.shards import tar_reader
from asit.errors import AudioError, CatalogueError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the watch reads /proc")


@pytest.fixture(scope="module")
def beside() -> Iterator[None]:
    """Modules beside this one can be imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parent)
        yield


@pytest.fixture
def damaging(beside: None) -> ModuleType:
    return importlib.import_module("damaging")


@pytest.fixture
def watched(beside: None) -> ModuleType:
    pytest.importorskip("httpx")
    return importlib.import_module("watched")


def test_mutants_follow_from_their_number(damaging: ModuleType) -> None:
    first = [(name, number, what, data) for name, number, what, data in damaging.cases(60)]
    assert first == list(damaging.cases(60))
    originals = damaging.recordings()
    assert {name for name, *_ in first} == set(originals)
    changed = sum(data != originals[name] for name, _, _, data in first)
    assert changed >= 55


@pytest.mark.slow
def test_the_watch_notices(watched: ModuleType, tmp_path: Path) -> None:
    """What takes too long, too much memory or down the process is called so."""
    with watched.Watched(tmp_path, bytes_=1 << 30, cpu=3.0) as process:
        for outcome, code in (
            ("hang", "while True: pass"),
            ("memory", "x = bytearray(2 << 30)\nfor i in range(0, len(x), 4096): x[i] = 1"),
            ("crash", "import os; os.kill(os.getpid(), 11)"),
            ("fault", "1 / 0"),
        ):
            (tmp_path / "code.py").write_text(code)
            assert process.ask("run", tmp_path / "code.py")["outcome"] == outcome


@pytest.mark.slow
def test_damaged_sounds(watched: ModuleType, tmp_path: Path) -> None:
    count = int(os.environ.get("ASIT_MUTANTS", "600"))
    found = watched.sweep(tmp_path, count)
    print(found["counts"], f"peak {found['peak'] / 1e9:.2f} GB")
    assert not found["failures"], "\n".join(found["failures"][:40])
    for entry in ("read", "vectors", "page"):
        assert sum(n for name, n in found["counts"].items() if name.split()[0] == entry) == count
    assert found["counts"]["read read"] > count // 10
    assert found["counts"]["read refused"] > count // 10


@pytest.mark.slow
def test_damaged_files_are_read_or_refused(damaging: ModuleType) -> None:
    """From their bytes, in time and bounded memory, without NaN, and refusals have a fix."""
    for name in damaging.recordings():
        arguments = [sys.executable, damaging.__file__, name, "600"]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["wrong"] == [], name
        assert sum(found["ends"].values()) == 600


@pytest.mark.slow
def test_no_search_in_a_file_is_long(damaging: ModuleType) -> None:
    for name, content in damaging.long_searches().items():
        begun = time.process_time()
        with contextlib.suppress(AudioError):
            files.probe(content)
        assert time.process_time() - begun < damaging.SECONDS, name


@pytest.mark.slow
def test_damaged_tars(damaging: ModuleType, watched: ModuleType, tmp_path: Path) -> None:
    originals, path = damaging.tars(), tmp_path / "m.tar"
    outcomes = []
    with watched.Watched(tmp_path) as process:
        for number in range(int(os.environ.get("ASIT_MUTANTS", "1000"))):
            path.write_bytes(damaging.tar_mutant(originals[number % 2], number))
            outcomes.append((process.ask("tar", path), number))
        assert process.peak < 1 << 30
    bad = [(found, number) for found, number in outcomes if found["outcome"] not in ("read", "refused")]
    assert not bad, bad[:5]


def _long_name(size: int) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")


def test_headers_of_tars_that_claim_much(damaging: ModuleType, tmp_path: Path) -> None:
    """Long names within long names, a name of a TB, and a length below zero; what came before is kept."""
    path, good = tmp_path / "m.tar", damaging.tars()[1].rstrip(b"\0")
    good += bytes(-len(good) % 512)
    negative = bytearray(_long_name(10)[:512])
    negative[156:157] = b"7"
    negative[124:136] = b"\xff" * 4 + (-512).to_bytes(8, "big", signed=True)
    negative[148:156] = b" " * 8
    negative[148:156] = b"%06o\0 " % sum(negative)
    for bad in (_long_name(10) * 3000, _long_name(1 << 40) + bytes(1 << 20), bytes(negative) * 3):
        path.write_bytes(good + bad)
        shard = tar_reader.read_shard(str(path))
        assert [Path(member.name).suffix for member in shard.members][:3] == [".wav", ".flac", ".wav"]
        assert shard.fault is not None
        assert "damaged at byte" in shard.fault
        path.write_bytes(bad)
        if bad[156:157] != b"7":
            with pytest.raises(CatalogueError, match="is no tar file"):
                tar_reader.read_shard(str(path))
