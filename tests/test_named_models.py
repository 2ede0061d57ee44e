"""Every verb that takes MODEL, given a repository of the hub, for which a local server answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from hub_server import COMMITS, environment, hub

PROGRAM = r"""
import contextlib, io, json, os, sys
from pathlib import Path
from asit import cli, hear, xares

run = ["--device", "cpu", "--workers", "0", "--threads", "1", "--batch-size", "4", "--stop-after", "1"]
strides = ["--encoder.patch-stride-frames", "8", "--encoder.patch-stride-mels", "8", "--views.seconds", "0.4"]
model = "someone/ast"
verbs = {
    "info": ["info", model, "--json"],
    "embed": ["embed", model, "sounds", "--out", "e.npz"],
    "tag": ["tag", model, "sounds", "--out", "t.csv"],
    "index": ["index", model, "sounds", "--out", "INDEX"],
    "similar": ["similar", "INDEX", "sounds/0.wav"],
    "evaluate": ["evaluate", model, "--data", "table.csv"],
    "probe": ["probe", model, "table.csv"],
    "export": ["export", model, "--to", "huggingface", "--out", "exported"],
    "convert": ["convert", model, "--out", "converted"],
    "pretrain": ["pretrain", "--model", model, "--data", "sounds", "--out", "RUN", *run, *strides],
    "finetune": ["finetune", "--model", model, "--data", "table.csv", "--out", "FT", *run],
}
status = {}
for name, line in verbs.items():
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            code = cli.main(line)
        except SystemExit as ended:  # an option that the verb does not have
            code = ended.code
    status[name] = [code, "" if code == 0 else said.getvalue()[-600:]]
os.environ["ASIT_MODEL"] = model
status["hear"] = [0, str(hear.load_model("").scene_embedding_size)]
status["xares"] = [0, str(xares.AsitEncoder().output_dim)]
Path("out.json").write_text(json.dumps(status))
"""


@pytest.fixture(scope="module")
def ended(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder, the exit status and what was printed of each verb, and the requests."""
    pytest.importorskip("huggingface_hub")
    transformers = pytest.importorskip("transformers")
    root = tmp_path_factory.mktemp("named")
    config = transformers.ASTConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, intermediate_size=80, patch_size=8, time_stride=5,
        frequency_stride=6, max_length=64, num_mel_bins=32, id2label={0: "dog", 1: "rain"},
    )  # fmt: skip
    torch.manual_seed(0)
    folder = root / "hub" / "someone" / "ast"
    transformers.ASTForAudioClassification(config).save_pretrained(folder)
    transformers.ASTFeatureExtractor(mean=-6.0, std=3.0, num_mel_bins=32, max_length=64).save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: bsd-3-clause\n---\n")
    (root / "sounds").mkdir()
    rows = ["path,label,split"]
    for i in range(16):
        wave = 0.1 * np.random.default_rng(i).standard_normal(9600) * (1 + 5 * (i % 2))
        soundfile.write(root / "sounds" / f"{i}.wav", np.clip(wave, -1, 1).astype(np.float32), 16000)
        rows.append(f"sounds/{i}.wav,{'dog' if i % 2 else 'rain'},{'train' if i < 10 else 'test'}")
    (root / "table.csv").write_text("\n".join(rows) + "\n")
    with hub(root / "hub") as server:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env=environment(server.url, root / "home"),
            cwd=root,
            capture_output=True,
            text=True,
            timeout=240,
        )
        asked = server.asked
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-3000:])
    return root, json.loads((root / "out.json").read_text()), asked


def test_each_verb_takes_a_repository(ended: tuple[Path, dict[str, Any], list[str]]) -> None:
    _, status, _ = ended
    assert {name: said for name, (code, said) in status.items() if code} == {}


def test_it_is_fetched_and_converted_once(ended: tuple[Path, dict[str, Any], list[str]]) -> None:
    root, _, asked = ended
    fetched = [line for line in asked if line.startswith("GET") and "model.safetensors" in line]
    assert len(fetched) == 1
    assert len(list((root / "home" / "cache" / "asit" / "models").iterdir())) == 1


def test_the_card_of_what_was_trained_says_where_it_is_from(ended: tuple[Path, dict[str, Any], list[str]]) -> None:
    root, _, _ = ended
    facts = json.loads((root / "RUN" / "model" / "card.json").read_text())["training"]["continued_from"]
    assert (facts["model"], facts["license"]) == ("someone/ast", "bsd-3-clause")
    source = facts["training"]["source"]
    assert (source["repository"], source["revision"]) == ("someone/ast", COMMITS["main"])
    card = json.loads((root / "converted" / "card.json").read_text())
    assert (card["training"]["source"], card["training"]["license"]) == (source, "bsd-3-clause")
