"""Distances and thresholds by loops, AUC as scikit-learn's, and the verb."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from asit import cli
from asit.data.catalogue.inputs import expand
from asit.model.audio_model import AudioModel
from asit.search import Index, IndexSettings, anomaly, build

from .conftest import write  # type: ignore[import-not-found]

SETTINGS = IndexSettings(window=0.4, hop=0.4, precision="float32")


@pytest.fixture(scope="module")
def normal(model: AudioModel, model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of seven recordings, three of them of several windows."""
    root = tmp_path_factory.mktemp("normal")
    for i in range(7):
        write(root / "normal" / f"{i}.wav", 0.4 + 0.5 * (i % 3), i)
    build(model, [str(root / "normal")], root / "index", SETTINGS, model_path=str(model_folder))
    for i in range(4):
        write(root / "new" / f"{i}.wav", 0.5 + 0.4 * (i % 2), 100 + i)
    (root / "new" / "broken.wav").write_bytes(b"RIFF no sound")
    return root


@pytest.mark.parametrize("k", [1, 3])
def test_scores_are_those_of_loops(normal: Path, model: AudioModel, k: int) -> None:
    index = Index.read(normal / "index")
    vectors, owner = np.asarray(index.vectors, np.float64), index.rows["file"]
    want = []
    for i in range(len(index.sources)):
        worst = []
        for row in np.flatnonzero(owner == i):
            cosines = sorted(float(vectors[row] @ vectors[other]) for other in np.flatnonzero(owner != i))
            worst.append(1 - np.mean(cosines[-k:]))
        want.append(max(worst))
    np.testing.assert_allclose(anomaly.normal_scores(index, k), want, atol=1e-5)
    items = [item for item in expand([str(normal / "new")]) if "broken" not in item.name]
    for item, found in zip(items, anomaly.score(index, model, items, k), strict=True):
        assert isinstance(found, anomaly.Anomaly)
        own = [index.vector_of(item.path, model, None, start, 0.4) for start in (0.0,)]
        assert found.score >= anomaly.distances(index, own, k)[0][0] - 2e-3  # rows are of half precision
        assert 0 <= found.start < found.end
        assert not found.known


def test_a_recording_of_the_index_is_scored_without_itself(normal: Path, model: AudioModel) -> None:
    index = Index.read(normal / "index")
    items = expand([str(normal / "normal")])
    found = list(anomaly.score(index, model, items))
    assert all(isinstance(one, anomaly.Anomaly) and one.known for one in found)
    scores = [one.score for one in found if isinstance(one, anomaly.Anomaly)]
    np.testing.assert_allclose(scores, anomaly.normal_scores(index), atol=1e-4)


@pytest.mark.parametrize("most", [1.0, 0.1, 0.37])
def test_partial_auc_is_scikit_learns(most: float) -> None:
    rng = np.random.default_rng(3)
    for digits in (1, 6):
        truth = rng.random(200) < 0.3
        scores = np.round(rng.normal(size=200) + truth, digits)
        want = roc_auc_score(truth, scores, max_fpr=None if most == 1 else most)
        assert anomaly.partial_auc(scores, truth, most) == pytest.approx(want, abs=1e-12)
    assert anomaly.partial_auc([1, 2], [True, True]) is None


def test_the_verb(normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [("path", "label"), *((f"{i}.wav", "normal" if i < 2 else "broken bearing") for i in range(4))]
    with (normal / "new" / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows(rows)
    given = ["anomaly", str(normal / "index"), str(normal / "new" / "table.csv")]
    assert cli.main([*given, "--out", str(tmp_path / "scores.csv")]) == 0
    with (tmp_path / "scores.csv").open() as file:
        read = list(csv.DictReader(file))
    scores = [float(row["score"]) for row in read]
    assert scores == sorted(scores, reverse=True)
    log = capsys.readouterr().err
    auc = roc_auc_score([row["label"] != "normal" for row in read], scores)
    assert f"AUC {auc:.3f}" in log
    assert "pAUC" in log
    threshold = np.quantile(anomaly.normal_scores(Index.read(normal / "index")), 0.95, method="higher")
    assert [row["anomalous"] for row in read] == [str(score > threshold) for score in scores]
    # Exit status 1 on request; JSON lines.
    assert cli.main([*given, "--quantile", "0", "--check"]) == 1
    assert len([json.loads(line) for line in capsys.readouterr().out.splitlines()]) == 4
    assert cli.main([*given, "--quantile", "1", "--format", "table"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4
    # A file that exists is kept; a broken recording is named, and the others are scored.
    assert cli.main([*given, "--out", str(tmp_path / "scores.csv")]) == 2
    assert "already exists" in capsys.readouterr().err
    assert cli.main(["anomaly", str(normal / "index"), str(normal / "new")]) == 2
    captured = capsys.readouterr()
    assert "broken.wav" in captured.err
    assert len(captured.out.splitlines()) == 4


def test_what_would_be_no_test_is_said(normal: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["anomaly", str(normal / "index"), str(normal / "normal" / "1.wav")]) == 0
    assert "1 recordings are in the index" in capsys.readouterr().err
    given = ["anomaly", str(normal / "index"), str(normal / "new" / "table.csv"), "--normal", "nominal"]
    assert cli.main([*given, "--out", str(tmp_path / "s.csv")]) == 2
    assert "labels are broken bearing, normal" in capsys.readouterr().err
    assert not (tmp_path / "s.csv").exists()


def test_one_recording_gives_no_threshold(normal: Path, model: AudioModel, model_folder: Path, tmp_path: Path) -> None:
    shutil.copy(normal / "normal" / "2.wav", tmp_path / "2.wav")
    build(model, [str(tmp_path / "2.wav")], tmp_path / "index", SETTINGS, model_path=str(model_folder))
    assert cli.main(["anomaly", str(tmp_path / "index"), str(normal / "new" / "0.wav")]) == 2
