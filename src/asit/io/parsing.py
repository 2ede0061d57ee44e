"""JSON, YAML and NumPy files of unknown origin: whatever is wrong with one is a single exception, `Malformed`.

Python's parsers raise UnicodeDecodeError, RecursionError, OverflowError, and for an integer of more than 4,300 digits
a plain ValueError; JSON may hold half a surrogate pair, which no file or terminal takes, or an integer that no array
holds. All of these end here, so that a reader of a file has one exception to turn into its own error.
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
"""Containers within containers: more than any file of asit has, and what Python's own recursion takes."""
_MOST = 100_000
"""Values and characters of keys that a YAML file of settings may lead to, aliases followed."""
_HALVES, _OTHERS = re.compile("[\ud800-\udfff]"), re.compile("[\ud800-\udc7f\udd00-\udfff]")
"""Lone surrogates, and those that stand for no byte of a file's name."""
_LONGEST = 1 << 18
"""Bytes of a YAML file of settings."""
_LARGEST = 1 << 128  # no float overflows by it


UNFIT = (AttributeError, ArithmeticError, LookupError, TypeError, ValueError, RuntimeError, MemoryError)
"""What code raises that is given values of another type or size than it takes: pydantic's errors are ValueErrors,
Python's recursion limit and torch's errors are RuntimeErrors."""


class Malformed(ValueError):  # noqa: N818  # read as a word beside ValueError
    """What is wrong with a text, in one line."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, whose merge keys (`<<`) cannot multiply what they copy without end."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        super().flatten_mapping(node)
        if len(node.value) > _MOST:
            raise yaml.constructor.ConstructorError(None, None, "merge keys that multiply", node.start_mark)


def from_json(
    text: bytes | str, *, surrogates: bool = False, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None
) -> Any:
    """The value of a JSON text; NaN and infinity are taken as numbers.

    Args:
        text: bytes are UTF-8, with or without a byte order mark.
        surrogates: names of files that are no UTF-8 may be in it, as Python's surrogateescape has them (PEP 383).
        pairs: makes an object of its keys and values; None: a dict, which keeps the last of equal keys.

    Raises:
        Malformed: it is not UTF-8 or not JSON, is nested more than `DEEPEST` deep, or holds an integer of more
            than 128 bits or a lone surrogate.
    """
    try:
        whole = text.decode("utf-8-sig") if isinstance(text, bytes) else text
        value = json.loads(whole, parse_int=_integer, object_pairs_hook=pairs)
    except Malformed:
        raise
    except (ValueError, RecursionError) as error:
        raise _malformed(error, f"it is not JSON: {error}") from None
    if whole.count("[") + whole.count("{") > DEEPEST:
        _check(value, len(whole))
    if "\\u" in whole or not isinstance(text, bytes):
        _check_letters(value, _OTHERS if surrogates else _HALVES)
    return value


def from_yaml(text: bytes) -> Any:
    """The value of a YAML text in UTF-8, of plain types alone.

    Raises:
        Malformed: it is not UTF-8 or not YAML, is nested more than `DEEPEST` deep, or leads to more than 100,000
            values once its aliases are followed.
    """
    if len(text) > _LONGEST:
        raise Malformed(f"it has {len(text)} bytes: no file of settings has more than {_LONGEST}")
    try:
        value = yaml.load(text.decode("utf-8-sig"), _Loader)  # a SafeLoader
        _check(value, _MOST)
    except Malformed:
        raise
    except (yaml.YAMLError, *UNFIT) as error:  # PyYAML's constructors take any tag's text as of its type
        raise _malformed(error, " ".join(str(error).split())[:300]) from None
    _check_letters(value, _HALVES)
    return value


def json_object(
    path: Path, error: type[AsitError], expected: str = "a JSON object", remedy: str = ""
) -> dict[str, Any]:
    """The object that a JSON file holds.

    Args:
        error: what to raise.
        expected, remedy: for its message.

    Raises:
        error: the file cannot be read, is malformed, or holds another value.
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
    """Turn what code raises that meets a value of another type than asit writes into an error that names the file.

    Args:
        what: the file or folder that the values are from.
        remedy: the fix that the message names.
        error: what to raise.

    Raises:
        error: anything of `UNFIT` was raised inside.
    """
    try:
        yield
    except UNFIT as reason:
        raise error(
            f"{what} cannot be used: it holds a value of another kind than asit writes ({_first(reason)})",
            "the file as it was written",
            remedy,
        ) from reason


def npy(path: Path) -> npt.NDArray[Any]:
    """The array of a .npy file, left on the disk.

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
    """The arrays of a .npz file, by name.

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


def _check(value: Any, most: int) -> None:
    """Raises Malformed for containers nested too deep, that hold too much once followed, or that hold wide integers."""
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
    """What a parser's error says; `otherwise` where it is of the format itself."""
    if isinstance(error, UnicodeDecodeError):
        return Malformed(f"it is not UTF-8: byte {error.object[error.start]:#04x} at {error.start}")
    if isinstance(error, RecursionError):
        return Malformed(f"it is nested more than {DEEPEST} deep")
    return Malformed(otherwise)
