"""Mutated files of every structured kind: each is read, or refused by an AsitError; none runs anything or hangs.

A case is one mutation of one file, drawn from its number alone, and what reads that file in asit. `REPORT=1` prints the
counts. The default suite has a few hundred cases, `slow` many thousand.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import random
import re
import shutil
import signal
import struct
import sys
import traceback
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import yaml

import asit
from asit import search
from asit.config import EncoderSettings, FinetuneSettings, FrontEndSettings, PretrainSettings
from asit.config import yaml as config
from asit.data.catalogue import scan, tables
from asit.data.catalogue.catalogue import Catalogue
from asit.errors import AsitError
from asit.evaluate import feature_cache
from asit.finetune import cross_validation
from asit.finetune import finetune_run as finetuning
from asit.interop import convert, huggingface
from asit.interop.convert import SourceOptions
from asit.io import parsing
from asit.model.audio_model import AudioModel
from asit.model.classifier import Head, Labelling
from asit.model.vit import Encoder
from asit.pretrain import pretrain_run as pretraining
from asit.report import report as write_report
from asit.report.compare import compare
from asit.report.score_records import Scores
from asit.tools import model_info
from asit.training import metrics_log

if sys.platform == "win32":
    pytest.skip("an alarm ends a case that hangs", allow_module_level=True)

SECONDS = 10
"""Of the processor's time that a case may take."""
RATE = 8000
FRONT_END = {"rate": RATE, "mels": 32, "mean": -8.0, "std": 3.5}
SHAPE = {"size": "custom", "width": 32, "depth": 1, "heads": 1}
SHARED: dict[str, Any] = {"epochs": 1, "batch_size": 2, "device": "cpu", "precision": "float32", "workers": 0,
                          "threads": 1, "front_end": FRONT_END, "encoder": SHAPE}  # fmt: skip
RECORDS = {"log_every": 1, "checkpoint_every": 2, "keep": 2, "tensorboard": False, "figure_every": 0}

# Replacements of a value, as JSON text, so that numbers are written as they are here.
ODD = [
    "null", "true", "false", "0", "-1", "1", "1.5", "-0.0", "1e308", "-1e308", "1e400", "NaN", "Infinity", "-Infinity",
    "9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" + "0" * 5000,
    "4294967296", "2147483648", "1e-320", '""', '"x"', '" "', '"1"', '"nan"', '"\\ud800"', '"\\udcff"', '"\\u0000"',
    '"\\u001b[31m"', '"../../etc/passwd"', '"/dev/zero"', '"/dev/stdin"', '"' + "y" * 5000 + '"', "[]", "{}", "[null]",
    "[[]]", "[1, 2]", '{"a": 1}', '[{"a": []}]', "[" * 60 + "]" * 60, "[" * 3000 + "]" * 3000,
    '{"a":' * 3000 + "1" + "}" * 3000, "9" * 400, "true false", "// no",
]  # fmt: skip


def mutated_bytes(data: bytes, draw: random.Random) -> bytes:
    """Bytes changed, cut out, doubled, torn off, or put in."""
    kind, at = draw.randrange(8), draw.randrange(len(data) + 1)
    size = draw.choice([1, 2, 4, 16, 200])
    if kind == 0:
        return data[:at]
    if kind == 1:
        return data[:at] + data[at + size :]
    if kind == 2:
        return data[:at] + data[at : at + size] * 2 + data[at + size :]
    if kind == 3:
        return data[:at] + draw.randbytes(size) + data[at + size :]
    if kind == 4:
        return data[:at] + bytes([data[at] ^ 1 << draw.randrange(8)]) + data[at + 1 :] if at < len(data) else data
    if kind == 5:
        return data[:at] + draw.choice([b"\xff", b"\0" * size, b"\xed\xa0\x80", b"\n", b"\r", b"null\n"]) + data[at:]
    if kind == 6:
        return data[:at] + b"\0" * (len(data) - at)  # what a crash of the machine leaves
    return draw.choice([b"", b"\0", b"\xef\xbb\xbf" + data, data + data, data.replace(b"\n", b"\r\n"), b"[" * 100_000])


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from nodes(inner, (*path, key))


TOKEN = "\x01odd\x01"


def mutated_value(value: Any, draw: random.Random) -> tuple[Any, str]:
    """A value of JSON with one of its nodes replaced by `TOKEN`, removed or renamed, and the text for it."""
    value = json.loads(json.dumps(value))
    path = draw.choice(list(nodes(value)))
    text = draw.choice(ODD)
    if not path:
        return TOKEN, text
    at = value
    for key in path[:-1]:
        at = at[key]
    kind = draw.randrange(6)
    if kind == 0:
        del at[path[-1]]
    elif kind == 1 and isinstance(at, dict):
        at[draw.choice(["", "x", "__class__", str(path[-1]) + " ", "\udcff"])] = at.pop(path[-1])
    elif kind == 2 and isinstance(at[path[-1]], int | float) and not isinstance(at[path[-1]], bool):
        at[path[-1]] *= draw.choice([-1, 0, 2, 1e9, 1e30, 0.5])
    else:
        at[path[-1]] = TOKEN
    return value, text


def mutated_json(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutated_bytes(data, draw)
    value, text = mutated_value(json.loads(data), draw)
    return json.dumps(value).replace(json.dumps(TOKEN), text).encode("utf-8", "surrogatepass")


def mutated_lines(data: bytes, draw: random.Random) -> bytes:
    """One line of JSON mutated, or the whole file as bytes."""
    rows = data.splitlines(keepends=True)
    at = draw.randrange(len(rows))
    rows[at] = mutated_json(rows[at], draw).replace(b"\n", b" ") + b"\n"
    if draw.random() < 0.2:
        rows.insert(
            at, draw.choice([b"null\n", b"\n", b"{}\n", b"[]\n", b"\xff\xfe\n", b"3\n", rows[0], b'{"step": 1}\n'])
        )
    return b"".join(rows)


ODD_YAML = [
    "a: &a [*a]\n", "!!python/object/apply:os.system ['touch made']\n", "? [a]\n: b\n", "a: !!int x\n",
    "a: !!timestamp x\n", "<<: 3\n", "a: 2020-99-99\n", "--- a\n--- b\n", "seed: 0x" + "f" * 4000 + "\n",
    "a: 1:99:99:99\n", "!!set {a}\n", "!!omap [a: 1]\n", "a: !!binary x\n", "%YAML 9.9\n---\na: 1\n",
]  # fmt: skip


def mutated_yaml(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.3:
        return mutated_bytes(data, draw)
    if draw.random() < 0.2:
        before = ["*a", *(f"*b{i}" for i in range(9))]
        lists = [f"b{i}: &b{i} [{', '.join([before[i]] * 10)}]" for i in range(9)]
        merges = [f"b{i}: &b{i}\n  <<: [{', '.join([before[i]] * 10)}]" for i in range(9)]
        bombs = ["\n".join(["a: &a [x]", *lists]) + "\n", "\n".join(["a: &a {x: 1}", *merges]) + "\n", *ODD_YAML]
        return draw.choice([b"", data]) + draw.choice(bombs).encode()
    value, text = mutated_value(yaml.safe_load(data), draw)
    return yaml.safe_dump(value).replace('"\\x01odd\\x01"', text).encode("utf-8", "surrogatepass")


def mutated_header(data: bytes, draw: random.Random) -> bytes:
    """safetensors: eight bytes of length, the header in JSON, the numbers."""
    if draw.random() < 0.3:
        return mutated_bytes(data, draw)
    (size,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + size])
    rest = data[8 + size :]
    kind = draw.randrange(5)
    names = [name for name in header if name != "__metadata__"]
    name = draw.choice(names)
    if kind == 0:
        header[name]["dtype"] = draw.choice(["F64", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X"])
        if draw.random() < 0.7:  # of a size that fits
            begin, end = header[name]["data_offsets"]
            width = {"F64": 8, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "C64": 8}
            header[name]["shape"] = [(end - begin) // width.get(header[name]["dtype"], 4)]
    elif kind == 1:
        bad = struct.pack("<f", draw.choice([float("nan"), float("inf"), -3e38, 1e-45])) * draw.choice([1, 50])
        at = 4 * draw.randrange(max(1, len(rest) // 4))
        rest = rest[:at] + bad[: len(rest) - at] + rest[at + len(bad) :]
    elif kind == 2:
        header[name + draw.choice(["x", "\x00", "/", ".weight", "\ud800"])] = header.pop(name)
    elif kind == 3 and len(names) > 1:
        other = draw.choice(names)
        header[name], header[other] = header[other], header[name]
    else:
        changed, text = mutated_value(header, draw)
        packed = json.dumps(changed).replace(json.dumps(TOKEN), text).encode("utf-8", "surrogatepass")
        return struct.pack("<Q", len(packed)) + packed + rest
    packed = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(packed)) + packed + rest


def mutated_npy(data: bytes, draw: random.Random) -> bytes:
    if draw.random() < 0.4:
        return mutated_bytes(data, draw)
    (size,) = struct.unpack("<H", data[8:10])
    own = data[10 : 10 + size]
    header = draw.choice([
        b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }", b"{'descr': '<f4', 'fortran_order': False, }",
        b"{'descr': '<f8', 'fortran_order': False, 'shape': (9999999999999,), }", b"{'shape': (" * 500, b"",
        b"[" * 9000,
        b"{'descr': '<f2', 'fortran_order': 1, 'shape': -3, }", b"__import__('os').system('touch made')", b"\xff" * 60,
        b"{'descr': [('a', '<f4', (10**9,))], 'fortran_order': False, 'shape': (2,), }", b"{" * 300, b"(1", b"'" * 33,
        own.replace(b"<", b">"), own.replace(b"(", b"(1, "), own[:20], own.replace(b"False", b"True"),
        b"{'descr': '<M8', 'fortran_order': False, 'shape': (2,), }",
    ])  # fmt: skip
    version = draw.choice([b"\x01\x00", b"\x02\x00", b"\x03\x00", b"\x09\x00"])
    length = struct.pack("<H" if version == b"\x01\x00" else "<I", len(header))
    return data[:6] + version + length + header + data[10 + size :]


def mutated_npz(data: bytes, draw: random.Random, at: Path) -> bytes:
    if draw.random() < 0.4:
        return mutated_bytes(data, draw)
    at.write_bytes(data)
    with zipfile.ZipFile(at) as parts:
        held = {name: parts.read(name) for name in parts.namelist()}
    name = draw.choice(list(held))
    if draw.random() < 0.2:
        del held[name]
    elif draw.random() < 0.2:
        held[name] = held[draw.choice(list(held))]
    else:
        held[name] = mutated_npy(held[name], draw)
    with zipfile.ZipFile(at, "w") as parts:
        for key, value in held.items():
            parts.writestr(key, value)
    return at.read_bytes()


def mutated_text(data: bytes, draw: random.Random) -> bytes:
    """Cells of a table, or lines of a text."""
    if draw.random() < 0.4:
        return mutated_bytes(data, draw)
    rows = [line.split(",") for line in data.decode().split("\n")]
    row = draw.choice(rows)
    odd = ["", '"', '""', "\0", "\r", "nan", "1e400", "-1", "9" * 5000, "a;b:2", "x:", ":", "=1+1", "y" * 200_000]
    odd.append("\udcff")
    row[draw.randrange(len(row))] = draw.choice(odd)
    if draw.random() < 0.2:
        row.append("more")
    return "\n".join(",".join(cells) for cells in rows).encode("utf-8", "surrogateescape")


# What is mutated


def classifier() -> AudioModel:
    settings = EncoderSettings.model_validate({**SHAPE, "patch_frames": 8, "patch_mels": 8})
    encoder, head = Encoder(settings, 48, 32), Head(32, 3, "mean")
    encoder.init_weights(torch.Generator().manual_seed(0))
    head.init_weights(torch.Generator().manual_seed(0))
    labels = Labelling(("a", "b", "c"), False, "mean", 0.5)
    return AudioModel.from_parts(encoder, FrontEndSettings(**FRONT_END), settings, 48, {"steps": 7, "x": [1, {"y": 2.5}]}, head, labels)  # fmt: skip  # noqa: E501


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, its folder for transformers, a run of each kind, an index, tables, caches: all small."""
    root = tmp_path_factory.mktemp("originals")
    (root / "sounds").mkdir()
    rows = []
    for i in range(6):
        t = np.arange(4000) / RATE
        wave = 0.2 * np.sin(2 * np.pi * (300 + 200 * (i % 2)) * t) + 0.02 * np.random.default_rng(i).standard_normal(
            4000
        )
        soundfile.write(root / "sounds" / f"{i}.wav", wave.astype(np.float32), RATE, subtype="FLOAT")
        rows.append(f"sounds/{i}.wav,{'ab'[i % 2]},{'train' if i < 4 else 'test'}")
    (root / "table.csv").write_text("path,label,split\n" + "\n".join(rows) + "\n")
    (root / "table.jsonl").write_text(
        "\n".join(json.dumps({"path": f"sounds/{i}.wav", "label": {"a": 0.5}}) for i in range(4))
    )
    scan.build(root / "table.csv", root / "catalogue.jsonl", front_end=FrontEndSettings(**FRONT_END), workers=1)
    model = classifier()
    model.save(root / "model")
    huggingface.write(model, root / "hf")
    encoder = model.encoder.state_dict()
    torch.save({"cls_token": encoder["cls_token"], **encoder}, root / "weights.pth")
    views = {"seconds": 0.3, "local_views": 0}
    heads = {"hidden": 16, "bottleneck": 8, "class_prototypes": 16, "patch_prototypes": 16}
    settings = {**SHARED, "views": views, "heads": heads, "records": {**RECORDS, "figure_every": 2}}
    pretrained = PretrainSettings(data=str(root / "catalogue.jsonl"), out=str(root / "run"), stop_after=2, **settings)
    pretraining.pretrain(pretrained)
    tuned = {**SHARED, "model": "none", "input": {"seconds": 0.4}, "optim": {"average": "ema"}, "records": RECORDS}
    tuned["sides"] = {"hold_out": 0.5}
    begun = FinetuneSettings(data=str(root / "catalogue.jsonl"), out=str(root / "tuned"), **tuned)
    finetuning.finetune(begun)
    search.build(model, [str(root / "sounds")], root / "index", search.IndexSettings(precision="float32"))
    (root / "labels.csv").write_text("index,display_name\n0,a\n1,b\n2,c\n")
    (root / "labels.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    store = feature_cache.Store(root / "cache")
    store.shelf("x").put({bytes(20): np.zeros((1, 3), np.float32), bytes([1] * 20): np.ones((2, 3), np.float32)})
    return root


def with_hash(folder: Path, facts: str, weights: str) -> None:
    """The hash in the card is that of the weights, whatever they are: what only a person can do."""
    try:
        card = json.loads((folder / facts).read_text())
        card["sha256"] = hashlib.sha256((folder / weights).read_bytes()).hexdigest()
        (folder / facts).write_text(json.dumps(card))
    except (ValueError, TypeError, RecursionError):
        pass


def load(path: Path) -> None:
    model = asit.load(path)
    model.embed(np.zeros(4000, np.float32))
    model.card  # noqa: B018
    model_info.describe(path)


def load_weights(path: Path) -> None:
    with_hash(path, "card.json", "model.safetensors")
    load(path)


def read_index(path: Path) -> None:
    card = json.loads((path / "card.json").read_bytes())
    if isinstance(card, dict) and isinstance(card.get("sha256"), dict):
        card["sha256"] = {name: hashlib.sha256((path / name).read_bytes()).hexdigest() for name in card["sha256"]}
        (path / "card.json").write_text(json.dumps(card))
    read_index_as_it_is(path)


def read_index_as_it_is(path: Path) -> None:
    index = search.Index.read(path)
    index.nearest(np.ones(index.vectors.shape[1], np.float32), 3)


def resume(run: Path, change: bool = True) -> None:
    if change:
        state = next((run / "checkpoints").iterdir())
        with_hash(state, "state.json", "state.safetensors")
    begun: Any
    kind, go = (PretrainSettings, pretraining.pretrain)
    if run.name == "tuned":
        kind, go = (FinetuneSettings, finetuning.finetune)
    begun = config.build(kind, yaml.safe_load((run.parent / f"{run.name}.yaml").read_text()), "original")
    here: dict[str, Any] = {"out": str(run), "data": str(run.parent / "catalogue.jsonl")}
    if kind is PretrainSettings:
        here["stop_after"] = 2
    go(begun.changed(here), resume=True)


def read_catalogue(path: Path) -> None:
    found = Catalogue.read(path, look=False)
    found.digest  # noqa: B018
    found.ids()
    b"".join(found.lines("."))
    [dataclasses.asdict(found[i]) for i in range(len(found))]


def read_cache(path: Path) -> None:
    feature_cache.Store(path).shelf("x").get([bytes([i] * 20) for i in range(3)])


def write_card(run: Path) -> None:
    model = asit.load(run / "model")
    huggingface.write(model, run.parent / "out", run=run, overwrite=True)


def summarise(path: Path) -> None:
    with parsing.as_written(path, "again"):
        cross_validation.summarise([(name, parsing.json_object(path, AsitError)) for name in "12"])


def cut(path: Path) -> None:
    metrics_log.Records(path.parent, 3, 2).__exit__(None, None, None)
    for line, _ in metrics_log.lines(path):
        json.loads(line)


@dataclasses.dataclass(frozen=True)
class Target:
    """What is copied, which of its files is mutated and how, and what reads it."""

    name: str
    file: str
    mutate: Callable[..., bytes]
    read: Callable[[Path], Any]
    folder: str = ""
    slow: bool = False


STATE, TUNED = "run/checkpoints/step-00000002", "tuned/checkpoints/step-00000001"
TARGETS = [
    Target("card", "model/card.json", mutated_json, load, "model"),
    Target("weights", "model/model.safetensors", mutated_header, load_weights, "model"),
    Target("hf config", "hf/config.json", mutated_json, load, "hf"),
    Target("hf extractor", "hf/preprocessor_config.json", mutated_json, load, "hf"),
    Target("hf weights", "hf/model.safetensors", mutated_header, load, "hf"),
    Target("pickle", "weights.pth", mutated_bytes, lambda p: convert.convert(p, SourceOptions(kind="asit", mels=32))),
    Target("settings of pretraining", "run/config.yaml", mutated_yaml,
           lambda p: config.build(PretrainSettings, config.read_yaml(p), str(p))),
    Target("settings of fine-tuning", "tuned/config.yaml", mutated_yaml,
           lambda p: config.build(FinetuneSettings, config.read_yaml(p), str(p))),
    Target("metrics cut", "run/metrics.jsonl", mutated_lines, cut),
    Target("catalogue", "catalogue.jsonl", mutated_lines, read_catalogue),
    Target("table", "table.csv", mutated_text, tables.read_table),
    Target("table of JSON", "table.jsonl", mutated_lines, tables.read_table),
    Target("labels", "labels.csv", mutated_text, lambda p: convert.label_names._read(p)),
    Target("labels of JSON", "labels.json", mutated_json, lambda p: convert.label_names._read(p)),
    Target("index card", "index/card.json", mutated_json, read_index_as_it_is, "index"),
    Target("index vectors", "index/vectors.npy", mutated_npy, read_index, "index"),
    Target("index rows", "index/rows.npy", mutated_npy, read_index, "index"),
    Target("index sources", "index/sources.jsonl", mutated_lines, read_index, "index"),
    Target("cache", "cache", mutated_header, read_cache, "cache"),
    Target("scores", "tuned/scores", mutated_npz, Scores.read),
    Target("results for a model card", "tuned/results.json", mutated_json, write_card, "tuned"),
    Target("results of a fold", "tuned/results.json", mutated_json, summarise),
    Target("results to compare", "tuned/results.json", mutated_json, lambda p: compare([p, p])),
    Target("resume: metrics", "run/metrics.jsonl", mutated_lines, lambda p: resume(p, False), "run", True),
    Target("resume: settings", "run/config.yaml", mutated_yaml, lambda p: resume(p, False), "run", True),
    Target("resume: environment", "run/environment.json", mutated_json, lambda p: resume(p, False), "run", True),
    Target("resume: state", f"{STATE}/state.json", mutated_json, lambda p: resume(p, False), "run", True),
    Target("resume: tensors", f"{STATE}/state.safetensors", mutated_header, resume, "run", True),
    Target("resume: catalogue", "run/catalogue.jsonl", mutated_lines, lambda p: resume(p, False), "run", True),
    Target("resume: fine-tuning tensors", f"{TUNED}/state.safetensors", mutated_header, resume,
           "tuned", True),
    Target("resume: fine-tuning metrics", "tuned/metrics.jsonl", mutated_lines, lambda p: resume(p, False), "tuned",
           True),
    Target("report: metrics", "run/metrics.jsonl", mutated_lines, lambda p: write_report(p), "run", True),
    Target("report: settings", "run/config.yaml", mutated_yaml, lambda p: write_report(p), "run", True),
    Target("report: environment", "run/environment.json", mutated_json, lambda p: write_report(p), "run", True),
    Target("report: results", "tuned/results.json", mutated_json, lambda p: write_report(p), "tuned", True),
    Target("report: scores", "tuned/scores", mutated_npz, lambda p: write_report(p), "tuned", True),
    Target("report: figures", "run/figures", mutated_npz, lambda p: write_report(p), "run", True),
    Target("report: catalogue", "run/catalogue.jsonl", mutated_lines, lambda p: write_report(p), "run", True),
]  # fmt: skip


# Nothing is executed, nothing hangs

STARTS = {"os.system", "os.exec", "os.posix_spawn", "os.spawn", "subprocess.Popen", "pty.spawn", "socket.connect"}
_watching: list[list[str]] = []


def _audit(event: str, _: Any) -> None:
    if _watching and event in STARTS:
        _watching[-1].append(event)


sys.addaudithook(_audit)


class HangError(BaseException):
    """A case took longer than it may; no `except Exception` catches it."""


@contextmanager
def watched() -> Iterator[list[str]]:
    def ring(*_: Any) -> None:
        raise HangError

    # Time of the processor, so that a busy machine makes no case slow; a case that only waits is ended as well.
    before = {number: signal.signal(number, ring) for number in (signal.SIGPROF, signal.SIGALRM)}
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    signal.setitimer(signal.ITIMER_REAL, 12 * SECONDS)
    _watching.append([])
    try:
        yield _watching[-1]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
        _watching.pop()


def case(target: Target, number: int, originals: Path, at: Path) -> tuple[str, str]:
    """How one case ended: (read or refused, "") or (what went wrong, where)."""
    draw = random.Random(f"{target.name} {number}")
    shutil.rmtree(at, ignore_errors=True)
    at.mkdir()
    if target.folder:
        shutil.copytree(originals / target.folder, at / target.folder)
        for name in ("catalogue.jsonl",):
            shutil.copy(originals / name, at / name)
        if target.folder in ("run", "tuned"):
            shutil.copy(originals / target.folder / "config.yaml", at / f"{target.folder}.yaml")
    source = originals / target.file
    if source.is_dir():
        kind = ".npz" if target.mutate is mutated_npz else ".safetensors"
        source = draw.choice(sorted(source.rglob(f"*{kind}")))
    path = at / (source.relative_to(originals) if target.folder else source.name)
    data = source.read_bytes()
    more = (at / "scratch.npz",) if target.mutate is mutated_npz else ()
    changed = target.mutate(data, draw, *more)
    for path in more:
        path.unlink(missing_ok=True)
    path.write_bytes(changed)
    given = at / target.folder if target.folder else path
    try:
        with watched() as begun:
            target.read(given)
    except AsitError as error:
        message = str(error)
        if not re.search(r"[^\s]", message) or len(message) > 20_000:
            return "a message that cannot be read", repr(message[:200])
        ended = "refused"
    except HangError:
        return "took too long", traceback.format_exc()
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}", traceback.format_exc()
    else:
        ended = "read"
    if begun or list(at.rglob("made")) or Path("made").exists():
        return "something was run", ", ".join(begun)
    return ended, ""


@pytest.fixture(autouse=True)
def unlogged() -> Iterator[None]:
    """Without messages: pytest-xdist fails to send captured ones that are no valid Unicode."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def run(target: Target, numbers: range, originals: Path, at: Path) -> Counter[str]:
    counts: Counter[str] = Counter()
    wrong = []
    for number in numbers:
        ended, where = case(target, number, originals, at)
        counts[ended] += 1
        if where:
            wrong.append(f"case {number}: {ended}\n{where}")
    if os.environ.get("REPORT"):
        print(f"{target.name}: {dict(counts)}")
    assert not wrong, f"{len(wrong)} of {len(numbers)} cases of {target.name}\n" + "\n".join(wrong[:5])
    return counts


@pytest.mark.parametrize("target", [one for one in TARGETS if not one.slow], ids=lambda one: one.name)
def test_a_mutant_is_read_or_refused(target: Target, originals: Path, tmp_path: Path) -> None:
    run(target, range(12), originals, tmp_path / "at")


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS, ids=lambda one: one.name)
def test_many_mutants_are_read_or_refused(target: Target, originals: Path, tmp_path: Path) -> None:
    run(target, range(100, 125 if target.slow else 500), originals, tmp_path / "at")
