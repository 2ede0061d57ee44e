"""The command line: the verbs, and how errors end. Nothing heavy is imported for `asit --help`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from asit import __version__, logs
from asit.commands import SUMMARIES
from asit.errors import AsitError, ConfigError, suggestion


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; return the exit status: 0, 2 for a mistake that the user can fix, 130 or 143 when stopped."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    _open_streams()
    level = "debug" if given[:1] in (["-v"], ["--verbose"]) else None
    given = given[1:] if level else given
    try:
        if not given or given[0] in ("-h", "--help", "help"):
            print(_help(), flush=True)
            return 0
        if given[0] in ("-V", "--version", "version"):
            print(f"asit {__version__}", flush=True)
            return 0
        if given[0] not in SUMMARIES:
            hint = suggestion(given[0], SUMMARIES, ", did you mean {}?")
            raise ConfigError(f"asit has no verb {given[0]}{hint}", "one of " + ", ".join(SUMMARIES), "see asit --help")
        # Read by OpenMP when torch is loaded: threads that wait by spinning slow a busy machine down tenfold
        # (docs/speed.md), and cost next to nothing on an idle one when they sleep instead.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")  # a user's value was wrong, not their pydantic
        from asit import commands

        verb: Callable[[str, str, list[str]], int] = commands.verb(given[0])
        try:
            with logs.console(level):
                status = verb(f"asit {given[0]}", SUMMARIES[given[0]], given[1:])
        except SystemExit:  # a verb's --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()  # a broken pipe is raised here, not when the interpreter ends
        return status
    except AsitError as error:
        print(f"asit: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt as stopped:
        print(f"\nasit: stopped{': ' + str(stopped) if str(stopped) else ''}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # As in `asit ... | head`: what is left in the buffer has no reader.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        # When a buffer is written to a full disk, the system names no file.
        if error.filename is None and error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(f"asit: {error.filename or 'writing'}: {error.strerror}", file=sys.stderr)
        return 2


def _open_streams() -> None:
    """Open /dev/null for closed standard streams, whose numbers the next opened files would get, and their output."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, which is this one
    if sys.stdout is None:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115, PTH123


def _help() -> str:
    width = max(map(len, SUMMARIES))
    verbs = "\n".join(f"  {name:{width}}  {text}" for name, text in SUMMARIES.items())
    return (
        f"asit {__version__}: self-supervised audio spectrogram transformers (ASiT)\n\n"
        f"usage: asit [-v] VERB [options]\n\n{verbs}\n\n"
        "asit VERB --help lists a verb's options; -v logs details. First steps:\n"
        "  asit pretrain --data FOLDER --out RUN\n"
        "  asit report RUN"
    )
