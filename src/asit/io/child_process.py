"""Child processes of a scan or of packing: how many to start, and what each does first."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def usable_cpus() -> int:
    """Return the number of CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def settle() -> None:
    """Silence the standard error of a new child process, and let it end when its parent does, however that ends."""
    # Decoders write to the standard error by themselves and would tear the progress line.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    os.close(nowhere)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)
