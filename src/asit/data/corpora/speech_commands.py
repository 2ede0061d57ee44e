"""Speech Commands: version 0.02 with its 35 words, and version 0.01 as the twelve classes of SUPERB.

Sources: Warden, "Speech Commands: A Dataset for Limited-Vocabulary Speech Recognition", 2018, and the archives' own
README and lists; Yang et al., "SUPERB", 2021, and the keyword-spotting task of the public code s3prl.
"""

# ruff: noqa: PTH112, PTH113, PTH118, PTH119, PTH120, PTH122, PTH208

from __future__ import annotations

import hashlib
import math
import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Mapping
from itertools import chain

import numpy as np

from asit.audio import files
from asit.data.catalogue.tables import TableRow
from asit.data.corpora import corpus
from asit.errors import CatalogueError

NOISE = "_background_noise_"
SILENCE = "_silence_"
UNKNOWN = "_unknown_"

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten words of SUPERB's task; all others are ``_unknown_``."""

EXPECTED_V2 = {"train": 84_843, "validation": 9_981, "test": 11_005}
"""Clips of version 0.02, 105,829 together; test and validation as in the archive's lists."""

EXPECTED_V1 = {"train": 51_094, "validation": 6_798, "test": 3_081}
"""Clips as SUPERB counts them: 51,088 words and the six background recordings; 6,798 words; the test archive.

Our silent validation clips come on top. 6,835 words of the hash's testing part are left out.
"""

WORDS_V1 = (
    *COMMANDS,
    *("bed", "bird", "cat", "dog", "eight", "five", "four", "happy", "house", "marvin", "nine", "one", "seven"),
    *("sheila", "six", "three", "tree", "two", "wow", "zero"),
)
"""The 30 words of version 0.01."""

WORDS_V2 = (*WORDS_V1, "backward", "follow", "forward", "learn", "visual")
"""The 35 words of version 0.02."""

SILENCE_SHARE = 0.1
"""Silent clips for each clip of the ten words, rounded up: as in the official test archive, 257 to 2,567."""

_HASHES = 2**27 - 1  # MAX_NUM_WAVS_PER_CLASS in the data set's script
_SECONDS = 1.0


def split_of(name: str) -> str:
    """Return the split of a clip by the data set's own rule: "validation", "test" or "train".

    The SHA-1 of the speaker (the file's name before "_nohash_") modulo 2^27, in percent of 2^27 - 1: below 10
    validation, below 20 test, the rest train. Source: `which_set` in the archive's README. For all 64,721 words of
    version 0.01 it agrees with the archive's lists.
    """
    speaker = _speaker(name) or os.path.basename(name)
    number = int(hashlib.sha1(speaker.encode(), usedforsecurity=False).hexdigest(), 16)
    percent = number % (_HASHES + 1) * (100.0 / _HASHES)
    return "validation" if percent < 10 else "test" if percent < 20 else "train"


def _speaker(name: str) -> str | None:
    head, separator, _ = os.path.basename(name).partition("_nohash_")
    return head if separator else None


def read_v2(root: str | os.PathLike[str], *, incomplete: bool = False) -> corpus.Corpus:
    """Read version 0.02: a folder a word, testing_list.txt and validation_list.txt; what is on no list is train.

    The label is the word, the classes are the words by alphabet, the group is the speaker.

    Args:
        root: the folder of the words, or its parent.
        incomplete: accept missing clips.

    Raises:
        CatalogueError: no such layout, clips missing, a folder that is no word, or a speaker in two splits.
    """
    name = "speech-commands-v2"
    list_of = {"test": "testing_list.txt", "validation": "validation_list.txt"}
    folder = corpus.find_folder(name, corpus.existing(root), *list_of.values())
    lists = {split: _listed(os.path.join(folder, file)) for split, file in list_of.items()}
    paths, notes = _clips(name, folder, WORDS_V2)
    splits = {key: split for split, keys in lists.items() for key in keys}
    if twice := sorted(lists["test"].keys() & lists["validation"].keys()):
        found = f"{folder}: {len(twice)} clips are on both lists: {corpus.names(twice)}"
        raise CatalogueError(found, "each on one", "download the lists again")
    speakers: defaultdict[str, set[str]] = defaultdict(set)
    for key in chain(splits, paths):
        if (speaker := _speaker(key)) is not None:
            speakers[speaker].add(splits.get(key, "train"))
    if parted := [f"{who} ({', '.join(sorted(its))})" for who, its in sorted(speakers.items()) if len(its) > 1]:
        problem = f"{folder}: {len(parted)} speakers are in more than one split: {corpus.names(parted)}"
        wanted = "each speaker in one of train, validation and test"
        raise CatalogueError(problem, wanted, "download testing_list.txt and validation_list.txt again")
    counts = Counter(splits.get(key, "train") for key in paths)
    missing = [path for split in lists.values() for key, path in split.items() if key not in paths]
    notes += corpus.require_complete(name, folder, (counts, EXPECTED_V2), missing, incomplete=incomplete)

    def rows() -> Iterator[TableRow]:
        for key, path in paths.items():
            full = os.path.join(folder, path)
            yield TableRow(path=full, label=key.split("/")[0], split=splits.get(key, "train"), group=_speaker(key))

    return corpus.Corpus(
        name=name,
        root=folder,
        rows=rows,
        classes=tuple(sorted(WORDS_V2)),
        expected=EXPECTED_V2,
        found=dict(counts),
        notes=notes,
    )


def read_v1(
    root: str | os.PathLike[str],
    *,
    test_root: str | os.PathLike[str] | None = None,
    incomplete: bool = False,
    seed: int = 0,
) -> corpus.Corpus:
    """Read version 0.01 as SUPERB's keyword spotting: ten words, ``_unknown_`` and ``_silence_``.

    - The train archive is split by :func:`split_of`; its testing part is left out. All other words are ``_unknown_``.
    - Test is the separate archive of twelve folders, as it is.
    - ``_silence_`` in train are the complete background recordings, of which training takes random parts. In
      validation it is one-second parts of the same recordings, drawn once from `seed`, one for ten clips of the ten
      words (:data:`SILENCE_SHARE`). SUPERB's code draws them again in each validation.

    The group is the speaker; silence has none.

    Args:
        root: the train archive's folder, or one that holds it (and the test archive's).
        test_root: the test archive's folder, if it is neither in root nor beside it.
        incomplete: accept missing clips.
        seed: of the silent validation clips.

    Raises:
        CatalogueError: no such layout, clips missing, or a folder that is no word.
    """
    name = "speech-commands-v1"
    folder = corpus.find_folder(name, corpus.existing(root), NOISE)
    tests = _test_folder(folder, corpus.existing(root), test_root)
    paths, notes = _clips(name, folder, WORDS_V1)
    splits = {key: split_of(key) for key in paths}
    noise, more = corpus.recordings(f"{NOISE}/{path}" for path in corpus.walk(os.path.join(folder, NOISE)))
    tested, others = _clips(f"the test archive of {name}", tests, (*COMMANDS, UNKNOWN, SILENCE))
    found = Counter(split for split in splits.values() if split != "test")
    found.update(train=len(noise), test=len(tested))
    missing, astray = _compare_lists(folder, paths)
    notes += more + others + astray
    notes += corpus.require_complete(name, folder, (found, EXPECTED_V1), missing, incomplete=incomplete)
    wanted = sum(key.split("/")[0] in COMMANDS for key, split in splits.items() if split == "validation")
    silent = _draw_silence([os.path.join(folder, path) for path in noise.values()], wanted, seed)
    if silent:
        notes += (
            f"{len(silent)} one-second parts of the background recordings are added to validation as {SILENCE}, one "
            f"for ten clips of the {len(COMMANDS)} words as in the test archive; seed {seed}",
        )

    def rows() -> Iterator[TableRow]:
        for key, path in paths.items():
            if (split := splits[key]) != "test":
                word = key.split("/")[0]
                label = word if word in COMMANDS else UNKNOWN
                yield TableRow(path=os.path.join(folder, path), label=label, split=split, group=_speaker(key))
        for path in noise.values():
            yield TableRow(path=os.path.join(folder, path), label=SILENCE, split="train")
        for path, start in silent:
            yield TableRow(path=path, label=SILENCE, split="validation", start=start, end=start + _SECONDS)
        for key, path in tested.items():
            yield TableRow(path=os.path.join(tests, path), label=key.split("/")[0], split="test", group=_speaker(key))

    return corpus.Corpus(
        name=name,
        root=os.path.commonpath([folder, tests]),  # both archives may be side by side
        rows=rows,
        classes=(*COMMANDS, UNKNOWN, SILENCE),
        expected=EXPECTED_V1,
        found=dict(found),
        notes=notes,
        facts={"silence_seed": seed, "silence_cuts": len(silent)},
    )


def _compare_lists(folder: str, paths: Mapping[str, str]) -> tuple[list[str], tuple[str, ...]]:
    """Compare the archive's lists with the clips: those missing, and notes on clips whose hash gives another split."""
    missing, notes = list[str](), list[str]()
    for split in ("validation", "testing"):
        path = os.path.join(folder, f"{split}_list.txt")
        if os.path.isfile(path):
            listed = _listed(path)
            if astray := [key for key in listed if split_of(key) != {"testing": "test"}.get(split, split)]:
                text = f"{len(astray):,} clips of {split}_list.txt are in another split by their hash: "
                notes.append(text + corpus.names(astray))
            missing += [clip for key, clip in listed.items() if key not in paths]
    return missing, tuple(notes)


def _draw_silence(paths: list[str], words: int, seed: int) -> list[tuple[str, float]]:
    """Draw recording and start, s, to the millisecond, of the silent clips for so many clips of words."""
    count = math.ceil(SILENCE_SHARE * words)
    if not paths or not count:
        return []
    room = np.array([max(0.0, files.probe(path).seconds - _SECONDS) for path in paths])
    rng = np.random.default_rng([seed, count])
    which = rng.integers(0, len(paths), count)
    starts = np.floor(rng.random(count) * room[which] * 1000) / 1000
    return sorted({(paths[i], float(start)) for i, start in zip(which.tolist(), starts.tolist(), strict=True)})


def _test_folder(folder: str, root: str, given: str | os.PathLike[str] | None) -> str:
    """Return the test archive's folder: as given, in root, or beside the train archive's."""
    if given is not None:
        return corpus.find_folder("speech-commands-v1 (test archive)", corpus.existing(given), SILENCE, UNKNOWN)
    for top in (root, os.path.dirname(folder)):
        for name in sorted(os.listdir(top)):
            found = os.path.join(top, name)
            if all(os.path.isdir(os.path.join(found, inner)) for inner in (SILENCE, UNKNOWN)) and found != folder:
                return found
    both = os.path.isdir(os.path.join(folder, UNKNOWN))
    raise CatalogueError(
        f"both archives of version 0.01 are unpacked into {folder}"
        if both
        else f"the test archive of version 0.01 is neither in {root} nor beside {folder}",
        f"a folder of its own for speech_commands_test_set_v0.01, with {SILENCE}, {UNKNOWN} and the ten words",
        "unpack each archive into its own folder" if both else "unpack it there, or name its folder: --test-root",
    )


def _clips(name: str, folder: str, classes: Collection[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Return the clips in the folders of classes, and notes; another folder of recordings is refused."""
    found = (path for path in corpus.walk(folder) if path.count("/") == 1 and not path.startswith(NOISE))
    paths, notes = corpus.recordings(found)
    if wrong := sorted({key.split("/")[0] for key in paths}.difference(classes)):
        later = SILENCE not in classes and set(wrong) <= set(WORDS_V2)
        problem = f"{folder} has folders that are no class of {name}: {corpus.names(wrong)}"
        fix = "this looks like version 0.02: asit catalogue speech-commands-v2" if later else "move them elsewhere"
        raise CatalogueError(problem, f"the {len(classes)} classes of {name}", fix)
    return paths, notes


def _listed(path: str) -> dict[str, str]:
    """Map the clips of a list from name without suffix to name."""
    listed = {}
    for number, line in corpus.read_lines(path):
        if line.count("/") != 1:
            raise corpus.damaged(path, number, f"'{line[:40]}' is not WORD/FILE")
        listed[os.path.splitext(line)[0]] = line
    return listed
