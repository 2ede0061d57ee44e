"""Recordings to labels: prepared by threads, scored in batches, in the order they were given, each read once."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import torch

from asit.audio.stream import open_sound
from asit.data.catalogue.inputs import Item, Sounds, named
from asit.model.inference.batching import Done, Piece, listen
from asit.model.inference.tagging import Tagger, Tags, WindowScores


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


def tag_items(tagger: Tagger, items: Sequence[Item], batch: int = 16, threads: int = 0) -> Generator[Tagged]:
    """Tag each input; one that cannot be read is told of as such, and the others go on.

    Args:
        tagger: of `AudioModel.tagger`.
        items: the inputs; answers come in their order, as they become known.
        batch: windows that are scored together, of one recording or of several.
        threads: that decode and make log-mels; 0: as many as compute.
    """
    settings, columns = tagger.front_end.settings, tagger.encoder.grid[0]

    sound_of = Sounds(items)

    def cut(place: int) -> Iterator[Piece]:
        item = items[place]
        with open_sound(sound_of(place), None, settings.rate, settings.resampler, item.start, item.seconds) as sound:
            yield Piece(sound, item.start)

    answers = listen(
        tagger,
        len(items),
        cut,
        lambda: _Scores(tagger),
        size=lambda window: columns,
        batch=batch,
        batches=1,
        threads=threads or torch.get_num_threads(),
    )
    tags: Tags | None = None
    with closing(answers):
        for one in answers:
            if not isinstance(one, Done):
                tags = one.found
                continue
            fault = one.fault
            if fault is None and tags is not None and not bool(tags.windows.isfinite().all()):
                fault = "the model's scores are not finite"
            if fault is None:
                yield Tagged(items[one.place], tags)
            else:
                yield Tagged(items[one.place], None, named(items[one.place].text, fault))


class _Scores:
    """The scores of a recording's windows, kept until all are there: what labels say is not known before."""

    def __init__(self, tagger: Tagger) -> None:
        self.tagger, self.parts = tagger, list[WindowScores]()

    def add(self, part: WindowScores) -> None:
        self.parts.append(part)

    def ready(self) -> None:
        return None

    def rest(self) -> Tags:
        return self.tagger.join(self.parts)
