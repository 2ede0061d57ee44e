"""Write one self-contained HTML page about a run: scores, curves, what to look at and listen to, settings."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from asit.errors import ConfigError
from asit.io import atomic, parsing
from asit.report import findings, finetune_page, pretrain_page, ranking_page, templates
from asit.report.class_results import probe_table_html
from asit.report.run_reader import RunFolder
from asit.report.run_sections import curves
from asit.report.templates import Section

__all__ = ["probe_table_html", "report"]


def report(
    run: Path | str,
    out: Path | str | None = None,
    sections: Sequence[tuple[str, str]] = (),
    *,
    preset: Mapping[str, Any] | None = None,
    overlay: Sequence[Path | str] = (),
) -> Path:
    """Write one HTML page about a run or a comparison of encoders; reading it needs no other file and no network.

    The run may still be running, and parts of it may be missing: the page states what is not there. For a
    cross-validation each fold's page is written too, beside the fold's run, and linked.

    Args:
        run: the folder written by `asit pretrain` or `asit finetune`, or by `asit evaluate` for several models.
        out: the page, which is written atomically; RUN/report.html if not given.
        sections: (title, HTML) to put first, such as results measured elsewhere; the HTML is not escaped.
        preset: settings of the run's preset or recipe, nested as in config.yaml, to mark differences from; the built-in
            defaults if not given.
        overlay: folders of other pretraining runs, whose curves are drawn with those of `run`.

    Returns:
        The page's path.

    Raises:
        AsitError: `run` is not a run's folder, or its results are not as a run writes them.
        ConfigError: `out` is a folder, or a file whose name is not that of a page; a run given or overlaid does not
            pretrain; or the run's config.yaml, environment.json or results.json cannot be parsed.
    """
    path = Path(out) if out is not None else Path(run) / "report.html"
    ranking = None if overlay else ranking_page.read(Path(run))
    if ranking is not None:
        render = functools.partial(ranking_page.html, ranking, Path(run))
    else:
        render = functools.partial(_html, RunFolder.read(Path(run)), path, sections, preset, overlay)
    if path.is_dir() or (path.exists() and path.suffix.lower() not in (".html", ".htm")):
        raise ConfigError(
            f"{path} is {'a folder' if path.is_dir() else 'a file, and not an HTML page by its name'}",
            "the path of a page: a new file, or one whose name ends in .html",
            f"give one such as {path / 'report.html' if path.is_dir() else path.with_suffix('.html')}",
        )
    with parsing.as_written(run, "restore the files of the run, or delete the changed one and report again"):
        html = render()
    html = html.replace("@SIZE@ MB.", f"{len(html.encode()) / 1e6:.1f} MB.")
    atomic.write_text(path, html)
    return path


def _overlaid(held: RunFolder, overlay: Sequence[Path | str]) -> dict[str, RunFolder]:
    """The other runs by name; of two with one name the later ones are numbered."""
    names, found = [held.folder.resolve().name], dict[str, RunFolder]()
    for folder in map(Path, overlay):
        other = RunFolder.read(folder)
        for run in (held, other):
            if run.kind != "pretraining":
                raise ConfigError(
                    f"{run.folder} is a {run.kind} run",
                    "--overlay draws the curves of several pretraining runs together",
                    "compare scored runs with asit compare",
                )
        name = folder.resolve().name
        names.append(name)
        found[name if names.count(name) == 1 else f"{name} ({names.count(name)})"] = other
    return found


def _html(
    held: RunFolder,
    path: Path,
    sections: Sequence[tuple[str, str]],
    preset: Mapping[str, Any] | None,
    overlay: Sequence[Path | str],
) -> str:
    overlaid = _overlaid(held, overlay)
    found: Sequence[findings.RunFinding] = []
    if held.kind == "cross-validation":
        for fold in held.folds:
            report(fold, preset=preset)
        (state, verdict), facts, own = finetune_page.folds_page(held, preset, path)
    else:
        state, verdict = held.verdict
        if held.kind == "pretraining":
            drawn = curves(held.train)
            found = findings.pretraining(held, drawn)
            facts, own = pretrain_page.facts(held), pretrain_page.sections(held, preset, drawn, overlaid)
        else:
            found = findings.finetuning(held)
            facts, own = finetune_page.facts(held), finetune_page.sections(held, preset)
    return templates.page(
        title=f"asit: {held.folder.resolve().name}",
        state=state,
        verdict=verdict,
        findings=found,
        commands=findings.next_commands(held),
        facts=facts,
        sections=[*(Section(title, Markup(body)) for title, body in sections), *(part for part in own if part.body)],
        damaged=held.damaged,
    )
