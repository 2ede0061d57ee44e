"""Labels, splits and small training sets against loops, and the errors that name what is wrong."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.catalogue.labels import Labels, balanced_weights, inverse_weights, list_hash, read_labels, subsample
from asit.data.catalogue.splits import Splits, check_splits, drop_unseen_classes, folds, make_splits
from asit.errors import CatalogueError

NAMES = ["ant", "bee", "cat", "dog"]
TEXTS = st.lists(st.lists(st.sampled_from(NAMES), min_size=1, max_size=4).map(";".join), min_size=2, max_size=20)


def listed(labels: Sequence[str | None], header: dict[str, Any] | None = None, **more: Sequence[Any]) -> Catalogue:
    """A catalogue of clips 0.wav, 1.wav ... with these labels, and other columns."""
    clips = [
        Clip(f"/d/{i}.wav", 1.0, 8000, 1, label, **{name: column[i] for name, column in more.items()})
        for i, label in enumerate(labels)
    ]
    return Catalogue.from_clips(clips, root="/d", header=header)


def error_of(call: Callable[[], Any]) -> str:
    with pytest.raises(CatalogueError) as error:
        call()
    return str(error.value)


@pytest.fixture
def notes(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO")
    return caplog


# labels


def test_single_labels() -> None:
    made = read_labels(listed(["dog", "cat", " dog ", "ant"]))
    assert (made.names, made.multi, made.single.tolist()) == (("ant", "cat", "dog"), False, [2, 1, 2, 0])
    assert (made.counts().tolist(), made.counts([0, 2]).tolist()) == ([1, 1, 2], [0, 0, 2])
    assert made.matrix([3, 0]).tolist() == [[1, 0, 0], [0, 0, 1]]
    assert made.take([3, 0]).single.tolist() == [0, 2]


def test_classes_are_compared_as_identifiers(caplog: pytest.LogCaptureFixture) -> None:
    made = listed(["1", "1.0", "e\u0301 b", "é  b", None])
    assert read_labels(made, missing="skip").names == ("1", "é b")
    given = read_labels(made, classes=["e\u0301 b", "1.0"], missing="skip")
    assert given.names == ("e\u0301 b", "1.0")
    assert given.single.tolist() == [1, 1, 0, 0, -1]
    assert "listed twice: é, e\u0301" in error_of(
        lambda: read_labels(made, classes=["é", "e\u0301", "1"], missing="skip")
    )
    assert read_labels(listed(["Dog", "dog", "cat"])).names == ("Dog", "cat", "dog")
    assert caplog.messages == ["classes that differ only in upper and lower case: 'Dog', 'dog'"]


def test_names_that_are_read_as_weights_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    text = error_of(lambda: read_labels(listed(["call:0", "call:1"])))
    assert "the same label: call" in text
    assert "such as 'call:0', 'call:1' are read as weights of 1 classes; if they are names, replace ':' by '_'" in text
    assert read_labels(listed(["call:0", "call:1", "song:0", "song:1"])).names == ("call", "song")
    (message,) = caplog.messages
    assert message.startswith("labels such as 'call:0', 'call:1', 'song:0', 'song:1' are read as weights of 2 classes")
    read_labels(listed(["call:0.5", "song:1", "call:0"]))
    read_labels(listed(["call:1.0", "song:0.0"]))  # as a JSONL's object of names and weights becomes
    assert len(caplog.messages) == 1


def test_several_and_soft_labels() -> None:
    made = read_labels(listed(["dog;cat", "ant:0.25;dog", "cat;;cat; ", "dog:0", "Clock: 12 h:1e-3"]))
    assert made.multi
    assert made.names == ("Clock: 12 h", "ant", "cat", "dog")
    expected = [[0, 0, 1, 1], [0, 0.25, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0], [1e-3, 0, 0, 0]]
    np.testing.assert_allclose(made.matrix(np.arange(5)), expected, rtol=1e-6)
    assert made.known.all()
    assert made.indptr.tolist() == [0, 2, 4, 5, 5, 6]
    assert read_labels(listed(["dog", "cat"]), "multi").multi


@settings(max_examples=60, deadline=None)
@given(TEXTS)
def test_labels_against_a_loop(texts: list[str]) -> None:
    made = read_labels(listed(texts), classes=NAMES)
    for row, text in enumerate(texts):
        assert made.matrix([row])[0].tolist() == [float(name in text.split(";")) for name in NAMES]
    assert made.multi == any(len({*text.split(";")}) > 1 for text in texts)
    assert made.counts().tolist() == [sum(name in text.split(";") for text in texts) for name in NAMES]


def test_the_order_of_classes() -> None:
    texts, header = ["b", "a", "c"], {"classes": ["c", "b", "a", "x"]}
    assert read_labels(listed(texts)).names == ("a", "b", "c")
    assert read_labels(listed(texts, header)).names == ("c", "b", "a", "x")
    made = read_labels(listed(texts, header), classes=("b", "c", "a"))
    assert (made.names, made.single.tolist()) == (("b", "c", "a"), [0, 2, 1])
    # Texts that no clip has any more do not count.
    part = read_labels(listed(["a", "b", "c;d", "x:7"]).subset([0, 1]))
    assert (part.names, part.multi) == (("a", "b"), False)


def test_clips_without_a_label(notes: pytest.LogCaptureFixture) -> None:
    some = listed(["a", None, "b", ";", "a"])
    assert "2 of 5 clips have no label: 1.wav, 3.wav" in error_of(lambda: read_labels(some))
    made = read_labels(some, missing="skip")
    assert made.known.tolist() == [True, False, True, False, True]
    assert made.single.tolist() == [0, -1, 1, -1, 0]
    assert "none of the 2 clips has a label" in error_of(lambda: read_labels(listed([None, None]), missing="skip"))
    assert make_splits(some, labels=made).train.tolist() == [0, 2, 4]
    assert notes.messages == ["2 clips without a label are not used"]


@pytest.mark.parametrize(
    ("texts", "how", "message"),
    [
        (["a", "a"], {}, "the same label: a"),
        (["a", "b:1.5", "b:-1", "b:0,5", "b:50%"], {}, "4 labels end in a colon .* 'b:1.5', 'b:-1', 'b:0,5', 'b:50%'"),
        (["a", ":0.5"], {}, "1 labels end in a colon"),
        (["a", "b:0.5;b"], {}, "have a name twice with different weights: 'b:0.5;b'"),
        (["a", "b;c", "a:0.5"], {"kind": "single"}, "2 of 3 clips have several labels, or soft ones: 1.wav, 2.wav"),
        (
            ["dog", "cta", "cta"],
            {"classes": ["cat", "dog"]},
            r"1 labels are not .* 'cta' \(did you mean 'cat'\?\)",
        ),
        (["a", "b"], {"classes": ["a", "b", "a"]}, "listed twice: a"),
    ],
)
def test_labels_that_cannot_be(texts: list[str], how: dict[str, Any], message: str) -> None:
    with pytest.raises(CatalogueError, match=message):
        read_labels(listed(texts), **how)


# weights and ids


@settings(max_examples=40, deadline=None)
@given(TEXTS, st.randoms(use_true_random=False))
def test_balanced_weights_against_a_loop(texts: list[str], draw: Any) -> None:
    rows = sorted(draw.sample(range(len(texts)), max(1, len(texts) // 2)))
    count = Counter(name for row in rows for name in {*texts[row].split(";")})
    expected = [sum(1000 / (count[name] + 0.01) for name in {*texts[row].split(";")}) for row in rows]
    made = balanced_weights(read_labels(listed(texts), "multi", classes=NAMES), rows)
    np.testing.assert_allclose(made, expected, rtol=1e-12)


def test_inverse_weights_draw_every_class_as_often() -> None:
    made = inverse_weights(read_labels(listed(["a", "a", "b", "c", "c", "c"])), [0, 2, 3, 4, 5])
    np.testing.assert_allclose(made, [1, 1, 1 / 3, 1 / 3, 1 / 3], rtol=1e-15)


def test_a_list_has_the_hash_of_its_lines() -> None:
    assert list_hash(["a/1.wav", "b.wav@3"]) == hashlib.sha256(b"a/1.wav\nb.wav@3\n").hexdigest()[:16]
    assert list_hash(["b.wav@3", "a/1.wav"]) != list_hash(["a/1.wav", "b.wav@3"])


# splits


def rows_of(splits: Splits) -> list[list[int]]:
    return [rows.tolist() for _, rows in splits.items()]


def test_splits_by_any_of_their_names(notes: pytest.LogCaptureFixture) -> None:
    names = [("train", "val", "eval"), ("Training", "dev", "Testing "), ("train", "valid", "evaluation")]
    for train, validation, test in names:
        made = listed(list("ababab"), split=[train, train, validation, test, train, test])
        assert rows_of(make_splits(made)) == [[0, 1, 4], [2], [3, 5]]
    assert notes.messages == []
    audioset = listed(list("ababab"), split=["balanced", "unbalanced", "test", "balanced", None, "strange"])
    assert rows_of(make_splits(audioset)) == [[0, 1, 3], [], [2]]
    assert notes.messages == ["1 clips of split strange are not used", "1 clips without a split are not used"]
    splits = make_splits(audioset, train=["balanced"], validation=["strange"], test=["eval"])
    assert rows_of(splits) == [[0, 3], [5], [2]]
    assert notes.messages[2] == "1 clips of split unbalanced are not used"
    assert rows_of(make_splits(listed(list("abab")))) == [[0, 1, 2, 3], [], []]


def test_splits_and_folds_that_cannot_be() -> None:
    made = listed(list("abab"), split=["train", "train", "holdout", "test"])
    some = listed([None, None, "a", "b"], split=["train", "train", "test", "test"])
    gap = listed(list("abc"), fold=["1", "2", "4"])
    for call, text in [
        (lambda: make_splits(made, validation=["holdot"]), "no split holdot; did you mean holdout?"),
        (lambda: make_splits(made, validation=["holdot"]), "train (2 clips), holdout (1 clips), test (1 clips)"),
        (lambda: make_splits(made, test=["training"]), "split train is named for train and for test"),
        (lambda: make_splits(made.subset([2, 3])), "no labelled clip is in one of the splits train, balanced"),
        (lambda: make_splits(listed(list("ab")), test=["holdout"]), "the catalogue has no splits"),
        (lambda: make_splits(some, labels=read_labels(some, missing="skip")), "no labelled clip is in one of"),
        (lambda: make_splits(made, share=1.5), "share of 1.5"),
        (lambda: make_splits(listed(list("ab"), fold=["1", "2"]), fold="12"), "there is no fold 12"),
        (lambda: folds(listed(list("ab"))), "no folds"),
        (lambda: folds(listed(list("ab"), fold=["1", "1"])), "only one fold"),
        (lambda: folds(gap), "folds without a clip: 3"),
        (lambda: folds(gap), "there are 1 (1 clips), 2 (1 clips), 4 (1 clips)"),
        (
            lambda: make_splits(listed(list("abc"), fold=["x", "y", "z"]).subset([0, 2]), fold="x"),
            "folds without a clip: y",
        ),
    ]:
        assert text in error_of(call)


def test_folds(notes: pytest.LogCaptureFixture) -> None:
    made = listed(list("ab") * 6, fold=[str(i % 11) for i in range(12)])
    assert folds(made) == [str(i) for i in range(11)]
    assert rows_of(make_splits(made, fold="0")) == [[1, 2, 3, 4, 5, 6, 7, 8, 9, 10], [], [0, 11]]
    make_splits(listed(list("abc"), fold=["1", "2", None]), fold="1")
    assert notes.messages == ["1 clips without a fold are not used"]


def test_a_share_is_held_out_by_class() -> None:
    texts = ["a"] * 100 + ["b"] * 50 + ["c"] * 10 + ["d"]
    made = listed(texts)
    splits = make_splits(made, share=0.2, seed=3)
    held = Counter(texts[row] for row in splits.validation.tolist())
    assert abs(held["a"] - 20) <= 1
    assert abs(held["b"] - 10) <= 1
    assert abs(held["c"] - 2) <= 1
    assert held["d"] == 0
    assert sorted([*splits.train, *splits.validation]) == [*range(161)]
    assert rows_of(make_splits(made, share=0.2, seed=3)) == rows_of(splits)
    assert rows_of(make_splits(made, share=0.2, seed=4)) != rows_of(splits)
    given = listed(texts, split=["train"] * 100 + ["val"] * 61)
    assert len(make_splits(given, share=0.2).validation) == 61


def test_a_held_out_share_keeps_groups_together(notes: pytest.LogCaptureFixture) -> None:
    rng = np.random.default_rng(0)
    groups = [f"g{i}" if i else None for i in rng.integers(0, 40, 800)]
    made = listed([NAMES[i] for i in rng.integers(0, 4, 800)], group=groups)
    labels = read_labels(made)
    splits = make_splits(made, share=0.25, labels=labels)
    assert 0.2 < len(splits.validation) / 800 < 0.3
    check_splits(labels, splits, made.column("group"))
    # A class that one group alone has stays in training.
    one = listed(["a"] * 9 + ["b"] * 3, group=[*"111222333", "4", "4", "4"])
    for seed in range(8):
        assert {9, 10, 11} <= {*make_splits(one, share=0.3, seed=seed).train.tolist()}
    # Groups too large for the share: the smallest, and a note.
    notes.clear()
    few_groups = listed(["a", "b"] * 20, group=["x"] * 16 + ["y"] * 24)
    assert make_splits(few_groups, share=0.1).validation.tolist() == [*range(16)]
    assert notes.messages == ["40% of the training clips are held out, not 10%: groups stay together"]
    text = error_of(lambda: make_splits(listed(["a", "b"] * 4, group=["x"] * 8), share=0.1))
    assert "8 training clips in 1 groups cannot be held out" in text


def test_splits_that_leak_or_cannot_be_learned_from(notes: pytest.LogCaptureFixture) -> None:
    split = ["train", "train", "val", "test", "test"]
    made = listed(["a", "b", "c", "a", "d"], split=split)
    text = error_of(lambda: check_splits(read_labels(made), make_splits(made), None))
    assert "1 of 4 classes are in validation and not in train: c (1 clips)" in text
    assert "--sides.unseen-classes skip (asit finetune), --unseen-classes skip (asit evaluate)" in text
    made = listed(list("abaaa"), split=split, group=["1", "2", None, "1", None])
    labels, splits, groups = read_labels(made), make_splits(made), made.column("group")
    text = error_of(lambda: check_splits(labels, splits, groups))
    assert "1 groups are in train and in test: 1 (1 and 1 clips)" in text
    check_splits(labels, splits, groups, allow_shared_groups=True)
    assert notes.messages == ["1 of 2 classes have no test clips: b"]


@pytest.mark.parametrize(("one", "other"), [("ann", "ann "), ("1", "1.0"), ("é", "e\u0301"), ("a b", "a\u00a0 b")])
def test_a_group_spelt_in_two_ways_is_one(one: str, other: str) -> None:
    split = ["train", " Train", "test ", "TEST"]
    made = listed(["a", "b", "a ", "b"], split=split, group=[one, "x", other, "y"])
    labels, splits = read_labels(made), make_splits(made)
    text = error_of(lambda: check_splits(labels, splits, made.column("group")))
    assert "1 groups are in train and in test" in text
    kept = listed(list("abab"), fold=["1", "2.0", "1.0 ", "2"])
    assert folds(kept) == ["1", "2"]
    assert make_splits(kept, fold=" 1.0").test.tolist() == [0, 2]


def test_splits_without_the_classes_that_are_not_trained(notes: pytest.LogCaptureFixture) -> None:
    split = ["train", "train", "val", "test", "test", "test"]
    made = listed(["a", "b", "c", "a", "d", "c"], split=split)
    labels = read_labels(made)
    found = drop_unseen_classes(labels, make_splits(made))
    assert (rows_of(found), found.unseen) == ([[0, 1], [], [3]], ("c", "d"))
    (note,) = notes.messages
    assert note == "2 of 4 classes have no training clip: c, d; their 3 validation and test clips are left out"
    check_splits(labels, found, None)
    several = listed(["a;b", "a", "a;c", "b", "c:0.5;b"], split=["train", "train", "test", "test", "test"])
    found = drop_unseen_classes(read_labels(several), make_splits(several))
    assert (found.test.tolist(), found.unseen) == ([3], ("c",))
    found = make_splits(made.subset([0, 1, 3]))
    assert drop_unseen_classes(labels.take([0, 1, 3]), found) is found


# subsample


def classes_in(labels: Labels, rows: Sequence[int] | np.ndarray[Any, Any]) -> set[int]:
    return {int(i) for i in labels.take(np.asarray(rows, np.int64)).indices}


def test_subsample_of_single_labels_is_stratified_and_nested() -> None:
    rng = np.random.default_rng(1)
    texts = [NAMES[i] for i in rng.choice(4, 1000, p=[0.6, 0.3, 0.097, 0.003])]
    labels, rows = read_labels(listed(texts)), np.arange(0, 1000, 2)
    counts = labels.counts(rows)
    before: set[int] = set()
    for share in (0.001, 0.01, 0.1, 0.5, 1.0):
        chosen = subsample(labels, rows, share=share, seed=5)
        assert labels.counts(chosen).tolist() == [max(1, round(share * count)) for count in counts.tolist()]
        assert before <= {*chosen.tolist()} <= {*rows.tolist()}
        assert (np.diff(chosen) > 0).all()
        before = {*chosen.tolist()}
    before = set()
    for k in (1, 2, 16, 1000):
        chosen = subsample(labels, rows, per_class=k, seed=5)
        assert labels.counts(chosen).tolist() == [min(k, count) for count in counts.tolist()]
        assert before <= {*chosen.tolist()}
        before = {*chosen.tolist()}
    assert subsample(labels, rows, share=0.1, seed=5).tolist() != subsample(labels, rows, share=0.1, seed=6).tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), max_size=3), min_size=3, max_size=60), st.integers(0, 9))
def test_subsample_of_several_labels_keeps_every_class_and_is_nested(drawn: list[list[str]], seed: int) -> None:
    texts = [";".join(names) or "a:0" for names in drawn]
    labels = read_labels(listed(texts), "multi", classes=[*"abcdefgh"])
    rows = np.arange(len(drawn))
    chosen = [{*subsample(labels, rows, share=share, seed=seed).tolist()} for share in (0.01, 0.1, 0.4, 1.0)]
    assert chosen[0] <= chosen[1] <= chosen[2] <= chosen[3]
    assert classes_in(labels, [*chosen[0]]) == classes_in(labels, rows)
    assert len(chosen[0]) <= 8 + 1
    counts = labels.counts()
    before: set[int] = set()
    for k in (1, 2, 3, 60):
        now = subsample(labels, rows, per_class=k, seed=seed)
        assert (labels.counts(now) >= np.minimum(k, counts)).all()
        assert before <= {*now.tolist()}
        before = {*now.tolist()}


@pytest.mark.usefixtures("no_global_draws")
def test_draws_depend_on_the_seed_alone_and_refuse_what_cannot_be() -> None:
    made = listed(list("abab") * 10)
    labels = read_labels(made)
    make_splits(made, share=0.2, labels=labels)
    subsample(labels, np.arange(40), share=0.2, seed=0)
    for how in ({}, {"share": 0.5, "per_class": 1}, {"share": 0.0}, {"share": 1.5}, {"per_class": 0}):
        assert "share=" in error_of(lambda how=how: subsample(labels, [0, 1], seed=0, **how))  # type: ignore[misc]
