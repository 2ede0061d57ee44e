"""Examine the installation: versions, decoders, devices, extras, folders.

Each check runs by itself and turns any failure into a finding, so that a broken torch, soundfile or cache folder is one
line among the others. So this module imports only the standard library until a check needs more.
"""

from __future__ import annotations

import contextlib
import functools
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
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

State = Literal["ok", "missing", "note", "broken"]
"""missing: of an extra; note: works, with a remark; broken: asit needs it."""

PACKAGE = "asit-audio"
IMPORTS = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
"""Modules whose name differs from their package's."""

_COMBINED = frozenset({"all", "dev", "docs"})  # sums of other extras, and tools of development
_NEED_MB = 500
_RATE, _SECONDS, _TONE_HZ = 16000, 0.5, 440.0


@dataclass(frozen=True)
class Finding:
    """Result of one check of a part (python, packages, decoders, devices, extras, folders); `remedy` may be empty."""

    part: str
    name: str
    state: State
    text: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return all findings in the order of the report; catches every exception but interrupts."""
    checks = {"python": _python, "packages": _packages, "decoders": _decoders}
    checks |= {"devices": _devices, "extras": _extras, "folders": _folders}
    out: list[Finding] = []
    # Hide warnings of old drivers and of extensions that fail to load.
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for part, check in checks.items():
            try:
                out.extend(check())
            except Exception as error:
                out.append(Finding(part, part, "broken", f"check failed: {_first_line(error)}"))
    return out


def works(findings: Sequence[Finding]) -> bool:
    """Whether nothing is broken."""
    return not any(finding.state == "broken" for finding in findings)


def _first_line(error: BaseException) -> str:
    """Return an error's type and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _python() -> Iterator[Finding]:
    version = platform.python_version()
    wanted = next(iter(_metadata("Requires-Python")), "")
    fits = all(_at_least(version, least) for least in re.findall(r">=\s*([\d.]+)", wanted))
    remedy = "" if fits else f"install Python {wanted}"
    yield Finding("python", "python", "ok" if fits else "broken", f"{version}, {sys.executable}", remedy)
    yield Finding("python", "system", "ok", f"{platform.system()} {platform.release()} {platform.machine()}")


def _packages() -> Iterator[Finding]:
    import asit

    text = f"{asit.__version__}, {Path(asit.__file__).parent}"
    if _metadata("Name"):
        yield Finding("packages", "asit", "ok", text)
    else:
        text += ", run from source without an installation: its requirements are unknown"
        yield Finding("packages", "asit", "note", text, "pip install -e . in the source folder")
    for package, least in _needs(None):
        yield _imported("packages", package, least, "broken", f"pip install --upgrade '{package}>={least}'")
    try:
        yield _pickles()
    except Exception as error:  # torch cannot be imported
        yield Finding("packages", "pickles", "broken", _first_line(error), "see torch above")
    remedy = f"if everything above is ok: pip install --force-reinstall {PACKAGE}"
    yield _guarded("packages", "model", _tiny_model, remedy)


def _pickles() -> Finding:
    """Whether this torch may read weights from pickles."""
    from asit.io import safe_load

    fault = safe_load.pickle_fault()
    suffixes = ", ".join(safe_load.PICKLED)
    if not fault:
        return Finding("packages", "pickles", "ok", f"{suffixes} files are read (tensors only)")
    remedy = f"pip install --upgrade 'torch>={'.'.join(map(str, safe_load.SAFE_TORCH))}'"
    return Finding("packages", "pickles", "broken", f"{suffixes} files are refused: {fault}", remedy)


def _extras() -> Iterator[Finding]:
    for extra in _metadata("Provides-Extra"):
        if extra in _COMBINED:
            continue
        found = [_imported("extras", package, least, "missing", "") for package, least in _needs(extra)]
        lacking = "; ".join(f"{one.name} {one.text}" for one in found if one.state != "ok")
        if lacking:
            yield Finding("extras", extra, "missing", lacking, f"pip install '{PACKAGE}[{extra}]'")
        else:
            yield Finding("extras", extra, "ok", ", ".join(f"{one.name} {one.text.split(',')[0]}" for one in found))


def _imported(part: str, package: str, least: str, otherwise: State, remedy: str) -> Finding:
    """Check that a package can be imported and is new enough."""
    try:
        version = metadata.version(package)
    except metadata.PackageNotFoundError:
        return Finding(part, package, otherwise, "is not installed", remedy)
    try:
        module = importlib.import_module(IMPORTS.get(package, package.replace("-", "_")))
    except Exception as error:
        return Finding(part, package, otherwise, f"{version} cannot be imported: {_first_line(error)}", remedy)
    if least and not _at_least(version, least):
        return Finding(part, package, otherwise, f"{version} is older than {least}", remedy)
    inside = getattr(module, "__libsndfile_version__", "")
    return Finding(part, package, "ok", version + (f", libsndfile {inside}" if inside else ""))


def _tiny_model() -> str:
    """Embed half a second of a tone with a small encoder: front end, matrix products and attention work."""
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
    return f"a small encoder embedded a tone: {found.grid[0]} x {found.grid[1]} patches"


def _decoders() -> Iterator[Finding]:
    remedy = "pip install --force-reinstall soundfile (libsndfile 1.1 or newer has mp3 and opus)"
    formats: Sequence[tuple[str, str, str | None, State]] = [
        ("wav", "WAV", "PCM_16", "broken"),
        ("flac", "FLAC", "PCM_16", "broken"),  # asit writes wav and flac itself
        ("mp3", "MP3", None, "missing"),
        ("ogg", "OGG", "VORBIS", "missing"),
        ("opus", "OGG", "OPUS", "missing"),
    ]
    for name, container, codec, state in formats:
        yield _guarded("decoders", name, functools.partial(_decode, container, codec), remedy, state)
    yield _guarded("decoders", "m4a", _decode_m4a, f"pip install '{PACKAGE}[av]'", "missing")


def _decode(container: str, codec: str | None) -> str:
    import soundfile

    buffer = io.BytesIO()
    soundfile.write(buffer, _tone(), _RATE, format=container, subtype=codec)
    return _check_decoded(buffer.getvalue())


def _decode_m4a() -> str:
    import av

    return f"PyAV {av.__version__} has {av.codec.Codec('aac', 'r').long_name}"


def _tone() -> Any:
    import numpy as np

    at = np.arange(int(_RATE * _SECONDS)) / _RATE
    return (0.5 * np.sin(2 * math.pi * _TONE_HZ * at)).astype(np.float32)


def _check_decoded(data: bytes) -> str:
    """Decode and resample the bytes as asit reads a file, and check that the result is the tone."""
    import numpy as np

    from asit.audio.stream import read_sound

    target = _RATE // 2
    waveform = read_sound(data, None, target)
    expected = _SECONDS * target
    if abs(len(waveform) - expected) > 0.1 * target:
        raise ValueError(f"{len(waveform)} samples instead of {expected:.0f}")
    spectrum = np.abs(np.fft.rfft(waveform * np.hanning(len(waveform))))
    loudest = float(np.fft.rfftfreq(len(waveform), 1 / target)[spectrum.argmax()])
    if abs(loudest - _TONE_HZ) > 10:
        raise ValueError(f"a tone of {_TONE_HZ:.0f} Hz has its peak at {loudest:.0f} Hz")
    return "decoded and resampled"


def _devices() -> Iterator[Finding]:
    from asit.io.child_process import usable_cpus

    yield Finding("devices", "cpu", "ok", f"{_cpu_name()}, {usable_cpus()} of {os.cpu_count()} cores available")
    import torch

    from asit import runtime

    kernels = f"{torch.get_num_threads()} threads, kernels for {torch.backends.cpu.get_cpu_capability()}"
    yield Finding("devices", "torch", "ok", kernels)
    chosen = runtime.precision("auto", runtime.World(0, 1, torch.device("cpu"), ""))
    yield Finding("devices", "precision", "ok", f"{chosen.name} on the CPU: {chosen.reason}")
    yield _guarded("devices", "cuda", _cuda, "install the build for your driver, see pytorch.org", "note")
    yield Finding("devices", "mps", "ok", "available" if torch.backends.mps.is_available() else "none")


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return "none: torch was built without CUDA"
    if not torch.cuda.is_available():
        return f"none; torch was built for CUDA {torch.version.cuda}"
    several = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return "; ".join(f"{one.name}, {one.total_memory / 2**30:.0f} GiB" for one in several)


def _folders() -> Iterator[Finding]:
    from asit.evaluate.feature_cache import default_folder

    folders = [
        ("cache", default_folder(), "set XDG_CACHE_HOME to a folder with space"),
        ("temporary", Path(tempfile.gettempdir()), "set TMPDIR to a folder with space"),
        ("current", Path.cwd(), "work in a writable folder with space"),
    ]
    if (shared := Path("/dev/shm")).is_dir():
        folders.append(("shared memory", shared, "start the container with --shm-size 1g, or train with --workers 0"))
    for name, folder, remedy in folders:
        yield _guarded("folders", name, functools.partial(_writable, folder), remedy, "note")


def _writable(folder: Path) -> str:
    """Check that a folder, or its nearest existing parent, can be written to and has space."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    with tempfile.TemporaryFile(dir=existing) as file:
        file.write(b"asit")
    free = shutil.disk_usage(existing).free / 2**20
    if free < _NEED_MB:
        raise OSError(f"{free:.0f} MiB free at {folder}")
    return f"{folder} is writable, {free / 2**10:.1f} GiB free"


def _guarded(part: str, name: str, check: Callable[[], str], remedy: str, otherwise: State = "broken") -> Finding:
    try:
        return Finding(part, name, "ok", check())
    except Exception as error:
        return Finding(part, name, otherwise, _first_line(error), remedy)


def _needs(extra: str | None) -> list[tuple[str, str]]:
    """Return (package, least version) of each requirement of asit or of one of its extras."""
    out = []
    for line in _metadata("Requires-Dist"):
        wanted, _, condition = line.partition(";")
        named = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", condition)
        package = re.match(r"[A-Za-z0-9._-]+", wanted)
        if package is not None and (named[1] if named else None) == extra:
            least = re.search(r">=\s*([\d.]+)", wanted)
            out.append((package[0], least[1] if least else ""))
    return out


def _metadata(field: str) -> list[str]:
    """Return the values of a field of asit's metadata; none where it is run without an installation."""
    try:
        return metadata.metadata(PACKAGE).get_all(field) or []
    except metadata.PackageNotFoundError:
        return []


def _at_least(version: str, least: str) -> bool:
    def numbers(text: str) -> list[int]:
        found = re.match(r"\d+(\.\d+)*", text)
        return [int(part) for part in found[0].split(".")] if found else []

    have, need = numbers(version), numbers(least)
    return have + [0] * (len(need) - len(have)) >= need
