"""Several processes, and several passes a step, learn what one process with the whole batch learns.

Float32, after three steps. Sums are taken in another order, so equality holds to rounding; AdamW divides by the
gradient's own size, so a parameter whose gradient is nothing but rounding moves by its sign (the bias of the keys,
which softmax cancels): gradients are compared for all parameters, weights for all but those.
"""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from asit import cli
from asit.config import PretrainSettings, yaml
from asit.errors import ConfigError
from asit.pretrain import pretrain_run as runs
from asit.training import resources

ADAM = 3 * 2 * 0.05 * 16 / 256
"""Adam divides a gradient by its own size: of one that is 0 but for rounding, it makes a step of the size of the
learning rate. So a few weights may differ by that: 3 steps of 2 * lr * 16 / 256, lr of the fixture `tiny`."""

WHOLE: dict[str, Any] = {"batch_size": 16, "epochs": 3, "masking": {"donor_pool": 4}}
"""16 clips a step, one step an epoch: two processes get two whole blocks of donors each, and so one process' donors."""


def go(settings: PretrainSettings, **how: Any) -> int:
    return 0 if runs.pretrain(settings, **how).finished else 1


def values_of(lines: list[dict[str, Any]], part: str) -> list[float]:
    return [line["loss"] if part == "loss" else line["parts"][part] for line in lines]


@pytest.fixture
def equal_to_rounding(close: Any) -> Callable[..., None]:
    def compare(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
        for centre in ("task/class_centre.", "task/patch_centre."):
            close(ours, theirs, centre, rtol=1e-4, atol=2e-5)
            assert all(value.abs().max() > 0.05 for name, value in theirs.items() if name.startswith(centre))
        for weights in ("task/student.", "task/teacher."):
            close(ours, theirs, weights, steps=ADAM)

    return compare


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process."""
    return tmp_path_factory.mktemp("alone") / "run"


@pytest.fixture
def one(alone: Path, tiny: Any) -> Path:
    if not alone.exists():
        go(tiny(alone, **WHOLE))
    return alone


def test_two_processes_equal_one(
    one: Path, tiny: Any, tmp_path: Path, ranks: Any, state: Any, metrics: Any, equal_to_rounding: Any
) -> None:
    run = tmp_path / "run"
    ranks(2, lambda: go(tiny(run, **WHOLE)), code=0)
    equal_to_rounding(state(run), state(one))
    for part in ("loss", "global", "local", "reconstruction", "gradient_norm", "mask_share", "teacher_entropy_patch"):
        assert values_of(metrics(run), part) == pytest.approx(values_of(metrics(one), part), rel=2e-4)
    assert json.loads((run / "environment.json").read_text())["processes"] == 2


def test_gradients_of_two_processes(tiny: Any, tmp_path: Path, ranks: Any, state: Any) -> None:
    """After one step AdamW's first moment is a tenth of the gradient, of every parameter."""
    settings = {**WHOLE, "stop_after": 1, "optim": {"freeze_last_layer": 0, "clip": 0}}
    settings["losses"] = {"local_tokens": "masked"}
    assert go(tiny(tmp_path / "one", **settings)) == 1
    ranks(2, lambda: go(tiny(tmp_path / "two", **settings)), code=1)
    ours, theirs = state(tmp_path / "two"), state(tmp_path / "one")
    moments = [name for name in theirs if name.endswith("/exp_avg")]
    students = [name for name in theirs if name.startswith("task/student.") and not name.endswith("weight_g")]
    assert len(moments) == len(students)
    for name in moments:
        scale = float(theirs[name].abs().max())
        if "attn.qkv.bias" in name:
            scale = max(scale, float(theirs[name.replace("bias", "weight")].abs().max()))
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=2e-5 * scale, msg=name)


@pytest.mark.parametrize(
    ("batch", "pool", "where", "divisions"),
    [
        (6, 4, "loader", [(2, 1), (2, 3), (1, 2)]),
        (6, 4, "device", [(2, 1)]),
        pytest.param(15, 4, "loader", [(3, 1), (1, 5), (5, 3)], marks=pytest.mark.slow),
        pytest.param(10, 3, "device", [(2, 5), (1, 10)], marks=pytest.mark.slow),
    ],
)
def test_groups_of_donors_that_borders_divide(
    batch: int,
    pool: int,
    where: str,
    divisions: list[tuple[int, int]],
    tiny: Any,
    tmp_path: Path,
    ranks: Any,
    state: Any,
    equal_to_rounding: Any,
) -> None:
    """Processes and passes whose clips are no multiple of the pool read the donors that others have."""
    over: dict[str, Any] = {"batch_size": batch, "epochs": 3, "stop_after": 3, "masking": {"donor_pool": pool}}
    over |= {"losses": {"reconstruction_weight": 0}, "front_end_on": where}
    over["masking"] |= {"replace_probability": 0.9}
    go(tiny(tmp_path / "one", **over))
    for processes, accumulate in divisions:
        run = tmp_path / f"{processes}-{accumulate}"
        settings = {**over, "accumulate": accumulate}
        if processes == 1:
            go(tiny(run, **settings))
        else:
            ranks(processes, lambda run=run, settings=settings: min(go(tiny(run, **settings)), 0), code=0)
        equal_to_rounding(state(run), state(tmp_path / "one"))


def test_accumulation_equals_one_pass(
    tiny: Any, tmp_path: Path, ranks: Any, state: Any, metrics: Any, equal_to_rounding: Any
) -> None:
    """Global and local loss and both centres: to rounding; two processes of two passes of four clips see the donors of
    one process too. The reconstruction loss is apart."""
    one, over = tmp_path / "one", {**WHOLE, "losses": {"reconstruction_weight": 0}}
    go(tiny(one, **over))
    for processes, accumulate in ((1, 2), (1, 4), (2, 2)):
        parts = tmp_path / f"{processes}-{accumulate}"
        settings = tiny(parts, **over, accumulate=accumulate)
        if processes == 1:
            go(settings)
        else:
            ranks(processes, lambda settings=settings: go(settings), code=0)
        equal_to_rounding(state(parts), state(one))
        for part in ("global", "local", "centre_norm_class", "mask_share"):
            assert values_of(metrics(parts), part) == pytest.approx(values_of(metrics(one), part), rel=2e-4)


def test_accumulated_reconstruction_is_a_mean_of_means(tiny: Any, tmp_path: Path, metrics: Any) -> None:
    """Each pass divides by its own count of masked values, which are not known before the last pass is read; where
    passes mask more or less, the loss of the first step is not the one pass' to rounding, but within a few per cent."""
    one, parts = (tmp_path / "one", tmp_path / "parts")
    go(tiny(one, **WHOLE, stop_after=1))
    go(tiny(parts, **WHOLE, stop_after=1, accumulate=4))
    ours, theirs = (values_of(metrics(run), "reconstruction")[0] for run in (parts, one))
    assert ours != pytest.approx(theirs, rel=1e-6)
    assert ours == pytest.approx(theirs, rel=0.05)


TERMS = {
    "global": {"local_weight": 0, "reconstruction_weight": 0},
    "local": {"global_weight": 0, "reconstruction_weight": 0, "local_tokens": "masked"},
    "reconstruction": {"global_weight": 0, "local_weight": 0},
}


@pytest.mark.parametrize("term", TERMS)
def test_each_term_alone_with_two_processes(
    term: str, tiny: Any, tmp_path: Path, ranks: Any, state: Any, close: Any
) -> None:
    """Processes average gradients of every parameter: one without a gradient would leave them waiting for ever."""
    over = {**WHOLE, "losses": TERMS[term], "views": {"local_views": int(term != "local")}}
    go(tiny(tmp_path / "one", **over))
    ranks(2, lambda: go(tiny(tmp_path / "two", **over)), code=0)
    ours, theirs = state(tmp_path / "two"), state(tmp_path / "one")
    close(ours, theirs, "task/student.", steps=ADAM)


def test_a_run_goes_on_with_another_number_of_processes(
    one: Path, tiny: Any, tmp_path: Path, ranks: Any, state: Any, equal_to_rounding: Any
) -> None:
    run = tmp_path / "run"
    ranks(2, lambda: go(tiny(run, **WHOLE, stop_after=1)), code=1)
    assert go(tiny(run, **WHOLE), resume=True) == 0
    equal_to_rounding(state(run), state(one))


def test_a_folder_is_looked_at_by_one_process(tiny: Any, recordings: Path, tmp_path: Path, ranks: Any) -> None:
    """The others read what it found."""
    run, seen = tmp_path / "run", tmp_path / "seen"

    def body() -> int:
        from asit.data.catalogue import scan

        real = scan.build

        def build(*arguments: Any, **more: Any) -> Any:
            with seen.open("a") as file:
                file.write(f"{os.environ['RANK']}\n")
            return real(*arguments, **{**more, "workers": 1})

        scan.build = build
        return go(tiny(run, data=recordings, epochs=1))

    ranks(2, body, code=0)
    assert seen.read_text() == "0\n"


def test_a_mistake_ends_all_processes(tiny: Any, tmp_path: Path, ranks: Any) -> None:
    ended = ranks(2, lambda: go(tiny(tmp_path / "run", data=tmp_path / "nothing")))
    assert [e.code for e in ended] == [2, 2]
    assert any("nothing" in e.said for e in ended)
    assert not any("Traceback" in e.said for e in ended)
    with pytest.raises(ConfigError, match=r"5 processes|batch_size is 4"):
        resources.fit_batch(tiny(tmp_path).batch_size, 1, 16, _World(3))


class _World:
    def __init__(self, size: int) -> None:
        self.size = size


def test_a_signal_to_any_process_ends_all(tiny: Any, tmp_path: Path, start_ranks: Any, reaches: Any) -> None:
    """The one that it did not meet says so too."""
    run = tmp_path / "run"
    file = tmp_path / "settings.yaml"
    file.write_text(yaml.to_yaml(tiny(run, **{**WHOLE, "epochs": 400})))
    children = start_ranks(2, lambda: cli.main(["pretrain", "--config", str(file)]))
    reaches(run, 4, children)
    children[1].signal(signal.SIGTERM)
    ended = [child.end() for child in children]
    assert [e.code for e in ended] == [143, 143], ended
    stopped = re.search(r"stopped by SIGTERM at step (\d+) of 400", ended[0].said)
    assert stopped
    assert (run / "checkpoints" / f"step-{int(stopped[1]):08d}").is_dir()
    assert not any("Traceback" in e.said for e in ended)
