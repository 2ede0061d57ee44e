"""The verb doctor. It reads its options by the standard library alone: whatever else is broken, it must start."""

from __future__ import annotations

import argparse
import json
import shutil
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING

from asit.terminal import stdout

if TYPE_CHECKING:
    from asit.tools.diagnostics import Finding

_SIGNS = {"ok": "ok", "missing": "--", "note": "!", "broken": "XX"}


def doctor(prog: str, summary: str, given: list[str]) -> int:
    """Exit status: 0 where the core works, 1 where it is broken, 2 for an option that there is not."""
    parser = argparse.ArgumentParser(prog=prog, description=summary[0].upper() + summary[1:] + ".")
    parser.add_argument("--json", action="store_true", help="write the findings as JSON")
    options = parser.parse_args(given)
    from asit.tools.diagnostics import examine, record, works

    findings = examine()
    stdout.for_data() if options.json else stdout.for_people()
    if options.json:
        print(json.dumps(record(findings), indent=1, ensure_ascii=False))
    else:
        print(_text(findings, min(100, shutil.get_terminal_size().columns)))
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
            lines.append(" " * len(head) + "-> " + finding.remedy)  # never wrapped: it is to be copied
    broken = [finding.name for finding in findings if finding.state == "broken"]
    missing = [finding for finding in findings if finding.state == "missing"]
    ending = f"asit does not work: {', '.join(broken)}" if broken else "asit works"
    lacking = ", ".join(finding.name for finding in missing)
    return "\n".join([*lines, "", ending + (f"; not there: {lacking}" if missing else "")])
