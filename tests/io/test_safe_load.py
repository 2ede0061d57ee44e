"""Weights of unknown origin: what is read, and what is refused before any of it could run."""

from __future__ import annotations

import argparse
import io
import itertools
import os
import pickle
import struct
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import nn

from asit.errors import CheckpointError
from asit.io import safe_load
from asit.io.checkpoint import check_numbers
from asit.io.safe_load import pickles


def saved(path: Path, content: Any, **how: Any) -> Path:
    torch.save(content, path, **how)
    return path


class Runs:
    """A pickle of this calls os.mkdir when it is loaded."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


OLD = {"_use_new_zipfile_serialization": False}
WEIGHTS = {
    "a": torch.arange(6.0).view(2, 3),
    "b": torch.ones(2).half(),
    "c": torch.tensor(3),
    "d": torch.tensor([True]),
}


@pytest.mark.parametrize("how", [{}, OLD])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".bin", ".ckpt"])
def test_what_torch_saves_is_read(tmp_path: Path, how: dict[str, Any], suffix: str) -> None:
    got = safe_load.read(saved(tmp_path / f"x{suffix}", WEIGHTS, **how))
    assert set(got) == set(WEIGHTS)
    assert all(torch.equal(got[name], value) and got[name].dtype == value.dtype for name, value in WEIGHTS.items())
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3))
    got = safe_load.read(saved(tmp_path / f"y{suffix}", module.state_dict(), **how))
    assert torch.equal(got["1.weight"], module[1].weight)
    got = safe_load.read(saved(tmp_path / f"z{suffix}", dict(module.named_parameters()), **how))
    assert torch.equal(got["0.bias"], module[0].bias)


def test_safetensors_are_read(tmp_path: Path) -> None:
    safetensors.torch.save_file(WEIGHTS, tmp_path / "x.safetensors")
    got = safe_load.read(tmp_path / "x.safetensors")
    assert torch.equal(got["a"], WEIGHTS["a"])


@pytest.mark.parametrize("how", [{}, OLD])
def test_a_training_state_is_read_where_it_is_asked_for(tmp_path: Path, how: dict[str, Any]) -> None:
    odd = {"lr": np.float64(0.1), "n": np.int64(7), "f": np.float32(0.5), "ok": np.bool_(True), "betas": (0.9, 0.95)}
    args = argparse.Namespace(
        name="asit", sizes=[1, (2, 3)], none=None, inner=argparse.Namespace(x=1), lr=np.float64(2.0)
    )
    path = saved(
        tmp_path / "x.pth", {"teacher": WEIGHTS, "optimizer": {"groups": [odd]}, "args": args, "epoch": 3}, **how
    )
    with pytest.raises(CheckpointError, match=r"x\.pth holds (argparse\.Namespace|numpy\S+), and reading that could"):
        safe_load.read(path)
    got = safe_load.read(path, training_state=True)
    want = {"lr": 0.1, "n": 7, "f": 0.5, "ok": True, "betas": (0.9, 0.95)}
    assert got["optimizer"]["groups"] == [want]
    assert [type(value) for value in got["optimizer"]["groups"][0].values()] == [float, int, float, bool, tuple]
    assert got["args"] == {"name": "asit", "sizes": [1, (2, 3)], "none": None, "inner": {"x": 1}, "lr": 2.0}
    assert type(got["args"]) is safe_load.Facts
    assert torch.equal(got["teacher"]["a"], WEIGHTS["a"])


@pytest.mark.parametrize("how", [{}, OLD])
@pytest.mark.parametrize("training_state", [False, True])
@pytest.mark.parametrize("place", ["beside", "inside"])
def test_nothing_is_run(tmp_path: Path, how: dict[str, Any], training_state: bool, place: str) -> None:
    bad = Runs(tmp_path / "made")
    content = {**WEIGHTS, "x": bad} if place == "beside" else {**WEIGHTS, "args": argparse.Namespace(x=[{"y": bad}])}
    path = saved(tmp_path / "x.pth", content, **how)
    with pytest.raises(CheckpointError, match=r"holds (posix|nt)\.mkdir|argparse"):
        safe_load.read(path, training_state=training_state)
    assert not (tmp_path / "made").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "made").exists(), "the file of this test would run something"


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (print, r"\S+\.print"),
        (nn.Linear(1, 1), r"torch\.nn\.modules\.linear\.Linear"),
        (np.zeros(3), r"numpy\S+_reconstruct"),
        (torch.Generator, r"torch\S+Generator"),
    ],
)
def test_what_it_holds_beside_tensors_is_named(tmp_path: Path, value: Any, name: str) -> None:
    path = saved(tmp_path / "x.pth", {"a": WEIGHTS["a"], "args": argparse.Namespace(x=value)})
    with pytest.raises(
        CheckpointError, match=rf"x\.pth holds {name}, and reading that could run code\n.*plain argparse"
    ):
        safe_load.read(path, training_state=True)


class Joined:
    """A path that is made of something else than texts."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(Path()), (["a"],)


@pytest.mark.parametrize("how", [{}, {"_use_new_zipfile_serialization": False}])
def test_a_path_in_the_settings_is_read_as_text(tmp_path: Path, how: dict[str, Any]) -> None:
    content = {**WEIGHTS, "args": argparse.Namespace(out=Path("runs") / "a b")}
    path = saved(tmp_path / "x.pth", content, **how)
    assert safe_load.read(path, training_state=True)["args"] == {"out": "runs/a b"}
    with pytest.raises(CheckpointError, match=r"holds argparse\.Namespace|holds pathlib"):
        safe_load.read(path)
    path = saved(tmp_path / "y.pth", {**WEIGHTS, "args": argparse.Namespace(out=Joined())}, **how)
    with pytest.raises(CheckpointError, match="a path of other parts than texts"):
        safe_load.read(path, training_state=True)


def test_a_numpy_scalar_of_objects_and_other_pickles(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="numpy scalar of another kind than a number") as caught:
        safe_load.read(saved(tmp_path / "x.pth", {"a": np.datetime64("2020-01-01")}), training_state=True)
    assert "weights_only" not in str(caught.value), "torch's advice is to read it unsafely"
    (tmp_path / "y.pth").write_bytes(pickle.dumps({"a": 1}, protocol=2))
    with pytest.raises(CheckpointError, match=r"y\.pth is a pickle that torch\.save did not write"):
        safe_load.read(tmp_path / "y.pth")
    (tmp_path / "y.pth").write_bytes(pickle.dumps(Runs(tmp_path / "made"), protocol=2))
    with pytest.raises(CheckpointError, match=r"holds (posix|nt)\.mkdir"):
        safe_load.read(tmp_path / "y.pth")
    with pytest.raises(CheckpointError, match=r"another kind than torch\.save writes \(FRAME\)"):
        safe_load.read(saved(tmp_path / "z.pth", nn.Linear(1, 1).state_dict(), pickle_protocol=4))


def rewritten(tmp_path: Path, change: Callable[[dict[str, bytes]], None], **how: Any) -> Path:
    """A file of torch.save whose archive was changed by `change`, which is given its parts."""
    with zipfile.ZipFile(saved(tmp_path / "was.pth", {"a": torch.zeros(1000)})) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    change(parts)
    with zipfile.ZipFile(tmp_path / "x.pth", "w", **how) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    return tmp_path / "x.pth"


def test_a_rewritten_archive_is_read(tmp_path: Path) -> None:
    assert torch.equal(safe_load.read(rewritten(tmp_path, lambda parts: None))["a"], torch.zeros(1000))


@pytest.mark.parametrize(
    ("change", "how", "text"),
    [
        (lambda parts: None, {"compression": zipfile.ZIP_DEFLATED}, r"archive with compressed parts \('was"),
        (lambda parts: parts.update({"../../evil": b"x"}), {}, "a part outside itself"),
        (lambda parts: parts.update({"/etc/evil": b"x"}), {}, "a part outside itself"),
        (lambda parts: parts.update({"C:\\evil": b"x"}), {}, "a part outside itself"),
        (lambda parts: parts.update({"was/code/__torch__.py": b"x"}), {}, "TorchScript archive, which holds code"),
        (lambda parts: parts.update({"other/data.pkl": b"x"}), {}, r"zip archive without a data\.pkl"),
        (lambda parts: parts.pop("was/data.pkl"), {}, r"zip archive without a data\.pkl"),
        (lambda parts: parts.pop("was/data/0"), {}, "says that it holds 4000 bytes for storage '0' and holds nothing"),
        (
            lambda parts: parts.update({"was/data/0": b"x" * 3999}),
            {},
            "4000 bytes for storage '0' and holds 3999 bytes",
        ),
    ],
)
def test_archives_that_are_not_as_torch_writes_them(
    tmp_path: Path, change: Any, how: dict[str, Any], text: str
) -> None:
    with pytest.raises(CheckpointError, match=text):
        safe_load.read(rewritten(tmp_path, change, **how))
    assert not (tmp_path.parent.parent / "evil").exists()


def test_sizes_that_are_not_so(tmp_path: Path) -> None:
    # An entry that claims more than the archive has, and a pickle that claims 2**40 numbers.
    path = saved(tmp_path / "x.pth", {"a": torch.zeros(1000)})
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"x/data/0") + 1)
    data[at + 20 : at + 28] = (0x7FFFFFF0).to_bytes(4, "little") * 2
    (tmp_path / "y.pth").write_bytes(data)
    with pytest.raises(CheckpointError, match="parts are larger than its"):
        safe_load.read(tmp_path / "y.pth")
    many = b"\x8a\x06\x00\x00\x00\x00\x00\x01"  # LONG1, 2**40, for 1000 as a BININT2

    def grow(parts: dict[str, bytes]) -> None:
        parts["was/data.pkl"] = parts["was/data.pkl"].replace(b"M\xe8\x03", many, 1)

    grown = rewritten(tmp_path, grow)
    with pytest.raises(CheckpointError, match="says that it holds 4398046511104 bytes for storage '0' and holds 4000"):
        safe_load.read(grown)
    old = saved(tmp_path / "z.pth", {"a": torch.zeros(1000)}, **OLD)
    old.write_bytes(old.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"holds 4000 bytes of numbers, and is 2000 bytes long"):
        safe_load.read(old)


def test_a_pickle_that_asks_for_memory(tmp_path: Path) -> None:
    content = pickle.PROTO + b"\x02" + pickle.EMPTY_DICT + pickle.LONG_BINPUT + (2**31 - 1).to_bytes(4, "little") + b"."
    path = rewritten(tmp_path, lambda parts: parts.update({"was/data.pkl": content}))
    with pytest.raises(CheckpointError, match="holds a dict and no named tensors"):  # no list of as many entries
        safe_load.read(path)


GET = {
    name: b"c" + name.replace(" ", "\n").encode() + b"\n"
    for name in (
        *(
            "torch._utils _rebuild_tensor_v2",
            "torch._utils _rebuild_parameter",
            "collections OrderedDict",
            "torch FloatStorage",
            "torch float32",
        ),
        *("torch.storage UntypedStorage", "_codecs encode", "torch._dynamo config"),
    )
}


def text(value: str) -> bytes:
    return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    data = pickle.encode_long(value)
    return pickle.LONG1 + bytes([len(data)]) + data


def tensor(offset: int, size: int, stride: int, holds: int = 4, old: bytes = b"") -> bytes:
    """The operations that make a tensor of one axis over a storage of `holds` numbers."""
    storage = b"(" + text("storage") + GET["torch FloatStorage"] + text("0") + text("cpu") + number(holds) + old + b"tQ"
    shape = (
        number(offset) + number(size) + b"\x85" + number(stride) + b"\x85\x89" + GET["collections OrderedDict"] + b")R"
    )
    return GET["torch._utils _rebuild_tensor_v2"] + b"(" + storage + shape + b"tR"


def as_zip(path: Path, value: bytes, **parts: bytes) -> Path:
    """A file of torch.save whose content is {"a": what these operations make}."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", b"\x80\x02}" + text("a") + value + b"s.")
        archive.writestr("x/data/0", bytes(16))
        archive.writestr("x/version", "3")
        for name, data in parts.items():
            archive.writestr(f"x/{name}", data)
    return path


def as_old(path: Path, value: bytes) -> Path:
    content = b"\x80\x02}" + text("a") + value + b"s."
    keys = b"\x80\x02]" + text("0") + b"a."
    first = b"".join(pickle.dumps(one, protocol=2) for one in (0x1950A86A20F9469CFC6C, 1001, {}))
    path.write_bytes(first + content + keys + struct.pack("<q", 4) + bytes(16))
    return path


@pytest.mark.parametrize("made", [as_zip, as_old])
def test_the_operations_of_these_tests_make_a_tensor(tmp_path: Path, made: Any) -> None:
    old = b"N" if made is as_old else b""
    assert torch.equal(safe_load.read(made(tmp_path / "x.pth", tensor(1, 3, 1, old=old)))["a"], torch.zeros(3))


TWICE = b")" + b"".join(b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60))
"""A tuple of two tuples of two tuples, and so on."""


@pytest.mark.parametrize("made", [as_zip, as_old])
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (b"}" + TWICE + b"K\x01s", "a key that is neither text nor a number of 64 bits"),
        (TWICE, "leads to more than 100000 values"),
        (GET["collections OrderedDict"] + TWICE + b"\x85R", "fills an OrderedDict in another way"),
        (GET["torch._utils _rebuild_parameter"] + TWICE + b"\x85R", "leads to more than 100000 values"),
        (TWICE + b"Q", "refers to something outside itself"),
        (b"})" + b"\x85" * 150_000 + b"K\x01s", "a key that is neither text nor"),
        (b")" + b"\x85" * 150_000, "nested more than 100 deep"),
        (b"](" + b"](" * 200 + b"e" * 201, "nested more than 100 deep"),
        (b"}(" + b"".join(number(i * (2**61 - 1)) + b"N" for i in range(8, 200)) + b"u", "a key that is neither"),
        (GET["torch.storage UntypedStorage"] + number(2**40) + b"\x85R", r"asks for memory with torch\.storage\.Unt"),
        (GET["torch.storage UntypedStorage"] + number(2**40) + b"\x85\x81", "asks for memory with"),
        (GET["_codecs encode"] * 2 + (text("A") + text("hex") + b"\x86R") + text("hex") + b"\x86R", "turns text into"),
        (GET["_codecs encode"] + text("A") + text("idna") + b"\x86R", "turns text into bytes in another way"),
        (GET["collections OrderedDict"] + b")R}" + text("items") + b"K\x01sb", r"sets attributes of collections\.Ord"),
        (tensor(0, 2, 1) + b"}b", r"sets attributes of torch\._utils\._rebuild_tensor_v2"),
        (tensor(0, 5, 1), "a tensor that reaches outside its numbers, of which there are 4"),
        (tensor(-1, 2, 1), "reaches outside"),
        (tensor(3, 2, -1), "reaches outside"),
        (tensor(0, 2**40, 1), "reaches outside"),
        (
            GET["torch._utils _rebuild_tensor_v2"] + b"(K\x01K\x00))tR",
            "something else than numbers, an offset",
        ),
        (tensor(0, 4, 1, old=b"(" + text("1") + b"K\x00K\x02t"), r"parts of storages, of torch before 0\.4"),
        (GET["torch float32"] + b")R", "cannot be read: .* not callable"),
        (GET["torch._dynamo config"], r"holds torch\._dynamo\.config, and reading that could run code"),
        (b"ctorch\n\x1b[2J\n", r"holds 'torch\.\\x1b\[2J', and"),
        (text("storage") + b"Q", "refers to something outside itself"),
        (
            b"(" + text("storage") + GET["torch float32"] + text("0") + text("cpu") + number(4) + b"NtQ",
            r"numbers of a kind that is not read here \(float32\)",
        ),
        (
            b"]" + tensor(0, 2, 1) + b"a" + tensor(0, 2, 1, holds=3) + b"a",
            r"two sizes of the same numbers \(storage 0\)",
        ),
        (b"h\x07", "cannot be read as tensors alone: Memo value not found"),
        (b"\x87", "cannot be read: "),
        (b"u", "cannot be read: "),
        (b"2", r"another kind than torch\.save writes \(DUP\)"),
        (b"\x82\x01", r"another kind than torch\.save writes \(EXT1\)"),
    ],
)
def test_pickles_that_ask_for_time_memory_or_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: Any, value: bytes, reason: str
) -> None:
    monkeypatch.setattr(pickles, "_MOST", 100_000)
    with pytest.raises(CheckpointError, match=reason) as caught:
        safe_load.read(made(tmp_path / "x.pth", value), training_state=True)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("name", ["\x1b[2Jevil", "a\nb", "", "x" * 301, "\udc80"])
def test_names_that_steer_a_terminal(tmp_path: Path, name: str) -> None:
    for content in ({name: torch.zeros(1)}, {"model": {name: torch.zeros(1)}}, {name: 3}):
        with pytest.raises(CheckpointError, match=r"x\.pth has an entry of the name") as caught:
            safe_load.read(saved(tmp_path / "x.pth", content))
        assert len(str(caught.value).splitlines()) == 3
        assert str(caught.value).replace("\n", "").isprintable()


def test_archives_that_two_readers_would_take_for_two(tmp_path: Path) -> None:
    one, two = saved(tmp_path / "1.pth", {"a": torch.zeros(3)}), saved(tmp_path / "2.pth", {"a": torch.ones(3)})
    refusal = "something before or after it, or with two tables of contents"
    if sys.version_info >= (3, 14):  # zipfile refuses some of them itself
        refusal += "|Corrupt zip64 end of central directory record"
    for name, content in {
        "x": one.read_bytes() + two.read_bytes(),
        "y": one.read_bytes()[:64] + two.read_bytes(),
        "z": one.read_bytes()[:-2] + b"\x04\x00abcd",
    }.items():
        (tmp_path / f"{name}.pth").write_bytes(content)
        with pytest.raises(CheckpointError, match=refusal):
            safe_load.read(tmp_path / f"{name}.pth")
    moved = bytearray(one.read_bytes())
    moved[-34:-26] = struct.pack("<Q", 64)  # the 64-bit record is said to be elsewhere
    (tmp_path / "w.pth").write_bytes(moved)
    with pytest.raises(CheckpointError, match=r"two tables of contents|cannot be read"):
        safe_load.read(tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="two parts of one name"):
        safe_load.read(as_zip(tmp_path / "v.pth", tensor(0, 2, 1), **{"DATA.PKL": b"x"}))


def test_downloads_that_went_wrong(tmp_path: Path) -> None:
    pages = {b"version https://git-lfs.github.com/spec/v1\noid": "pointer of Git", b"\n<!DOCTYPE html>": "web page"}
    for (content, reason), suffix in itertools.product(pages.items(), (".pth", ".safetensors")):
        (tmp_path / f"x{suffix}").write_bytes(content)
        with pytest.raises(CheckpointError, match=f"is a {reason}.*not downloaded"):
            safe_load.read(tmp_path / f"x{suffix}")


def test_a_tar_file_behind_an_old_files_beginning(tmp_path: Path) -> None:
    # Its first name is five pickles: to one reader an old file, to another a tar archive.
    first = b"".join(pickle.dumps(one, protocol=2) for one in (0x1950A86A20F9469CFC6C, 1001, {}))
    name = first + b"\x80\x02}U\x01aK\x01s.\x80\x02]."
    header = bytearray(tarfile.TarInfo("x").tobuf(tarfile.USTAR_FORMAT))
    header[:100], header[148:156] = name.ljust(100, b"\0"), b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    (tmp_path / "x.pth").write_bytes(bytes(header) + bytes(1536))
    assert tarfile.is_tarfile(tmp_path / "x.pth")
    with pytest.raises(CheckpointError, match="torch's reader of tensors refuses it"):
        safe_load.read(tmp_path / "x.pth")


def test_tensors_that_repeat_or_share_their_numbers(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"a of shape \(1000000, 100\) repeats fewer numbers"):
        safe_load.read(saved(tmp_path / "x.pth", {"a": torch.zeros(100).expand(1_000_000, 100)}))
    whole = torch.zeros(100_000)
    with pytest.raises(CheckpointError, match="which share their numbers"):
        safe_load.read(saved(tmp_path / "y.pth", {f"a{i}": whole for i in range(50)}))
    got = safe_load.read(saved(tmp_path / "z.pth", {"tied": whole, "same": whole, "part": whole[10:20]}))
    assert got["part"].shape == (10,)
    with pytest.raises(CheckpointError, match=r"torch\._utils\._rebuild_sparse_tensor"):
        safe_load.read(saved(tmp_path / "s.pth", {"a": torch.eye(3).to_sparse()}))


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("x.pth", b"garbage", "cannot be read as tensors alone: it begins like no file of torch.save"),
        ("x.pth", b"", "cannot be read: it is empty"),
        ("x.pth", b"\x80", "cannot be read: "),
        ("x.pth", b"PK\x03\x04garbage", "cannot be read: "),
        ("x.safetensors", b"\xff" * 64, "cannot be read: "),
        ("x.npz", b"PK\x03\x04", r"ends in \.npz"),
        ("x", b"PK\x03\x04", "ends in nothing"),
    ],
)
def test_files_that_are_no_weights(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=text):
        safe_load.read(tmp_path / name)


@pytest.mark.parametrize("how", [{}, OLD])
def test_files_cut_short_anywhere(tmp_path: Path, how: dict[str, Any]) -> None:
    whole = saved(tmp_path / "x.pth", {"a": torch.zeros(50)}, **how).read_bytes()
    for length in range(1, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "y.pth").write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"y\.pth "):
            safe_load.read(tmp_path / "y.pth")


def test_folders_tar_files_lists_and_names_without_tensors(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is a folder"):
        safe_load.read(tmp_path)
    with pytest.raises(CheckpointError, match=r"no\.pth is not there"):
        safe_load.read(tmp_path / "no.pth")
    with tarfile.open(tmp_path / "x.pth", "w") as archive:
        entry = tarfile.TarInfo("storages")
        entry.size = 3
        archive.addfile(entry, io.BytesIO(b"abc"))
    with pytest.raises(CheckpointError, match="is a tar archive"):
        safe_load.read(tmp_path / "x.pth")
    named = os.fsdecode(os.fsencode(tmp_path) + b"/\xff.pth")
    saved(tmp_path / "w.pth", WEIGHTS).rename(named)
    with pytest.raises(CheckpointError, match=r"is called something that is no UTF-8(.|\n)*rename it"):
        safe_load.read(Path(named))
    with pytest.raises(CheckpointError, match="holds a list and no named tensors"):
        safe_load.read(saved(tmp_path / "y.pth", [torch.zeros(1)]))
    content = safe_load.read(saved(tmp_path / "z.pth", {"model": {"a": torch.zeros(1), "n": 3}}))
    with pytest.raises(CheckpointError, match=r"1 entries that are no tensors \(n\)"):
        safe_load.tensors(tmp_path / "z.pth", content, ("model",))


@pytest.mark.parametrize(
    ("version", "safe"),
    [("2.9.1", False), ("2.9.1+cu128", False), ("1.13.1", False), ("2.6.0a0+nv", False), ("unknown", False),
     ("2.10.0", True), ("2.10.0+cpu", True), ("2.13.0", True), ("3.0.0", True)],
)  # fmt: skip
def test_a_torch_whose_reader_can_corrupt_memory_reads_no_pickle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, safe: bool
) -> None:
    assert safe_load.pickle_fault(version) == (
        "" if safe else f"the reader of torch {version} can be made to corrupt memory (CVE-2026-24747)"
    )
    if not safe:
        monkeypatch.setattr(safe_load, "pickle_fault", lambda: "CVE-2026-24747")
        monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("it was read"))
        for how in ({}, OLD):
            with pytest.raises(CheckpointError, match=r"is a pickle, and CVE-2026(.|\n)*'torch>=2\.10'"):
                safe_load.read(saved(tmp_path / "x.ckpt", WEIGHTS, **how))
        safetensors.torch.save_file(WEIGHTS, tmp_path / "x.safetensors")
        assert set(safe_load.read(tmp_path / "x.safetensors")) == set(WEIGHTS)


def test_numbers_that_are_not_finite_or_no_fractions_are_named(tmp_path: Path) -> None:
    check_numbers("x", {"a": torch.zeros(1), "b": torch.zeros(2).bfloat16()})
    odd = {"a": torch.zeros(1), "b": torch.tensor([1]), "c": torch.zeros(1).to(torch.float8_e4m3fn)}
    with pytest.raises(CheckpointError, match=r"2 tensors .* no plain .* \(b of torch\.int64, c of torch\.float8"):
        check_numbers("x", odd)
    with pytest.raises(CheckpointError, match=r"2 tensors with numbers that are not finite \(a, c\)"):
        check_numbers("x", {"a": torch.tensor([float("nan")]), "b": torch.ones(1), "c": torch.tensor([float("inf")])})
