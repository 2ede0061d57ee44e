"""Damaged sound files and tars through every entry point: a result or a message, within bounds of time and memory."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import damaging
import pytest

from asit.audio import files
from asit.data.shards import tar_reader
from asit.errors import AudioError, CatalogueError


def test_mutants_follow_from_their_number() -> None:
    first = list(damaging.cases(60))
    assert first == list(damaging.cases(60))
    originals = damaging.recordings()
    assert {name for name, *_ in first} == set(originals)
    assert sum(data != originals[name] for name, _, _, data in first) >= 55


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the bound on memory is Linux's")
@pytest.mark.parametrize(
    ("entry", "count"), [("read", 10_000), ("vectors", 600), ("page", 600), ("folders", 600), ("tar", 1000)]
)
def test_mutants_are_read_or_refused(entry: str, count: int, tmp_path: Path) -> None:
    """ASIT_MUTANTS: another number of them."""
    pytest.importorskip("httpx")
    count = int(os.environ.get("ASIT_MUTANTS", count))
    script = Path(damaging.__file__).with_name("entry_points.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    command = [sys.executable, str(script), str(tmp_path), entry, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=3600, check=False, env=environment)
    left = [path.name for path in tmp_path.iterdir()]
    assert done.returncode == 0, f"{left} {done.stderr[-2000:]}"
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == []
    assert sum(found["ends"].values()) == (count // 40 if entry == "folders" else count)
    if entry != "folders":
        assert min(found["ends"]["read"], found["ends"]["refused"]) > count // 20


@pytest.mark.slow
def test_no_search_in_a_file_is_long() -> None:
    for name, content in damaging.long_searches().items():
        begun = time.process_time()
        with contextlib.suppress(AudioError):
            files.probe(content)
        assert time.process_time() - begun < 5, name


def _long_name(size: int) -> bytes:
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, size
    return header.tobuf(tarfile.GNU_FORMAT) + b"abc".ljust(512, b"\0")


def test_headers_of_tars_that_claim_much(tmp_path: Path) -> None:
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
