"""Clips a second out of files, out of shards, and out of shards behind a web server that answers late.

    python bench/shards.py [--toy] [--clips 768] [--latency 20] [--batch 64] [--rounds 3]

One process reads and decodes whole clips of 10 s at 16 kHz (FLAC) in batches, as one loader process does before the
front end; the server is another process of this machine, which waits `--latency` ms before each answer. "one by one"
asks for each clip when it is wanted, "together" for a batch's clips at the same time, and "blocks" is the order of the
setting views.order, whose neighbours come by one request. Arms take turns; figures are medians over rounds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import soundfile

from asit.config import FrontEndSettings
from asit.data.catalogue.catalogue import Catalogue, Clip
from asit.data.loading import sampler
from asit.data.loading.waveforms import WaveformReader
from asit.data.shards import pack
from asit.data.shards.shard_plan import PackSettings
from asit.io import storage

RATE = 16000


def recordings(folder: Path, count: int, seconds: float) -> Catalogue:
    """Noise of a few kinds, so that FLAC has about the size that it has of speech."""
    rng, clips, kinds = np.random.default_rng(0), [], []
    for _ in range(16):
        noise = np.convolve(rng.normal(0, 0.05, round(seconds * RATE)), np.ones(8) / 8, "same")
        soundfile.write(folder / "kind.flac", noise, RATE, subtype="PCM_16")
        kinds.append((folder / "kind.flac").read_bytes())
    for i in range(count):
        path = folder / f"{i:06d}.flac"
        path.write_bytes(kinds[i % 16])
        clips.append(Clip(str(path), seconds, RATE, 1))
    return Catalogue.from_clips(clips, root=folder)


def serve(pipe: Connection, folder: Path, latency: float) -> None:
    """Answer requests for parts of a folder's files, each after `latency` s."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def _answer(self, body: bool) -> None:
            time.sleep(latency)
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            first, last, code = 0, path.stat().st_size - 1, 200
            if asked := self.headers.get("Range"):
                begin, _, end = asked.removeprefix("bytes=").partition("-")
                first, last, code = int(begin), min(int(end or last), last), 206
            self.send_response(code)
            self.send_header("Content-Length", str(last + 1 - first))
            self.end_headers()
            if body:
                with path.open("rb") as file:
                    file.seek(first)
                    self.wfile.write(file.read(last + 1 - first))

        def do_GET(self) -> None:
            self._answer(True)

        def do_HEAD(self) -> None:
            self._answer(False)

        def log_message(self, *_: object) -> None:
            pass

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    pipe.send(web.server_port)
    web.serve_forever()


def arm(listed: Catalogue, drawn: sampler.Order, batch: int, count: int, together: bool) -> Callable[[int], float]:
    """Reads `count` clips of an epoch; gives the requests a clip."""
    waves = WaveformReader(FrontEndSettings(rate=RATE))

    def read(epoch: int) -> float:
        asked, plain = 0, storage.read_range

        def counted(place: str, offset: int, size: int) -> bytes:
            nonlocal asked
            asked += 1
            return plain(place, offset, size)

        storage.read_range = counted  # type: ignore[assignment]
        try:
            rows = drawn(epoch)[:count].tolist()
            for first in range(0, count, batch):
                clips = [listed[row] for row in rows[first : first + batch]]
                if together:
                    waves.fetch(clips)
                for clip in clips:
                    waves.read(clip, 0.0, clip.seconds)
        finally:
            storage.read_range = plain
        return asked / count

    return read


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="tiny sizes: whether it runs")
    parser.add_argument("--clips", type=int, default=768)
    parser.add_argument("--latency", type=float, default=20.0, help="ms before each answer")
    parser.add_argument("--batch", type=int, default=64, help="clips of a micro-batch")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    if given.toy:
        given.clips, given.batch, given.rounds = 32, 16, 1
    os.environ["no_proxy"] = "127.0.0.1"
    seconds, shard = (0.5, 8) if given.toy else (10.0, 64)
    count = min(given.clips, 4 * given.batch)
    with tempfile.TemporaryDirectory() as scratch:
        top = Path(scratch)
        (top / "files").mkdir()
        loose = recordings(top / "files", given.clips, seconds)
        pack.pack(loose, str(top / "shards"), PackSettings(clips=shard))
        context = multiprocessing.get_context("spawn")
        pipe, theirs = context.Pipe()
        server = context.Process(target=serve, args=(theirs, top / "shards", given.latency / 1000), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{pipe.recv()}"
        local, far = Catalogue.read(top / "shards" / "index.jsonl"), Catalogue.read(f"{url}/index.jsonl")
        lying = far.shards
        assert lying is not None
        random = sampler.shuffled(0, len(loose))
        blocks = sampler.in_blocks(0, np.stack([lying.codes, lying.spans[:, 0]], axis=1), 8)
        arms = {
            "files": arm(loose, random, given.batch, count, False),
            "shards on the disk": arm(local, random, given.batch, count, True),
            "shards on the disk, blocks": arm(local, blocks, given.batch, count, True),
            "server, one by one": arm(far, random, given.batch, count, False),
            "server, together": arm(far, random, given.batch, count, True),
            "server, together, blocks": arm(far, blocks, given.batch, count, True),
        }
        found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in arms}
        for epoch in range(given.rounds + 1):
            for name, read in arms.items():
                clock, cpu = time.perf_counter(), time.process_time()
                requests = read(epoch)
                times = time.perf_counter() - clock, time.process_time() - cpu, requests
                if epoch:  # the first opens connections and fills the disk's cache
                    found[name].append(times)
        server.terminate()
        server.join()
    size = int(lying.spans[:, 1].mean())
    load = os.getloadavg()[0]
    print(
        f"{given.clips} clips of {seconds:g} s in shards of {shard}, {size / 1000:.0f} kB each; "
        f"batches of {given.batch}; {given.latency:g} ms an answer; {os.cpu_count()} cores, load {load:.1f}\n"
    )
    print("| clips from | clips/s by the clock | ms of CPU a clip | requests a clip |\n|---|---|---|---|")
    for name, rounds in found.items():
        wall, cpu, requests = (statistics.median(column) for column in zip(*rounds, strict=True))
        print(f"| {name} | {count / wall:.0f} | {1000 * cpu / count:.2f} | {requests:.3f} |")


if __name__ == "__main__":
    main()
