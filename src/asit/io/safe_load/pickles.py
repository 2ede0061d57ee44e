"""Check a pickle before torch reads it: the names, calls and memory in it, without creating anything.

A pickle is a program. `_measure` checks its operations: only those that `torch.save` writes, and no structure that is
small in the file and endless once it is followed. `_CheckingUnpickler` runs it with every name replaced by a class that
only checks how it is used. Then torch's own reader, which knows the same names (torch/_weights_only_unpickler.py), may
run it.
"""

from __future__ import annotations

import pickle
import pickletools
from typing import IO, Any

import torch

from asit.io.safe_load.refusal import Refused, shown

_ITEM = {
    **{"DoubleStorage": 8, "FloatStorage": 4, "HalfStorage": 2, "BFloat16Storage": 2, "LongStorage": 8},
    **{"IntStorage": 4, "ShortStorage": 2, "CharStorage": 1, "ByteStorage": 1, "BoolStorage": 1, "UntypedStorage": 1},
}
"""Bytes of a number, by the name of its storage."""

_STORAGES = {"torch.storage.UntypedStorage", *(f"torch.{name}" for name in _ITEM)}
_TENSORS = {"torch._utils._rebuild_tensor", "torch._utils._rebuild_tensor_v2"}
_WEIGHTS = {"collections.OrderedDict", "torch.Size", "torch._utils._rebuild_parameter", *_TENSORS, *_STORAGES}
_HOLDERS = {"argparse.Namespace", "numpy.dtype"}
_STATE = {"_codecs.encode", "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", *_HOLDERS}

_PUT, _GET = {"BINPUT", "LONG_BINPUT"}, {"BINGET", "LONG_BINGET"}
_FILL = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}
_KNOWN = {
    *{"PROTO", "STOP", "MARK", "GLOBAL", "REDUCE", "NEWOBJ", "BINPERSID", *_FILL, *_PUT, *_GET},
    *{"NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"},
    *{"BINUNICODE", "SHORT_BINSTRING", "EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"},
    *{"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3"},
}
"""Operations of pickles of protocol 2, which are all that torch's reader knows."""

_DEEPEST, _MOST = 100, 10**7
"""Nested containers, and values with all references followed: beyond what any training saves."""
_WIDE = 100
"""Integers of over 64 bits: a hundred thousand with one hash fill a dict for hours."""


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
    at = data.tell()
    _measure(data)
    data.seek(at)
    _CheckingUnpickler(data, _WEIGHTS | _STATE if training_state else _WEIGHTS, sizes).load()


def _measure(data: IO[bytes]) -> None:
    """Raise Refused for other operations than torch.save's, and for structures that take forever to follow.

    A tuple that holds a tuple twice, which holds one twice, and so on, takes 60 bytes and 2^30 steps to hash; a million
    nested tuples overflow the stack. So the values below each value are counted, and their depth.
    """
    stack: list[tuple[int, int] | None] = []  # (values, depth); None for the operation MARK
    memo: dict[int, tuple[int, int]] = {}
    followed = wide = 0
    for count, (operation, value, _) in enumerate(pickletools.genops(data), 1):
        name = operation.name
        if name not in _KNOWN:
            raise Refused(f"has a pickle of another kind than torch.save writes ({name})")
        wide += name == "LONG1" and int(value or 0).bit_length() > 64
        if wide > _WIDE:
            raise Refused(f"has more than {_WIDE} numbers of over 64 bits")
        if name == "MARK":
            stack.append(None)
        elif name in _PUT:
            # References are numbered one by one, and Python makes a list as long as the largest number.
            if int(value or 0) > count:
                raise Refused(f"has a pickle that asks for a list of {value} entries and has {count}")
            memo[int(value or 0)] = _top(stack, 1)[0]
        elif name in _GET:
            if value not in memo:
                raise pickle.UnpicklingError("its pickle takes what it never put")
            stack.append(memo[value])
            followed += memo[value][0]
        else:
            taken = _take(stack, operation)
            if operation.stack_after:
                within, deepest = sum(one[0] for one in taken), max((one[1] for one in taken[:-1]), default=0)
                last = taken[-1][1] if taken else 0  # what is filled, or the deepest in the stack
                depth = max(last, deepest + 1) if name in _FILL else max(last, deepest) + 1
                if depth > _DEEPEST:
                    raise Refused(f"has a pickle with containers more than {_DEEPEST} deep in one another")
                stack.append((within + 1, depth if taken else 0))
        if followed > _MOST:
            raise Refused(f"has a pickle of {count} operations that leads to more than {_MOST} values")


def _take(stack: list[tuple[int, int] | None], operation: pickletools.OpcodeInfo) -> list[tuple[int, int]]:
    """Pop what an operation takes off the stack, the topmost first."""
    before = operation.stack_before
    if pickletools.markobject not in before:
        taken = _top(stack, len(before))
        del stack[len(stack) - len(before) :]
        return taken
    if None not in stack:
        raise pickle.UnpicklingError("its pickle ends what it never began")
    found: list[tuple[int, int]] = []
    while (one := stack.pop()) is not None:
        found.append(one)
    below = before.index(pickletools.markobject)
    found += _top(stack, below)
    del stack[len(stack) - below :]
    return found


def _top(stack: list[tuple[int, int] | None], count: int) -> list[tuple[int, int]]:
    top = [one for one in stack[len(stack) - count :][::-1] if one is not None] if count <= len(stack) else []
    if len(top) < count:
        raise pickle.UnpicklingError("its pickle takes what is not there")
    return top


class _Placeholder(dict[Any, Any]):
    """Replaces whatever a pickle would create: it does nothing, and refuses misuse."""

    path = ""

    def __new__(cls, *given: Any, **_: Any) -> _Placeholder:
        _check_call(cls.path, given)
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        # The attributes of an OrderedDict go before its methods: "items" among them would answer for it.
        plain = self.path == "collections.OrderedDict" and type(state) is dict and set(state) <= {"_metadata"}
        if not plain and self.path not in _HOLDERS:
            raise Refused(f"sets attributes of {self.path or 'a storage'}, which files of weights do not")

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)


class _Storage(_Placeholder):
    """Replaces the numbers of a tensor."""

    count = 0


def _check_call(path: str, given: tuple[Any, ...]) -> None:
    """Raise Refused for a call that allocates memory, or for a tensor outside its storage."""
    if path in _STORAGES:
        raise Refused(f"asks for memory with {path}")
    if path == "_codecs.encode" and (len(given) != 2 or not isinstance(given[0], str) or given[1] != "latin1"):
        raise Refused("turns text into bytes in another way than numpy's scalars need")
    if path in _TENSORS:
        storage, offset, size, stride = given[:4]
        axes = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride)
        if not axes or not isinstance(storage, _Storage) or not all(type(n) is int for n in (offset, *size, *stride)):
            raise Refused(f"calls {path} with something else than numbers, an offset and a shape")
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if min(offset, *size, *stride, 0) < 0 or (0 not in size and last >= storage.count):
            raise Refused(f"has a tensor that reaches outside its numbers, of which there are {storage.count}")


class _CheckingUnpickler(pickle.Unpickler):
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
