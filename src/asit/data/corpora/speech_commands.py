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
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np

from asit.audio import files
from asit.data.catalogue.tables import TableRow
from asit.data.corpora.corpus import (
    FIRST,
    Corpus,
    damaged,
    existing,
    names,
    read_lines,
    recordings,
    require_whole,
    settle,
    walk,
)
from asit.errors import CatalogueError

NOISE = "_background_noise_"
SILENCE = "_silence_"
UNKNOWN = "_unknown_"

COMMANDS = ("yes", "no", "up", "down", "left", "right", "on", "off", "stop", "go")
"""The ten words of SUPERB's task; all others are ``_unknown_``."""

EXPECTED_V2 = {"train": 84_843, "validation": 9_981, "test": 11_005}
"""Clips of version 0.02, 105,829 together; test and validation as in the archive's lists."""

WORDS_V2 = {
    **{"backward": 1664, "bed": 2014, "bird": 2064, "cat": 2031, "dog": 2128, "down": 3917, "eight": 3787},
    **{"five": 4052, "follow": 1579, "forward": 1557, "four": 3728, "go": 3880, "happy": 2054, "house": 2113},
    **{"learn": 1575, "left": 3801, "marvin": 2100, "nine": 3934, "no": 3941, "off": 3745, "on": 3845, "one": 3890},
    **{"right": 3778, "seven": 3998, "sheila": 2022, "six": 3860, "stop": 3872, "three": 3727, "tree": 1759},
    **{"two": 3880, "up": 3723, "visual": 1592, "wow": 2123, "yes": 4044, "zero": 4052},
}
"""Clips of each word in version 0.02, from table I of the paper."""

EXPECTED_V1 = {"train": 51_094, "validation": 6_798, "test": 3_081}
"""Clips as SUPERB counts them: 51,088 words and the six background recordings; 6,798 words; the test archive.

Our cuts of silence for validation come on top. 6,835 words of the hash's testing part are left out.
"""

WORDS_V1 = {
    **{"bed": 1713, "bird": 1731, "cat": 1733, "dog": 1746, "down": 2359, "eight": 2352, "five": 2357, "four": 2372},
    **{"go": 2372, "happy": 1742, "house": 1750, "left": 2353, "marvin": 1746, "nine": 2364, "no": 2375, "off": 2357},
    **{"on": 2367, "one": 2370, "right": 2367, "seven": 2377, "sheila": 1734, "six": 2369, "stop": 2380},
    **{"three": 2356, "tree": 1733, "two": 2373, "up": 2375, "wow": 1745, "yes": 2377, "zero": 2376},
}
"""Clips of each word in version 0.01, 64,721 together, counted in the archive's lists and what they leave."""

SILENCE_SHARE = 0.1
"""Silent clips for each clip of the ten words, rounded up: the share of the official test archive, 257 to 2,567."""

_HASHES = 2**27 - 1  # MAX_NUM_WAVS_PER_CLASS in the data set's script
_SECONDS = 1.0


def side(name: str) -> str:
    """The split of a clip by the data set's own rule: "validation", "test" or "train".

    The SHA-1 of the speaker (the file's name before "_nohash_") modulo 2^27, in percent of 2^27 - 1: under 10
    validation, under 20 test, the rest train. Source: `which_set` in the archive's README. For all 64,721 words of
    version 0.01 it gives the archive's own lists.
    """
    speaker = _speaker(name) or os.path.basename(name)
    number = int(hashlib.sha1(speaker.encode(), usedforsecurity=False).hexdigest(), 16)
    percent = number % (_HASHES + 1) * (100.0 / _HASHES)
    return "validation" if percent < 10 else "test" if percent < 20 else "train"


def _speaker(name: str) -> str | None:
    head, mark, _ = os.path.basename(name).partition("_nohash_")
    return head if mark else None


def read_v2(
    root: str | os.PathLike[str],
    *,
    incomplete: bool = False,
    expected: Mapping[str, int] = EXPECTED_V2,
    words: Mapping[str, int] = WORDS_V2,
) -> Corpus:
    """Version 0.02: a folder a word, testing_list.txt and validation_list.txt; what is on no list is train.

    The label is the word, the classes are the words by alphabet, the group is the speaker.

    Args:
        root: the folder of the words, or the one that holds it.
        incomplete: go on where clips are missing.
        expected: clips of each split.
        words: clips of each word.

    Raises:
        CatalogueError: no such layout, clips missing, a folder that is no word, or a speaker in two splits.
    """
    name = "speech-commands-v2"
    place = settle(name, existing(root), "testing_list.txt", "validation_list.txt")
    files_of = {"test": "testing_list.txt", "validation": "validation_list.txt"}
    lists = {split: _listed(os.path.join(place, name_of)) for split, name_of in files_of.items()}
    there, notes = _words(name, place, words)
    splits = {key: split for split, keys in lists.items() for key in keys}
    twice = sorted(lists["test"].keys() & lists["validation"].keys())
    if twice:
        raise CatalogueError(
            f"{place}: {len(twice)} clips are on both lists: {names(twice)}", "each on one", "download the lists again"
        )
    speakers: defaultdict[str, set[str]] = defaultdict(set)
    for key in chain(splits, there):
        if (speaker := _speaker(key)) is not None:
            speakers[speaker].add(splits.get(key, "train"))
    parted = sorted(speaker for speaker, its in speakers.items() if len(its) > 1)
    if parted:
        told = [f"{speaker} ({', '.join(sorted(speakers[speaker]))})" for speaker in parted]
        raise CatalogueError(
            f"{place}: {len(parted)} speakers are in more than one split: {names(told)}",
            "each speaker in one of train, validation and test",
            "download testing_list.txt and validation_list.txt again",
        )
    found = Counter(splits.get(key, "train") for key in there)
    missing = [path for split in lists.values() for key, path in split.items() if key not in there]
    notes += require_whole(name, place, expected, found, missing, incomplete=incomplete, detail=_short(there, words))

    def iterate() -> Iterator[TableRow]:
        for key, path in there.items():
            full = os.path.join(place, path)
            yield TableRow(full, key.split("/")[0], splits.get(key, "train"), group=_speaker(key))

    absent = _absent(expected, found)
    return Corpus(name, place, iterate, tuple(sorted(words)), expected, dict(found), absent, tuple(missing[:5]), notes)


def read_v1(
    root: str | os.PathLike[str],
    *,
    test_root: str | os.PathLike[str] | None = None,
    incomplete: bool = False,
    seed: int = 0,
    expected: Mapping[str, int] = EXPECTED_V1,
    words: Mapping[str, int] = WORDS_V1,
) -> Corpus:
    """Version 0.01 as SUPERB's keyword spotting: ten words, ``_unknown_`` and ``_silence_``.

    - The train archive is parted by :func:`side`; its testing part is left out. All other words are ``_unknown_``.
    - Test is the separate archive of twelve folders, as it is.
    - ``_silence_`` in train are the background recordings, whole: they are longer than a clip, and training takes
      random parts of them. In validation they are cuts of one second, drawn once from `seed`, so that every
      validation sees the same: one for ten clips of the ten words (:data:`SILENCE_SHARE`). They come from the same
      recordings as in train, as in SUPERB, whose code draws them anew each time.

    The group is the speaker; silence has none.

    Args:
        root: the train archive's folder, or one that holds it (and the test archive's).
        test_root: the test archive's folder, where it is neither in root nor beside it.
        incomplete: go on where clips are missing.
        seed: of the cuts.
        expected: clips of each split; train includes the background recordings.
        words: clips of each word in the train archive.

    Raises:
        CatalogueError: no such layout, clips missing, or a folder that is no word.
    """
    name = "speech-commands-v1"
    place = settle(name, existing(root), NOISE)
    tests = _test_folder(place, existing(root), test_root)
    there, notes = _words(name, place, words)
    sides = {key: side(key) for key in there}
    noise, more = recordings(f"{NOISE}/{path}" for path in walk(os.path.join(place, NOISE)))
    tested, others = _test_clips(tests)
    notes += more + others
    found = Counter(split for split in sides.values() if split != "test")
    found.update(train=len(noise), test=len(tested))
    missing = []
    for split in ("validation", "testing"):
        path = os.path.join(place, f"{split}_list.txt")
        if os.path.isfile(path):
            listed = _listed(path)
            astray = [key for key in listed if side(key) != {"testing": "test"}.get(split, split)]
            if astray:
                notes += (f"{len(astray):,} clips of {split}_list.txt go elsewhere by their hash: {names(astray)}",)
            missing += [clip for key, clip in listed.items() if key not in there]
    notes += require_whole(name, place, expected, found, missing, incomplete=incomplete, detail=_short(there, words))
    wanted = sum(key.split("/")[0] in COMMANDS for key, split in sides.items() if split == "validation")
    cuts = _cuts([os.path.join(place, path) for path in noise.values()], math.ceil(SILENCE_SHARE * wanted), seed)
    if cuts:
        notes += (
            f"{len(cuts)} cuts of one second from the background recordings are added to validation as {SILENCE}, one "
            f"for ten clips of the {len(COMMANDS)} words as in the test archive; seed {seed}",
        )

    def iterate() -> Iterator[TableRow]:
        for key, path in there.items():
            if (split := sides[key]) != "test":
                yield TableRow(os.path.join(place, path), _class(key), split, group=_speaker(key))
        for path in noise.values():
            yield TableRow(os.path.join(place, path), SILENCE, "train")
        for path, start in cuts:
            yield TableRow(path, SILENCE, "validation", start=start, end=start + _SECONDS)
        for key, path in tested.items():
            yield TableRow(os.path.join(tests, path), key.split("/")[0], "test", group=_speaker(key))

    # Both archives may lie side by side: the catalogue counts its paths from what holds both.
    top = os.path.commonpath([place, tests])
    return Corpus(
        name,
        top,
        iterate,
        (*COMMANDS, UNKNOWN, SILENCE),
        expected,
        dict(found),
        _absent(expected, found),
        tuple(missing[:FIRST]),
        notes,
        {"silence_seed": seed, "silence_cuts": len(cuts)},
    )


def _class(key: str) -> str:
    word = key.split("/")[0]
    return word if word in COMMANDS else UNKNOWN


def _cuts(paths: list[str], count: int, seed: int) -> list[tuple[str, float]]:
    """Where `count` cuts begin, each from a recording drawn evenly, in whole milliseconds."""
    if not paths or not count:
        return []
    room = np.array([max(0.0, files.probe(path).seconds - _SECONDS) for path in paths])
    rng = np.random.default_rng([seed, count])
    which = rng.integers(0, len(paths), count)
    starts = np.floor(rng.random(count) * room[which] * 1000) / 1000
    return sorted({(paths[i], float(start)) for i, start in zip(which.tolist(), starts.tolist(), strict=True)})


def _test_folder(place: str, root: str, given: str | os.PathLike[str] | None) -> str:
    """The test archive's folder: as given, in root, or beside the train archive's."""
    if given is not None:
        return settle("speech-commands-v1 (test archive)", existing(given), SILENCE, UNKNOWN)
    for top in (root, os.path.dirname(place)):
        for name in sorted(os.listdir(top)):
            folder = os.path.join(top, name)
            if all(os.path.isdir(os.path.join(folder, mark)) for mark in (SILENCE, UNKNOWN)) and folder != place:
                return folder
    both = os.path.isdir(os.path.join(place, UNKNOWN))
    raise CatalogueError(
        f"both archives of version 0.01 are unpacked into {place}"
        if both
        else f"the test archive of version 0.01 is neither in {root} nor beside {place}",
        f"a folder of its own for speech_commands_test_set_v0.01, with {SILENCE}, {UNKNOWN} and the ten words",
        "unpack each archive into its own folder" if both else "unpack it there, or name its folder: --test-root",
    )


def _test_clips(place: str) -> tuple[dict[str, str], tuple[str, ...]]:
    there, notes = recordings(path for path in walk(place) if path.count("/") == 1)
    wrong = sorted({key.split("/")[0] for key in there} - {*COMMANDS, UNKNOWN, SILENCE})
    if wrong:
        raise CatalogueError(
            f"{place} has folders that are none of the twelve classes: {names(wrong)}",
            f"{', '.join(COMMANDS)}, {UNKNOWN} and {SILENCE}",
            "give the folder of speech_commands_test_set_v0.01",
        )
    return there, notes


def _words(name: str, place: str, words: Mapping[str, int]) -> tuple[dict[str, str], tuple[str, ...]]:
    """The clips in folders of words; a folder of recordings that is no word is refused."""
    there, notes = recordings(path for path in walk(place) if path.count("/") == 1 and not path.startswith("_"))
    strange = sorted({key.split("/")[0] for key in there} - words.keys())
    if strange:
        later = strange and set(strange) <= WORDS_V2.keys()
        raise CatalogueError(
            f"{place} has folders that are no word of {name}: {names(strange)}",
            f"the {len(words)} words of {name}",
            "this looks like version 0.02: asit catalogue speech-commands-v2" if later else "move them elsewhere",
        )
    return there, notes


def _short(there: Iterable[str], words: Mapping[str, int]) -> str:
    found = Counter(key.split("/")[0] for key in there)
    wrong = [f"{word} {found[word]:,} of {count:,}" for word, count in words.items() if found[word] != count]
    return f"words that differ: {names(wrong)}" if wrong else ""


def _absent(expected: Mapping[str, int], found: Mapping[str, int]) -> int:
    return sum(max(0, count - found.get(split, 0)) for split, count in expected.items())


def _listed(path: str) -> dict[str, str]:
    """A list's clips: name without ending -> name as it stands there."""
    listed = {}
    for number, line in read_lines(path):
        if line.count("/") != 1:
            raise damaged(path, number, f"'{line[:40]}' is not WORD/FILE")
        listed[os.path.splitext(line)[0]] = line
    return listed
