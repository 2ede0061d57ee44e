"""Files that asit wrote before its modules moved are read, resumed and searched by the code as it is now.

They were made by commit 11ab9cc (see tests/golden/before_move_facts.py). Numbers are compared within a bound that
follows from float32 (see `close`) on any processor, and to the last bit where the environment is the one they were made
in. Only the command line and public names of `asit` are used, so these tests hold wherever a module lies.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch

import asit
from asit import cli

GOLDEN = Path(__file__).with_name("golden")
FIXTURES = GOLDEN / "before_move"
EXPECTED: dict[str, Any] = json.loads((FIXTURES / "expected.json").read_text("utf-8"))
UNIT = 2.0**-24
"""Largest relative error of one float32 operation (IEEE 754, round to nearest)."""
ROUNDINGS = 256
"""Units by which a value may be off. Each has less than 4,096 roundings one after the other behind it: about 12 sums of
at most 256 terms, such as the FFT of a frame or a row of a matrix product, in an order that processors choose. Errors
of either sign add up like a random walk, to sqrt(4096) = 64 units; four times that. Other instruction sets of one
processor (AVX2, SSE4.2) gave a thirtieth of it."""

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the paths in the fixtures are POSIX paths")


def close(found: Any, expected: Any, steps: int = 1) -> None:
    """Equal but for rounding: the error of a value is at most `ROUNDINGS` units of the largest value beside it, and
    training adds that much again in each of its `steps`."""
    expected = np.asarray(expected, np.float64)
    bound = steps * ROUNDINGS * UNIT * float(np.abs(expected).max())
    np.testing.assert_allclose(np.asarray(found, np.float64), expected, rtol=0, atol=bound)


def same_but_for_rounding(found: Any, expected: Any, steps: int = 1, where: str = "") -> None:
    """JSON values: text and whole numbers equal (but for terms renamed since), other numbers `close`."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for name, value in expected.items():
            same_but_for_rounding(found[name], value, steps, f"{where}.{name}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for i, value in enumerate(expected):
            same_but_for_rounding(found[i], value, steps, f"{where}[{i}]")
    elif isinstance(expected, float):
        close(found, expected, steps)
    else:
        assert found == (
            expected.replace("validation side", "validation split") if where.endswith("chosen_by") else expected
        ), where


@pytest.fixture(scope="module")
def making() -> Iterator[ModuleType]:
    """Facts of the fixtures, and the digests and command lines that go with them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(GOLDEN)
        yield importlib.import_module("before_move_facts")


def lay(making: ModuleType, place: Path) -> Path:
    """Copy the fixtures to a place, and put its path where files hold that of the place where they were made."""
    shutil.copytree(FIXTURES, place)
    place = place.resolve()
    for name in ("catalogue.jsonl", "pretraining/catalogue.jsonl", "finetuning/catalogue.jsonl", "index/sources.jsonl"):
        _moved(place / name, place)
    sources = (place / "index" / "sources.jsonl").read_bytes()
    card = place / "index" / "card.json"
    _moved(card, place)
    facts = json.loads(card.read_text("utf-8"))
    facts["sha256"]["sources.jsonl"] = hashlib.sha256(sources).hexdigest()
    card.write_text(json.dumps(facts), "utf-8")
    making.set_times(place)
    return place


def _moved(path: Path, place: Path) -> None:
    text = path.read_text("utf-8")
    assert EXPECTED["made_in"] in text
    path.write_text(text.replace(EXPECTED["made_in"], json.dumps(str(place))[1:-1]), "utf-8")


@pytest.fixture(scope="module")
def place(making: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A copy of the fixtures, and the working folder of these tests; runs are resumed in it."""
    found = lay(making, tmp_path_factory.mktemp("before-move") / "place")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(found)
        yield found


@pytest.fixture
def own(making: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures that a test may change, and its working folder."""
    found = lay(making, tmp_path / "place")
    monkeypatch.chdir(found)
    return found


@pytest.fixture
def same_environment(making: ModuleType) -> None:
    """Skips where the last bits may differ from those of the place where the fixtures were made."""
    there, here = EXPECTED["environment"], making.environment()
    if other := [f"{name}: {value} there, {here[name]} here" for name, value in there.items() if value != here[name]]:
        pytest.skip("results are the same but for rounding, since the fixtures were made with " + "; ".join(other))


@pytest.fixture(scope="module")
def resumed(place: Path) -> Callable[[str], Path]:
    """Resume a run to its end, once; gives its folder."""
    done: set[str] = set()

    def resume(name: str) -> Path:
        if name not in done:
            if name == "pretraining":
                result: Any = asit.pretrain("clips", name, resume=True)
            else:
                result = asit.finetune("table.csv", name, "encoder", resume=True)
            assert (result.step, result.finished) == (EXPECTED[name]["steps"], True)
            done.add(name)
        return place / name

    return resume


def say(capsys: pytest.CaptureFixture[str], arguments: Sequence[str]) -> str:
    """Run the command line, which must succeed; gives its standard output."""
    capsys.readouterr()
    code = cli.main(arguments)
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


# runs


@pytest.mark.parametrize("name", ["pretraining", "finetuning"])
def test_a_stopped_run_resumes_to_the_same_end(name: str, making: ModuleType, resumed: Callable[[str], Path]) -> None:
    run, expected = resumed(name), EXPECTED[name]
    found, stop = making.train_lines(run), expected["stopped"]
    assert found[:stop] == expected["train"][:stop]  # written before the move, and kept
    assert len(found) == expected["steps"]
    same_but_for_rounding(found, expected["train"], expected["steps"])
    assert making.shapes_of(making.last_state(run)) == expected["shapes"]
    assert set(expected["files"]) <= {path.relative_to(run).as_posix() for path in run.rglob("*")}
    theirs = FIXTURES / {"pretraining": "encoder", "finetuning": "classifier"}[name]
    ours = safetensors.numpy.load_file(run / "model" / "model.safetensors")
    rates = sum(line["lr"] for line in expected["train"])
    for tensor, value in safetensors.numpy.load_file(theirs / "model.safetensors").items():
        mine = ours[tensor]
        if tensor.endswith("attn.qkv.bias"):
            # Softmax does not depend on the keys' bias, so that its gradient is rounding alone, which AdamW divides by
            # its own size: each step may go either way, by about the learning rate.
            mine, value = mine.reshape(3, -1), value.reshape(3, -1)
            np.testing.assert_allclose(mine[1], value[1], rtol=0, atol=2 * rates)
            mine, value = mine[::2], value[::2]
        close(mine, value, expected["steps"])
    cards = [json.loads((folder / "card.json").read_text("utf-8")) for folder in (run / "model", theirs)]
    for card in cards:
        del card["sha256"], card["asit"]
    same_but_for_rounding(cards[0], cards[1], expected["steps"])


@pytest.mark.parametrize("name", ["pretraining", "finetuning"])
def test_a_stopped_run_resumes_to_the_same_bits(
    name: str, making: ModuleType, resumed: Callable[[str], Path], same_environment: None
) -> None:
    run = resumed(name)
    assert making.train_lines(run) == EXPECTED[name]["train"]
    assert making.bits_of(run) == EXPECTED[name]["bits"]


def test_a_resumed_fine_tuning_is_scored_the_same(resumed: Callable[[str], Path]) -> None:
    run, expected = resumed("finetuning"), EXPECTED["finetuning"]
    found = json.loads((run / "results.json").read_text("utf-8"))["results"]
    found = [{key: one[key] for key in theirs} for one, theirs in zip(found, expected["results"], strict=True)]
    same_but_for_rounding(found, expected["results"], expected["steps"])
    for name, arrays in expected["scores"].items():
        held = np.load(run / "scores" / name)
        for key, value in arrays.items():
            close(held[key], value, expected["steps"])


def test_a_run_on_files_resumes_on_their_shards(
    own: Path, making: ModuleType, resumed: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Shards and their index of before the move hold the recordings of the run: the same bits on any processor."""
    say(capsys, ["shard", "--check", "shards"])
    assert asit.Catalogue.read("shards/index.jsonl").digest == EXPECTED["shards"]["digest"]
    assert asit.pretrain("shards", "pretraining", resume=True).finished
    assert making.bits_of(own / "pretraining") == making.bits_of(resumed("pretraining"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretraining", "finetuning"])
def test_a_run_of_before_the_move_has_a_report(name: str, own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As it was stopped, and after it was resumed by the command line."""
    say(capsys, ["report", name])
    (own / name / "report.html").unlink()
    kind = {"pretraining": ["pretrain"], "finetuning": ["finetune"]}[name]
    say(capsys, [*kind, "--out", name, "--resume"])
    say(capsys, ["report", name])
    assert (own / name / "report.html").stat().st_size > 10_000


# models and catalogues


def test_models_answer_the_same(place: Path, making: ModuleType) -> None:
    embedding = asit.load("encoder").embed(f"clips/{making.QUERY}", precision="float32")
    for name, value in EXPECTED["embedding"].items():
        close(getattr(embedding, name), value)
    model, expected = asit.load("classifier"), EXPECTED["tags"]
    tags = model.tag(f"clips/{making.QUERY}", precision="float32")
    assert list(tags.classes) == expected["classes"]
    close(tags.clip, expected["clip"])


def test_a_catalogue_is_read(place: Path) -> None:
    expected = EXPECTED["catalogue"]
    for found in (
        asit.Catalogue.read("catalogue.jsonl"),
        asit.Catalogue.read(FIXTURES / "catalogue.jsonl", root="clips"),
    ):
        clips = [found[i] for i in range(len(found))]
        assert [[Path(clip.path).name, clip.seconds, clip.rate, clip.channels] for clip in clips] == expected["clips"]
        assert all(Path(clip.path).is_file() for clip in clips)
        assert (found.digest, found.header["mean"], found.header["std"]) == tuple(
            expected[name] for name in ("digest", "mean", "std")
        )


def test_a_catalogue_made_now_is_the_same(place: Path, tmp_path: Path) -> None:
    front_end = asit.FrontEndSettings(**EXPECTED["front_end"])
    asit.build_catalogue("clips", tmp_path / "now.jsonl", front_end=front_end, workers=1)
    (head, *found), (expected_head, *expected) = (
        [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        for path in (tmp_path / "now.jsonl", place / "catalogue.jsonl")
    )
    assert found == expected
    same_but_for_rounding(head, expected_head)


# indexes


def test_an_index_is_searched(place: Path, making: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    output = say(
        capsys, ["similar", "index", f"clips/{making.QUERY}", "-k", "4", "--format", "json", "--device", "cpu"]
    )
    hits = json.loads(output)["neighbours"]
    found = [[hit["name"], hit["similarity"], hit["start"], hit["end"]] for hit in hits]
    expected = EXPECTED["index"]["neighbours"]
    assert [Path(hit["path"]).name for hit in hits] == [name for name, *_ in expected]
    for (name, similarity, *times), (other, close_to, *when) in zip(found, expected, strict=True):
        assert (name, times) == (other, when)
        # Vectors of the index are float16, and similarities are printed with four digits.
        assert abs(similarity - close_to) <= 1e-4 + ROUNDINGS * UNIT


def test_an_index_made_now_is_the_same(place: Path, making: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    say(capsys, making.index_arguments("now"))
    np.testing.assert_array_equal(np.load("now/rows.npy"), np.load("index/rows.npy"))
    assert Path("now/sources.jsonl").read_bytes() == Path("index/sources.jsonl").read_bytes()
    found, expected = (np.load(f"{name}/vectors.npy") for name in ("now", "index"))
    assert found.dtype == expected.dtype == np.float16
    np.testing.assert_allclose(found.astype(float), expected, rtol=0, atol=2.0**-11)  # float16 below 1


def test_an_index_is_brought_up_to_date(own: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it holds is kept: the files are not read again, which would fail, and a new one is added."""
    before = np.load("index/vectors.npy")
    shutil.copy("clips/low-0.wav", "clips/new.wav")
    for path in Path("clips").glob("*-*"):
        path.write_bytes(bytes(path.stat().st_size))
        os.utime(path, ns=(EXPECTED["mtime"], EXPECTED["mtime"]))
    say(capsys, ["index", "encoder", "clips", "--out", "index", "--add", "--device", "cpu"])
    after = np.load("index/vectors.npy")
    np.testing.assert_array_equal(after[: len(before)], before)
    names = [json.loads(line)["name"] for line in Path("index/sources.jsonl").read_text("utf-8").splitlines()]
    assert names[-1] == "new.wav"
    first = names.index("low-0.wav")
    old = [int(row["file"]) == first for row in np.load("index/rows.npy")[: len(before)]]
    np.testing.assert_allclose(after[len(before) :], before[old], atol=2e-3)  # float16 of unit vectors


# embeddings


SIGN = 12345.0
"""Put into the kept block; it would be gone if the block were made again."""


@pytest.fixture(scope="module")
def finished(making: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> tuple[float, np.ndarray]:
    """The first value of the stopped `asit embed`, and its vectors once it was finished with `SIGN` in its place."""
    own = lay(making, tmp_path_factory.mktemp("embed") / "place")
    making.copy_many(own)
    plan, kept = own / "many.npz.parts" / "plan.json", own / "many.npz.parts" / "000000.vectors"
    facts = json.loads(plan.read_text("utf-8"))
    facts["facts"]["asit"] = metadata.version("asit-audio")  # blocks of another version are refused, by design
    plan.write_text(json.dumps(facts), "utf-8")
    block = np.fromfile(kept, np.float32)
    first, block[0] = float(block[0]), SIGN
    block.tofile(kept)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(own)
        assert cli.main(making.embed_arguments("many", "many.npz")) == 0
    assert not (own / "many.npz.parts").exists()
    with np.load(own / "many.npz") as found:
        assert [name[:3] for name in found["paths"]] == [f"{i:03d}" for i in range(making.MANY)]
        return first, found["vectors"]


def test_a_stopped_embed_goes_on(finished: tuple[float, np.ndarray]) -> None:
    (_, vectors), kept = finished, EXPECTED["embed"]["kept"]
    block = np.fromfile(FIXTURES / "many.npz.parts" / "000000.vectors", np.float32)
    assert vectors[0, 0] == SIGN
    np.testing.assert_array_equal(vectors[:kept].ravel()[1:], block[1:])
    close(vectors[kept:], EXPECTED["embed"]["last"])


def test_a_stopped_embed_goes_on_to_the_same_bits(
    finished: tuple[float, np.ndarray], making: ModuleType, same_environment: None
) -> None:
    first, vectors = finished
    vectors = vectors.copy()
    vectors[0, 0] = first
    assert making.digest({"vectors": vectors}) == EXPECTED["embed"]["bits"]


def test_vectors_embedded_now_are_those_of_before(
    place: Path, making: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    say(capsys, making.embed_arguments("clips", "now.npz"))
    with np.load("now.npz") as found, np.load("embed.npz") as expected:
        assert sorted(found) == sorted(expected)
        for name in ("paths", "starts", "seconds"):
            np.testing.assert_array_equal(found[name], expected[name])
        close(found["vectors"], expected["vectors"])
        about, theirs = (json.loads(str(one["about"])) for one in (found, expected))
        del about["asit"], theirs["asit"]
        assert about == theirs


# the cache of features


def key(*facts: str) -> bytes:
    """The name of an entry of the cache as it was defined before the move: BLAKE2b over each fact and its length."""
    found = hashlib.blake2b(digest_size=20)
    for fact in facts:
        data = fact.encode("utf-8")
        found.update(len(data).to_bytes(8, "little") + data)
    return found.digest()


def shelf(kind: str, version: str) -> str:
    """The folder of one kind of feature of the encoder, read with a version of torch."""
    held = EXPECTED["cache"]
    facts = json.dumps({**held["facts"], "torch": version}, sort_keys=True)
    return key(held["format"], f"{held['weights']} {facts}", kind).hex()


def keys_of(place: Path) -> list[bytes]:
    """The keys of the recordings of table.csv at a place, in the cache's order."""
    catalogue = asit.Catalogue.read("catalogue.jsonl")
    clips = sorted((catalogue[i] for i in range(len(catalogue))), key=lambda clip: (clip.path, clip.start))
    found = []
    for clip in clips:
        path = place / "clips" / Path(clip.path).name
        file = f"{Path(clip.path).stat().st_size} {EXPECTED['mtime']}"
        found.append(key(str(path), file, repr(clip.start), repr(clip.seconds)))
    return found


def entry(folder: Path, keys: Sequence[bytes]) -> Path:
    return folder / f"{key(*(one.hex() for one in keys)).hex()}.safetensors"


def test_features_in_the_cache_are_found(own: Path, making: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    """The names in the cache are what they were; with those of this place and torch all features come from it."""
    there, here = keys_of(Path(EXPECTED["made_in"])), keys_of(own)
    values = {}
    for kind in EXPECTED["cache"]["kinds"]:
        old = entry(own / "cache" / shelf(kind, EXPECTED["environment"]["torch"]), there)
        held = safetensors.numpy.load_file(old)
        assert [one.tobytes() for one in held["keys"]] == there
        held["keys"] = np.frombuffer(b"".join(here), np.uint8).reshape(len(here), -1)
        moved = entry(own / "moved" / shelf(kind, torch.__version__), here)
        moved.parent.mkdir(parents=True)
        safetensors.numpy.save_file(held, moved)
        values[kind] = held["values"]
    before = {path: path.read_bytes() for path in (own / "moved").rglob("*") if path.is_file()}
    say(capsys, making.evaluate_arguments("moved", "evaluated.json"))
    assert {path: path.read_bytes() for path in (own / "moved").rglob("*") if path.is_file()} == before
    found = json.loads(Path("evaluated.json").read_text("utf-8"))["results"]
    same_but_for_rounding(found, EXPECTED["evaluated"])
    # Read now, they are the same numbers under the same names.
    say(capsys, making.evaluate_arguments("fresh", "again.json"))
    assert {path.relative_to(own / "fresh") for path in (own / "fresh").rglob("*.safetensors")} == {
        path.relative_to(own / "moved") for path in before
    }
    for kind, value in values.items():
        fresh = safetensors.numpy.load_file(entry(own / "fresh" / shelf(kind, torch.__version__), here))
        close(fresh["values"], value)
