"""The walk of examples/machines at toy size."""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_machines(repository: Path, tmp_path: Path) -> None:
    """Five commands from synthetic sounds to anomalies with AUC and an ONNX file."""
    pytest.importorskip("onnxscript")
    script = repository / "examples" / "machines" / "run.sh"
    commands = [line for line in script.read_text().splitlines() if line.startswith(("asit ", "python "))]
    assert len(commands) <= 5
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for name, arguments in (("python", '"$@"'), ("asit", '-m asit "$@"')):
        (binaries / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments}\n')
        (binaries / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["sh", script, tmp_path / "out", "8", "1"], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"AUC [01]\.\d+, pAUC", done.stderr)
    with (tmp_path / "out" / "anomalies.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 8
    assert {row["label"] for row in rows} == {"normal", "bearing", "imbalance", "rubbing"}
    assert (tmp_path / "out" / "machine.onnx").stat().st_size > 100_000
