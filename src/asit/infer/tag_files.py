"""Labels of recordings: windows prepared by threads, scored in batches, results in the order of the inputs."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

from asit.data.catalogue.inputs import InputReader, Item, named
from asit.model.inference.batching import Done, run_recordings
from asit.model.inference.tagging import Tagger, Tags


@dataclass(frozen=True)
class Tagged:
    """The labels of one input.

    Attributes:
        item: the input.
        tags: its labels, with times in seconds from the start of the item's part; None where it failed.
        failure: why there are no tags, in one line; None where there are.
    """

    item: Item
    tags: Tags | None
    failure: str | None = None


def tag_items(tagger: Tagger, items: Sequence[Item], batch: int = 16, threads: int = 0) -> Generator[Tagged]:
    """Yield the tags of each input, in their order; inputs that cannot be read get a `failure`.

    Args:
        tagger: of `AudioModel.tagger`.
        items: the inputs.
        batch: windows in a batch, of one recording or of several.
        threads: that decode and make log-mels; 0: as many as torch computes with.
    """
    pieces = partial(InputReader(items).pieces, settings=tagger.front_end.settings)
    tags: Tags | None = None
    with closing(run_recordings(tagger, len(items), pieces, batch=batch, pooled=1, threads=threads)) as results:
        for result in results:
            if not isinstance(result, Done):
                tags = result.found
                continue
            item, fault = items[result.index], result.fault
            if fault is None and tags is not None and not bool(tags.windows.isfinite().all()):
                fault = "the model's scores are not finite"
            yield Tagged(item, tags) if fault is None else Tagged(item, None, named(item.text, fault))
