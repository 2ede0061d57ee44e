"""Make tests/golden/before_move: small files of every kind that asit keeps, as the code wrote them before its move.

The move of modules (issue 13) began after commit 11ab9cc. tests/test_before_move.py proves that later code still reads,
resumes and searches these files. They are made once, by the package of that commit, and never again by later code:

    git worktree add /tmp/before 11ab9cc
    OMP_NUM_THREADS=1 PYTHONPATH=/tmp/before/src python tests/golden/make_before_move.py tests/golden/before_move

The test imports digests, command lines and the like from here; only what `make` calls imports asit.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import scipy
import soundfile
import torch

RATE = 8000
MANY = 260
"""Recordings in `many`: more than the 256 of one block of `asit embed`, so that a stopped call keeps a block."""
MTIME = 1_700_000_000_000_000_000
"""Time of change of all recordings, ns: git keeps none, and feature caches, indexes and blocks depend on it."""
QUERY = "low-1.flac"
"""The recording whose neighbours, vectors and labels are kept."""
FRONT_END = {"rate": RATE, "mels": 16}
ENCODER = {
    **{"size": "custom", "width": 16, "depth": 2, "heads": 2, "mlp_ratio": 2.0, "patch_frames": 8, "patch_mels": 8},
    "drop_path": 0.2,
}
COMMON: dict[str, Any] = {
    **{"seed": 5, "epochs": 3, "device": "cpu", "precision": "float32", "workers": 0, "threads": 1},
    "encoder": ENCODER,
}
RECORDS = {"log_every": 1, "checkpoint_every": 2, "keep": 1, "tensorboard": False}
PRETRAINING: dict[str, Any] = {
    **COMMON,
    "batch_size": 4,
    "front_end": FRONT_END,
    "views": {"seconds": 0.4, "local_views": 1, "local_seconds": 0.2, "roll": 0.5, "gain_db": 3.0, "stretch": 0.1},
    "heads": {"hidden": 24, "bottleneck": 12, "class_prototypes": 24, "patch_prototypes": 20},
    "optim": {"lr": 0.05, "warmup": 1.0, "freeze_last_layer": 0.5},
    "losses": {"teacher_warmup": 1.0},
    "records": {**RECORDS, "figure_every": 0},
}
FINETUNING: dict[str, Any] = {
    **COMMON,
    "batch_size": 3,
    "front_end": {},
    "encoder": {},
    "input": {"seconds": 0.4},
    "network": {"dropout": 0.2, "drop_path": 0.2},
    "augment": {
        **{"mixup": 0.5, "mixup_probability": 0.5, "roll_seconds": 0.1, "gain_db": 3.0, "noise": 0.1, "stretch": 0.1},
        **{"mel_warp": 0.1, "mel_mask": 4, "time_mask": 8},
    },
    "sampling": {"order": "balanced"},
    "optim": {"lr": 3e-3, "warmup": 1.0, "average": "ema", "ema": 0.7},
    "validation": {"every": 1},
    "records": RECORDS,
}
STOPS = {"pretraining": 4, "finetuning": 3}
"""Steps after which the runs were stopped, each in the middle of its second epoch."""


def environment() -> dict[str, Any]:
    """What the last bits of a result depend on: versions of the libraries that compute, and the processor."""
    flags: set[str] = set()
    about: dict[str, str] = {}
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text("utf-8").partition("\n\n")[0].splitlines()
        about = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        flags = set(about.get("flags", "").split())
    kinds = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16")
    return {
        "torch": torch.__version__,
        "numpy": np.__version__,
        "scipy": scipy.__version__,
        "soundfile": soundfile.__libsndfile_version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "processor": " ".join(about.get(name, "?") for name in ("vendor_id", "cpu family", "model")),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "flags": {name: name in flags for name in kinds},
    }


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """SHA-256 of arrays with their names, types and shapes."""
    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {value.shape}\n".encode())
        found.update(np.ascontiguousarray(value).tobytes())
    return found.hexdigest()


def last_state(run: Path) -> Path:
    """The tensors of a run's newest checkpoint."""
    return max((run / "checkpoints").iterdir()) / "state.safetensors"


def train_lines(run: Path) -> list[dict[str, Any]]:
    """The lines of training in metrics.jsonl, without what the clock decides."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    timed = ("clips_per_second", "data_wait", "seconds")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if line["kind"] == "train"]


def bits_of(run: Path) -> dict[str, str]:
    """Digests of a run's newest checkpoint and of the model that it leaves."""
    files = {"state": last_state(run), "model": run / "model" / "model.safetensors"}
    return {name: digest(safetensors.numpy.load_file(path)) for name, path in files.items()}


def shapes_of(path: Path) -> dict[str, list[int]]:
    """Names and shapes of the tensors in a file."""
    return {name: list(value.shape) for name, value in sorted(safetensors.numpy.load_file(path).items())}


def set_times(place: Path) -> None:
    """Give the recordings their time of change."""
    for path in [*(place / "clips").iterdir(), *(place / "shards").glob("*.tar")]:
        os.utime(path, ns=(MTIME, MTIME))


def copy_many(place: Path) -> None:
    """Lay the copies of the recordings that `asit embed` was asked for."""
    clips = sorted((place / "clips").iterdir())
    (place / "many").mkdir()
    for i in range(MANY):
        copy = place / "many" / f"{i:03d}{clips[i % len(clips)].suffix}"
        shutil.copyfile(clips[i % len(clips)], copy)
        os.utime(copy, ns=(MTIME, MTIME))


def _write_clips(place: Path) -> None:
    """Twelve chirps in noise, six low and six high, half of them FLAC, and their table."""
    (place / "clips").mkdir()
    rows = [["path", "label", "split"]]
    for i in range(12):
        label, rng = ("low", "high")[i % 2], np.random.default_rng([13, i])
        t = np.arange(round((0.45 + 0.02 * i) * RATE)) / RATE
        pitch = (300, 1500)[i % 2] * rng.uniform(0.8, 1.2)
        wave = 0.3 * np.sin(2 * np.pi * pitch * t * (1 + rng.uniform(0, 0.5) * t)) + 0.03 * rng.standard_normal(len(t))
        name = f"{label}-{i // 2}.{('wav', 'flac')[i // 2 % 2]}"
        soundfile.write(place / "clips" / name, wave, RATE, subtype="PCM_16")
        rows.append([f"clips/{name}", label, ("train", "train", "train", "validation", "test", "test")[i // 2]])
    with (place / "table.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(rows)


def _say(*arguments: str) -> None:
    from asit import cli

    print("asit", *arguments, flush=True)
    if cli.main(arguments):
        raise SystemExit(f"asit {' '.join(arguments)} failed")


def _train(place: Path) -> dict[str, Any]:
    """Each run twice: stopped, and to its end; what the latter came to."""
    import asit

    found: dict[str, Any] = {}
    for name, stop in STOPS.items():
        for out, steps in ((name, stop), (f"whole-{name}", 0)):
            if name == "pretraining":
                asit.pretrain("clips", out, stop_after=steps, **PRETRAINING)
            else:
                asit.finetune("table.csv", out, "encoder", stop_after=steps, **FINETUNING)
        whole = place / f"whole-{name}"
        shutil.copytree(whole / "model", place / {"pretraining": "encoder", "finetuning": "classifier"}[name])
        found[name] = {
            "stopped": stop,
            "steps": len(train_lines(whole)),
            "train": train_lines(whole),
            "shapes": shapes_of(last_state(whole)),
            "bits": bits_of(whole),
            "files": sorted(path.relative_to(whole).as_posix() for path in whole.rglob("*") if path.is_file()),
        }
    results = json.loads((place / "whole-finetuning" / "results.json").read_text())["results"]
    found["finetuning"]["results"] = [
        {key: one[key] for key in ("weights", "side", "split", "metrics", "clips") if key in one} for one in results
    ]
    found["finetuning"]["scores"] = {
        path.name: {name: value.tolist() for name, value in np.load(path).items() if value.dtype.kind == "f"}
        for path in sorted((place / "whole-finetuning" / "scores").glob("*.npz"))
    }
    return found


def _stop_embed() -> None:
    """`asit embed` of `many`, stopped by Ctrl-C as it begins its second block."""
    from asit.runs import embed_parts

    from asit import cli

    real = embed_parts.Parts.writer

    def stopping(self: Any, number: int) -> Any:
        if number == 1:
            raise KeyboardInterrupt
        return real(self, number)

    embed_parts.Parts.writer = stopping  # type: ignore[method-assign]
    code = cli.main(embed_arguments("many", "many.npz"))
    embed_parts.Parts.writer = real  # type: ignore[method-assign]
    if code != 130:
        raise SystemExit(f"asit embed was to be stopped, and ended with {code}")


def embed_arguments(inputs: str, out: str) -> list[str]:
    """The command line of `asit embed`, the same for the call that was stopped and for the one that goes on."""
    how = ["--precision", "float32", "--device", "cpu", "--threads", "1"]
    return ["embed", "encoder", inputs, "--out", out, *how]


def index_arguments(out: str) -> list[str]:
    """The command line of `asit index`."""
    how = ["--precision", "float32", "--device", "cpu", "--threads", "1"]
    return ["index", "encoder", "clips", "--out", out, *how]


def evaluate_arguments(cache: str, out: str) -> list[str]:
    """The command line of `asit evaluate` that fills the cache, or reads it."""
    how = ["--probe", "linear", "--pooling", "class+mean", "--device", "cpu", "--threads", "1"]
    return ["evaluate", "encoder", "--data", "table.csv", *how, "--cache", cache, "--out", out]


def _cache_facts() -> dict[str, Any]:
    """What the names in the cache of features are made of: facts of the shelves, without torch's version."""
    from asit.runs import features, readers

    import asit

    weights, _, facts = readers.EncoderReader(asit.load("encoder")).digest.partition(" ")
    return {"format": features.FORMAT, "weights": weights, "facts": json.loads(facts), "kinds": ["class", "mean"]}


def _answers(place: Path) -> dict[str, Any]:
    """What the models and the catalogue say."""
    import asit

    embedding = asit.load("encoder").embed(f"clips/{QUERY}", precision="float32")
    tags = asit.load("classifier").tag(f"clips/{QUERY}", precision="float32")
    catalogue = asit.Catalogue.read("catalogue.jsonl")
    clips = [catalogue[i] for i in range(len(catalogue))]
    return {
        "embedding": {
            "clip": embedding.clip.tolist(),
            "class_token": embedding.class_token.tolist(),
            "frames": embedding.frames.tolist(),
            "times": embedding.times.tolist(),
        },
        "tags": {"classes": tags.classes, "clip": tags.clip.tolist()},
        "catalogue": {
            "digest": catalogue.digest,
            "mean": catalogue.header["mean"],
            "std": catalogue.header["std"],
            "clips": [[Path(c.path).name, c.seconds, c.rate, c.channels] for c in clips],
        },
        "shards": {"digest": asit.Catalogue.read("shards/index.jsonl").digest},
    }


def make(out: Path) -> None:
    """Make the fixtures in a folder of the temporary files, whose path some of them hold, and move them to `out`."""
    import contextlib
    import io

    place = Path(tempfile.gettempdir()).resolve() / "asit-before-move"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir()
    os.chdir(place)
    torch.set_num_threads(1)
    _write_clips(place)
    front_end = [f"--front-end.{name}={value}" for name, value in FRONT_END.items()]
    _say("catalogue", "clips", "--out", "catalogue.jsonl", "--workers", "1", *front_end)
    _say("shard", "catalogue.jsonl", "--out", "shards", "--clips", "6", "--workers", "1")
    set_times(place)
    copy_many(place)
    expected: dict[str, Any] = {"commit": "11ab9cc", "made_in": str(place), "mtime": MTIME, "front_end": FRONT_END}
    expected["environment"], expected["threads"] = environment(), torch.get_num_threads()
    expected |= _train(place)
    expected |= _answers(place)
    _say(*index_arguments("index"))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        _say("similar", "index", f"clips/{QUERY}", "-k", "4", "--format", "json", "--device", "cpu", "--threads", "1")
    answer = json.loads(said.getvalue().splitlines()[-1])
    neighbours = [[hit["name"], hit["similarity"], hit["start"], hit["end"]] for hit in answer["neighbours"]]
    expected["index"] = {"neighbours": neighbours}
    _say(*embed_arguments("many", "whole.npz"))
    vectors = np.load("whole.npz")["vectors"]
    _stop_embed()
    _say(*embed_arguments("clips", "embed.npz"))
    expected["embed"] = {"kept": 256, "bits": digest({"vectors": vectors}), "last": vectors[256:].tolist()}
    _say(*evaluate_arguments("cache", "evaluated.json"))
    expected["evaluated"] = json.loads(Path("evaluated.json").read_text())["results"]
    expected["cache"] = _cache_facts()
    kept = ("clips", "table.csv", "catalogue.jsonl", "shards", "pretraining", "finetuning", "encoder", "classifier")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    for name in (*kept, "index", "many.npz.parts", "embed.npz", "cache"):
        if Path(name).is_dir():
            shutil.copytree(name, out / name)
        else:
            shutil.copy(name, out / name)
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in expected.items())
    (out / "expected.json").write_text("{\n" + ",\n".join(lines) + "\n}\n", "utf-8")


def main(arguments: Sequence[str]) -> None:
    make(Path(arguments[0]).absolute())


if __name__ == "__main__":
    main(sys.argv[1:])
