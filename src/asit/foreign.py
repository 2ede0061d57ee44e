"""Weights that others wrote: read without running anything that the file says.

Files are safetensors, or what `torch.save` writes: a zip archive with a pickle and the raw numbers in it, or, before
torch 1.6, pickles and numbers one after the other. Three steps, each of which refuses: the pickle is walked with every
name in it replaced by something that does nothing, so that what it asks for is known (names, sizes, memory); the
archive is compared with that; then torch reads it with `weights_only=True`. The first two are here because torch's
reader neither says what a file holds beside tensors nor compares sizes with the archive's.

A training state may hold an `argparse.Namespace` and numpy's scalars too, as the official ASiT files do. Where that is
asked for, they are read into plain objects of this module, and neither argparse nor numpy is called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import IO, Any, NoReturn

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from asit.errors import CheckpointError

PICKLED = (".pth", ".pt", ".bin")
SUFFIXES = (".safetensors", *PICKLED)
"""How the names of files end that can be read."""

_LEGACY = pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)
"""How files of torch before 1.6 begin (torch/serialization.py)."""

_ITEM = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8},
    **{"IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
"""Bytes of a number, by the name of its storage."""

_TENSORS = {
    "collections.OrderedDict",
    "torch.Size",
    "torch._utils._rebuild_tensor",
    "torch._utils._rebuild_tensor_v2",
    "torch._utils._rebuild_parameter",
    "torch.storage.UntypedStorage",
    *(f"torch.{name}" for name in _ITEM),
}
_STATE = {
    "_codecs.encode",
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
}
_ODD = {"STACK_GLOBAL", "INST", "OBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "NEXT_BUFFER"}
"""Ways to name or make things in a pickle that `torch.save` does not use."""

_NOT_RECORDS = ("code/", "constants.pkl")
"""What only TorchScript's archives have."""


class Facts(dict[str, Any]):
    """Stands for an argparse.Namespace: its values by name."""

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, Mapping):
            self.update({str(name): value for name, value in state.items()})


class _Dtype:
    """Stands for a numpy.dtype."""

    def __init__(self, code: str = "", *_: Any) -> None:
        self.code = code

    def __setstate__(self, _: Any) -> None:
        """Byte order and the like: numbers are little-endian on all that torch runs on."""


def _scalar(dtype: Any, data: Any) -> int | float | bool:
    """Stands for numpy's way to rebuild a scalar."""
    formats = {
        "f8": "<d",
        "f4": "<f",
        "f2": "<e",
        "i8": "<q",
        "i4": "<i",
        "i2": "<h",
        "i1": "<b",
        "u1": "<B",
        "b1": "<?",
    }
    code = formats.get(str(getattr(dtype, "code", "")))
    if code is None or not isinstance(data, bytes) or len(data) != struct.calcsize(code):
        raise pickle.UnpicklingError("a numpy scalar of another kind than a number")
    number: int | float | bool = struct.unpack(code, data)[0]
    return number


def read(path: Path, *, training_state: bool = False) -> dict[str, Any]:
    """What a file of weights holds: tensors by name, or mappings of mappings of them.

    Tensors of a zip archive are mapped and not copied: what is not used is not read.

    Args:
        path: a .safetensors, .pth, .pt or .bin file.
        training_state: an argparse.Namespace and numpy's scalars may be in it; they come out as `Facts` and numbers.

    Raises:
        CheckpointError: no such file, one that is damaged or cut short, one that holds anything else (named), or one
            that says of itself what is not so: sizes, places outside the archive, compressed parts.
    """
    expected = f"a .safetensors file, or one of {', '.join(PICKLED)} with nothing in it but tensors"
    if training_state:
        expected += " and a plain argparse.Namespace"
    if not path.is_file():
        raise CheckpointError(f"{path} is {'a folder' if path.is_dir() else 'not there'}", expected)
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f"{path} ends in {path.suffix or 'nothing'}", expected, "give one of these")
    content: Any
    try:
        content = safetensors.torch.load_file(path) if path.suffix == ".safetensors" else _pickled(path, training_state)
    except _Refused as refused:
        raise CheckpointError(
            f"{path} {refused}",
            expected,
            "where the file came from, save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')",
        ) from None
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


def tensors(path: Path, content: Mapping[str, Any], nests: Sequence[str] = ()) -> dict[str, Tensor]:
    """The named tensors of what `read` gave, as they are or under the first of `nests` that is there.

    Raises:
        CheckpointError: there are others than tensors.
    """
    nest = next((name for name in nests if isinstance(content.get(name), Mapping)), None)
    found = content if nest is None else content[nest]
    others = [str(name) for name, value in found.items() if not isinstance(value, Tensor)]
    if others or not found:
        raise CheckpointError(
            f"{path} holds {len(others)} entries that are no tensors ({', '.join(others[:3])})",
            "tensors by name" + (f", as they are or under {' or '.join(map(repr, nests))}" if nests else ""),
            "save the tensors alone",
        )
    return {str(name): value for name, value in found.items()}


def finite(path: Path, found: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError where tensors hold numbers that are not finite, and names them."""
    bad = [name for name, value in found.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise CheckpointError(
            f"{path} has {len(bad)} tensors with numbers that are not finite ({', '.join(bad[:3])})",
            "finite weights",
            "take an earlier checkpoint: this one is of a training that diverged",
        )


class _Refused(Exception):  # noqa: N818  # never leaves this module
    """What the file holds that it must not; the file's name goes before it."""


class _Inert(dict[Any, Any]):
    """Takes the place of whatever a pickle would make: any arguments, items and state, and nothing happens."""

    path = ""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None: ...

    def append(self, _: Any) -> None: ...

    def extend(self, _: Any) -> None: ...

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _Walk(pickle.Unpickler):
    """Walks a pickle, making nothing; `sizes` are then the bytes of the storages that it asks for, by key."""

    def __init__(self, file: IO[bytes], allowed: set[str]) -> None:
        super().__init__(file)
        self.allowed = allowed
        self.sizes: dict[str, int] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in self.allowed and not (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            raise _Refused(f"holds {path}, and reading that could run code")
        return type("Inert", (_Inert,), {"path": path})

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) >= 5 and pid[0] == "storage"):
            raise _Refused(f"refers to something outside itself ({str(pid)[:40]})")
        kind, key, numel = getattr(pid[1], "path", "").rpartition(".")[2], pid[2], pid[4]
        if kind not in _ITEM or not isinstance(key, str) or not isinstance(numel, int) or numel < 0:
            raise _Refused(f"holds numbers of a kind that is not read here ({kind or 'without a name'})")
        size = numel * _ITEM[kind]
        if self.sizes.setdefault(key, size) != size:
            raise _Refused(f"says two sizes of the same numbers (storage {key})")
        return _Inert()


def _pickled(path: Path, training_state: bool) -> Any:
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
        if start == _LEGACY:
            _check_legacy(file, path.stat().st_size, _allowed(training_state))
        elif start.startswith(b"PK\x03\x04"):
            _check_archive(file, path.stat().st_size, _allowed(training_state))
        else:
            _no_format(file, start, _allowed(training_state))
    with _safe(training_state):
        return torch.load(path, map_location="cpu", weights_only=True, mmap=start != _LEGACY)


def _allowed(training_state: bool) -> set[str]:
    return _TENSORS | _STATE if training_state else _TENSORS


def _safe(training_state: bool) -> AbstractContextManager[None]:
    """What torch's reader may call beside its own, for as long as this is open."""
    stands: list[Any] = [
        (Facts, "argparse.Namespace"),
        (_Dtype, "numpy.dtype"),
        (_scalar, "numpy.core.multiarray.scalar"),
        (_scalar, "numpy._core.multiarray.scalar"),
    ]
    context: AbstractContextManager[None] = torch.serialization.safe_globals(stands if training_state else [])
    return context


def _walk(data: IO[bytes], allowed: set[str]) -> dict[str, int]:
    """The storages that the next pickle asks for, and their bytes."""
    at = data.tell()
    for count, (operation, value, _) in enumerate(pickletools.genops(data), 1):
        if operation.name in _ODD:
            raise _Refused(f"has a pickle of another kind than torch.save writes ({operation.name})")
        # A pickle numbers what it will refer to again one by one; a list is made that is as long as the largest.
        if operation.name in ("PUT", "BINPUT", "LONG_BINPUT") and int(value or 0) > count:
            raise _Refused(f"has a pickle that asks for a list of {value} entries and has {count}")
    data.seek(at)
    walk = _Walk(data, allowed)
    walk.load()
    return walk.sizes


def _check_archive(file: IO[bytes], length: int, allowed: set[str]) -> None:
    file.seek(0)
    with zipfile.ZipFile(file) as archive:
        parts = archive.infolist()
        names = [part.filename for part in parts]
        if len(set(names)) != len(names):
            raise _Refused("is an archive with two parts of one name")
        for part in parts:
            steps = re.split(r"[/\\]", part.filename)
            if ".." in steps or not steps[0] or ":" in steps[0] or "\x00" in part.orig_filename:
                raise _Refused(f"is an archive with a part outside itself ({part.filename[:60]!r})")
            if part.compress_type != zipfile.ZIP_STORED or part.flag_bits & 1:
                raise _Refused(
                    f"is an archive with compressed parts ({part.filename[:60]!r}), which torch never writes"
                )
            if part.file_size != part.compress_size:
                raise _Refused(f"is an archive that says two sizes of a part ({part.filename[:60]!r})")
        if sum(part.file_size for part in parts) > length:
            raise _Refused(f"is an archive whose parts are larger than its {length} bytes")
        tops = {name.split("/")[0] for name in names}
        inner = {name.partition("/")[2] for name in names}
        if any(name.startswith(_NOT_RECORDS) for name in inner):
            raise _Refused("is a TorchScript archive, which holds code")
        if len(tops) != 1 or "data.pkl" not in inner:
            raise _Refused(f"is a zip archive without a data.pkl ({', '.join(sorted(names)[:3])})")
        top = tops.pop()
        sizes = _walk(io.BytesIO(archive.read(f"{top}/data.pkl")), allowed)
        for key, size in sizes.items():
            name = f"{top}/data/{key}"
            has = archive.getinfo(name).file_size if name in names else None
            if has != size:
                there = "nothing" if has is None else f"{has} bytes"
                raise _Refused(f"says that it holds {size} bytes for storage {key[:20]!r} and holds {there}")


def _check_legacy(file: IO[bytes], length: int, allowed: set[str]) -> None:
    file.seek(0)
    sizes: dict[str, int] = {}
    for _ in range(5):  # magic number, version, machine, content, keys of the storages
        sizes.update(_walk(file, allowed))
    if sum(sizes.values()) + file.tell() > length:
        raise _Refused(f"says that it holds {sum(sizes.values())} bytes of numbers, and is {length} bytes long")


def _no_format(file: IO[bytes], start: bytes, allowed: set[str]) -> NoReturn:
    file.seek(257)
    if file.read(5) == b"ustar":
        raise _Refused("is a tar archive: of torch before 0.2, or no weights")
    if not start:
        raise EOFError("it is empty")
    if start[0] == 0x80:
        file.seek(0)
        _walk(file, allowed)
        raise _Refused("is a pickle that torch.save did not write")
    raise pickle.UnpicklingError("it begins like no file of torch.save")


def _check_tensors(path: Path, content: Mapping[str, Any], length: int) -> None:
    """Raises CheckpointError for tensors that claim more numbers than the file has."""
    total, seen, waiting = 0, {id(content)}, [content]
    while waiting:
        for name, value in waiting.pop().items():
            if isinstance(value, Mapping) and id(value) not in seen:
                seen.add(id(value))
                waiting.append(value)
            if not isinstance(value, Tensor):
                continue
            if value.layout is not torch.strided or value.numel() * value.itemsize > value.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path}: {name} of shape {tuple(value.shape)} repeats fewer numbers, or is not dense",
                    "dense tensors",
                    "save contiguous tensors",
                )
            total += value.numel() * value.itemsize
    # Tied weights lie in a file once and are found twice; more than that is no model.
    if total > 4 * length:
        raise CheckpointError(
            f"{path} of {length} bytes has tensors of {total} bytes, which share their numbers",
            "tensors that have their own",
            "save each tensor by itself",
        )


def _first(error: BaseException) -> str:
    """The reason, without torch's advice to read the file unsafely."""
    text = str(error)
    if found := re.search(r"WeightsUnpickler error:\s*(\S.*)", text):
        return found[1]
    if "weights_only" in text:
        return "torch's reader of tensors refuses it"
    return (text.strip().splitlines() or [type(error).__name__])[0]
