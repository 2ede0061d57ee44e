"""Options that `asit pretrain` and `asit finetune` share."""

from __future__ import annotations

import dataclasses
import os
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro
from pydantic import Field, TypeAdapter, ValidationError

from asit.config import FinetuneSettings, PretrainSettings, RunSettings, Settings, presets, yaml
from asit.config.presets import Resume
from asit.errors import ConfigError

S = TypeVar("S", bound=Settings)
V = TypeVar("V")

Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(help="Model folder, run folder, Hugging Face folder or hub id (owner/name)."),
]
Inputs = Annotated[
    list[str],
    tyro.conf.Positional,
    tyro.conf.arg(
        help="Recordings, folders, patterns in quotes, catalogues, tables (CSV, TSV, JSONL), uncompressed tar shards."
    ),
]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], tyro.conf.arg(help="Where the encoder runs.")]
Threads = Annotated[int, Field(ge=0), tyro.conf.arg(help="CPU threads of a process; 0: torch's choice.")]
Precision = Annotated[
    Literal["auto", "float32", "bf16"],
    tyro.conf.arg(help="Arithmetic of the encoder; auto: bf16 where it is faster."),
]
Batch = Annotated[int, Field(ge=1), tyro.conf.arg(help="Windows in a batch; on a CPU fewer where they are long.")]
Count = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Spreadsheet = Annotated[
    bool,
    tyro.conf.arg(
        help='Of CSV: write "\'" before names that a spreadsheet program would run as a formula (those that begin with '
        "=, +, -, @, a tab or a carriage return)."
    ),
]


def parse(kind: Any, prog: str, summary: str, given: list[str], **options: Any) -> Any:
    """Return the options of a verb, checked against the bounds in their annotations, or print its help.

    Raises:
        ConfigError: values that do not fit.
    """
    try:
        description = summary[0].upper() + summary[1:] + "."
        found = tyro.cli(kind, prog=prog, args=given, description=description, **options)
        if dataclasses.is_dataclass(kind):
            TypeAdapter(kind).validate_python(vars(found))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"])).replace("_", "-")
        expected = first["msg"].removeprefix("Input should be ")
        raise ConfigError(f"--{name} {first['input']}", expected, f"see {prog} --help") from None
    return found


def pick(kind: type[V], options: Any, /, **own: Any) -> V:
    """Return a `kind` of which each field is in `own`, or has the value of the option of its name."""
    names = {field.name for field in dataclasses.fields(kind)} - set(own)  # type: ignore[arg-type]
    return kind(**{name: getattr(options, name) for name in names}, **own)


def check_spreadsheet(spreadsheet: bool, form: str | None) -> None:
    """Raise a ConfigError for --spreadsheet with a format or a file other than CSV."""
    if spreadsheet and (form or "").rpartition(".")[2].lower() != "csv":
        raise ConfigError(f"--spreadsheet with {form or 'standard output'}", "CSV", "leave --spreadsheet out")


def settings_of(kind: type[S], base: S, options: S, given: list[str]) -> S:
    """Return the settings of a run: `base`, overridden by the options that were given (`presets.overlay`).

    Args:
        kind: of the settings, without a verb's own options.
        base: defaults of the options.
        options: parsed.
        given: the arguments.
    """
    flags = {argument.removeprefix("--").partition("=")[0].replace("-", "_") for argument in given}
    values, before = dict(yaml.flat(options.model_dump())), dict(yaml.flat(base.model_dump()))
    named = [(name, values[name]) for name in before if name in flags or values[name] != before[name]]
    below = base.model_dump()
    if isinstance(base, PretrainSettings) and base.has_card:  # its card decides the fields that nobody sets
        below |= {name: getattr(base, name).model_dump(exclude_unset=True) for name in presets.MODEL_GROUPS}
    return kind(**presets.overlay(below, yaml.nested(named)))


def early(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Return the values of options that decide the defaults of all others, before those are parsed."""
    out = {}
    for i, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name in names:
            out[name] = value if equals else (given[i + 1] if i + 1 < len(given) else "")
    return out


S = TypeVar("S", bound=RunSettings)


class RunOptions(Settings):
    """How to run, beside the settings of the run."""

    config: str | None = None
    """YAML file of settings, such as another run's config.yaml; flags override it."""
    resume: bool = False
    """Resume the run in --out from its last checkpoint."""
    auto_resume: bool = False
    """Resume the run in --out, or start one where there is none: for jobs that a scheduler may restart."""
    overwrite: bool = False
    """Delete the run in --out and start from scratch."""
    dry_run: bool = False
    """Take a few steps, write nothing, and print the resolved settings, shapes, memory and time to expect."""


def parse_run(kind: type[S], options_kind: Any, prog: str, summary: str, given: list[str]) -> tuple[S, Any]:
    """Return the settings of a run, and all options of its verb, an `options_kind`."""
    recipe = f"--{kind.RECIPE}"
    chosen = early(given, (recipe, "--config", "--out", "--model"))
    resume = "--resume" in given or "--auto-resume" in given  # read before parsing: the run's settings are defaults
    named = {"model": chosen["--model"]} if "--model" in chosen else {}
    base = presets.build_for(
        kind, chosen.get("--out", ""), chosen.get(recipe), chosen.get("--config"), named, resume=resume
    )
    options = parse(options_kind, prog, summary, given, default=options_kind(**base.model_dump()))
    return settings_of(kind, base, options, given), options


def resume_of(options: RunOptions) -> Resume:
    """Return what the options request: to resume, not to, or "auto"."""
    if options.auto_resume and (options.resume or options.overwrite):
        other = "--resume" if options.resume else "--overwrite"
        raise ConfigError(f"--auto-resume and {other} were both given", "one of the two", "choose one")
    return "auto" if options.auto_resume else options.resume


def dry_run_lines(settings: PretrainSettings | FinetuneSettings) -> Iterator[str]:
    """Resolve and measure a run, and yield the lines that say what was found."""
    from asit.progress import duration
    from asit.tools import run_estimate

    found = run_estimate.dry_run(settings)
    yield found.settings
    yield from (f"{name}: {shape}" for name, shape in found.shapes.items())
    how = "from two smaller sizes measured" if found.extrapolated else "measured"
    for name, size in found.memory_gb.items():
        yield f"peak memory of a process, {name}: {size:.1f} GB ({how})"
        if size > found.machine_gb.get(name, size):
            there = found.machine_gb[name]
            yield f"warning: that is more than the {there:.1f} GB there are; raise accumulate, or lower batch_size"
    yield f"a step: {found.seconds_per_step:.2f} s, {found.clips_per_second:.1f} clips/s ({how})"
    yield f"loading: {1 / found.seconds_per_clip:.0f} clips/s in one process, the first time (measured)"
    scores = "" if isinstance(settings, PretrainSettings) else ", without scoring"
    yield f"the whole run: {duration(found.total_seconds)} at that rate{scores}; nothing was written"


def is_main_process() -> bool:
    """Return whether this process prints results: rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


def resume_line(verb: str, out: Path) -> str:
    """Return the line with the command that resumes a stopped run."""
    return f"resume: {verb} --out {shlex.quote(str(out))} --resume"


def signal_status(name: str | None) -> int:
    """Return the exit status that shells give to a process ended by this signal; 0 for none."""
    return 0 if name is None else 128 + signal.Signals[name]
