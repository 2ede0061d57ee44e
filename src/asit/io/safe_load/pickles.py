"""Check a pickle before torch reads it: the names, calls and memory in it, without creating anything.

A pickle is a program. `_CheckingUnpickler` runs it with every name replaced by a class that only checks how it is used,
and with no other operations than `torch.save` writes. Then torch's own reader, which knows the same names
(torch/_weights_only_unpickler.py), may run it.
"""

from __future__ import annotations

import pickle
import pickletools
from collections.abc import Callable
from typing import IO, Any, NoReturn

import torch

from asit.io import parsing

_ITEM = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8},
    **{"IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
"""Bytes of a number, by the name of its storage."""

_STORAGES = {"torch.storage.UntypedStorage", *(f"torch.{name}" for name in _ITEM)}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_WEIGHTS = {"collections.OrderedDict", "torch.Size", "torch._utils._rebuild_parameter", *_TENSORS, *_STORAGES}
_HOLDERS = {"argparse.Namespace", "numpy.dtype"}
PATHS = {"pathlib.PosixPath", "pathlib.WindowsPath", "pathlib._local.PosixPath", "pathlib._local.WindowsPath"}
"""Paths in settings, as in AudioMAE's; they are read as text."""
_STATE = {"_codecs.encode", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", *_HOLDERS, *PATHS}

_KNOWN = {
    *{"PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BINPERSID", "APPEND", "APPENDS", "SETITEM", "SETITEMS"},
    *{"BUILD", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1"},
    *{"BININT2", "LONG1", "BINFLOAT", "BINUNICODE", "SHORT_BINSTRING", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_TUPLE"},
    *{"TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"},
}
"""Operations of pickles of protocol 2, which are all that torch's reader knows."""
_MOST = 3 * 10**6
"""Values with all references followed: beyond what any training saves."""


class Refused(Exception):  # noqa: N818  # never leaves this package
    """Refused content.

    Args:
        what: the sentence after the file's name.
        remedy: the fix.
    """

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what)
        self.remedy = remedy or (
            "where the file came from, save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        )


def shown(text: str, most: int = 80) -> str:
    """Return a name out of a file of unknown origin, shortened and printable."""
    cut = text if len(text) <= most else text[:most] + "..."
    return cut if cut.isprintable() else ascii(cut)


def walk(data: IO[bytes], training_state: bool, sizes: dict[str, int]) -> None:
    """Check the next pickle of `data`, and leave the position after it.

    Args:
        data: an open file that can seek.
        training_state: allow an argparse.Namespace and numpy's scalars.
        sizes: bytes of the storages that pickles refer to, by key; this pickle's are added.

    Raises:
        Refused: it holds or does what no file of weights does.
        Exception: it is damaged.
    """
    found = _CheckingUnpickler(data, _WEIGHTS | _STATE if training_state else _WEIGHTS, sizes).load()
    try:
        parsing.check_size(found, _MOST)
    except parsing.Malformed as error:
        raise Refused(f"has a pickle that is endless: {error}") from None


class _Dict(dict[Any, Any]):
    """Replaces dict: a tuple of two tuples of two tuples, and so on, would take forever to hash."""

    def __setitem__(self, key: Any, value: Any) -> None:
        if not (isinstance(key, str) or (isinstance(key, int) and -(2**63) <= key < 2**63)):
            raise Refused("has a key that is neither text nor a number of 64 bits")
        super().__setitem__(key, value)


class _Placeholder(_Dict):
    """Replaces whatever a pickle would create: it does nothing, and refuses misuse."""

    path = ""

    def __new__(cls, *given: Any, **_: Any) -> _Placeholder:
        _check_call(cls.path, given)
        found = super().__new__(cls)
        dict.__setitem__(found, None, [*given])  # for the check of its size; content has no such key
        return found

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        # The attributes of an OrderedDict go before its methods: "items" among them would answer for it.
        plain = self.path == "collections.OrderedDict" and isinstance(state, _Dict) and set(state) <= {"_metadata"}
        if not plain and self.path not in _HOLDERS:
            raise Refused(f"sets attributes of {self.path or 'a storage'}, which files of weights do not")
        self[None].append(state)


class _Storage(_Placeholder):
    """Replaces the numbers of a tensor."""

    count = 0


def _check_call(path: str, given: tuple[Any, ...]) -> None:
    """Raise Refused for a call that allocates memory, or for a tensor outside its storage."""
    if path in _STORAGES:
        raise Refused(f"asks for memory with {path}")
    if path == "collections.OrderedDict" and given:
        raise Refused("fills an OrderedDict in another way than torch.save does")
    if path == "_codecs.encode" and (len(given) != 2 or not isinstance(given[0], str) or given[1] != "latin1"):
        raise Refused("turns text into bytes in another way than numpy's scalars need")
    if path in PATHS and not all(isinstance(part, str) for part in given):
        raise Refused("has a path of other parts than texts")
    if path in _TENSORS:
        storage, offset, size, stride = given[:4]
        axes = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not axes or not isinstance(storage, _Storage) or not all(type(n) is int for n in (offset, *size, *stride)):
            raise Refused(f"calls {path} with something else than numbers, an offset and a shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= storage.count):
            raise Refused(f"has a tensor that reaches outside its numbers, of which there are {storage.count}")


def _empty_dict(reader: Any) -> None:
    reader.append(_Dict())


def _unknown(name: str) -> Callable[[Any], NoReturn]:
    def refuse(_: Any) -> NoReturn:
        raise Refused(f"has a pickle of another kind than torch.save writes ({name})")

    return refuse


class _CheckingUnpickler(pickle._Unpickler):
    """Python's own, since the one in C allocates a list as long as the largest number of a reference."""

    dispatch = {  # noqa: RUF012
        **pickle._Unpickler.dispatch,
        **{ord(code.code): _unknown(code.name) for code in pickletools.opcodes if code.name not in _KNOWN},
        pickle.EMPTY_DICT[0]: _empty_dict,
    }

    def __init__(self, file: IO[bytes], allowed: set[str], sizes: dict[str, int]) -> None:
        super().__init__(file)
        self.allowed = allowed
        self.sizes = sizes
        self.placeholders: dict[str, type[_Placeholder]] = {}

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        if path not in self.allowed and not (module == "torch" and isinstance(vars(torch).get(name), torch.dtype)):
            raise Refused(f"holds {shown(path)}, and reading that could run code")
        return self.placeholders.setdefault(path, type("Placeholder", (_Placeholder,), {"path": path}))

    def persistent_load(self, pid: Any) -> Any:
        if not (isinstance(pid, tuple) and len(pid) in (5, 6) and isinstance(pid[0], str) and pid[0] == "storage"):
            raise Refused("refers to something outside itself")
        kind, key, numel = getattr(pid[1], "path", "").rpartition(".")[2], pid[2], pid[4]
        if kind not in _ITEM or not isinstance(key, str) or type(numel) is not int or numel < 0:
            raise Refused(f"holds numbers of a kind that is not read here ({shown(kind) or 'without a name'})")
        if len(pid) == 6 and pid[5] is not None:
            raise Refused("holds parts of storages, of torch before 0.4")
        size = numel * _ITEM[kind]
        if self.sizes.setdefault(key, size) != size:
            raise Refused(f"says two sizes of the same numbers (storage {shown(key)})")
        found = _Storage()
        found.count = numel
        return found
