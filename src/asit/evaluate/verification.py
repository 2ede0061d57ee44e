"""Verify speakers with frozen embeddings: trials, and EER and minDCF of the cosine between the embeddings of two clips.

Letters: N clips, n trials, D width.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from asit.data.catalogue.catalogue import Catalogue
from asit.data.catalogue.labels import list_hash
from asit.data.catalogue.splits import TRAIN, make_splits, rows_of_splits
from asit.errors import AsitError, CatalogueError
from asit.evaluate.feature_cache import Store
from asit.evaluate.feature_readers import LOG_MEL, LOG_MEL_STATISTICS, MODEL, POOLINGS, FeatureSettings, choose, pooled
from asit.evaluate.frozen import collect_features
from asit.evaluate.result_records import bracketed, text_table
from asit.evaluate.verification_metrics import verification_metrics
from asit.io import local_files
from asit.model.audio_model import AudioModel
from asit.runtime import World

log = logging.getLogger(__name__)

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]

CENTRING_CLIPS = 2000
"""Maximum number of training clips whose mean is subtracted, drawn with the seed; more would not change it."""


TRIAL_BLOCK = 2**16
"""Trials scored at a time, so that two gathered blocks of embeddings fit in memory."""


@dataclass(frozen=True, kw_only=True)
class VerificationSettings(FeatureSettings):
    """Settings of verification.

    Attributes:
        trials: list of trials; None: drawn from the test split.
        root: folder that the list's paths are relative to; None: the catalogue's.
        most: maximum number of trials drawn.
        by: what two clips of one speaker share: "group" or "label"; "auto": the group where the catalogue has groups.
    """

    trials: str | None = None
    root: str | None = None
    most: int = 100_000
    by: Literal["auto", "group", "label"] = "auto"


class Trials(NamedTuple):
    """Pairs of clips: indices `first` and `second` (n,), and `same` (n,), whether both are of one speaker."""

    first: Indices
    second: Indices
    same: NDArray[np.bool_]


def trials_from_labels(labels: ArrayLike, seed: int, most: int) -> Trials:
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


def verification_text(records: Sequence[Mapping[str, Any]]) -> str:
    """Make a table with a row for each record."""
    first = records[0]
    lines = [["encoder", "embedding", *first["metrics"]]]
    for record in records:
        cells = [f"{m['value']:.4f}{bracketed(m['interval'])}" for m in record["metrics"].values()]
        lines.append([record["encoder"], record["features"], *cells])
    legend = (
        f"{first['trials']} trials, {first['same_trials']} of them of one {first['by']}, over {first['clips']} "
        f"clips (list {first['list']}); in brackets the 95 % interval over {first['bootstrap']['unit']}s"
    )
    return "\n".join([*text_table(lines), legend])


def verify(
    model: AudioModel, catalogue: Catalogue, settings: VerificationSettings, *, world: World, store: Store | None = None
) -> list[dict[str, Any]] | None:
    """Compute EER and minDCF of the cosine between embeddings centred on the mean of the training split.

    Embeddings of one encoder share a large common part, which the mean of clips that are not scored removes; without
    a training split they are compared as they are. Every process of the world calls this; the main one gets a record
    for each encoder and pooling (docs/evaluate.md), the others None.

    Raises:
        ConfigError: an unknown pooling.
        CatalogueError: no speakers, no test split, or a list of trials that cannot be read or names unknown clips.
        AsitError: trials of one kind only.
    """
    choose("pooling", settings.pooling, POOLINGS)
    train, test = _splits(catalogue, settings)
    speakers, by = _speakers(catalogue, settings)
    known = np.array([name is not None for name in speakers], bool)
    listed = None if settings.trials is None else read_trials(Path(settings.trials), catalogue, settings.root)
    scored = test[known[test]] if listed is None else np.unique(np.concatenate([listed.first, listed.second]))
    train = np.setdiff1d(train, scored)
    if len(train) > CENTRING_CLIPS:
        train = np.sort(np.random.default_rng([settings.seed, 4]).permutation(train)[:CENTRING_CLIPS])
    used = np.union1d(train, scored)
    found = collect_features(model, catalogue, used, settings, pooling=settings.pooling, world=world, store=store)
    if found is None:
        return None
    index = np.full(len(catalogue), -1, np.int64)  # of each clip in the features; -1: unreadable
    index[used[found.kept]] = np.arange(len(found.kept))
    unreadable = int((index[scored] < 0).sum())
    scored, train = scored[index[scored] >= 0], train[index[train] >= 0]
    if listed is not None:
        both = (index[listed.first] >= 0) & (index[listed.second] >= 0)
        if not both.all():
            log.warning("%d of %d trials have a clip that cannot be read and are left out", (~both).sum(), len(both))
        trials = Trials(listed.first[both], listed.second[both], listed.same[both])
    else:
        drawn = trials_from_labels(speakers[scored].astype(str), settings.seed, settings.most)
        trials = Trials(scored[drawn.first], scored[drawn.second], drawn.same)
    pairs = None
    if known[trials.first].all() and known[trials.second].all():
        pairs = speakers[trials.first].astype(str), speakers[trials.second].astype(str)
    if not len(train):
        log.info("no training split: embeddings are compared without centring")
    records = []
    for encoder in found.vectors:
        for kind in (LOG_MEL,) if encoder == LOG_MEL_STATISTICS else settings.pooling:
            table = pooled(found.vectors[encoder], kind)
            if len(train):
                table = table - table[index[train]].mean(0, dtype=np.float64).astype(np.float32)
            cosines = cosine_scores(table, index[trials.first], index[trials.second])
            records.append(
                {
                    "task": str(catalogue.header.get("task") or ""),
                    "kind": "verification",
                    "split": "test" if settings.trials is None else Path(settings.trials).name,
                    "weights": f"cosine, {kind}" + ("" if encoder == MODEL else f", {encoder}"),
                    "step": None,
                    "clips": len(scored),
                    "list": list_hash(catalogue.ids(scored)),
                    "unreadable": unreadable,
                    "encoder": encoder,
                    "features": kind,
                    "by": by,
                    "centred": bool(len(train)),
                    **verification_metrics(cosines, trials.same, speakers=pairs, seed=settings.seed),
                }
            )
    return records


def _splits(catalogue: Catalogue, settings: VerificationSettings) -> tuple[Indices, Indices]:
    """Return the rows of the training split, which may be empty, and of the test split: without splits, all."""
    empty = np.empty(0, np.int64)
    if catalogue.column("split") is None:
        return empty, np.arange(len(catalogue))
    test = empty
    if settings.trials is None:
        test = rows_of_splits(catalogue, settings.test)
    try:
        train = make_splits(catalogue, train=settings.train, validation=settings.validation, test=settings.test).train
    except CatalogueError:
        if settings.train != TRAIN:  # named by the user
            raise
        train = empty
    return train, test


def _speakers(catalogue: Catalogue, settings: VerificationSettings) -> tuple[NDArray[np.object_], str]:
    """Return each clip's speaker or None (N,), and the column used."""
    column: str = settings.by
    if column == "auto":
        column = "label" if catalogue.column("group") is None else "group"
    if catalogue.column(column) is None:
        if settings.trials is not None and settings.by == "auto":
            column = "speaker"  # a list of trials needs no column
        else:
            raise CatalogueError(
                f"the catalogue has no {column}s to verify by",
                "a column group (or speaker), or label",
                "add it, or give a list of trials with --trials",
            )
    return catalogue.texts(column), column
