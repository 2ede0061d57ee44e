"""What the processes of a scan or of a packing do when they start: hush their decoders, and end with their parent."""

from __future__ import annotations

import multiprocessing
import os
import threading
from multiprocessing import connection


def settle() -> None:
    """To be called first in such a process: from here on its standard error leads nowhere, and it ends when its parent
    does, whatever became of that one."""
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
