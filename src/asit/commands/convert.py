"""The verb convert."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from asit.errors import CheckpointError, ConfigError
from asit.logs import printable
from asit.terminal import stdout
from asit.terminal.options import Count, Seconds, parse, pick

if TYPE_CHECKING:
    from asit.interop.convert import Converted


@dataclass
class ConvertOptions:
    source: Annotated[str, tyro.conf.Positional]
    """File of weights (.pth, .pt, .bin, .ckpt, .safetensors), or a Hugging Face folder of AST or EAT; the hub's
    owner/name[@revision]; or a name of asit models."""
    out: str | None = None
    """Folder for the model."""
    kind: str = "auto"
    """asit, asit-sed, ast, hf-ast, ssast, audiomae, eat, beats or vit; auto: by the names of its tensors."""
    which: Literal["teacher", "student"] = "teacher"
    """Network of an ASiT pretraining to convert."""
    frames: Count | None = None
    """Resize the positions to this many input frames."""
    seconds: Seconds | None = None
    """The same in seconds."""
    stride: str | None = None
    """Stride of the patches in training, such as 10, or 10x16 (frames x mel bins)."""
    mels: Count | None = None
    """Mel bins in training; by default those of the file, or 128."""
    rate: Count | None = None
    """Sample rate in training, in Hz."""
    mean: float | None = None
    """Mean of the log-mel in training; by default that of the file, or AudioSet's."""
    std: float | None = None
    """Its standard deviation."""
    labels: str | None = None
    """File of class names: AudioSet's class_labels_indices.csv, or a text with one per line."""
    answer: Literal["auto", "single", "multi"] = "auto"
    """One class per clip or several; auto: what the file says, else several of 527 classes, one of others."""
    pooling: Literal["auto", "class", "mean"] = "auto"
    """What the head reads; auto: the mean of the patch tokens in SSAST, the class token (or both tokens) elsewhere."""
    license: str | None = None
    """Licence of the weights, for the card."""
    no_head: bool = False
    """Convert the encoder alone and leave out all other tensors, unknown heads included."""
    keep_heads: bool = False
    """Keep the heads of an official ASiT pretraining, for asit pretrain --model MODEL --keep-heads."""
    list: bool = False
    """List every tensor and write nothing."""
    overwrite: bool = False
    """Overwrite a model in the folder."""


def convert(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ConvertOptions, prog, summary, given)
    if (options.out is None) != options.list:
        raise ConfigError(
            "--list and --out are both given" if options.list else "no output folder was given",
            "--out FOLDER or --list",
            f"asit convert {shlex.quote(options.source)} --out MODEL",
        )
    out = None if options.out is None else Path(options.out)
    if out is not None:
        _check_out(out, options.overwrite)
    from asit.interop import converted_models, model_names
    from asit.interop.convert import SourceOptions

    labels, path = None if options.labels is None else Path(options.labels), Path(options.source).expanduser()
    if path.exists():
        files = model_names.ModelFiles(name=options.source, path=path, convertible=True)
    else:
        files = model_names.find(options.source)
    kind = files.options.kind if options.kind == "auto" else options.kind
    asked = pick(SourceOptions, options, kind=kind, stride=_stride(options.stride), labels=labels)
    done = converted_models.convert_files(files, asked)
    stdout.for_people()
    if out is not None:
        done.save(out, overwrite=options.overwrite)
    _print(done, everything=options.list)
    if out is not None:
        print(f"Model: {out}")
        print(f"Look at it:  asit info {shlex.quote(str(out))}")
        print(f'In Python:   import asit; model = asit.load("{out}"); model.embed("clip.wav").clip')
    return 0


def _print(done: Converted, everything: bool) -> None:
    model, source = done.model, done.model.training.get("source", {})
    settings, (time, mel) = model.encoder.settings, model.encoder.grid
    kind = f"{source['kind']}: " if source else ""
    print(f"{kind}{done.mapped} tensors mapped, {len(done.left_out)} entries left out")
    for why, names in done.reasons():
        shown = names if everything else names[:3]
        print(f"  left out: {why} ({len(names)}: {', '.join(shown)}{', ...' if len(shown) < len(names) else ''})")
    if everything:
        head = {} if model.head is None else model.head.state_dict()
        own = {**model.encoder.state_dict(), **{f"head.{name}": value for name, value in head.items()}}
        for name, value in own.items():
            print(f"  {name} {tuple(value.shape)}")
    front = model.front_end.settings
    print(
        f"{settings.size} encoder, width {model.encoder.width}, {model.encoder.depth} blocks, {time} x {mel} patches "
        f"(time x mel) of {model.frames} frames\n"
        f"front end: {front.rate} Hz, {front.mels} mel bins, mean {front.mean}, std {front.std}"
    )
    if done.heads is not None:
        print(f"kept: heads of pretraining, {len(done.heads.state)} tensors")
    if model.classes is not None:
        more = ", ..." if len(model.classes) > 3 else ""
        print(f"{len(model.classes)} classes: {', '.join(map(printable, model.classes[:3]))}{more}")


def _check_out(out: Path, overwrite: bool) -> None:
    """Refuse existing output before anything is read; only a model is ever overwritten."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise CheckpointError(f"{out} already exists", "a new path", "give another path, or pass --overwrite")
    if not (out / "card.json").is_file():
        raise CheckpointError(f"{out} exists and is no model", "a model folder to overwrite", "give another path")


def _stride(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d{0,3})(?:x([1-9]\d{0,3}))?", text)
    if found is None:
        raise ConfigError(f"--stride {text}", "a number, or two with an x between them", "such as 10 or 10x16")
    return int(found[1]), int(found[2] or found[1])
