"""Child processes of a scan or of packing: how many to start, what each does first, and a pool that runs tasks."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")

_stopped: Any = None


class LostTasksError(Exception, Generic[T]):
    """A child process died; `tasks` are those without a result."""

    def __init__(self, tasks: list[T]) -> None:
        super().__init__(f"{len(tasks)} tasks without a result")
        self.tasks = tasks


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_tasks(function: Callable[[T], R], tasks: Iterator[T], workers: int, ahead: int) -> Generator[R]:
    """Call a function for each task in child processes; yields the results as they come.

    Args:
        function: what to call; it returns early when `stopped` says so.
        tasks: its arguments, at most `ahead` of them taken before their results are yielded.
        workers: number of processes.
        ahead: number of tasks given to the processes at once.

    Raises:
        LostTasksError: a process died.
    """
    # Fork shares what is imported; macOS and Windows cannot, and start from scratch.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else None)
    flag = context.RawValue(ctypes.c_bool, False)
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start, initargs=(flag,))
    waiting: dict[Future[R], T] = {}
    try:
        while True:
            for task in islice(tasks, ahead - len(waiting)):
                try:
                    waiting[executor.submit(function, task)] = task
                except BrokenProcessPool:
                    waiting[Future()] = task
                    raise
            if not waiting:
                return
            done, _ = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                del waiting[future]
                yield result
    except BrokenProcessPool:
        raise LostTasksError([*waiting.values()]) from None
    finally:
        flag.value = True
        executor.shutdown(cancel_futures=True)


def _start(flag: Any) -> None:
    """Let a child silence its standard error, and end when its parent does, however that ends."""
    global _stopped
    _stopped = flag
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    # Decoders write to the standard error by themselves and would tear the progress line.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def stopped() -> bool:
    """Whether the task that this child process runs should end early."""
    return bool(_stopped.value)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
