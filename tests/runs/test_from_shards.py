"""Runs on shards: the same arithmetic as on files, a store that fails and recovers, a killed worker."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from web_server import Server, following_a_script

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.inputs import expand
from asit.data.shards import pack as shards
from asit.data.shards.shard_plan import PackSettings
from asit.errors import StoreError
from asit.finetune.finetune_run import finetune
from asit.infer.embed_files import OutputSettings, embed_files
from asit.model.audio_model import AudioModel
from asit.model.vit import Encoder
from asit.pretrain.pretrain_run import pretrain

FRONT_END = {"rate": 8000, "mels": 32, "mean": -8.0, "std": 3.5}


def pack(listed: Catalogue, folder: Path) -> Path:
    """The catalogue's files as they are in tars of six, and the index of them."""
    shards.pack(listed, str(folder), PackSettings(clips=6))
    return folder


@pytest.fixture
def store(listed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The sixteen recordings in shards, behind a URL."""
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    folder = pack(Catalogue.read(listed), tmp_path / "shards")
    with following_a_script() as served:
        served.files = {f"/{path.name}": path.read_bytes() for path in folder.iterdir()}
        yield served


READ = {"views": {"keep_gb": 0.0}}


def test_a_store_that_dies_and_comes_back(
    tiny: Callable[..., Any],
    store: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    equal_runs: Any,
) -> None:
    """Finished steps are kept, and the resumed run equals an uninterrupted one that read files."""
    monkeypatch.setenv("ASIT_STORE_SECONDS", "1")
    pretrain(tiny(tmp_path / "files", epochs=1, **READ))
    settings = functools.partial(tiny, tmp_path / "shards-run", Path("x"), epochs=1, **READ)
    given = settings().model_copy(update={"data": store.url})
    store.left = 3 + 8  # a look at each of three shards, then up to three requests for a step of four clips
    with pytest.raises(StoreError, match=r"shard-00000\d\.tar(.|\n)*--resume, which resumes from step"):
        pretrain(given.model_copy(deep=True))
    assert "the server answers 503" in caplog.text
    store.left = 1 << 30
    result = pretrain(given.model_copy(deep=True), resume=True)
    assert result.finished
    equal_runs(tmp_path / "files", tmp_path / "shards-run")


@pytest.mark.slow
def test_fine_tuning_reads_shards_and_their_labels(
    tuned: Callable[..., Any], labelled: Path, tmp_path: Path, equal_runs: Any
) -> None:
    pack(Catalogue.read(labelled), tmp_path / "packed")
    over = {"epochs": 1, "input": {"keep_gb": 0.0}}
    finetune(tuned(tmp_path / "files", **over))
    result = finetune(tuned(tmp_path / "shards", tmp_path / "packed", **over))
    equal_runs(tmp_path / "files", tmp_path / "shards")
    assert result.results


def test_shards_are_looked_for_before_a_run_begins(tiny: Callable[..., Any], listed: Path, tmp_path: Path) -> None:
    folder = pack(Catalogue.read(listed), tmp_path / "packed")
    (folder / "shard-000002.tar").write_bytes((folder / "shard-000002.tar").read_bytes()[:9000])
    with pytest.raises(StoreError, match=r"shard-000002\.tar"):
        pretrain(tiny(tmp_path / "run", folder))
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_blocks_as_an_order_of_a_run(tiny: Callable[..., Any], listed: Path, tmp_path: Path) -> None:
    data = pack(Catalogue.read(listed), tmp_path / "packed")
    views = {"order": "blocks", "block": 2}
    result = pretrain(tiny(tmp_path / "run", data, epochs=1, stop_after=2, views=views))
    assert result.step == 2


def test_embedding_of_an_index_has_the_files_rows(listed: Path, tmp_path: Path) -> None:
    """Named as the files were; a shard that is missing ends the call, and is no bad recording."""
    folder = pack(Catalogue.read(listed), tmp_path / "packed")
    size = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
    model = AudioModel(Encoder(size, 48, 32), FrontEnd(FrontEndSettings(**FRONT_END)))
    model.encoder.init_weights(torch.Generator().manual_seed(0))
    tables = []
    for given in (str(Catalogue.read(listed).root), str(folder)):
        embed_files(model, expand([given]), tmp_path / "out.npz", output=OutputSettings(overwrite=True), threads=2)
        with np.load(tmp_path / "out.npz") as table:
            tables.append({name: table[name] for name in table.files})
    assert tables[0].keys() == tables[1].keys()
    assert [
        name for name in tables[0] if name != "about" and not np.array_equal(tables[0][name], tables[1][name])
    ] == []
    moved = folder.rename(tmp_path / "moved")  # this process holds the shards open that it has read
    (moved / "shard-000001.tar").unlink()
    with pytest.raises(StoreError, match=r"moved/shard-000001\.tar"):
        embed_files(model, expand([str(moved)]), tmp_path / "other.npz", threads=2)
    assert not (tmp_path / "other.npz").exists()


@pytest.mark.slow
def test_a_worker_that_the_system_kills(
    tiny: Callable[..., Any], fork: Callable[..., Any], reaches: Callable[..., None], tmp_path: Path, equal_runs: Any
) -> None:
    """The error names the worker, finished steps are kept, and the resumed run equals an undisturbed one."""
    more = {"epochs": 60, "workers": 2, "records": {"checkpoint_every": 1000}}
    pretrain(tiny(tmp_path / "whole", **more))
    child = fork(lambda: pretrain(tiny(tmp_path / "struck", **more)))
    reaches(tmp_path / "struck", 3, [child])
    workers = Path(f"/proc/{child.process.pid}/task/{child.process.pid}/children").read_text("ascii").split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    began = time.monotonic()
    ended = child.end()
    assert time.monotonic() - began < 45
    assert ended.code == 2, ended.said
    assert "1 of 2 loader workers ended unexpectedly" in ended.said
    assert f"process {workers[-1]} by SIGKILL" in ended.said
    assert "--resume" in ended.said
    result = pretrain(tiny(tmp_path / "struck", **more), resume=True)
    assert result.finished
    equal_runs(tmp_path / "whole", tmp_path / "struck")
