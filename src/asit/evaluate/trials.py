"""Verification trials: drawn from speaker labels or read from a list, and the cosine score of each.

Letters: N clips, n trials, D width.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError, CatalogueError
from asit.io import local_files

MAX_TRIALS = 100_000
"""Maximum number of trials drawn, by default."""
TRIAL_BLOCK = 2**16
"""Trials scored at a time, so that two gathered blocks of embeddings fit in memory."""

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]


class Trials(NamedTuple):
    """Pairs of clips: indices `first` and `second` (n,), and `same` (n,), whether both are of one speaker."""

    first: Indices
    second: Indices
    same: NDArray[np.bool_]


def trials_from_labels(labels: ArrayLike, seed: int, most: int = MAX_TRIALS) -> Trials:
    """Pair clips into trials: every pair where there are at most `most`, else a seeded balanced draw.

    Half of a draw are same-speaker pairs, half different-speaker pairs, each uniform over its pairs and without
    repetition; where there are too few of one kind, all of them are taken and the other kind fills up. Pairs are
    sorted by first clip, then second; first < second.

    Args:
        labels: (N,) speaker of each clip.
        seed: of the draw.
        most: maximum number of trials.

    Raises:
        AsitError: one speaker only, no speaker with two clips, or `most` under 2.
    """
    speakers, code = np.unique(np.asarray(labels), return_inverse=True)
    sizes = np.bincount(code, minlength=len(speakers))
    if len(speakers) < 2 or sizes.max() < 2 or most < 2:
        raise AsitError(
            f"{len(code)} clips of {len(speakers)} speakers, {int((sizes > 1).sum())} of them with two clips or more; "
            f"{most} trials at most",
            "two speakers, one of them with two clips, and room for a pair of the same and one of different speakers",
            "check the column that names the speaker",
        )
    # Clips in speaker order: position q has, before it, `start` clips of other speakers and q - start of its own.
    order = np.argsort(code, kind="stable")
    start = np.repeat(np.cumsum(sizes) - sizes, sizes)
    own, others = np.arange(len(order)) - start, start
    all_same, all_different = int(own.sum()), int(others.sum())
    same_wanted, different_wanted = all_same, all_different
    if all_same + all_different > most:
        same_wanted = min(all_same, max(most // 2, most - all_different))
        different_wanted = min(all_different, most - same_wanted)
    rng = np.random.default_rng([seed, len(order)])
    same_q, same_rest = _pairs(own, same_wanted, rng)
    different_q, different_rest = _pairs(others, different_wanted, rng)
    left = np.concatenate([order[start[same_q] + same_rest], order[different_rest]])
    right = np.concatenate([order[same_q], order[different_q]])
    first, second = np.minimum(left, right), np.maximum(left, right)
    same = np.arange(len(first)) < same_wanted
    sequence = np.lexsort((second, first))
    return Trials(first[sequence].astype(np.int64), second[sequence].astype(np.int64), same[sequence])


def _pairs(partners: Indices, wanted: int, rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Draw `wanted` of all pairs (position, one of its partners[position]), uniformly without repetition."""
    ends = np.cumsum(partners)
    total = int(ends[-1])
    picked = np.arange(total) if wanted == total else rng.choice(total, wanted, replace=False, shuffle=False)
    position = np.searchsorted(ends, picked, side="right")
    return position, picked - (ends[position] - partners[position])


def cosine_scores(table: Floats, a: Indices, b: Indices) -> Floats:
    """Compute the cosine (n,) of the embeddings, of a table (N, D), of each trial's two clips.

    Raises:
        AsitError: embeddings that are zero or not finite.
    """
    length = np.sqrt(np.einsum("nd,nd->n", table, table, dtype=np.float64))
    bad = np.flatnonzero(~np.isfinite(length) | (length == 0))
    if len(bad):
        raise AsitError(
            f"{len(bad)} of {len(table)} embeddings are zero or not finite, the first is that of clip {bad[0]}",
            "finite embeddings other than zero",
            "look at that clip and at the weights",
        )
    unit = (table / length[:, None]).astype(np.float32)
    scores = np.empty(len(a), np.float32)
    for start in range(0, len(a), TRIAL_BLOCK):
        block = slice(start, start + TRIAL_BLOCK)
        scores[block] = np.einsum("nd,nd->n", unit[a[block]], unit[b[block]])
    return scores


def read_trials(path: Path, catalogue: Catalogue, root: str | None = None) -> Trials:
    """A list of trials in VoxCeleb's format: "1 id10270/a.wav id10270/b.wav", 1 for the same speaker, 0 for another.

    Args:
        path: the list.
        catalogue: holds the clips.
        root: folder that the paths count from; None: the catalogue's.

    Raises:
        CatalogueError: no such list, a damaged line (with its number), or clips that the catalogue does not hold.
    """
    top = os.path.abspath(root if root is not None else catalogue.root)  # noqa: PTH100
    try:
        with local_files.open_text(path) as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise CatalogueError(f"the trials {path} cannot be read: {error}", "a text file", "check the path") from None
    same: list[bool] = []
    names: list[str] = []
    for number, line in enumerate(lines, 1):
        match line.split():
            case []:
                continue
            case ["0" | "1" as kind, *paths] if len(paths) == 2:
                same.append(kind == "1")
                names += [os.path.normpath(local_files.locate(name, top)) for name in paths]
            case _:
                found, wanted = (
                    f"{path}, line {number}: {line.strip()[:60]!r}",
                    "1 or 0 and two paths without white space",
                )
                raise CatalogueError(found, wanted, "correct this line")
    if not same:
        raise CatalogueError(f"{path} holds no trials", "lines such as: 1 a.wav b.wav", "check the file")
    rows = {clip.path: i for i in range(len(catalogue)) if not (clip := catalogue[i]).start}
    lost = [name for name in dict.fromkeys(names) if name not in rows]
    if lost:
        raise CatalogueError(
            f"{len(lost)} of {len(set(names))} clips of the trials are not in the catalogue: {', '.join(lost[:3])}",
            f"paths below {top}",
            "pass the folder that the list's paths are relative to as --trials-root, or add these clips",
        )
    pairs = np.array([rows[name] for name in names], np.int64).reshape(-1, 2)
    return Trials(pairs[:, 0], pairs[:, 1], np.array(same, bool))
