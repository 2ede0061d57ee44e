"""What can be asked over HTTP, with which options; `/api` tells the same."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from asit.serve.limits import Limits, RefusedError


@dataclass(frozen=True)
class Option:
    """One option of a query.

    Attributes:
        about: what it means.
        kind: int, float or str.
        default: when it is not given; None: whatever the model's own is.
        low, high: bounds of a number, both allowed.
        choices: of a str.
    """

    about: str
    kind: type
    default: Any = None
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()

    @property
    def expected(self) -> str:
        """What may be given, in words."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        what = "a whole number" if self.kind is int else "a number"
        if math.isfinite(self.low) and math.isfinite(self.high):
            return f"{what} from {self.low:g} to {self.high:g}"
        return what if not math.isfinite(self.low) else f"{what} of {self.low:g} or more"


_TOP = Option("labels of the whole clip, best first", int, 5, 1, 10_000)
_THRESHOLD = Option("least score of a segment", float, 0.5, 0, 1)
_WINDOW = Option("seconds of a window; as in training if not given", float, None, 0.01, 600)
_HOP = Option("seconds from window to window; end to end if not given", float, None, 0.01, 600)
_LAYER = Option("block of the encoder, 0 the first, -1 the last", int, None, -1000, 1000)
_K = Option("how many neighbours", int, 10, 1, 1000)

_NUMBER = re.compile(r"[-+]?[0-9.]{1,20}(e[-+]?[0-9]{1,3})?", re.IGNORECASE)

ENDPOINTS: dict[str, tuple[str, dict[str, Option]]] = {
    "tag": (
        "scores of the model's labels, of the clip and of its windows",
        {"top": _TOP, "threshold": _THRESHOLD, "window": _WINDOW, "hop": _HOP},
    ),
    "embed": (
        "the clip's vector, or with level=frames also one for each moment",
        {
            "level": Option("clip, or clip and frames", str, "clip", choices=("clip", "frames")),
            "layer": _LAYER,
            "hop": Option("seconds between frames; a column of patches if not given", float, None, 0.001, 60),
        },
    ),
    "neighbours": (
        "the clips of the index that are most similar to the recording, or to a part of it",
        {
            "k": _K,
            "start": Option("where the part begins, in seconds", float, 0.0, 0, 1e6),
            "seconds": Option("length of the part; to the end if not given", float, None, 0.01, 1e6),
        },
    ),
    "attention": (
        "what the class token of a block attends to, for each head, moment and band of the spectrogram",
        {"layer": Option("block of the encoder, 0 the first, -1 the last", int, -1, -1000, 1000)},
    ),
    "analyse": (
        "all that the page shows: spectrogram, labels with their times, vector, colours of the frames, neighbours",
        {"top": _TOP, "threshold": _THRESHOLD, "window": _WINDOW, "hop": _HOP, "k": _K},
    ),
}
"""POST /api/NAME with the bytes of an audio file as the body: what it answers, and its options."""

_OF_NUMBERS: dict[str, dict[str, Option]] = {"clip": {}, "neighbours": {"k": _K}}


def read(endpoint: str, given: Sequence[tuple[str, str]], numbered: bool = False) -> dict[str, Any]:
    """The options of an endpoint, with the defaults of those that are not given.

    Args:
        endpoint: its name.
        given: names and values of the query, in their order.
        numbered: the endpoint of this name that takes a number of the index.

    Raises:
        RefusedError: 400, an option that is not there, given twice, or of a value that cannot be.
    """
    known = _OF_NUMBERS[endpoint] if numbered else ENDPOINTS[endpoint][1]
    found = {name: option.default for name, option in known.items()}
    seen = set()
    for name, text in given:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f", did you mean {close[0]}?" if close else ""
            raise RefusedError(
                400,
                f"/api/{endpoint} has no option {name[:50]!r}{hint}",
                "one of " + ", ".join(known) if known else "no option",
                "GET /api tells what there is",
            )
        if name in seen:
            raise RefusedError(400, f"the option {name} is given twice", "one value", "drop one")
        seen.add(name)
        found[name] = _value(name, known[name], text)
    return found


def _value(name: str, option: Option, text: str) -> Any:
    wrong = RefusedError(400, f"{name}={text[:50]!r}", option.expected, "GET /api tells what there is")
    if option.kind is str:
        if text not in option.choices:
            raise wrong
        return text
    if not _NUMBER.fullmatch(text):  # Python would also read 1_0, spaces and the digits of other scripts
        raise wrong
    try:
        value = option.kind(text)
    except ValueError:
        raise wrong from None
    if not option.low <= value <= option.high:  # NaN is not
        raise wrong
    return value


def described(limits: Limits) -> dict[str, Any]:
    """What GET /api answers; JSON."""
    posts = {
        f"POST /api/{name}": {
            "answers": about,
            "options": {
                key: {"meaning": option.about, "expected": option.expected, "default": option.default}
                for key, option in options.items()
            },
        }
        for name, (about, options) in ENDPOINTS.items()
    }
    return {
        "GET /api/model": {"answers": "the model, its labels, the limits, the index"},
        "GET /api/health": {"answers": "whether the server lives, and how many requests are inside"},
        **posts,
        "GET /api/clip/N": {"answers": "the sound of clip N of the index, as WAV"},
        "GET /api/neighbours/N": {"answers": "the most similar clips of clip N of the index", "options": ["k"]},
        "body": "of a POST: an audio file's bytes, as they are: curl --data-binary @clip.wav ADDRESS/api/tag",
        "errors": {
            "parts": "found, expected, remedy",
            "400": "no audio, or an option that cannot be",
            "403": "another site asks",
            "404": "no such path, no such clip, or no index",
            "405": "another method",
            "408": "the body comes too slowly",
            "413": f"more than {limits.megabytes:g} MB",
            "421": "a Host that is not this machine",
            "422": f"a sound of more than {limits.seconds:g} s or {limits.channels} channels, or an answer above "
            f"{limits.numbers / 1e6:g} million numbers or {limits.compute:g} s of computing",
            "503": "too many requests; the header Retry-After says when to ask again",
        },
    }
