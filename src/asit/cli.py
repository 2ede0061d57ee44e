"""The command line: the verbs, and how errors end. Nothing heavy is imported for `asit --help`."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Sequence

from asit import __version__, logs
from asit.errors import AsitError, ConfigError, suggestion

SUMMARIES = {
    "catalogue": "check a folder or table of recordings and measure its mean and std",
    "shard": "pack a catalogue's recordings into tar shards, locally or in an object store",
    "plan": "estimate the time, memory and cost of a pretraining run",
    "pretrain": "pretrain an encoder on recordings without labels",
    "study": "pretrain and score a grid of settings, such as the paper's ablations, and write table and figure",
    "finetune": "train and score a classifier on labelled recordings, from a pretrained encoder or none",
    "evaluate": "score a model on labelled clips, or compare several: head, probes, few labels, verification",
    "probe": "compare a frozen encoder with an untrained one and log-mel statistics by linear probes",
    "embed": "write the vectors of recordings: one or many for each file",
    "tag": "label recordings, with a model that has labels",
    "info": "describe a model: sizes, labels, licence, training, hashes",
    "models": "list public models that can be named wherever a model is expected, with their sources",
    "convert": "turn weights of ASiT, AST, SSAST or an image transformer into a model folder",
    "export": "write a model as ONNX, torch.export or a Hugging Face folder",
    "index": "make your own recordings searchable by sound",
    "similar": "find the recordings of an index that sound most like one",
    "anomaly": "score recordings by their distance to an index of normal ones, with a threshold and AUC",
    "serve": "open a model in the browser, with an HTTP API behind the page",
    "report": "write one HTML page about a run",
    "compare": "print one table of scored runs, with intervals and paired differences",
    "download": "fetch ESC-50, Speech Commands or the spoken digits; say where to get AudioSet and VoxCeleb1",
    "settings": "list every setting with its meaning: of pretraining for a preset, of fine-tuning for a task",
    "completion": "print a script that completes verbs and flags in bash, zsh or fish",
    "doctor": "show the versions, decoders, devices and extras that are there",
    "demo": "try it all on notes of real instruments (needs the extra asit-audio[demo])",
}


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
