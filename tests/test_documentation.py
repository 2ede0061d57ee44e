"""Every command and snippet of the documentation is run, or stands in a table here with the reason why it is not.

A page's blocks run in their order in a folder of their own, which holds small stand-ins for the files that they name.
Each `asit` line is parsed by the verb itself; those of `QUICK` verbs are run too, the others by the slow test.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import shutil
import sys
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import tyro

import asit
from asit import cli
from asit.config import EncoderSettings, yaml
from asit.model.vit import Encoder

pytestmark = pytest.mark.usefixtures("few_draws")

REPOSITORY = Path(__file__).parents[1]
PAGES = ["README.md", "bench/README.md"]
PAGES += sorted(path.relative_to(REPOSITORY).as_posix() for path in (REPOSITORY / "docs").rglob("*.md"))

QUICK = {
    "anomaly",
    "catalogue",
    "compare",
    "convert",
    "embed",
    "index",
    "info",
    "models",
    "probe",
    "report",
    "settings",
    "similar",
    "tag",
}
"""Verbs whose lines take less than a second with the stand-ins."""

PARSED_ALONE = {
    "download": "fetches gigabytes: tests/data/test_download.py",
    "serve": "does not return: tests/serve",
    "asit demo": "the whole job: CI runs it",
    "asit study": "trains every arm: tests/study",
    "plan": "measures for most of a minute: tests/runs/test_plan.py",
    "doctor": "has no settings: tests/commands/test_doctor.py",
    "torchrun": "starts several processes: tests/runs/test_distributed.py",
    "s3://": "an object store: tests/data/test_storage.py",
    "owner/name": "the hub: tests/interop/test_loading.py",
    "MIT/ast": "the hub: tests/interop/test_loading.py",
    "asit tag ast": "the hub: tests/interop/test_loading.py",
    "ssast-base-patch": "a download: tests/interop/test_model_registry.py",
    "vit_small": "image weights of 85 MB: tests/runs/test_init_model.py",
    "NAME ROOT": "stands for the data sets of docs/tasks",
    "asit pretrain ...": "stands for any arguments",
    **dict.fromkeys(("audioset", "esc50", "sc1", "sc2", "voxceleb1"), "a data set: tests/data/corpora"),
    **dict.fromkeys(("runs/ten-*", "tables/"), "recordings that are not published with asit"),
    "$ ": "a transcript",
    "parts:": "needs examples/research/parts.py: tests/runs/test_custom_run.py",
    "wandb": "tests/training/test_trackers.py",
}
"""What an `asit` line that is parsed and not run holds, and why it is not run."""

NOT_RUN = {
    "pip install": "installs packages",
    "python -m pip install": "installs packages",
    "uv venv": "installs packages",
    "conda create": "installs packages",
    "curl": "asks a running server: tests/serve",
    "hf upload": "needs an account of the hub",
    "hear-validator": "a program of HEAR: tests/test_hear.py has its calls",
    "python -m heareval": "a program of HEAR: tests/test_hear.py has its calls",
    "python -m xares": "a program of X-ARES: tests/test_hear.py has its calls",
    "sbatch": "needs Slurm: tests/runs/test_cluster.py runs the script without",
    "cat vox1_dev_wav_parta*": "joins the archives of VoxCeleb1",
}
"""Commands of other programs, and why they are not run."""

NOT_COMMANDS = {
    '{"asit_catalogue":1': "a catalogue's header",
    '{"path":"dogs/0001.flac"': "a catalogue's row",
    "asit: the 4 processes": "a message: tests/runs/test_cluster.py",
    "source: what shall": "a grid of settings: tests/study/test_grids.py reads it",
    "src/asit/\n": "the tree of the layout",
    "__main__\ncli": "the rows of the layout: pyproject.toml has the contract",
    "thirty.flac": "what asit tag prints",
    '{"path": "thirty.flac"': "what asit tag prints",
    "ROOT/": "a listing",
    "-0xzrMun0Rs.wav": "a listing",
    "sc1/": "a listing",
    "path,label,split,speaker": "a table",
    "path,label,start,end": "a table",
}
"""How blocks begin that are no commands, and what they are."""

SLOW_PAGES = {
    "docs/encoders.md": "fits probes on several models",
    "docs/evaluate.md": "fits probes on several models",
    "docs/few-labels.md": "saves a head, and torch's exporters take seconds",
    "docs/export.md": "torch's exporters take seconds",
    "docs/huggingface.md": "transformers takes seconds",
    "docs/finetune.md": "trains",
    "docs/pretrain.md": "trains",
    "docs/tutorial.md": "trains, evaluates and exports",
}
"""Pages that are run by the slow test alone, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced block: the page, the line that it begins on, the language of its fence, and its text."""

    page: str
    line: int
    language: str
    text: str


def blocks_of(page: str, text: str) -> list[Block]:
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(page, text[: m.start()].count("\n") + 2, m[1], m[2]) for m in found]


BLOCKS = [block for page in PAGES for block in blocks_of(page, (REPOSITORY / page).read_text("utf-8"))]


def commands_of(block: Block) -> list[list[str]]:
    """The words of each command; of a transcript only lines that begin with `$` are commands."""
    if block.text.startswith(tuple(NOT_COMMANDS)):
        return []
    lines = block.text.replace("\\\n", " ").splitlines()
    if any(line.startswith("$ ") for line in lines):
        lines = [line for line in lines if line.startswith("$ ")]
    return [words for words in (shlex.split(line, comments=True) for line in lines) if words]


def reason_not_run(words: list[str]) -> str | None:
    line = " ".join(words)
    return next((reason for start, reason in NOT_RUN.items() if f" {line}".startswith(f" {start}")), None)


def asit_of(words: list[str]) -> list[str] | None:
    """The verb and its arguments, without what starts it; None for another program's command."""
    words = [word for i, word in enumerate(words) if "=" not in word or any("=" not in w for w in words[:i])]
    words = words[1:] if words[0] == "$" else words
    if words[0] == "torchrun":
        return words[words.index("asit") + 1 :]
    return words[1:] if words[0] == "asit" else None


def check_other(words: list[str], where: str) -> None:
    """A goal of make exists; so do a script and the flags it is given; anything else has a reason in NOT_RUN."""
    words = [word for word in words if "=" not in word or word.startswith("-")]
    script = next((word for word in words[1:2] if word.endswith((".py", ".sh"))), "")
    source = (REPOSITORY / script).read_text("utf-8") if script else ""
    if script.endswith(".py"):
        assert [word for word in words if word.startswith("--") and f'"{word}"' not in source] == [], where
    if words[0] == "make":
        makefile = (REPOSITORY / "Makefile").read_text("utf-8")
        for goal in words[1:]:
            assert re.search(rf"^{goal}:", makefile, re.MULTILINE), f"{where}: no goal {goal}"
    elif not (script and words[0] == "python"):
        assert reason_not_run(words), f"{where}: {' '.join(words)} is neither run nor listed with a reason"


class ParsedError(Exception):
    """Raised where a verb has its options, so that it stops there."""


def parse(arguments: list[str], where: str) -> None:
    """Let the verb parse its options and build its settings, no more."""

    def stop(*given: Any, **options: Any) -> None:
        real(*given, **options)
        raise ParsedError

    if arguments[0] == "doctor":
        assert set(arguments[1:]) <= {"--json"}, where
        return
    real, said = tyro.cli, io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setattr(tyro, "cli", stop)
        try:
            _ended(arguments)
        except ParsedError:
            return
    raise AssertionError(f"{where}: asit {' '.join(arguments)}\n{said.getvalue()}")


def _ended(arguments: list[str]) -> int:
    try:
        return cli.main(arguments)
    except SystemExit as stopped:
        return int(stopped.code or 0)


def run(arguments: list[str], where: str) -> None:
    """Run a verb in process. What it makes is not there before it; `> FILE` gets its standard output."""
    arguments, target = (
        (arguments[: arguments.index(">")], Path(arguments[-1])) if ">" in arguments else (arguments, None)
    )
    if "--out" in arguments and not {"--resume", "--auto-resume", "--add"} & set(arguments):
        made = Path(arguments[arguments.index("--out") + 1])
        shutil.rmtree(made) if made.is_dir() else made.unlink(missing_ok=True)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _ended(arguments)
    assert status == 0, f"{where}: asit {' '.join(arguments)}: {status}\n{err.getvalue()}"
    if target is not None:
        target.write_text(out.getvalue(), "utf-8")


def may_run(words: list[str]) -> bool:
    return not any(mark in " ".join(words) for mark in PARSED_ALONE)


def walk(page: str, *, slow: bool) -> None:
    """Run a page's blocks in their order."""
    names: dict[str, object] = {"waveform": np.zeros(30000, np.float32), "samples": np.zeros(16000, np.float32)}
    names |= {"waveforms": torch.zeros(2, 8000), "audio": torch.zeros(2, 16000), "torch": torch}
    exec("import json", names)
    for block in (block for block in BLOCKS if block.page == page):
        where = f"{page}:{block.line}"
        if block.language == "python":
            if slow or page not in SLOW_PAGES:
                offline = re.sub(r'^.*"OWNER/NAME.*$', "", block.text, flags=re.MULTILINE)
                with contextlib.redirect_stdout(io.StringIO()):
                    exec(compile(offline, where, "exec"), names)
            continue
        assert block.language == "", f"{where}: a fence of {block.language} is neither run nor checked"
        for words in commands_of(block):
            arguments = asit_of(words)
            if arguments is None:
                check_other(words, where)
                continue
            if words[-1] != "...":
                parse(arguments[: arguments.index(">")] if ">" in arguments else arguments, where)
            quick = arguments[0] in QUICK and page not in SLOW_PAGES
            if arguments[0] == "settings" or (may_run(words) and (slow or quick)):
                run(arguments, where)


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stand-ins for what the documentation names: RUN is a pretraining run, FT a classifier's, TABLE.csv has labels."""
    folder = tmp_path_factory.mktemp("stage")
    rng = np.random.default_rng(0)
    rows = ["path,label,split,speaker"]
    for i in range(24):
        kind, split = ("dog", "cat", "bird")[i % 3], ("train", "train", "validation", "test")[i // 6]
        path = folder / "SOUNDS" / kind / f"{i:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.normal(0, 0.01 * (1 + 4 * (i % 3)), 8000), 16000)
        rows.append(f"SOUNDS/{kind}/{i:02d}.wav,{kind},{split},{split}{i // 3}")
    for name in ("TABLE", "table", "test", "labelled"):
        (folder / f"{name}.csv").write_text("\n".join(rows) + "\n")
    for name in ("FOLDER", "RECORDINGS", "recordings", "folder", "sounds"):
        shutil.copytree(folder / "SOUNDS", folder / name)
    shutil.copytree(folder / "SOUNDS", folder / "demo-run" / "data" / "train")
    shutil.copytree(folder / "SOUNDS", folder / "demo-run" / "data" / "test")
    (folder / "demo-run" / "data" / "labelled.csv").write_text("\n".join(rows).replace("SOUNDS", "train") + "\n")
    shutil.copy(folder / "SOUNDS" / "dog" / "00.wav", folder / "demo-run" / "data" / "train" / "piano_00000.wav")
    for name in ("clip", "recording", "street", "query", "question", "a", "b"):
        soundfile.write(folder / f"{name}.wav", rng.normal(0, 0.1, 24000), 16000)
    for name, seconds in (
        ("b.flac", 1),
        ("more.flac", 1),
        ("an hour.flac", 8),
        ("meeting.flac", 3),
        ("interview.mp3", 2),
    ):
        soundfile.write(folder / name, rng.normal(0, 0.1, seconds * 16000), 16000)
    shutil.copy(folder / "clip.wav", folder / "FILE")
    (folder / "field").mkdir()
    for name in ("one", "two"):
        soundfile.write(folder / "field" / f"{name}.wav", rng.normal(0, 0.1, 160000), 16000)
    selections = "Selection\tBegin Time (s)\tEnd Time (s)\tSpecies\n1\t1\t2\tdog\n2\t7\t8.5\tcat\n"
    (folder / "field" / "one.Table.1.selections.txt").write_text(selections)
    (folder / "field" / "two.txt").write_text("0.5\t2\tdog\n3.1\t4\tcat\n")
    with tarfile.open(folder / "shard-000.tar", "w") as tar:
        tar.add(folder / "a.wav", "a.wav")
    for name in ("CATALOGUE", "c", "list"):
        asit.build_catalogue(folder / "TABLE.csv", folder / f"{name}.jsonl", workers=1)
    (folder / "mine.yaml").write_text("seed: 1\n")
    small = Encoder(EncoderSettings(size="custom", width=64, depth=1, heads=1), 48, 128)
    small.init_weights(torch.Generator().manual_seed(0))
    teacher = {f"backbone.{name}": value for name, value in small.state_dict().items()}
    for name in ("FILE", "checkpoint"):
        torch.save({"teacher": {**teacher, "head.last_layer.weight_g": torch.ones(1)}}, folder / f"{name}.pth")
    records: dict[str, Any] = {"tensorboard": False, "figure_every": 0}
    common: dict[str, Any] = {
        "epochs": 1,
        "device": "cpu",
        "workers": 0,
        "threads": 1,
        "records": records,
    }
    encoder = {"size": "custom", "width": 32, "depth": 2, "heads": 2}
    heads = {"hidden": 16, "bottleneck": 16, "class_prototypes": 16, "patch_prototypes": 16}
    asit.pretrain(folder / "c.jsonl", folder / "RUN", encoder=encoder, heads=heads, batch_size=4, **common)
    asit.finetune(folder / "c.jsonl", folder / "FT", folder / "RUN" / "model", batch_size=4, **common)
    for name in ("OTHER", "run0", "run1", "SCRATCH"):
        shutil.copytree(folder / "FT", folder / name)
    for name in ("run", "RUN2", "RUN3"):
        shutil.copytree(folder / "RUN", folder / name)
    shutil.copytree(folder / "FT" / "model", folder / "MODEL")
    return folder


@pytest.fixture
def page_folder(stage: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(stage, tmp_path / "page")
    monkeypatch.chdir(tmp_path / "page")
    monkeypatch.setenv("COLUMNS", "100")
    return tmp_path / "page"


@pytest.mark.parametrize("page", PAGES)
def test_a_page(page: str, page_folder: Path) -> None:
    walk(page, slow=False)


@pytest.fixture
def toy_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs of the settings that are asked for, but with a small encoder and one epoch."""
    from asit.finetune import cross_validation
    from asit.pretrain import pretrain_run
    from asit.tools import run_estimate

    once = {"epochs": 1, "batch_size": 4, "device": "cpu", "workers": 0, "threads": 1, "stop_after": 0}
    small = {"size": "custom", "width": 32, "depth": 2, "heads": 2}
    heads = {"hidden": 16, "bottleneck": 16, "class_prototypes": 16, "patch_prototypes": 16}

    def toy(real: Callable[..., Any]) -> Callable[..., Any]:
        def start(settings: Any, *given: Any, **options: Any) -> Any:
            over: dict[str, Any] = {**once, "optim": {"warmup": "auto"}}
            continued = isinstance(settings, asit.PretrainSettings) and bool(settings.model)
            if isinstance(settings, asit.PretrainSettings) and not continued:
                over |= {"encoder": small, "heads": heads}
            elif settings.model == "none":
                over |= {"encoder": small}
            # What nobody set comes from the card of the model that is continued.
            values = yaml.merge(settings.model_dump(exclude_unset=continued), over)
            return real(type(settings)(**values), *given, **options)

        return start

    monkeypatch.setattr(pretrain_run, "pretrain", toy(pretrain_run.pretrain))
    monkeypatch.setattr(cross_validation, "run", toy(cross_validation.run))
    monkeypatch.setattr(run_estimate, "dry_run", toy(run_estimate.dry_run))


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if "asit" in (REPOSITORY / page).read_text("utf-8")])
def test_a_page_with_what_takes_longer(page: str, page_folder: Path, toy_runs: None) -> None:
    walk(page, slow=True)


def test_what_is_listed_is_there() -> None:
    text = "\n".join(block.text for block in BLOCKS)
    for table in (PARSED_ALONE, NOT_RUN, NOT_COMMANDS):
        assert [entry for entry in table if entry not in text] == []
    assert set(SLOW_PAGES) <= set(PAGES)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("asit pretrain --data FOLDER --out RUN --epoch 3", "epoch"),
        ("asit pretrain --data FOLDER --out RUN --preset spech", "spech"),
        ("asit finetune --data FOLDER --out RUN --model none --optim.lr fast", "fast"),
        ("asit pretrian --data FOLDER", "pretrian"),
        ("asit info RUN/modl", "RUN/modl"),
        ("make dmeo", "no goal dmeo"),
        ("python bench/step.py --thread 1", "--thread"),
        ("python bench/stepp.py", "stepp"),
        ("cargo build", "neither run nor listed"),
        ('{"some": "thing"}', "neither run nor listed"),
    ],
)
def test_a_fault_is_found(block: str, message: str, page_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "BLOCKS", blocks_of("docs/new.md", f"# New\n\n```\n{block}\n```\n"))
    with pytest.raises((AssertionError, OSError), match=message):
        walk("docs/new.md", slow=False)
