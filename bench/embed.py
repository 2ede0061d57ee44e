"""asit embed over many short clips beside the encoder alone, and over an hour of sound in one file.

    python bench/embed.py [--toy] [--clips 2000] [--seconds 1] [--size base] [--threads 1 2] [--rounds 3] [--only short]

The clips are wav files at 16 kHz, freshly written, so the disk's cache is warm. In each round one process embeds them
all into a parquet file (read, log-mel, encoder, write; everything but loading the model and the imports), and then
sends ready-made batches of the same windows through the same encoder; the share is the second time over the first. A
process of n threads is held to n cores, so that the threads which read files take nothing for free. Encoders are
freshly drawn.

The hour is one FLAC file at 44.1 kHz; its process does nothing else, and its peak memory is that of the whole process
with torch in it, next to the same process after one minute.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import measure

RATE = 16000


def write_clips(folder: Path, count: int, seconds: float) -> None:
    """Wav files: gliding tones over noise."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(0)
    at = np.arange(round(seconds * RATE)) / RATE
    for i in range(count):
        f, g = rng.uniform((80, 1), (4000, 9))
        x = 0.2 * np.sin(6.28 * f * at + np.cos(at * g)) + rng.normal(0, 0.02, len(at))
        soundfile.write(folder / f"{i:06d}.wav", x.astype(np.float32), RATE)


def write_long(path: Path, minutes: int) -> None:
    """A FLAC file at 44.1 kHz, a minute at a time."""
    import numpy as np
    import soundfile

    rng, at = np.random.default_rng(0), np.arange(60 * 44100) / 44100
    with soundfile.SoundFile(path, "w", 44100, 1) as file:
        for _ in range(minutes):
            file.write((0.2 * np.sin(500 * at + np.cos(at * 3)) + rng.normal(0, 0.02, len(at))).astype(np.float32))


def build(size: str):  # type: ignore[no-untyped-def]
    """A model of ten-second windows with fresh weights."""
    import torch

    from asit.audio.fbank import FrontEnd
    from asit.config import EncoderSettings, FrontEndSettings
    from asit.model.audio_model import AudioModel
    from asit.model.vit import Encoder

    encoder = Encoder(EncoderSettings(size=size), 1024, 128)
    encoder.init_weights(torch.Generator().manual_seed(0))
    return AudioModel(encoder, FrontEnd(FrontEndSettings(mean=-4.2677393, std=4.5689974)))


def hold(threads: int) -> None:
    """Keep this process to so many cores, where the system can."""
    import torch

    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    torch.set_num_threads(threads)


def short(pipe: Connection, folder: str, size: str, threads: int) -> None:
    """Clips a second of asit embed and of the encoder alone."""
    hold(threads)
    from asit.data.catalogue.inputs import expand
    from asit.infer.embed_files import OutputSettings, embed_files
    from asit.infer.embed_rows import EmbedSettings

    model, items, ask = build(size), expand([folder]), EmbedSettings()
    embedder = model.embedder(patches=False)
    batches = max(1, min(32, len(items) // ask.batch))
    windows = [window for item in items[: batches * ask.batch] for window in embedder.windows(item.sound())]
    ready = [windows[i : i + ask.batch] for i in range(0, len(windows), ask.batch)]
    embedder.run(ready[0])
    heard = min(len(items), batches * ask.batch)
    while measure.asked(pipe):
        out = Path(folder).with_name(f"{threads}.parquet")
        start = time.perf_counter()
        embed_files(model, items, out, ask, OutputSettings(overwrite=True))
        whole = len(items) / (time.perf_counter() - start)
        done, start = 0, time.perf_counter()
        while done < len(items) * len(windows) // heard:
            for batch in ready:
                embedder.run(batch)
                done += len(batch)
        alone = done * heard / len(windows) / (time.perf_counter() - start)
        pipe.send({"embed": whole, "encoder": alone})


def long(pipe: Connection, folder: str, size: str, threads: int, level: str) -> None:
    """Times real time, and peak memory in GB, after the first minute and at the end."""
    hold(threads)
    from asit.data.catalogue.inputs import expand
    from asit.infer.embed_files import OutputSettings, embed_files
    from asit.infer.embed_rows import EmbedSettings

    model = build(size)
    while measure.asked(pipe):
        found = {}
        for name in ("minute", "long"):
            start = time.perf_counter()
            items = expand([str(Path(folder, f"{name}.flac"))])
            embed_files(
                model,
                items,
                Path(folder, f"{threads}-{level}.npz"),
                EmbedSettings(level=level),
                OutputSettings(overwrite=True),
            )
            found[f"{name}, s"], found[f"{name}, GB"] = time.perf_counter() - start, measure.memory()
        pipe.send(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="few clips, a tiny encoder: whether it runs")
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of the short clips")
    parser.add_argument("--size", default="base", help="encoder of the short clips")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=int, default=60, help="length of the long file")
    parser.add_argument("--only", choices=["short", "long"])
    options = parser.parse_args()
    if options.toy:
        options.clips, options.size, options.rounds, options.minutes = 40, "tiny", 1, 2
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # as the command line sets it
    import torch

    print(f"torch {torch.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as place:
        if options.only != "long":
            measure_short(Path(place, "clips"), options)
        if options.only != "short":
            measure_long(Path(place), options)


def measure_short(folder: Path, options: argparse.Namespace) -> None:
    folder.mkdir()
    write_clips(folder, options.clips, options.seconds)
    print(f"\n{options.clips} clips of {options.seconds:g} s, {options.size} encoder, clips a second\n")
    print("| threads | ready-made batches | asit embed | share |\n|---|---|---|---|")
    for threads in options.threads:
        helper = measure.Helper(short, str(folder), options.size, threads, env={"OMP_NUM_THREADS": str(threads)})
        rounds = [helper.ask() for _ in range(options.rounds)]
        helper.end()
        alone, whole = (statistics.median(r[name] for r in rounds) for name in ("encoder", "embed"))
        share = statistics.median(r["embed"] / r["encoder"] for r in rounds)
        print(f"| {threads} | {alone:.1f} | {whole:.1f} | {share:.2f} |")


def measure_long(folder: Path, options: argparse.Namespace) -> None:
    write_long(folder / "minute.flac", 1)
    write_long(folder / "long.flac", options.minutes)
    print(f"\n{options.minutes} minutes of 44.1 kHz FLAC, tiny encoder\n")
    print("| threads | level | x real time | peak memory after a minute | at the end |\n|---|---|---|---|---|")
    for threads in options.threads:
        for level in ("clip", "frames", "patches"):
            helper = measure.Helper(long, str(folder), "tiny", threads, level, env={"OMP_NUM_THREADS": str(threads)})
            found = helper.ask()
            helper.end()
            times = 60 * options.minutes / found["long, s"]
            print(f"| {threads} | {level} | {times:.0f} | {found['minute, GB']:.2f} GB | {found['long, GB']:.2f} GB |")


if __name__ == "__main__":
    main()
