"""Parse JSON, YAML and NumPy files of unknown origin; whatever is wrong with one raises `Malformed`.

Python's parsers raise UnicodeDecodeError, RecursionError, OverflowError or ValueError, and accept lone surrogates and
integers that no array holds.
"""

from __future__ import annotations

import json
import math
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from asit.errors import AsitError, ConfigError
from asit.io import local_files

if TYPE_CHECKING:
    import numpy.typing as npt

DEEPEST = 100
"""Nested containers: more than any file of asit has, and within Python's recursion limit."""
_MOST = 100_000
"""Values and characters of keys in a YAML file, aliases followed."""
_HALVES, _OTHERS = re.compile("[\ud800-\udfff]"), re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Lone surrogates, and those that encode no byte of a file's name (PEP 383)."""
_LONGEST = 1 << 18
"""Bytes of a YAML file of settings."""
_LARGEST = 1 << 128  # no float overflows by it


UNFIT = (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, MemoryError)
"""Raised for values of an unexpected type or size; pydantic's errors are ValueErrors, torch's RuntimeErrors."""


class Malformed(ValueError):  # noqa: N818  # read as a word beside ValueError
    """What is wrong with a file, in one line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose merge keys (`<<`) cannot multiply what they copy without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST:
            raise yaml.constructor.ConstructorError(None, None, "merge keys that multiply", node.start_mark)


def from_json(
    text: bytes | str, *, surrogates: bool = False, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """Return the value of a JSON text; NaN and infinity are numbers.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.
        surrogates: allow names of files that are not UTF-8, as Python's surrogateescape encodes them (PEP 383).
        pairs: makes an object of its keys and values; None: a dict, which keeps the last of equal keys.

    Raises:
        Malformed: it is not UTF-8 or not JSON, is nested more than `DEEPEST` deep, or holds an integer of more
            than 128 bits or a lone surrogate.
    """
    try:
        decoded = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(decoded, parse_int=_integer, object_pairs_hook=pairs)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise _malformed(error, f"it is not JSON: {error}") from None
    if decoded.count("[") + decoded.count("{") > DEEPEST:
        check_size(value, len(decoded))
    if "\\u" in decoded or not isinstance(text, bytes):
        _check_letters(value, _OTHERS if surrogates else _HALVES)
    return value


def from_yaml(text: bytes) -> Any:
    """Return the value of a YAML text in UTF-8, of plain types alone.

    Raises:
        Malformed: it is not UTF-8 or not YAML, is nested more than `DEEPEST` deep, or leads to more than 100,000
            values once its aliases are followed.
    """
    if len(text) > _LONGEST:
        raise Malformed(f"it has {len(text)} bytes: no file of settings has more than {_LONGEST}")
    try:
        value = yaml.load(text.decode("utf-8-sig"), _Loader)  # a SafeLoader
        check_size(value, _MOST)
    except Malformed:
        raise
    except (yaml.YAMLError, *UNFIT) as error:  # PyYAML's constructors take any tag's text as of its type
        raise _malformed(error, " ".join(str(error).split())[:300]) from None
    _check_letters(value, _HALVES)
    return value


def json_object(
    path: Path, error: type[AsitError], expected: str = "a JSON object", remedy: str = ""
) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        error: the file cannot be read, is malformed, or holds another value; `expected` and `remedy` are its message.
    """
    try:
        with local_files.open_file(path) as file:
            value = from_json(file.read())
    except OSError as reason:
        what = "is not there" if isinstance(reason, FileNotFoundError) else f"cannot be read: {reason.strerror}"
        raise error(f"{path} {what}", expected, remedy) from reason
    except Malformed as reason:
        raise error(f"{path} is damaged: {reason}", expected, remedy) from reason
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds a {type(value).__name__}", expected, remedy)
    return value


@contextmanager
def as_written(what: Path | str, remedy: str, error: type[AsitError] = ConfigError) -> Iterator[None]:
    """Raise `error`, which names the file or folder `what` and its `remedy`, for anything of `UNFIT` in the block."""
    try:
        yield
    except UNFIT as reason:
        raise error(
            f"{what} cannot be used: it holds a value of another kind than asit writes ({_first(reason)})",
            "the file as it was written",
            remedy,
        ) from reason


def npy(path: Path) -> npt.NDArray[Any]:
    """Return the array of a .npy file, memory-mapped.

    Raises:
        Malformed: it cannot be read, or is no array of plain values.
    """
    import numpy as np

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # of headers that Python 2 or nobody wrote
            found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy evaluates the header as Python: it fails in as many ways as that can
        raise Malformed(_first(error)) from None
    if not isinstance(found, np.ndarray):
        raise Malformed("it holds several arrays")
    return found


def npz(path: Path, names: Iterable[str]) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of a .npz file, by name.

    Raises:
        Malformed: it cannot be read, has no array of one of these names, or one that is larger than its part.
    """
    import numpy as np

    out: dict[str, npt.NDArray[Any]] = {}
    try:
        with warnings.catch_warnings(), zipfile.ZipFile(path) as parts, np.load(path, allow_pickle=False) as held:
            warnings.simplefilter("error")
            for name in names:
                with parts.open(f"{name}.npy") as part:  # before there is memory for as much as its header claims
                    version = np.lib.format.read_magic(part)
                    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
                    shape, _, kind = read[version](part)
                    size, at = parts.getinfo(f"{name}.npy").file_size, part.tell()
                if math.prod(shape) * kind.itemsize != size - at:
                    raise ValueError(f"{name} claims a shape of {shape} and has {size - at} bytes")
                out[name] = held[name]
    except Exception as error:
        raise Malformed(_first(error)) from None
    return out


def _first(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['without a reason'])[0][:200]}"


def _integer(digits: str) -> int:
    if len(digits) > 40 or not -_LARGEST <= (value := int(digits)) < _LARGEST:
        raise Malformed(f"it holds an integer of {len(digits.lstrip('-'))} digits: of more than 128 bits")
    return value


def check_size(value: Any, most: int) -> None:
    """Raise Malformed for containers nested too deeply, that hold too much with aliases followed, or wide integers."""
    level, seen = [[value]], 0
    for _ in range(DEEPEST + 2):
        below: list[Any] = []
        for held in level:
            if isinstance(held, dict):
                seen += sum(len(key) for key in held if isinstance(key, str))
            inner = list(held.values()) if isinstance(held, dict) else held
            seen += len(inner) + 1
            below += [one for one in inner if isinstance(one, dict | list | tuple | set)]
            if any(isinstance(one, int) and not -_LARGEST <= one < _LARGEST for one in inner):
                raise Malformed("it holds an integer of more than 128 bits")
            if max(seen, len(below)) > most + 2:
                raise Malformed(f"it leads to more than {most} values")
        if not below:
            return
        level = below
    raise Malformed(f"it is nested more than {DEEPEST} deep")


def _check_letters(value: Any, refused: re.Pattern[str]) -> None:
    text = json.dumps(value, ensure_ascii=False, default=str, skipkeys=True)
    if found := refused.search(text):
        raise Malformed(f"it holds {found[0]!a}, half of a surrogate pair, in a text")


def _malformed(error: Exception, otherwise: str) -> Malformed:
    """Return a parser's error as Malformed; `otherwise` is the text of errors of the format itself."""
    if isinstance(error, UnicodeDecodeError):
        return Malformed(f"it is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}")
    if isinstance(error, RecursionError):
        return Malformed(f"it is nested more than {DEEPEST} deep")
    return Malformed(otherwise)
