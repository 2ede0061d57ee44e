"""Processes and devices that cannot work together are refused before any of them waits."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from asit import runtime
from asit.errors import ConfigError


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with (
        pytest.raises(ConfigError, match=r"process 3 of this machine, and torch sees 2 GPUs(.|\n)*--nproc-per-node 2"),
        runtime.world("auto"),
    ):
        pytest.fail("there is no third GPU")


def test_different_devices_are_refused_before_anyone_waits() -> None:
    """A machine whose driver is broken finds no GPU: its process would wait for another kind of exchange."""
    store, kinds = torch.distributed.HashStore(), ["cuda", "cuda", "cpu"]
    with ThreadPoolExecutor(3) as pool:
        started = [pool.submit(runtime._same_devices, store, r, 3, torch.device(k)) for r, k in enumerate(kinds)]
    for one in started:
        message = str(one.exception())
        assert re.search(r"3 processes .* different devices: cuda on \S+ \(rank 0, 1\); cpu on \S+ \(rank 2\)", message)
        assert "--device cpu" in message
    store = torch.distributed.HashStore()
    with ThreadPoolExecutor(2) as pool:
        alike = [pool.submit(runtime._same_devices, store, r, 2, torch.device("cpu")) for r in range(2)]
    assert [one.exception() for one in alike] == [None, None]
