"""The figure of clean, corrupted, reconstructed and mask."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from asit.config import FrontEndSettings
from asit.training import figures
from asit.training.figures import write_figure


def _arrays(n: int = 2, frames: int = 48, mels: int = 32) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    clean = rng.normal(size=(n, frames, mels)).astype(np.float32)
    mask = rng.random(clean.shape) < 0.4
    return {"clean": clean, "corrupted": np.where(mask, 0, clean), "reconstructed": clean * 0.5, "mask": mask}


def test_writes_both_files_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)  # an import of it raises from here on
    arrays = _arrays()
    path = write_figure(tmp_path / "figures", 500, **arrays, ids=["a.wav", 7], front_end=FrontEndSettings())
    assert path == tmp_path / "figures" / "step-00000500.png"
    assert sorted(p.name for p in path.parent.iterdir()) == ["step-00000500.npz", "step-00000500.png"]
    with np.load(path.with_suffix(".npz"), allow_pickle=False) as kept:
        assert sorted(kept.files) == ["clean", "corrupted", "ids", "mask", "reconstructed"]
        assert kept["mask"].dtype == bool
        np.testing.assert_array_equal(kept["mask"], arrays["mask"])
        assert kept["ids"].tolist() == ["a.wav", "7"]
        for name in ("clean", "corrupted", "reconstructed"):
            np.testing.assert_array_equal(kept[name], arrays[name].astype(np.float16))


def test_low_band_at_the_bottom_and_time_from_left_to_right(tmp_path: Path) -> None:
    """A bright lowest band in the first half of the time must be in the lower left of the clean picture."""
    clean = np.zeros((1, 40, 20), np.float32)
    clean[0, :20, :5] = 10.0
    mask = np.zeros(clean.shape, bool)
    path = write_figure(tmp_path, 1, clean, clean, clean, mask, ["x"], FrontEndSettings())
    image = imread(io.BytesIO(path.read_bytes()), format="png")[..., :3]
    yellow = (image[..., 0] > 0.95) & (image[..., 1] > 0.9) & (image[..., 2] < 0.85)  # the top of the magma colours
    clean_rows = image.shape[0] // 4
    bright_y, bright_x = np.nonzero(yellow[: clean_rows + 20])
    assert bright_x.size > 500
    assert bright_y.mean() > clean_rows * 0.55
    assert bright_x.mean() < image.shape[1] * 0.5


@pytest.mark.slow
def test_five_columns_at_most_and_all_examples_kept(tmp_path: Path) -> None:
    def width(n: int) -> int:
        path = write_figure(tmp_path / str(n), 3, **_arrays(n), ids=range(n), front_end=FrontEndSettings())
        return int(imread(io.BytesIO(path.read_bytes()), format="png").shape[1])

    assert width(1) < width(5) == width(7)
    assert np.load(tmp_path / "7" / "step-00000003.npz")["clean"].shape == (7, 48, 32)


def test_values_not_finite_and_huge_are_drawn(tmp_path: Path) -> None:
    arrays = _arrays()
    arrays["reconstructed"][0] = np.nan
    arrays["reconstructed"][1] = 1e9
    arrays["clean"][1] = np.inf
    path = write_figure(tmp_path, 2, **arrays, ids=["$x$ _^", "b"], front_end=FrontEndSettings())
    assert np.load(path.with_suffix(".npz"))["reconstructed"][1].max() == np.float16(65504)


def test_a_failed_write_leaves_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_figure(tmp_path, 1, **_arrays(), ids=["a", "b"], front_end=FrontEndSettings())
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(file: io.BufferedWriter, **arrays: object) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(figures.np, "savez_compressed", full)
    with pytest.raises(OSError, match="No space left"):
        write_figure(tmp_path, 1, **_arrays(), ids=["a", "b"], front_end=FrontEndSettings())
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
    assert path.exists()
