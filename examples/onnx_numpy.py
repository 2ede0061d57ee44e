"""Labels of a WAV file, with onnxruntime and NumPy alone: python onnx_numpy.py MODEL.onnx CLIP.wav"""

import json
import struct
import sys
from pathlib import Path

import numpy as np
import onnxruntime


def read_wav(path: str) -> tuple[np.ndarray, int]:
    """Mono samples in [-1, 1] and their rate: PCM of 8 to 32 bits, or floats of 32 or 64, in a RIFF file."""
    data = Path(path).read_bytes()
    if data[:4] != b"RIFF" or data[8:12] != b"WAVE":
        sys.exit(f"{path} is no WAV file: convert it first, such as with ffmpeg -i IN out.wav")
    at, kind, channels, rate, bits, sound = 12, 0, 0, 0, 0, b""
    while at + 8 <= len(data) and not sound:
        name, size = struct.unpack_from("<4sI", data, at)
        if name == b"fmt ":
            kind, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", data, at + 8)
            if kind == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the kind is in its GUID
                (kind,) = struct.unpack_from("<H", data, at + 8 + 24)
        elif name == b"data":
            sound = data[at + 8 : at + 8 + size]
        at += 8 + size + size % 2
    if (kind, bits) not in [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)] or not channels or not rate:
        sys.exit(f"{path} has codec {kind} with {bits} bits: convert it first, such as with ffmpeg -i IN out.wav")
    raw = np.frombuffer(sound[: len(sound) // (bits // 8 * channels) * (bits // 8 * channels)], np.uint8)
    if kind == 3:
        wave = raw.view(f"<f{bits // 8}").astype(np.float64)
    elif bits == 8:
        wave = raw / 128.0 - 1.0
    else:  # the bytes of a sample become the upper ones of 32 bits
        wide = np.zeros((len(raw) * 8 // bits, 4), np.uint8)
        wide[:, 4 - bits // 8 :] = raw.reshape(-1, bits // 8)
        wave = wide.view("<i4").ravel() / 2.0**31
    if not len(wave) or not np.isfinite(wave).all():
        sys.exit(f"{path} has {'samples that are not finite' if len(wave) else 'no samples'}")
    return wave.reshape(-1, channels).mean(1), rate


def resample(wave: np.ndarray, rate: int, to: int) -> np.ndarray:
    """By Fourier transform: what both rates can hold is kept, as a long filter would. Its ends wrap around."""
    length = max(1, round(len(wave) * to / rate))
    pad = np.pad(wave, (0, rate // 10))  # so that the end does not ring into the beginning
    wide = max(1, round(len(pad) * to / rate))
    return np.fft.irfft(np.fft.rfft(pad)[: wide // 2 + 1], wide)[:length] * wide / len(pad)


def main(model: str, path: str) -> None:
    session = onnxruntime.InferenceSession(model)
    facts = session.get_modelmeta().custom_metadata_map
    rate, window, classes = int(facts["rate"]), int(facts["window"]), json.loads(facts["classes"])
    clip, own = read_wav(path)
    clip = (clip if own == rate else resample(clip, own, rate)).astype(np.float32)
    starts = [*range(0, max(1, len(clip) - window), window), max(0, len(clip) - window)]  # the last ends with the clip
    windows = np.stack([clip[start : start + window] for start in dict.fromkeys(starts)])
    scores = session.run(None, {"waveform": windows})[0].mean(0)
    for best in np.argsort(-scores)[:5]:
        print(f"{scores[best]:.4f}  {classes[best]}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
