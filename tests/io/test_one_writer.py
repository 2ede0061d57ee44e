"""Two processes with one --out: the second is refused with the name of the first, or the last one to end wins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
from entry_points import save_models

from asit import cli
from asit.data.download.fetch import download
from asit.demo.demo_dataset import build_dataset
from asit.errors import ConfigError
from asit.io import lock

LONG = {
    "catalogue": "catalogue sounds --out out/c.jsonl --workers 1 --front-end.mels 32",
    "embed": "embed tagger sounds --out out/e.npz",
    "index": "index tagger sounds --out out/i",
    "shard": "shard sounds --out out/s --clips 4 --workers 1",
}
"""Verbs that keep what is unfinished beside their output."""
SHORT = {
    "export": "export tagger --to huggingface --out out/hf --overwrite",
    "convert": "convert hf --out out/m --overwrite",
    "tag": "tag tagger sounds --out out/t.csv --overwrite",
}
"""Verbs whose output comes into being at once."""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tiny model and ten sounds, to be in."""
    monkeypatch.chdir(tmp_path)
    save_models(tmp_path)
    Path("sounds").mkdir()
    for i in range(10):
        soundfile.write(f"sounds/{i}.wav", 0.1 * np.random.default_rng(i).standard_normal(16000), 16000)
    return tmp_path


@pytest.mark.parametrize("verb", LONG)
def test_a_second_writer_is_refused(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(LONG[verb].partition("--out ")[2].split()[0])
    with lock.writing(out.absolute()):
        assert cli.main(LONG[verb].split()) == 2
        words = capsys.readouterr().err
        assert f"{out} is being written by another asit: process {os.getpid()} on " in words
        assert "one process at a time" in words
        assert "or choose another --out" in words
        assert [path.name for path in Path("out").iterdir()] == [f".{out.name}.lock"]
    # A holder that was killed holds nobody up, and what it left goes.
    code = (
        "import os, sys\nfrom pathlib import Path\nfrom asit.io import lock\n"
        "with lock.writing(Path(sys.argv[1])): os._exit(9)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(out)]).returncode == 9
    assert (out.parent / f".{out.name}.lock").exists()
    assert cli.main(LONG[verb].split()) == 0, capsys.readouterr().err
    assert out.exists()
    assert not list(Path("out").glob(".*"))


def test_data_sets_have_one_writer(tmp_path: Path) -> None:
    refused = pytest.raises(ConfigError, match="is being written by another asit")
    with lock.writing(tmp_path / "set"):
        with refused:
            download("esc50", tmp_path / "set")
        with refused:
            build_dataset(tmp_path / "set")
    assert list(tmp_path.iterdir()) == []


PAIRS = """
import contextlib, json, os, sys
import torch
import asit, asit.infer.embed_files, asit.search, asit.interop, asit.data.shards.pack, soundfile
from asit import cli
torch.set_num_threads(1)
pairs, arguments = int(sys.argv[1]), sys.argv[2:]
for number in range(pairs):
    os.mkdir("out")
    ready, go = os.pipe(), os.pipe()
    children = []
    for which in range(2):
        child = os.fork()
        if child == 0:
            words = open(f"words{which}", "w")
            with words, contextlib.redirect_stdout(words), contextlib.redirect_stderr(words):
                os.read(go[0], 1)
                try:
                    status = cli.main(arguments)
                except BaseException as error:
                    print("Traceback", repr(error))
                    status = 99
            os._exit(status)
        children.append(child)
    os.write(go[1], b"gg")
    statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    for end in (*ready, *go):
        os.close(end)
    print(json.dumps([statuses, [open(f"words{i}").read() for i in range(2)]]), flush=True)
    os.rename("out", f"out{number}")
"""


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize("verb", [*LONG, *SHORT])
def test_pairs_that_start_at_the_same_moment(verb: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this system")
    if verb == "convert":
        assert cli.main(["export", "tagger", "--to", "huggingface", "--out", "hf"]) == 0
    count = int(os.environ.get("ASIT_PAIRS", "10"))
    arguments = (LONG | SHORT)[verb].split()
    done = subprocess.run(
        [sys.executable, "-c", PAIRS, str(count), *arguments], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    pairs = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(pairs) == count
    Path("out").mkdir()
    assert cli.main(arguments) == 0, capsys.readouterr().err
    alone = tree(Path("out"))
    for number, (statuses, words) in enumerate(pairs):
        assert "Traceback" not in "".join(words)
        assert 0 in statuses
        for status, said in zip(statuses, words, strict=True):
            assert status == 0 or "is being written by another asit" in said or "already" in said, said
        made = tree(Path(f"out{number}"))
        assert made.keys() == alone.keys(), "files of unfinished work are left"
        assert made == alone
