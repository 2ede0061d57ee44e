"""Write scripts that complete verbs and flags in bash, zsh and fish, from the verbs' own help."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Mapping

SHELLS = ("bash", "zsh", "fish")

_BASH = """# asit: completion for bash
_asit() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} words
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    words={verbs}
  else
    case ${{COMP_WORDS[1]}} in
{cases}
    esac
    [[ $current == -* ]] || return 0
  fi
  COMPREPLY=($(compgen -W "$words" -- "$current"))
}}
complete -o default -F _asit asit
"""
_ZSH = """#compdef asit
_asit() {{
  local -a verbs flags
  verbs=({verbs})
  if (( CURRENT == 2 )); then
    _describe verb verbs
    return
  fi
  case $words[2] in
{cases}
  esac
  if [[ $PREFIX == -* ]]; then compadd -- $flags; else _files; fi
}}
compdef _asit asit
"""


def script(shell: str, summaries: Mapping[str, str], flags: Callable[[str], list[str]]) -> str:
    """Return the completion script for a shell.

    Args:
        shell: one of SHELLS.
        summaries: verb -> what it does.
        flags: returns the flags of a verb.
    """
    known = {verb: flags(verb) for verb in summaries}
    if shell == "fish":
        lines = [f"complete -c asit -n __fish_use_subcommand -fa {v} -d {shlex.quote(s)}" for v, s in summaries.items()]
        for verb, found in known.items():
            seen = shlex.quote(f"__fish_seen_subcommand_from {verb}")
            lines += [f"complete -c asit -n {seen} -l {flag.removeprefix('--')}" for flag in found]
        return "\n".join(["# asit: completion for fish", *lines]) + "\n"
    if shell == "zsh":
        verbs = " ".join(shlex.quote(f"{verb}:{summary}") for verb, summary in summaries.items())
        return _ZSH.format(verbs=verbs, cases=_cases(known, "flags=({})"))
    return _BASH.format(verbs=shlex.quote(" ".join(summaries)), cases=_cases(known, "words='{}'"))


def flags_in_help(verb: Callable[[list[str]], object]) -> list[str]:
    """Return the flags that a verb's --help lists, in their order; `verb` takes the arguments."""
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.suppress(SystemExit):
        verb(["--help"])
    plain = re.sub(r"\x1b\[[0-9;]*m", "", said.getvalue())
    return list(dict.fromkeys(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*", "\n".join(_option_lines(plain)))))


def _option_lines(text: str) -> list[str]:
    """The lines of a help text that begin with an option."""
    return [line for line in text.splitlines() if re.match(r"[\s│|]*-", line)]


def _cases(known: Mapping[str, list[str]], form: str) -> str:
    return "\n".join(f"      {verb}) {form.format(' '.join(flags))} ;;" for verb, flags in known.items())
