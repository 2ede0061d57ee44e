"""One self-contained HTML page about a run: what it scored, its curves, what to look at and listen to, its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from asit.errors import ConfigError
from asit.io import atomic, parsing
from asit.report import finetune_page, folds_page, pretrain_page
from asit.report import html as page
from asit.report.charts import probe_table_html
from asit.report.run_reader import Run

__all__ = ["probe_table_html", "report"]


def report(
    run: Path | str,
    out: Path | str | None = None,
    sections: Sequence[page.Section] = (),
    *,
    preset: Mapping[str, Any] | None = None,
) -> Path:
    """Write one HTML page about a run; no other file and no network is needed to read it.

    It may be called while the run goes on, and for a run that lacks parts: the page says what is not there. For a
    cross-validation each fold's page is written too, beside the fold's run, and linked.

    Args:
        run: the folder written by `asit pretrain` or `asit finetune`.
        out: the page; RUN/report.html if not given. Written whole or not at all.
        sections: (title, html) to put first, such as results measured elsewhere; the html is taken as it is.
        preset: settings of the run's preset or recipe, nested as in config.yaml, to mark differences from; the built-in
            defaults if not given.

    Returns:
        The page's path.

    Raises:
        AsitError: `run` is not a run's folder, or its results are not as a run writes them.
        ConfigError: `out` is a folder, or a file that is no page by its name; or the run's config.yaml,
            environment.json or results.json cannot be parsed.
    """
    held = Run.read(Path(run))
    path = Path(out) if out is not None else held.folder / "report.html"
    if path.is_dir() or (path.exists() and path.suffix.lower() not in (".html", ".htm")):
        raise ConfigError(
            f"{path} is {'a folder' if path.is_dir() else 'a file, and not an HTML page by its name'}",
            "the path of a page: a new file, or one whose name ends in .html",
            f"give one such as {path / 'report.html' if path.is_dir() else path.with_suffix('.html')}",
        )
    again = "restore the files of the run, or delete the one that was changed and report again"
    with parsing.as_written(held.folder, again):
        _write(path, _html(held, path, sections, preset))
    return path


def _html(held: Run, path: Path, sections: Sequence[page.Section], preset: Mapping[str, Any] | None) -> str:
    if held.kind == "cross-validation":
        for fold in held.folds:
            report(fold, preset=preset)
        (state, sentence), facts = folds_page.verdict(held), folds_page.facts(held)
        every = folds_page.sections(held, preset, path, links=bool(held.folds))
    else:
        state, sentence = held.verdict
        kind = pretrain_page if held.kind == "pretraining" else finetune_page
        facts, every = kind.facts(held), kind.sections(held, preset)
    damaged = f" {held.damaged} unreadable lines of metrics.jsonl were left out." if held.damaged else ""
    html = page.page(
        f"asit: {held.folder.resolve().name}",
        f'<p class="verdict {state}">{escape(sentence)}</p>{page.tiles(facts)}',
        [section for section in (*sections, *every) if section[1]],
        f"Written by <code>asit report</code>; one file, no outside request. Size: @SIZE@ MB.{damaged}",
    )
    return html.replace("@SIZE@ MB.", f"{len(html.encode()) / 1e6:.1f} MB.")


def _write(path: Path, html: str) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_text(path, html)
