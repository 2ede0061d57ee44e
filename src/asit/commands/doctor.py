"""The verb doctor, which parses its options with the standard library so that it starts whatever is broken."""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from asit.terminal import stdout

if TYPE_CHECKING:
    from asit.tools.diagnostics import Finding

_SIGNS = {"ok": "ok", "missing": "--", "note": "!", "broken": "XX"}


def doctor(prog: str, summary: str, given: list[str]) -> int:
    """Return 0 if asit works, 1 if something it needs is broken, 2 for an unknown option."""
    parser = argparse.ArgumentParser(prog=prog, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("--json", action="store_true", help="write the findings as JSON")
    options = parser.parse_args(given)
    from asit.tools.diagnostics import examine, works

    findings = examine()
    result = {"works": works(findings), "findings": [asdict(finding) for finding in findings]}
    print(stdout.rendered(options.json, result, lambda columns: _text(findings, columns)))
    return 0 if works(findings) else 1


def _text(findings: Sequence[Finding], columns: int) -> str:
    width = max(len(finding.name) for finding in findings)
    lines: list[str] = []
    part = ""
    for finding in findings:
        if finding.part != part:
            part = finding.part
            lines += ["", part] if lines else [part]
        head = f"  {_SIGNS[finding.state]:2}  {finding.name:{width}}  "
        body = textwrap.wrap(finding.text, max(20, columns - len(head)), break_on_hyphens=False) or [""]
        lines += [head + body[0], *(" " * len(head) + line for line in body[1:])]
        if finding.state != "ok" and finding.remedy:
            lines.append(" " * len(head) + "-> " + finding.remedy)  # not wrapped, so that it can be copied
    broken = [finding.name for finding in findings if finding.state == "broken"]
    missing = ", ".join(finding.name for finding in findings if finding.state == "missing")
    ending = f"asit does not work: {', '.join(broken)}" if broken else "asit works"
    return "\n".join([*lines, "", ending + (f"; not installed: {missing}" if missing else "")])
