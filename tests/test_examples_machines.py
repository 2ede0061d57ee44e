"""The walk of examples/machines at toy size."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_machines(run_example: Any, tmp_path: Path) -> None:
    """Five commands from synthetic sounds to anomalies with AUC and an ONNX file."""
    pytest.importorskip("onnxscript")
    done = run_example("machines", tmp_path / "out", "8", "1")
    assert re.search(r"AUC [01]\.\d+, pAUC", done.stderr)
    with (tmp_path / "out" / "anomalies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["label"] for row in rows} == {"normal", "bearing", "imbalance", "rubbing"}
    assert (tmp_path / "out" / "machine.onnx").stat().st_size > 100_000
