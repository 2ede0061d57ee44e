"""Command lines to typed options."""

from __future__ import annotations

import dataclasses
import logging
import operator
import os
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

import tyro
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from asit.config import PretrainSettings, RunSettings, TableSettings, presets, yaml
from asit.errors import ConfigError

if TYPE_CHECKING:
    from asit.data.catalogue.inputs import Item

S = TypeVar("S", bound=RunSettings)
V = TypeVar("V")

log = logging.getLogger(__name__)

Model = Annotated[
    str,
    tyro.conf.Positional,
    tyro.conf.arg(
        help="Model folder, run folder or file of weights; the hub's owner/name[@revision]; or a name of asit models."
    ),
]
OptionalModel = Annotated[
    str | None,
    tyro.conf.Positional,
    tyro.conf.arg(metavar="[MODEL]", help="As for asit info; by default the encoder that is part of asit."),
]
Inputs = Annotated[
    list[str],
    tyro.conf.Positional,
    tyro.conf.arg(
        help="Recordings, folders, patterns in quotes, catalogues, tables (CSV, TSV, JSONL, Parquet), tar shards."
    ),
]
Table = Annotated[TableSettings, tyro.conf.arg(name="")]
"""The options --columns, --window, --hop, --box-share and --background of verbs that take a table."""
Columns = Annotated[
    str, tyro.conf.arg(help="Names of the columns of tables, such as label=species,path=file_name; see asit catalogue.")
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


def model_or_included(model: str | None) -> str:
    """Return the model that was named, or else the one that is part of asit, which is logged."""
    if model is not None:
        return model
    from asit.interop.model_registry import INCLUDED

    if os.environ.get("RANK", "0") == "0":
        log.info(f"no model is named: {INCLUDED} is used, the encoder that is part of asit (asit info {INCLUDED})")
    return INCLUDED


def model_and_inputs(model: str | None, inputs: list[str]) -> tuple[str | None, list[str]]:
    """Return the model that was named, if any, and the inputs: a first argument that is recordings is one of them."""
    from asit.interop.model_names import is_recordings

    return (None, [model, *inputs]) if model is not None and is_recordings(model) else (model, inputs)


def recordings(inputs: Sequence[str], columns: str = "") -> list[Item]:
    """List the recordings of a verb's inputs; the files that are ignored for their suffix are logged."""
    from asit.data.catalogue.inputs import expand
    from asit.data.catalogue.listing import describe_ignored

    items = expand(inputs, others := Counter[str](), columns)
    if others and os.environ.get("RANK", "0") == "0":
        log.info(describe_ignored(others))
    return items


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
    flags = flags_of(given)
    # Not of `model_dump`, which leaves out what is `later`.
    values, before = ({name: operator.attrgetter(name)(held) for name in yaml.names(kind)} for held in (options, base))
    named = [
        (name, value)
        for name, value in values.items()
        if not isinstance(value, BaseModel) and (name in flags or value != before[name])
    ]
    below = base.model_dump()
    continued = isinstance(base, PretrainSettings) and bool(base.model)
    if isinstance(base, PretrainSettings) and continued:  # the model's card decides the fields that nobody sets
        left = presets.left_to_model(base.keep_heads)
        below |= {name: getattr(base, name).model_dump(exclude_unset=True) for name in left}
    return kind(**presets.overlay(below, yaml.nested(named), encoder_too=not continued))


def flags_of(given: list[str]) -> set[str]:
    """Return the dotted names of the settings among the arguments, and other words that name none."""
    return {argument.removeprefix("--").partition("=")[0].replace("-", "_") for argument in given}


def early(given: list[str], names: tuple[str, ...]) -> dict[str, str]:
    """Return the values of options that decide the defaults of all others, before those are parsed."""
    out = {}
    for i, argument in enumerate(given):
        name, equals, value = argument.partition("=")
        if name in names:
            out[name] = value if equals else (given[i + 1] if i + 1 < len(given) else "")
    return out


def parse_run(kind: type[S], options_kind: Any, prog: str, summary: str, given: list[str]) -> tuple[S, Any]:
    """Return the settings of a run, and all options of its verb, an `options_kind`."""
    recipe = f"--{kind.RECIPE}"
    chosen = early(given, (recipe, "--config", "--out", "--model"))
    resume = "--resume" in given or "--auto-resume" in given  # read before parsing: the run's settings are defaults
    named: dict[str, Any] = {"model": chosen["--model"]} if "--model" in chosen else {}
    if "--keep-heads" in given:
        named["keep_heads"] = True
    base = presets.build_for(
        kind, chosen.get("--out", ""), chosen.get(recipe), chosen.get("--config"), named, resume=resume
    )
    options = parse(options_kind, prog, summary, given, default=options_kind(**base.model_dump()))
    return settings_of(kind, base, options, given), options
