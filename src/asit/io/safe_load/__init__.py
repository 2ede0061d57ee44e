"""Read weights of unknown origin without running anything in the file.

Files are safetensors, or pickles with raw numbers of `torch.save`. The latter are checked first, `torch_archives` for
their structure and `pickles` for what they would do, because torch's reader (`weights_only=True`) does not name what a
file holds beside tensors, compare sizes with the file's, or bound a pickle's memory and time. A training state may hold
an `argparse.Namespace`, numpy's scalars and paths too, which are read into plain objects of this module.
"""

from __future__ import annotations

import contextlib
import io
import pickle
import pickletools
import re
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from asit.errors import CheckpointError
from asit.io import local_files
from asit.io.local_files import PICKLED, SUFFIXES
from asit.io.safe_load.pickles import PATHS, Refused, shown
from asit.io.safe_load.torch_archives import LEGACY, ZIP, check_archive, check_download, check_legacy, no_format

__all__ = ["PICKLED", "SUFFIXES", "Facts", "pickle_fault", "read", "shown", "tensors", "texts"]

SAFE_TORCH = (2, 10)
"""The first version of torch whose reader of pickles does not corrupt memory (CVE-2026-24747)."""


_TEXTS = 1 << 26  # bytes of a pickle that are searched for texts


class Facts(dict[str, Any]):
    """Replaces an argparse.Namespace: its values by name."""

    def __setstate__(self, state: Any) -> None:
        if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
            raise pickle.UnpicklingError("an argparse.Namespace without names")
        self.update(state)


class _Dtype:
    """Replaces a numpy.dtype."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        """Take (version, byte order, ...); the other order is not supported."""
        if not isinstance(state, tuple) or len(state) < 2 or state[1] not in ("<", "|", "="):
            self.code = ""


def _scalar(dtype: Any, data: Any) -> int | float | bool:
    """Replaces numpy's function that rebuilds a scalar."""
    code = str(getattr(dtype, "code", ""))
    if code not in ("f8", "f4", "f2", "i8", "i4", "i2", "i1", "u1", "b1") or not isinstance(data, bytes):
        raise pickle.UnpicklingError("a numpy scalar of another kind than a number")
    number: int | float | bool = np.frombuffer(data, f"<{code}").item()
    return number


def _path(*parts: str) -> str:
    """Replaces the classes of paths: a path is read as text."""
    return "/".join(parts)


def read(path: Path, *, training_state: bool = False) -> dict[str, Any]:
    """Return the content of a file of weights: tensors by name, or nested mappings of them.

    Tensors of a zip archive are memory-mapped.

    Args:
        path: a file with one of `SUFFIXES`.
        training_state: allow an argparse.Namespace and numpy's scalars and paths, which become `Facts`,
            numbers and texts.

    Raises:
        CheckpointError: no such file, one that is damaged or truncated, that holds anything else (named), or whose
            structure is false: sizes, paths outside the archive, compressed parts.
    """
    expected = f"a .safetensors file, or one of {', '.join(PICKLED)} with nothing in it but tensors"
    if training_state:
        expected += " and a plain argparse.Namespace"
    if not path.is_file():
        unfit = local_files.special(path) or "no file that can be read"
        there = "a folder" if path.is_dir() else unfit if path.exists() else "not there"
        raise CheckpointError(f"{path} is {there}", expected, "check the path")
    if any("\ud800" <= letter <= "\udfff" for letter in str(path)):  # torch and safetensors cannot open it
        raise CheckpointError(f"{path} is called something that is no UTF-8", "a name that is text", "rename it")
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} ends in {path.suffix or 'nothing'}", expected, "give one of these")
    content: Any
    try:
        content = _content(path, training_state)
    except Refused as refused:
        raise CheckpointError(f"{path} {refused}", expected, refused.remedy) from None
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} cannot be read as tensors alone: {_first(error)}",
            expected,
            "get the file again, or save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from error
    except Exception as error:  # a reader given bytes from anywhere may fail in any way, and none is the caller's
        raise CheckpointError(f"{path} cannot be read: {_first(error)}", expected, "get the file again") from error
    if not isinstance(content, Mapping) or not content:
        raise CheckpointError(f"{path} holds a {type(content).__name__} and no named tensors", expected)
    _check_tensors(path, content, path.stat().st_size)
    return {str(name): value for name, value in content.items()}


def pickle_fault(version: str = torch.__version__) -> str:
    """Return why pickles are not read with this version of torch; "" where they are."""
    found = re.match(r"(\d+)\.(\d+)", str(version))
    if found is not None and (int(found[1]), int(found[2])) >= SAFE_TORCH:
        return ""
    return f"the reader of torch {version} can be made to corrupt memory (CVE-2026-24747)"


def texts(path: Path) -> list[str]:
    """Return the texts in a pickle, such as names of tensors, without running it; [] where there is no pickle."""
    out: list[str] = []
    with contextlib.suppress(Exception), path.open("rb") as file:
        data: IO[bytes] = file
        if file.read(len(ZIP)) == ZIP:
            with zipfile.ZipFile(file) as archive:
                inner = next(part for part in archive.infolist() if part.filename.endswith("/data.pkl"))
                data = io.BytesIO(archive.open(inner).read(_TEXTS))
        data.seek(0)
        while data.tell() < _TEXTS:
            for _, value, _ in pickletools.genops(data):
                if isinstance(value, str) and len(value) < 300:
                    out.append(value)
    return out


def tensors(
    path: Path, content: Mapping[str, Any], nests: Sequence[str] = ("model", "state_dict")
) -> dict[str, Tensor]:
    """Return the named tensors in what `read` returned, at the top or under the first of `nests` that exists.

    The prefix "module." of `DataParallel` is removed from their names.

    Raises:
        CheckpointError: there are other values than tensors, or none.
    """
    nest = next((name for name in nests if isinstance(content.get(name), Mapping)), None)
    found = content if nest is None else content[nest]
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are no tensors ({', '.join(map(shown, others[:3]))})"
            if others
            else f"{path} holds no tensors",
            "tensors by name" + (f", as they are or under {' or '.join(map(repr, nests))}" if nests else ""),
            "save the tensors alone",
        )
    return {str(name).removeprefix("module."): value for name, value in found.items()}


def _content(path: Path, training_state: bool) -> Any:
    with path.open("rb") as file:
        check_download(file)
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path)
        file.seek(0)
        start, length = file.read(len(LEGACY)), path.stat().st_size
        if start == LEGACY:
            check_legacy(file, length, training_state)
        elif start.startswith(ZIP):
            check_archive(file, length, training_state)
        else:
            no_format(file, training_state)
    if fault := pickle_fault():
        raise Refused(f"is a pickle, and {fault}", f"pip install --upgrade 'torch>={'.'.join(map(str, SAFE_TORCH))}'")
    with _safe(training_state):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start != LEGACY)


def _safe(training_state: bool) -> AbstractContextManager[None]:
    """Let torch's reader use the replacements above, within the block."""
    allowed: list[Any] = [
        (Facts, "argparse.Namespace"),
        (_Dtype, "numpy.dtype"),
        (_scalar, "numpy.core.multiarray.scalar"),
        (_scalar, "numpy._core.multiarray.scalar"),
        *((_path, name) for name in sorted(PATHS)),
    ]
    context: AbstractContextManager[None] = torch.serialization.safe_globals(allowed if training_state else [])
    return context


def _check_tensors(path: Path, content: Mapping[Any, Any], length: int) -> None:
    """Raise CheckpointError for tensors with more numbers than the file has, and for names that are not printable."""
    total, seen, waiting = 0, {id(content)}, [content]
    while waiting:
        held = waiting.pop()
        for name, value in held.items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
            if held is content or isinstance(value, Tensor):
                _check_name(path, name)
            if not isinstance(value, Tensor):
                continue
            if value.layout is not torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path}: {name} of shape {tuple(value.shape)} repeats fewer numbers, or is not dense",
                    "dense tensors",
                    "save contiguous tensors",
                )
            total += value.numel() * value.itemsize
    # Tied weights are stored once and found twice; more than that is no model.
    if total > 4 * length:
        raise CheckpointError(
            f"{path} of {length} bytes has tensors of {total} bytes, which share their numbers",
            "tensors that have their own",
            "save each tensor by itself",
        )


def _check_name(path: Path, name: Any) -> None:
    """Refuse a name that could control a terminal or is too long: names are printed and written into cards."""
    text = str(name) if isinstance(name, str | int) else ""
    if not text or not text.isprintable() or len(text) > 300:
        what = f"name {shown(text)}" if text else f"name that is {type(name).__name__ or 'nothing'}"
        raise CheckpointError(f"{path} has an entry of the {what}", "names of letters", "get the file again")


def _first(error: BaseException) -> str:
    """Return the reason, without torch's advice to read the file unsafely or to report a bug."""
    text = str(error).partition("  (Could this error message")[0]
    if found := re.search(r"WeightsUnpickler error:\s*(\S.*)", text):
        return shown(found[1], 300)
    if "weights_only" in text:
        return "torch's reader of tensors refuses it"
    return shown((text.strip().splitlines() or [type(error).__name__])[0], 300)
