"""The endpoints of the HTTP API, the options of each, and how a query's options are read."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from asit.config.yaml import nearest
from asit.serve.request_queue import RefusedError


@dataclass(frozen=True)
class QueryOption:
    """One option of a query.

    Attributes:
        about: its meaning.
        kind: int, float or str.
        default: when it is not given; None: the model's own.
        low, high: bounds of a number, inclusive.
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
        return f"{'a whole number' if self.kind is int else 'a number'} from {self.low:g} to {self.high:g}"

    def value(self, text: str) -> Any:
        """Return the value of a query's text; raises ValueError if it is not allowed."""
        # Python would also read 1_0, spaces and the digits of other scripts as numbers.
        if text not in self.choices and (self.kind is str or not _NUMBER.fullmatch(text)):
            raise ValueError(text)
        value = self.kind(text)
        if self.kind is not str and not self.low <= value <= self.high:  # NaN too
            raise ValueError(text)
        return value


_NUMBER = re.compile(r"[-+]?[0-9.]{1,20}(e[-+]?[0-9]{1,3})?", re.IGNORECASE)
_LAYER = "block of the encoder, 0 the first, -1 the last"
_LABELS = {
    "top": QueryOption("labels of the whole clip, best first", int, 5, 1, 10_000),
    "threshold": QueryOption("lowest score of a segment", float, 0.5, 0, 1),
    "window": QueryOption("seconds of a window; as in training if not given", float, None, 0.01, 600),
    "hop": QueryOption("seconds from window to window; end to end if not given", float, None, 0.01, 600),
}
NEIGHBOURS = {"k": QueryOption("number of neighbours", int, 10, 1, 1000)}
"""Options of the neighbours of a recording or of a clip of the index."""

ENDPOINTS: dict[str, tuple[str, dict[str, QueryOption]]] = {
    "tag": ("scores of the model's labels, of the clip and of its windows", _LABELS),
    "embed": (
        "the clip's vector, or with level=frames also one for each moment",
        {
            "level": QueryOption("clip, or clip and frames", str, "clip", choices=("clip", "frames")),
            "layer": QueryOption(_LAYER, int, None, -1000, 1000),
            "hop": QueryOption("seconds between frames; a column of patches if not given", float, None, 0.001, 60),
        },
    ),
    "neighbours": (
        "the clips of the index that are most similar to the recording, or to a part of it",
        {
            **NEIGHBOURS,
            "start": QueryOption("where the part begins, in seconds", float, 0.0, 0, 1e6),
            "seconds": QueryOption("length of the part; to the end if not given", float, None, 0.01, 1e6),
        },
    ),
    "attention": (
        "what the class token of a block attends to, for each head, moment and band of the spectrogram",
        {"layer": QueryOption(_LAYER, int, -1, -1000, 1000)},
    ),
    "analyse": (
        "all that the page shows: spectrogram, labels with their times, vector, colours of the frames, neighbours",
        {**_LABELS, **NEIGHBOURS},
    ),
}
"""POST /api/NAME with the bytes of an audio file as the body: what it answers, and its options."""


GETS: dict[str, tuple[str, dict[str, QueryOption]]] = {
    "/api": ("the endpoints and their options", {}),
    "/api/openapi.json": ("the same as an OpenAPI document", {}),
    "/api/health": ("whether the server runs, and how many requests are inside", {}),
    "/api/model": ("the model, its labels, the limits, the index", {}),
    "/api/map": ("the clips of the index on a plane, in groups that sound alike", {}),
    "/api/clip/{number}": ("the sound of a clip of the index, as WAV", {}),
    "/api/neighbours/{number}": ("the most similar clips of a clip of the index", NEIGHBOURS),
}
"""GET PATH: what it answers, and its options."""


def read(endpoint: str, known: Mapping[str, QueryOption], given: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Return the options of a request, with the defaults of those that are not given.

    Args:
        endpoint: its name, for messages.
        known: its options.
        given: names and values of the query, in their order.

    Raises:
        RefusedError: 400, an unknown option, one given twice, or a value that is not allowed.
    """
    found = {name: option.default for name, option in known.items()}
    names = [name for name, _ in given]
    for name, text in given:
        if name not in known:
            what, expected = f"/api/{endpoint} has no option {name[:50]!r}{nearest(name, known)}", ", ".join(known)
        elif names.count(name) > 1:
            what, expected = f"the option {name} is given twice", "one value"
        else:
            try:
                found[name] = known[name].value(text)
                continue
            except ValueError:
                what, expected = f"{name}={text[:50]!r}", known[name].expected
        raise RefusedError(400, what, expected, "GET /api lists the options")
    return found


def described() -> dict[str, Any]:
    """Return what GET /api answers."""
    paths = {f"GET {path.replace('{number}', 'N')}": entry for path, entry in GETS.items()}
    paths |= {f"POST /api/{name}": entry for name, entry in ENDPOINTS.items()}
    return {
        path: {
            "answers": about,
            "options": {
                key: {"meaning": option.about, "expected": option.expected, "default": option.default}
                for key, option in options.items()
            },
        }
        for path, (about, options) in paths.items()
    } | {
        "body": "of a POST: an audio file's bytes, as they are: curl --data-binary @clip.wav ADDRESS/api/tag",
        "errors": "found, expected, remedy; for 503 the header Retry-After has the seconds until the next try",
    }
