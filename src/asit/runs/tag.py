"""Recordings to labels: prepared by threads, scored in batches, long ones streamed, in the order they were given.

Letters: W windows of a recording.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

from asit.data.inputs import Item
from asit.errors import AsitError
from asit.model.tagging import Tagger, Tags, TagWindow, join_tags

LONG = 32
"""Windows above which a recording is streamed by itself, and not held in memory whole."""

_WORKERS = 2  # decoding, resampling and log-mel take a small part of the encoder's time


@dataclass(frozen=True)
class Tagged:
    """What became of one input.

    Attributes:
        item: the input.
        tags: its labels, with times in seconds from the start of the part that was asked for; None where it failed.
        failure: why there are no tags, in one line; None where there are.
    """

    item: Item
    tags: Tags | None
    failure: str | None = None


def tag_items(tagger: Tagger, items: Sequence[Item], batch: int = 16) -> Iterator[Tagged]:
    """Tag each input; one that cannot be read is told of as such, and the others go on.

    Args:
        tagger: of `AudioModel.tagger`.
        items: the inputs; answers come in their order, as they become known.
        batch: windows that are scored together, of one recording or of several.
    """
    pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="prepare")
    try:
        waiting: deque[tuple[Item, Future[list[TagWindow] | str]]] = deque()
        together: list[tuple[Item, list[TagWindow] | str]] = []
        queue, count = iter(items), 0
        while True:
            for item in islice(queue, max(0, 2 * batch - len(waiting))):
                waiting.append((item, pool.submit(_prepare, tagger, item)))
            if not waiting:
                break
            item, future = waiting.popleft()
            prepared = future.result()
            long = not isinstance(prepared, str) and len(prepared) > LONG
            if not long:
                together.append((item, prepared))
                count += 0 if isinstance(prepared, str) else len(prepared)
            if long or count >= batch or len(together) >= 4 * batch:
                yield from _score(tagger, together, batch)
                together, count = [], 0
            if long:
                yield _stream(tagger, item, batch)
        yield from _score(tagger, together, batch)
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def one_line(error: AsitError | OSError, name: str) -> str:
    """What was found, in one line; `name`, of what it is about, stands before it where it does not say so itself."""
    text = error.found if isinstance(error, AsitError) else error.strerror or str(error)
    return " ".join((text if name in text else f"{name}: {text}").split())


def _prepare(tagger: Tagger, item: Item) -> list[TagWindow] | str:
    """The item's windows, at most one more than `LONG`; where it cannot be read, why."""
    try:
        return list(islice(tagger.windows(item.sound(), None, item.start, item.seconds), LONG + 1))
    except (AsitError, OSError) as error:
        return one_line(error, item.name)


def _score(tagger: Tagger, together: Sequence[tuple[Item, list[TagWindow] | str]], batch: int) -> Iterator[Tagged]:
    windows = [window for _, held in together if not isinstance(held, str) for window in held]
    scores = iter([one for i in range(0, len(windows), batch) for one in tagger.run(windows[i : i + batch])])
    for item, held in together:
        if isinstance(held, str):
            yield Tagged(item, None, held)
        else:
            yield Tagged(item, tagger.join(list(islice(scores, len(held)))))


def _stream(tagger: Tagger, item: Item, batch: int) -> Tagged:
    try:
        pieces = tagger.stream(item.sound(), batch=batch, start=item.start, seconds=item.seconds)
        return Tagged(item, join_tags(list(pieces)))
    except (AsitError, OSError) as error:
        return Tagged(item, None, one_line(error, item.name))
