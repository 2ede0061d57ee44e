"""Folders of pretraining runs written by hand, for the pages that are made of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from asit.config import PretrainSettings

HOSTILE = '<script>alert("x")</script>&.wav'


def line(step: int, epoch_steps: int = 50) -> dict[str, Any]:
    parts = {"global": 9 - step / 100, "local": 6.5, "reconstruction": 0.5, "teacher_entropy_class": 8.0,
             "teacher_entropy_patch": 6.0, "centre_norm_class": 1.0, "centre_norm_patch": 1.0, "feature_spread": 0.3,
             "mask_share": 0.5, "gradient_norm": 2.0}  # fmt: skip
    return {"kind": "train", "step": step, "epoch": step / epoch_steps, "loss": 16.5 - step / 100, "parts": parts,
            "lr": 1e-4, "weight_decay": 0.04, "teacher_momentum": 0.996, "teacher_temperature": 0.04,
            "clips_per_second": 12.5, "data_wait": 0.031, "seconds": 2.0 * step}  # fmt: skip


def write_run(folder: Path, lines: list[dict[str, Any]], tail: str = "") -> Path:
    folder.mkdir()
    settings = PretrainSettings(data=HOSTILE, out="out", epochs=4)
    settings = settings.changed({"front_end": {"mean": -6.0, "std": 4.0}, "masking": {"drop": 0.55}})
    (folder / "config.yaml").write_text(yaml.safe_dump(settings.model_dump(mode="json")))
    (folder / "environment.json").write_text(json.dumps({"torch": "2.13.0", "git": {"commit": "abc123"}}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines) + tail)
    header = {"asit_catalogue": 1, "clips": 7200, "seconds": 7236.0, "mean": -6.0, "std": 4.0, "skipped": {"silent": 3}}
    (folder / "catalogue.jsonl").write_text(json.dumps(header) + "\n" + json.dumps({"path": "a.wav"}) + "\n")
    (folder / "log.txt").write_text("started <now>\n")
    return folder


def full_lines() -> list[dict[str, Any]]:
    probe = {"kind": "probe", "step": 100, "accuracy": 0.5, "features": {"mean": 0.5, "time-mean": 0.625}, "clips": 400}
    return [
        {"kind": "event", "step": 0, "text": "begins"},
        *(line(step) for step in range(10, 110, 10)),
        probe,
        *(line(step) for step in range(110, 210, 10)),
        {"kind": "event", "step": 200, "text": "finished: 200 steps in 7 min"},
    ]
