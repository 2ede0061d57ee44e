"""The command line: every mistake of a user ends with exit status 2, what was found, and no traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

import asit
from asit import cli, commands
from asit.errors import AsitError, ConfigError


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Run a verb in an empty folder: (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        try:
            code = cli.main(arguments)
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


def wave(path: Path, seconds: float = 0.5) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, round(seconds * 16000)), 16000)
    return path


@pytest.fixture
def material(tmp_path: Path) -> Path:
    """Things that are not what a verb wants."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "note.txt").write_text("no sound")
    (tmp_path / "broken.yaml").write_text("optim: [")
    (tmp_path / "wrong.yaml").write_text("epoch: 3\noptim: {lrr: 1}\nmasking: {drop: 1.5}\nencodr: {size: tiny}\n")
    (tmp_path / "bare.csv").write_text("path,split\nsounds/a.wav,train\nsounds/b.wav,test\n")
    (tmp_path / "split.csv").write_text("path,label,split\nsounds/a.wav,x,train\n")
    (tmp_path / "note.txt").write_text("no sound")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "thesis.tex").touch()
    for i in range(3):
        wave(tmp_path / "sounds" / f"{'abc'[i]}.wav")
    return tmp_path


SMALL = ("--encoder.size", "custom", "--encoder.width", "32", "--encoder.depth", "1", "--encoder.heads", "1")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("pretrian --data x", ["no verb pretrian, did you mean pretrain?"]),
        ("quux", ["no verb quux", "one of catalogue, shard, plan, pretrain"]),
        ("pretrain --dta x --out r --optim.lrr 3 --mask.drop 0.4", ["--data", "--optim.lr ", "--masking.drop"]),
        ("pretrain --data sounds --out r --masking.drop 1.5", ["masking", "less than or equal to 1", "1.5"]),
        ("pretrain --data sounds --out r --epochs many", ["--epochs", "many"]),
        ("pretrain --data sounds --out r --losses.local-tokens some", ["local-tokens", "masked"]),
        (
            "pretrain --config wrong.yaml --out r",
            ["4 settings do not fit", "epoch: no such", "optim.lr?", "1.5", "encoder?"],
        ),
        ("pretrain --config broken.yaml --out r", ["broken.yaml is not YAML"]),
        ("pretrain --config none.yaml --out r", ["none.yaml: No such file"]),
        ("pretrain --preset papr --data sounds --out r", ["no preset is called papr, did you mean paper?"]),
        ("pretrain --data sounds", ["--data sounds --out RUN"]),
        ("pretrain --out r", ["pass --data FOLDER"]),
        ("pretrain --data nowhere --out r", ["nowhere"]),
        ("pretrain --data empty --out r", ["empty is empty"]),
        ("pretrain --data words --out r", ["words", ".txt"]),
        ("pretrain --data note.txt --out r", ["note.txt"]),
        ("pretrain --data sounds --out foreign", ["thesis.tex", "another --out"]),
        ("pretrain --data sounds --out note.txt", ["note.txt is a file"]),
        ("pretrain --out r --resume", ["r is not there", "without --resume"]),
        ("pretrain --out r --data sounds --resume --overwrite", ["--resume and --overwrite"]),
        ("pretrain --data sounds --out r --epochs 3 --optim.warmup 9", ["optim.warmup is 9", "before the run"]),
        ("pretrain --data sounds --out r --views.seconds 0.05 --dry-run", ["hold no patch", "raise views.seconds to"]),
        (
            "pretrain --data sounds --out r --preset paper --encoder.size custom",
            ["encoder.size is custom, without width"],
        ),
        ("catalogue sounds", ["--out"]),
        ("catalogue nowhere --out c.jsonl", ["nowhere"]),
        ("catalogue empty --out c.jsonl", ["empty is empty"]),
        ("catalogue sounds --out c.jsonl --workers 0", ["workers=0"]),
        ("report nowhere", ["nowhere is not there"]),
        ("report empty", ["empty"]),
        ("embed nowhere a.wav", ["nowhere"]),
        ("probe nowhere split.csv", ["no clip of the split 'test'"]),
        ("settings --preset papr", ["did you mean paper?"]),
        ("settings --task esc5", ["did you mean esc50?"]),
        ("settings --task esc50 --preset paper", ["choose one"]),
    ],
)
def test_mistakes(arguments: str, expected: list[str], run: Any, material: Path) -> None:
    before = {p for p in material.rglob("*") if p.name != "r"}
    code, _, err = run(*arguments.split())
    assert code == 2, err
    assert "Traceback" not in err
    flat = " ".join(err.replace("│", " ").split())
    for text in expected:
        assert text.strip() in flat, err
    left = {p for p in material.rglob("*") if p.name != "r"} - before
    assert {p.name for p in left} <= {"catalogue.jsonl", "catalogue.skipped.jsonl", "catalogue.jsonl.partial"}
    assert not (material / "r" / "config.yaml").exists()


def test_a_mistake_in_a_real_process(tmp_path: Path) -> None:
    """As the shell sees it; a verb that imports no torch."""
    call = [sys.executable, "-m", "asit", "settings", "--preset", "papr"]
    done = subprocess.run(call, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.startswith("asit: ")
    assert "expected:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_help_lists_the_verbs_and_the_first_steps(run: Any) -> None:
    for arguments in ((), ("--help",), ("-h",), ("help",)):
        code, out, _ = run(*arguments)
        assert code == 0
        for verb in commands.SUMMARIES:
            assert f"  {verb}" in out
            assert callable(commands.verb(verb))
        assert "asit pretrain --data FOLDER --out RUN" in out
    for arguments in (("--version",), ("-V",), ("version",)):
        assert run(*arguments) == (0, f"asit {asit.__version__}\n", "")


@pytest.mark.parametrize("verb", commands.SUMMARIES)
def test_each_verb_explains_itself(verb: str, run: Any) -> None:
    code, out, err = run(verb, "--help")
    assert code == 0
    assert f"asit {verb}" in out
    assert err == ""


def test_light_verbs_need_no_torch() -> None:
    code = (
        "import sys\nfrom asit.cli import main\n"
        "for given in (['--help'], ['settings'], ['pretrain', '--help'], ['pretrain', '--maskin.drop', '1'],"
        "  ['finetune', '--help'], ['settings', '--task', 'esc50']):\n"
        "    try:\n        main(given)\n    except SystemExit:\n        pass\n"
        "sys.exit(' '.join({'torch', 'matplotlib', 'sklearn', 'tensorboard'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize(
    ("given", "text", "verb"),
    [
        (["--preset", "paper"], "# Largest share of a view's area wiped", ["pretrain"]),
        (["--task", "esc50"], "# Label smoothing", ["finetune", "--model", "none"]),
    ],
)
def test_settings_are_a_file_to_start_from(
    given: list[str], text: str, verb: list[str], run: Any, tmp_path: Path
) -> None:
    code, out, _ = run("settings", *given)
    assert (code, text in out) == (0, True)
    assert run("settings", *given)[1] == out
    (tmp_path / "mine.yaml").write_text(out)
    code, _, err = run(*verb, "--config", "mine.yaml", "--out", "r")
    assert (code, "no data were given" in err) == (2, True)  # it is read without error, and lacks the data alone


@pytest.mark.parametrize("given", [["--help"], ["finetune", "--help"], ["settings", "--task", "esc50"]])
def test_a_broken_pipe_is_no_error(given: list[str]) -> None:
    """As in `asit --help | head -1`."""
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run([sys.executable, "-m", "asit", *given], stdout=write, stderr=subprocess.PIPE, timeout=60)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_closed_standard_streams_are_replaced(tmp_path: Path) -> None:
    code = (
        "import os, sys\nfrom asit.cli import main\nstatus = main(['nothing'])\n"
        "number = os.open('file', os.O_WRONLY | os.O_CREAT)\n"
        "os.write(2, b'what a decoder says')\nprint('more')\nos.write(number, b'data')\nos._exit(status)"
    )
    done = subprocess.run(["sh", "-c", f'{sys.executable} -c "$0" <&- >&- 2>&-', code], cwd=tmp_path, timeout=60)
    assert done.returncode == 2
    assert (tmp_path / "file").read_bytes() == b"data"


def test_other_endings(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(error: BaseException) -> int:
        def verb(*_: object) -> int:
            raise error

        monkeypatch.setattr(commands, "verb", lambda _: verb)
        return 0

    for error, code, text in (
        (KeyboardInterrupt("kept so far"), 130, "asit: stopped: kept so far"),
        (KeyboardInterrupt(), 130, "asit: stopped"),
        (AsitError("found", "wanted", "do this"), 2, "asit: found\n  expected: wanted\n  fix:      do this"),
        (ConfigError("found"), 2, "asit: found"),
        (OSError(28, "No space left on device"), 2, "No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), 2, "asit: /x: Permission denied"),
    ):
        ends(error)
        found, _, err = run("report", "x")
        assert found == code
        assert text in err
        assert "Traceback" not in err
    ends(ZeroDivisionError("our own mistake"))
    with pytest.raises(ZeroDivisionError):  # is not dressed up as the user's
        run("report", "x")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(("stopped", "code"), [(None, 0), ("SIGTERM", 143), ("SIGINT", 130)])
def test_how_pretraining_ends(
    stopped: str | None, code: int, rank: int, run: Any, material: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asit.pretrain import pretrain_run as runs

    seen: dict[str, Any] = {}

    def pretrain(settings: Any, **how: Any) -> runs.PretrainResult:
        seen.update(settings=settings, **how)
        out = Path(settings.out)
        return runs.PretrainResult(
            out=out,
            model=out / "model",
            step=5,
            total=9,
            finished=stopped is None,
            stopped_by=stopped,
            clips_per_second=12.3,
        )

    monkeypatch.setattr(runs, "pretrain", pretrain)
    monkeypatch.setenv("RANK", str(rank))
    found, out, _ = run(
        "pretrain", "--data", "sounds", "--out", "my run", "--epochs=7", "--masking.drop=0.6", "--overwrite"
    )
    assert found == code
    assert (seen["settings"].epochs, seen["settings"].masking.drop, seen["overwrite"]) == (7, 0.6, True)
    assert "config" not in seen["settings"].model_dump()
    if rank:
        assert out == ""
    elif stopped:
        assert "resume: asit pretrain --out 'my run' --resume" in out
    else:
        assert "asit report 'my run'" in out
        assert "import asit" in out


def test_flags_go_over_the_file_and_the_file_over_the_preset(run: Any, material: Path, monkeypatch: Any) -> None:
    from asit.tools import run_estimate as dryrun

    seen: list[Any] = []

    def dry_run(settings: Any, **_: Any) -> dict[str, Any]:
        seen.append(settings)
        raise ConfigError("enough")

    monkeypatch.setattr(dryrun, "dry_run", dry_run)
    (material / "mine.yaml").write_text("epochs: 50\nmasking: {drop: 0.4}\noptim: {betas: [0.8, 0.9]}\n")
    run("pretrain", "--preset", "paper", "--config", "mine.yaml", "--epochs", "3", "--out", "r", "--dry-run")
    settings = seen[0]
    assert (settings.epochs, settings.masking.drop, settings.front_end.rate) == (3, 0.4, 32000)
    assert settings.optim.betas == (0.8, 0.9)
    assert settings.preset == "paper"


def test_a_dry_run_warns_of_more_memory_than_there_is(run: Any, monkeypatch: Any) -> None:
    from asit.tools import run_estimate as dryrun

    def found(memory: dict[str, float]) -> dryrun.DryRun:
        shapes = {"global views": [160, 1, 592, 128]}
        return dryrun.DryRun("epochs: 9\n", shapes, 90.0, 0.01, 0.9, 7200.0, {"cpu": 67.0}, memory, True)

    cases: list[tuple[dict[str, float], bool]] = [({"cpu": 25.0}, True), ({"cpu": 99.0}, False), ({}, False)]
    for memory, warned in cases:
        result = found(memory)
        monkeypatch.setattr(dryrun, "dry_run", lambda *_, result=result, **__: result)
        code, out, _ = run("pretrain", "--data", "sounds", "--out", "r", "--epochs", "9", "--dry-run")
        assert code == 0
        assert ("more than the 25.0 GB there are; raise accumulate" in out) is warned
        assert "67.0 GB (from two smaller sizes measured)" in out
        assert "2 h 00 min" in out


def test_a_table_without_labels_gives_no_probe(run: Any, material: Path, small_model: Callable[..., Any]) -> None:
    small_model().save(material / "model")
    code, _, err = run("probe", "model", "bare.csv")
    assert (code, "none of the 2 clips has a label" in err) == (2, True), err
