"""The walk of examples/bioacoustics at toy size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import soundfile
import torch

from asit.audio.fbank import FrontEnd
from asit.config import EncoderSettings, FrontEndSettings
from asit.data.annotations.annotation_files import read_annotations
from asit.model.audio_model import AudioModel
from asit.model.encoders import new_encoder


@pytest.mark.slow
def test_bioacoustics(run_example: Any, tmp_path: Path) -> None:
    """Four commands from recordings with Raven tables to detections that the readers of Raven's and Audacity's files
    take back, and clips of them."""
    settings = EncoderSettings(size="custom", width=32, depth=2, heads=2, patch_frames=8, patch_mels=8)
    encoder = new_encoder(settings, 104, 64)
    encoder.init_weights(torch.Generator().manual_seed(0))
    AudioModel(encoder, FrontEnd(FrontEndSettings(mels=64, mean=-6.0, std=3.0))).save(tmp_path / "encoder")
    out = tmp_path / "out"
    run_example("bioacoustics", tmp_path / "encoder", out, "4", "15")
    species = {"wren", "owl", "cricket"}
    rows, recordings = read_annotations(out / "selections.txt")
    assert rows
    assert {row.label for row in rows} <= species
    assert set(recordings) <= {str(path) for path in (out / "new").glob("*.wav")}
    lines = (out / "labels" / "site-00.txt").read_text("utf-8").splitlines()
    expected = [row for row in rows if Path(row.path).name == "site-00.wav"]
    assert [line.split("\t")[2] for line in lines] == [row.label for row in expected]
    clips = list((out / "clips").rglob("*.wav"))
    assert len(clips) == len(rows)
    assert {soundfile.info(path).samplerate for path in clips} == {22050}
