"""Files of torch.export: the model's outputs at every length and number of rows, by torch alone; what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from asit.errors import CheckpointError, ConfigError
from asit.interop import exportable, torch_export
from asit.interop.exportable import Waveform
from asit.interop.torch_export import export

NEED = 47 * 160 + 400  # samples of 48 frames


@pytest.mark.slow
def test_a_program_gives_the_models_scores_without_asit(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    m = make_model(depth=1, pooling="class+mean", multi=True, distilled=True, patch_stride_frames=5, norm_eps=1e-12)
    report = export(m, tmp_path / "m.pt2")
    waves = {
        f"{samples}x{rows}": make_waves(samples, rows)
        for samples, rows in ((1, 1), (3001, 3), (m.front_end.samples_for(m.frames), 2))
    }
    np.savez(tmp_path / "waves.npz", **waves)
    alone = (
        "import json, sys, numpy, torch\n"
        "kept = {'asit.json': ''}\n"
        "run = torch.export.load('m.pt2', extra_files=kept).module()\n"
        "waves = numpy.load('waves.npz')\n"
        "numpy.savez('out.npz', **{name: run(torch.from_numpy(waves[name])).numpy() for name in waves})\n"
        "assert not any(name.partition('.')[0] == 'asit' for name in sys.modules)\n"
        "kept = json.loads(kept['asit.json'])\n"
        "try: run(torch.zeros(1, kept['longest'] + 1))\n"
        "except Exception as error: assert str(kept['longest']) in str(error), error\n"
        "else: raise AssertionError('longer than the longest')\n"
        "print(kept['classes'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", alone], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=60,
        env={"PYTHONUTF8": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(list(m.classes))
    found = np.load(tmp_path / "out.npz")
    for name, given in waves.items():
        want = m.scores(torch.from_numpy(given), "float32").numpy()
        np.testing.assert_allclose(found[name], want, atol=1e-5, err_msg=name)
    assert np.ptp(found[list(waves)[-1]], axis=0).max() > 0.01, "the weights are such that sounds differ"
    assert report["check"]["largest_difference"] < 1e-5
    assert report["bytes"] == (tmp_path / "m.pt2").stat().st_size
    assert str(Path(torch_export.__file__).parent).encode() not in (tmp_path / "m.pt2").read_bytes()


@pytest.mark.slow
def test_frames_of_two_tokens_and_overlapping_patches(make_model: Any, make_waves: Any, tmp_path: Path) -> None:
    m = make_model(
        depth=1, distilled=True, norm_eps=1e-12, patch_stride_frames=5, patch_stride_mels=6, front={"padding": "zero"}
    )
    facts = export(m, tmp_path / "m.pt2", output="frames")
    kept = {torch_export.FACTS: ""}
    run = torch.export.load(tmp_path / "m.pt2", extra_files=kept).module()
    for samples in (200, 4000, facts["window"], facts["longest"]):
        waves = make_waves(samples, 2)
        want = torch.stack([one.frames for one in m.embed_batch(list(waves), precision="float32")])
        torch.testing.assert_close(run(torch.from_numpy(waves)), want, atol=1e-4, rtol=1e-5)
    assert json.loads(kept[torch_export.FACTS])["card"] == m.card


@pytest.mark.parametrize("padding", ["silence", "zero", "repeat"])
def test_the_traced_function_is_the_reference(make_model: Any, make_waves: Any, padding: str) -> None:
    """Before tracing, so that all lengths and outputs are quickly tried."""
    m = make_model(front={"padding": padding})
    for output in ("scores", "logits", "embedding", "frames"):
        function = Waveform(m, output).eval()
        for samples in (1, 399, 3001, NEED, NEED + 3000):
            waves = torch.from_numpy(make_waves(samples, 2))
            with torch.no_grad():
                found = function(waves)
            torch.testing.assert_close(found, exportable.reference(m, output, waves), atol=1e-5, rtol=1e-5)


def test_no_weight_is_in_a_file_twice(make_model: Any) -> None:
    m = make_model(distilled=True)
    tables = {"columns", "hann", "fourier", "bank"}
    held = [value for name, value in Waveform(m, "scores").state_dict().items() if name not in tables]
    own = [*m.encoder.state_dict().values(), *m.head.state_dict().values()]
    # Of the prefix's own embeddings and positions the sum is kept.
    assert sum(map(torch.numel, held)) == sum(map(torch.numel, own)) - 2 * m.encoder.width


def test_what_cannot_be_exported_is_refused(make_model: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="scores were requested, and this model has no head"):
        export(make_model(head=False), tmp_path / "m.pt2", output="scores")
    with pytest.raises(ConfigError, match=r"ends in \.pt2"):
        export(make_model(), tmp_path / "m.pth")
    (tmp_path / "m.pt2").write_bytes(b"mine")
    with pytest.raises(ConfigError, match="already exists"):
        export(make_model(), tmp_path / "m.pt2")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("m.pt2", b"mine")]


class Other(nn.Module):
    """Not the model: the loudest sample."""

    def __init__(self, *_: Any) -> None:
        super().__init__()

    def forward(self, waves: torch.Tensor) -> torch.Tensor:
        return waves.abs().amax(1, keepdim=True).expand(-1, 3)


def test_a_program_that_disagrees_with_the_model_is_not_left(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_export, "Waveform", Other)
    with pytest.raises(CheckpointError, match=r"the program for m\.pt2 differs from the model by .* for 1 waves"):
        export(make_model(), tmp_path / "m.pt2")
    assert not list(tmp_path.iterdir())
