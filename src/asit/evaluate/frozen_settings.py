"""Settings of frozen evaluations: which features, which probes or trials, which splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from asit.data.catalogue.splits import TEST, TRAIN, VALIDATION
from asit.errors import ConfigError, suggestion

Probe = Literal["linear", "knn", "prototype"]
Pooling = Literal["class", "mean", "class+mean", "time-mean", "mel-mean", "mean+std"]
POOLINGS: tuple[Pooling, ...] = get_args(Pooling)


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What probes and verification have in common.

    Attributes:
        pooling: vectors that linear and k-NN probes read, and verification compares.
        baselines: also evaluate the same architecture untrained, and log-mel statistics.
        seed: of draws, folds, bootstrap and the untrained weights.
        train, validation, test: names of splits.
        seconds: length that every clip is cut or padded to; None: clips as they are.
        precision: arithmetic of the encoder.
        bad_files: share of clips that may be unreadable.
    """

    pooling: tuple[Pooling, ...] = ("class+mean",)
    baselines: bool = False
    seed: int = 0
    train: tuple[str, ...] = TRAIN
    validation: tuple[str, ...] = VALIDATION
    test: tuple[str, ...] = TEST
    seconds: float | None = None
    precision: Literal["float32", "bf16"] = "float32"
    bad_files: float = 0.1


@dataclass(frozen=True, kw_only=True)
class FrozenSettings(FeatureSettings):
    """Settings of probes.

    Attributes:
        probes: which are fitted; prototype reads patch tokens.
        shares, per_class: parts of the training labels, each drawn once per seed; neither: all labels.
        seeds: number of draws, the first with `seed`.
        fold: a fold to test on; "all": each in turn; None: the splits, or all folds where there are no splits.
        kind: whether clips have one label or several.
        missing: whether clips without a label are an error or left out.
        unseen: whether test clips of classes without a training clip are an error or left out.
        allow_shared_groups: a group may be in several splits, as in speaker identification.
        clips: about so many clips of each split, drawn with the seed.
    """

    probes: tuple[Probe, ...] = ("linear", "knn")
    shares: tuple[float, ...] = ()
    per_class: tuple[int, ...] = ()
    seeds: int = 1
    fold: str | None = None
    kind: Literal["auto", "single", "multi"] = "auto"
    missing: Literal["error", "skip"] = "error"
    unseen: Literal["error", "skip"] = "error"
    allow_shared_groups: bool = False
    clips: int | None = None

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            ConfigError: names them.
        """
        choose("probe", self.probes, get_args(Probe))
        choose("pooling", self.pooling, POOLINGS)
        wrong = [f"{share:g}" for share in self.shares if not 0 < share <= 1]
        wrong += [str(count) for count in self.per_class if count < 1]
        if wrong:
            expected = "shares above 0 up to 1, or clips of each class from 1"
            raise ConfigError(f"parts of the labels: {', '.join(wrong)}", expected, "change these")
        few_clips = self.clips is not None and self.clips < 2
        if self.seeds < 1 or few_clips or (self.seconds is not None and self.seconds <= 0):
            found = f"seeds {self.seeds}, clips {self.clips}, seconds {self.seconds}"
            raise ConfigError(found, "at least one seed, two clips in a split, a length above 0", "change these")


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


def choose(name: str, given: Sequence[str], known: Sequence[str]) -> None:
    """Refuse a choice that is empty, or has a name that is unknown or repeated.

    Raises:
        ConfigError: names it, and the known names.
    """
    wrong = [value for value in given if value not in known]
    if not wrong and given and len(set(given)) == len(given):
        return
    hint = suggestion(wrong[0], known, " (did you mean {}?)") if wrong else ""
    raise ConfigError(
        f"{name} {', '.join(wrong or given) or 'none'}{hint}",
        f"one or more of {', '.join(known)}, each once",
        f"give --{name} with these names separated by commas",
    )
