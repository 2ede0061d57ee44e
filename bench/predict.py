"""From a 10 s file to scores on a CPU, beside Hugging Face's AST as its users run it.

    python bench/predict.py [--toy] [--rounds 5] [--threads 1 2] [--only NAME ...] [--no-int8]

Base encoders with random weights, 527 classes, a 10 s FLAC file at 16 kHz, one clip at a time. Every contender is a
process of its own, and they take turns; a round's ratios are of that round, and medians over rounds are printed. AST is
`ASTForAudioClassification` in float32 with 1,212 patches (16 x 16, every 10) and its feature extractor; where
torchaudio cannot be loaded, the extractor computes in NumPy, so the column "network" tells the time of the network
alone, and no ratio has to rest on the extraction. Ours is `model.tag(path)`, which decodes, resamples and checks too.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from measure import Helper, asked

SECONDS, RATE, CLASSES = 10, 16000, 527
HF, EAGER, EQUAL = "AST, float32", "AST, float32, eager attention", "ours at AST's tokens"
OURS, PLAIN, INT8 = "ours", "ours, float32", "ours, int8 ONNX"
CONTENDERS = (HF, EAGER, EQUAL, OURS, PLAIN, INT8)
TARGETS = {EQUAL: 1.5, OURS: 4.5, INT8: 8.0}
"""Wished ratios to `HF`, from file to scores."""

Timed = Callable[[], tuple[Any, float]]
"""Scores of the file, and the seconds of the network among all."""


def recording(path: Path) -> None:
    """A sound that is no noise: gliding tones, some of them broken off."""
    import numpy as np
    import soundfile

    rng, t = np.random.default_rng(0), np.arange(SECONDS * RATE) / RATE
    wave = sum(np.sin(2 * np.pi * f * t * (1 + 0.05 * t)) * (np.sin(f * t / 99) > 0) for f in rng.uniform(100, 5000, 8))
    soundfile.write(path, (0.05 * wave + 0.005 * rng.standard_normal(len(t))).astype(np.float32), RATE)


def our_model(toy: bool, stride: int | None) -> Any:
    """A classifier with random weights; `stride`: of patches in frames and bins, None: their side."""
    import torch

    from asit.audio.fbank import FrontEnd
    from asit.config import EncoderSettings, FrontEndSettings
    from asit.model.audio_model import AudioModel
    from asit.model.classifier import Head, Labelling
    from asit.model.positions import round_up_frames
    from asit.model.vit import Encoder, shape_of

    size: dict[str, Any] = {"size": "custom", "width": 32, "depth": 2, "heads": 2} if toy else {"size": "base"}
    settings = EncoderSettings(**size, patch_stride_frames=stride, patch_stride_mels=stride)
    frames = round_up_frames(998, settings) if stride is None else 1016  # AST's 1,024 fill 101 columns, 1,016 frames
    encoder, head = Encoder(settings, frames, 128), Head(shape_of(settings)[0], CLASSES)
    for part in (encoder, head):
        part.init_weights(torch.Generator().manual_seed(0))
    labels = Labelling(tuple(f"class {i}" for i in range(CLASSES)), True, "class", float(SECONDS))
    front_end = FrontEndSettings(mean=-4.2677393, std=4.5689974)
    return AudioModel(encoder, FrontEnd(front_end), {}, head, labels)


def ours(path: Path, toy: bool, stride: int | None, precision: str) -> Timed:
    model = our_model(toy, stride)
    tagger = model.tagger(precision)

    def once() -> tuple[Any, float]:
        windows = list(tagger.windows(path))
        assert len(windows) == 1
        start = time.perf_counter()
        parts = tagger.run(windows)
        seconds = time.perf_counter() - start
        return tagger.join(parts).clip, seconds

    return once


def hugging_face(path: Path, toy: bool, attention: str) -> Timed:
    import soundfile
    import torch
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = ASTConfig(num_labels=CLASSES, attn_implementation=attention, **(small if toy else {}))  # type: ignore[call-arg]
    network = ASTForAudioClassification(config).eval()
    extract = ASTFeatureExtractor()

    def once() -> tuple[Any, float]:
        wave, rate = soundfile.read(path, dtype="float32")
        inputs = extract(wave, sampling_rate=rate, return_tensors="pt")
        start = time.perf_counter()
        with torch.inference_mode():
            scores = network(**inputs).logits.sigmoid()[0]
        return scores, time.perf_counter() - start

    return once


def onnx(path: Path, file: Path, threads: int) -> Timed:
    import onnxruntime
    import soundfile

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def once() -> tuple[Any, float]:
        wave, _ = soundfile.read(path, dtype="float32")
        start = time.perf_counter()
        scores = session.run(None, {"waveform": wave[None]})[0][0]
        return scores, time.perf_counter() - start

    return once


def contend(pipe: Connection, name: str, path: Path, file: Path, threads: int, toy: bool) -> None:
    """A process that takes the file to scores each time it is asked."""
    import torch

    torch.set_num_threads(threads)
    once = {
        HF: lambda: hugging_face(path, toy, "sdpa"),
        EAGER: lambda: hugging_face(path, toy, "eager"),
        EQUAL: lambda: ours(path, toy, 10, "auto"),
        OURS: lambda: ours(path, toy, None, "auto"),
        PLAIN: lambda: ours(path, toy, None, "float32"),
        INT8: lambda: onnx(path, file, threads),
    }[name]()
    for _ in range(2):
        once()
    while asked(pipe):
        start, began = time.perf_counter(), time.process_time()
        _, network = once()
        pipe.send({"file": time.perf_counter() - start, "network": network, "cpu": time.process_time() - began})


def export(pipe: Connection, file: Path, toy: bool) -> None:
    """A process that writes the int8 file: what the exporter holds in memory goes with it."""
    from asit.interop.onnx import export as write

    while asked(pipe):
        write(our_model(toy, None), file, output="scores", int8=True)
        pipe.send({})


def accuracy(path: Path, file: Path, toy: bool) -> None:
    """How far the lower precisions are from float32, for the same weights."""
    import numpy as np

    def logits(scores: Any) -> Any:
        p = np.asarray(scores, np.float64)
        return np.log(p / (1 - p))

    want = logits(ours(path, toy, None, "float32")()[0])
    found = {"bf16": ours(path, toy, None, "bf16")()[0]}
    if file.exists():
        found["int8 ONNX"] = onnx(path, file, 1)()[0]
    print("\n| to float32, same weights | cosine of logits | largest difference of a score |\n|---|---|---|")
    for name, scores in found.items():
        got = logits(scores)
        cosine = float(got @ want / np.linalg.norm(got) / np.linalg.norm(want))
        most = float(np.abs(np.asarray(scores) - 1 / (1 + np.exp(-want))).max())
        print(f"| {name} | {cosine:.5f} | {most:.5f} |")


def table(path: Path, file: Path, names: list[str], threads: int, rounds: int, toy: bool) -> None:
    """Contenders in turn, medians over rounds."""
    env = {"OMP_NUM_THREADS": str(threads)}
    helpers = {name: Helper(contend, name, path, file, threads, toy, env=env) for name in names}
    try:
        taken: list[dict[str, dict[str, float]]] = []
        for _ in range(rounds):
            taken.append({name: helper.ask() for name, helper in helpers.items()})
    finally:
        for helper in helpers.values():
            helper.end()
    import torch

    print(f"\ntorch {torch.__version__}, {os.cpu_count()} cores, {threads} threads, load {os.getloadavg()[0]:.1f}")
    print("\n| 10 s file to scores | s | of it the network | CPU s | times AST's rate | network alone | wished |")
    print("|---|---|---|---|---|---|---|")

    for name in names:
        times = [f"{statistics.median(one[name][key] for one in taken):.3f}" for key in ("file", "network", "cpu")]
        ratios = ["", ""]
        if HF in names:
            each = {key: [one[HF][key] / one[name][key] for one in taken] for key in ("file", "network")}
            ratios = [f"{statistics.median(found):.2f}" for found in each.values()]
        print(f"| {name} | {' | '.join(times + ratios)} | {TARGETS.get(name, '')} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny networks, one round: whether it runs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--no-int8", action="store_true", help="without the ONNX file, whose writing takes a while")
    options = parser.parse_args()
    names = [name for name in options.only if not (options.no_int8 and name == INT8)]
    with tempfile.TemporaryDirectory() as folder:
        path, file = Path(folder) / "clip.flac", Path(folder) / "model.onnx"
        recording(path)
        if INT8 in names:
            helper = Helper(export, file, options.toy)
            helper.ask()
            helper.end()
        for threads in options.threads:
            table(path, file, names, threads, 1 if options.toy else options.rounds, options.toy)
        accuracy(path, file, options.toy)


if __name__ == "__main__":
    main()
