"""What is here and what works: versions, decoders, devices, extras, places; nothing it meets may stop it.

Every check runs by itself and turns whatever goes wrong into a finding, so that a broken torch, soundfile or cache
folder is told of as one line among the others. That is why this module imports nothing but the standard library until
a check needs more.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import math
import os
import platform
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "missing", "note", "broken"]
"""ok; missing: of an extra; note: works, and something is worth knowing; broken: of what asit cannot do without."""

PACKAGE = "asit-audio"
IMPORTS = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
"""Packages whose module has another name than the package."""

_LEFT_OUT = frozenset({"all", "dev"})  # extras that are sums of others, and of the development tools
_NEED_MB = 500
_RATE, _SECONDS, _TONE_HZ = 16000, 0.5, 440.0


@dataclass(frozen=True)
class Finding:
    """One line of the answer.

    Attributes:
        part: python, packages, decoders, devices, extras or places.
        name: what was looked at, such as "torch" or "mp3".
        state: see `State`.
        text: what was found.
        remedy: the command or step that mends it; empty where nothing is to be mended.
    """

    part: str
    name: str
    state: State
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """All findings, in the order they are told in; never raises but for an interrupt."""
    parts: Sequence[tuple[str, Callable[[], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("decoders", _decoders),
        ("devices", _devices),
        ("extras", _extras),
        ("places", _places),
    ]
    out: list[Finding] = []
    # Warnings of old drivers, and what an extension prints when it cannot be loaded, are not this check's answer.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for part, check in parts:
            try:
                out.extend(check())
            except Exception as error:
                out.append(Finding(part, part, "broken", f"could not be looked at: {words(error)}"))
    return out


def works(findings: Sequence[Finding]) -> bool:
    """Whether the core works: nothing that it needs is broken."""
    return not any(finding.state == "broken" for finding in findings)


def record(findings: Sequence[Finding]) -> dict[str, Any]:
    """The findings as JSON."""
    return {"works": works(findings), "findings": [asdict(finding) for finding in findings]}


def words(error: BaseException) -> str:
    """An error in one line: its kind and the first line of its text."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _python() -> Iterator[Finding]:
    told = f"{platform.python_version()}, {sys.executable}"
    wanted = _metadata_field("Requires-Python")
    fits = all(_at_least(platform.python_version(), least) for least in re.findall(r">=\s*([\d.]+)", wanted))
    yield Finding("python", "python", "ok" if fits else "broken", told, "" if fits else f"install Python {wanted}")
    yield Finding("python", "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    import asit

    place = Path(asit.__file__).parent
    try:
        metadata.version(PACKAGE)
        yield Finding("packages", "asit", "ok", f"{asit.__version__}, {place}")
    except metadata.PackageNotFoundError:
        yield Finding(
            "packages",
            "asit",
            "note",
            f"{asit.__version__}, {place}, run from its source: what it needs is not known",
            "pip install -e . in the source's folder",
        )
    for package, least in _needs(None):
        yield _imported("packages", package, least, "broken", f"pip install --upgrade '{package}>={least}'")
    try:
        yield _pickles()
    except Exception as error:  # of a torch that cannot be imported
        yield Finding("packages", "pickles", "broken", words(error), "see torch above")
    yield _guarded(
        "packages",
        "model",
        _tiny_model,
        f"if all above is well: pip install --force-reinstall {PACKAGE}",
    )


def _pickles() -> Finding:
    """Whether files of weights that are pickles are read with this torch."""
    from asit.io import safe_load

    fault = safe_load.pickle_fault()
    told = ", ".join(safe_load.PICKLED)
    if not fault:
        return Finding("packages", "pickles", "ok", f"{told} files are read, tensors alone")
    remedy = f"pip install --upgrade 'torch>={'.'.join(map(str, safe_load.SAFE_TORCH))}'"
    return Finding("packages", "pickles", "broken", f"{told} files are refused: {fault}", remedy)


def _extras() -> Iterator[Finding]:
    extras = [name for name in _metadata_fields("Provides-Extra") if name not in _LEFT_OUT]
    for extra in extras:
        found = [_imported("extras", package, least, "missing", "") for package, least in _needs(extra)]
        lacking = [one for one in found if one.state != "ok"]
        told = ", ".join(f"{one.name} {one.text.split(',')[0]}" for one in found if one.state == "ok")
        if not lacking:
            yield Finding("extras", extra, "ok", told)
            continue
        kinds = "; ".join(f"{one.name} {one.text}" for one in lacking)
        yield Finding("extras", extra, "missing", kinds, f"pip install '{PACKAGE}[{extra}]'")


def _imported(part: str, package: str, least: str, otherwise: State, remedy: str) -> Finding:
    """A package: its version, and whether it can be imported and is new enough."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(part, package, otherwise, "is not installed", remedy)
    try:
        module = importlib.import_module(IMPORTS.get(package, package.replace("-", "_")))
    except Exception as error:
        return Finding(part, package, otherwise, f"{version} cannot be imported: {words(error)}", remedy)
    if least and not _at_least(version, least):
        return Finding(part, package, otherwise, f"{version} is older than {least}", remedy)
    inside = getattr(module, "__libsndfile_version__", "")
    return Finding(part, package, "ok", version + (f", libsndfile {inside}" if inside else ""))


def _tiny_model() -> str:
    """A small encoder hears half a second of a tone, so that front end, products and attention are seen to work."""
    import torch

    from asit.audio.fbank import FrontEnd
    from asit.config import EncoderSettings, FrontEndSettings
    from asit.model.audio_model import AudioModel
    from asit.model.vit import Encoder

    settings = EncoderSettings(size="custom", width=32, depth=1, heads=2)
    encoder = Encoder(settings, 48, 32)
    encoder.init_weights(torch.Generator().manual_seed(0))
    model = AudioModel(encoder, FrontEnd(FrontEndSettings(mels=32, mean=-6.0, std=3.0)))
    found = model.embed(_tone())
    return f"a tone went through a small encoder: {found.grid[0]} x {found.grid[1]} patches"


def _decoders() -> Iterator[Finding]:
    formats: Sequence[tuple[str, str, str | None]] = [
        ("wav", "WAV", "PCM_16"),
        ("flac", "FLAC", "PCM_16"),
        ("mp3", "MP3", None),
        ("ogg", "OGG", "VORBIS"),
        ("opus", "OGG", "OPUS"),
    ]
    for name, container, codec in formats:
        # Only what asit writes and measures itself must work; a build of libsndfile may lack a compressed format.
        state: State = "broken" if name in ("wav", "flac") else "missing"
        remedy = "pip install --force-reinstall soundfile (libsndfile 1.1 or newer has mp3 and opus)"

        def decode(container: str = container, codec: str | None = codec) -> str:
            import soundfile

            buffer = io.BytesIO()
            soundfile.write(buffer, _tone(), _RATE, format=container, subtype=codec)
            return _heard(buffer.getvalue())

        yield _guarded("decoders", name, decode, remedy, state)
    yield _guarded("decoders", "m4a", _decode_m4a, f"pip install '{PACKAGE}[av]'", "missing")


def _decode_m4a() -> str:
    import av
    import numpy as np

    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=_RATE, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(_tone())[None], format="fltp", layout="mono")
        frame.sample_rate = _RATE
        for packet in [*stream.encode(frame), *stream.encode(None)]:
            container.mux(packet)
    return _heard(buffer.getvalue())


def _tone() -> Any:
    import numpy as np

    at = np.arange(int(_RATE * _SECONDS)) / _RATE
    return (0.5 * np.sin(2 * math.pi * _TONE_HZ * at)).astype(np.float32)


def _heard(data: bytes) -> str:
    """Decode and resample the bytes as asit reads a file, and see that it is the tone that comes out."""
    import numpy as np

    from asit.audio.stream import read_sound

    target = _RATE // 2
    wave = read_sound(data, None, target)
    expected = _SECONDS * target
    if abs(len(wave) - expected) > 0.1 * target:
        raise ValueError(f"{len(wave)} samples came back instead of {expected:.0f}")
    spectrum = np.abs(np.fft.rfft(wave * np.hanning(len(wave))))
    loudest = float(np.fft.rfftfreq(len(wave), 1 / target)[spectrum.argmax()])
    if abs(loudest - _TONE_HZ) > 10:
        raise ValueError(f"a tone of {_TONE_HZ:.0f} Hz came back with its peak at {loudest:.0f} Hz")
    return "decoded and resampled"


def _devices() -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    yield Finding("devices", "cpu", "ok", f"{_cpu_name()}, {cores} of {os.cpu_count()} cores may be used")
    yield _guarded("devices", "torch", _torch_cpu, "pip install --force-reinstall torch")
    yield _guarded("devices", "precision", _precision, "pip install --force-reinstall torch", "note")
    yield from _accelerators()


def _torch_cpu() -> str:
    import torch

    flags = [name for name in ("avx512_bf16", "amx_bf16", "amx_int8") if name in _cpu_flags()]
    built = torch.backends.cpu.get_cpu_capability() if hasattr(torch.backends, "cpu") else "unknown"
    told = f", {', '.join(flags)}" if flags else ""
    return f"{torch.get_num_threads()} threads, kernels for {built}{told}"


def _precision() -> str:
    import torch

    from asit import runtime

    chosen = runtime.precision("auto", runtime.World(0, 1, torch.device("cpu"), "as asked"))
    return f"{chosen.name} on the CPU: {chosen.reason}"


def _accelerators() -> Iterator[Finding]:
    def cuda() -> str:
        import torch

        if torch.version.cuda is None:
            return "none: this torch is a build without CUDA"
        if not torch.cuda.is_available():
            return f"none seen, by a torch built for CUDA {torch.version.cuda}"
        several = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in several)

    def mps() -> str:
        import torch

        return "there" if torch.backends.mps.is_available() else "none"

    yield _guarded("devices", "cuda", cuda, "see the driver's version, and pytorch.org for the matching build", "note")
    yield _guarded("devices", "mps", mps, "", "note")


def _places() -> Iterator[Finding]:
    from asit.evaluate.feature_cache import default_folder

    yield _guarded("places", "cache", lambda: _writable(default_folder()), "set XDG_CACHE_HOME to a folder", "note")
    yield _guarded("places", "temporary", lambda: _writable(Path(tempfile.gettempdir())), "set TMPDIR", "note")
    yield _guarded("places", "here", lambda: _writable(Path.cwd()), "work in a folder that may be written", "note")
    for name, place in (("cache", default_folder()), ("here", Path.cwd())):
        free = shutil.disk_usage(_existing(place)).free / 2**20
        if free < _NEED_MB:
            told = f"{free:.0f} MiB free on the disk of {place}"
            yield Finding("places", f"disk of {name}", "note", told, "free some space, or work elsewhere")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / 2**20
        if free < _NEED_MB:
            remedy = "start the container with --shm-size 1g, or pass --workers 0 to training"
            yield Finding("places", "shared memory", "note", f"{free:.0f} MiB free for loading in processes", remedy)


def _writable(folder: Path) -> str:
    """Where the folder, or the nearest one above it that is there, may be written; says so with the room left."""
    there = _existing(folder)
    with tempfile.TemporaryFile(dir=there) as file:
        file.write(b"asit")
    return f"{folder} may be written, {shutil.disk_usage(there).free / 2**30:.1f} GiB free"


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.parents) if place.exists())


def _guarded(part: str, name: str, check: Callable[[], str], remedy: str, otherwise: State = "broken") -> Finding:
    try:
        return Finding(part, name, "ok", check())
    except Exception as error:
        return Finding(part, name, otherwise, words(error), remedy)


def _needs(extra: str | None) -> list[tuple[str, str]]:
    """Packages that asit, or one of its extras, asks for, each with its least version; from the package's metadata."""
    out = []
    for line in metadata.requires(PACKAGE) or [] if _installed() else []:
        wanted, _, condition = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", condition)
        package = re.match(r"[A-Za-z0-9._-]+", wanted)
        if package is not None and (named[1] if named else None) == extra:
            least = re.search(r">=\s*([\d.]+)", wanted)
            out.append((package[0], least[1] if least else ""))
    return out


def _installed() -> bool:
    try:
        metadata.version(PACKAGE)
    except metadata.PackageNotFoundError:
        return False
    return True


def _metadata_fields(name: str) -> list[str]:
    return metadata.metadata(PACKAGE).get_all(name) or [] if _installed() else []


def _metadata_field(name: str) -> str:
    return next(iter(_metadata_fields(name)), "")


def _at_least(version: str, least: str) -> bool:
    def numbers(text: str) -> list[int]:
        found = re.match(r"\d+(\.\d+)*", text)
        return [int(part) for part in found[0].split(".")] if found else []

    have, need = numbers(version), numbers(least)
    length = max(len(have), len(need))
    return have + [0] * (length - len(have)) >= need + [0] * (length - len(need))


def _cpu_name() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_flags() -> set[str]:
    found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", _cpuinfo(), re.MULTILINE)
    return set(found[1].split()) if found else set()


def _cpuinfo() -> str:
    place = Path("/proc/cpuinfo")
    return place.read_text(encoding="utf-8", errors="replace") if place.is_file() else ""
