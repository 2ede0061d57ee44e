"""The verbs settings and completion, which print what the program knows about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from asit.config import FinetuneSettings, PretrainSettings, presets
from asit.config.yaml import annotated
from asit.errors import ConfigError
from asit.terminal.options import parse


@dataclass
class SettingsOptions:
    preset: str | None = None
    """Of pretraining: default, speech, paper or official-v2; default if neither is given."""
    task: str | None = None
    """A recipe of fine-tuning, such as any, esc50 or esc50-cpu."""


def settings(prog: str, summary: str, given: list[str]) -> int:
    options = parse(SettingsOptions, prog, summary, given)
    if options.preset is not None and options.task is not None:
        raise ConfigError(
            f"--preset {options.preset} and --task {options.task}", "a preset of pretraining or a task", "choose one"
        )
    if options.task is None:
        print(annotated(presets.build(PretrainSettings, options.preset)), end="")
    else:
        print(annotated(presets.build(FinetuneSettings, options.task)), end="")
    return 0


@dataclass
class CompletionOptions:
    shell: Annotated[Literal["bash", "zsh", "fish"], tyro.conf.Positional]
    """The shell that the script is for."""


def completion(prog: str, summary: str, given: list[str]) -> int:
    options = parse(CompletionOptions, prog, summary, given)
    from asit.commands import SUMMARIES, verb
    from asit.terminal.completion import flags_in_help, script

    def flags(name: str) -> list[str]:
        return flags_in_help(lambda arguments: verb(name)(f"asit {name}", SUMMARIES[name], arguments))

    print(script(options.shell, SUMMARIES, flags), end="")
    return 0
