"""The verbs info and models."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from asit.errors import ConfigError
from asit.logs import printable
from asit.terminal import stdout
from asit.terminal.options import Model, parse

if TYPE_CHECKING:
    from asit.interop.model_registry import RegisteredModel

_FIRST = 8
"""Labels shown without --labels."""


@dataclass
class InfoOptions:
    model: Model
    labels: bool = False
    """List all labels only, one per line."""
    json: bool = False
    """Print everything as JSON."""


def info(prog: str, summary: str, given: list[str]) -> int:
    options = parse(InfoOptions, prog, summary, given)
    from asit.tools.model_info import describe

    if options.labels and options.json:
        raise ConfigError("--labels and --json", "one of them", "--json holds all labels")
    facts = describe(options.model)
    if options.labels and facts["labels"] is None:
        raise ConfigError(
            f"{options.model} has no labels: it is an encoder",
            "a classifier, as fine-tuning writes it",
            "fine-tune it first (asit finetune)",
        )
    names = map(printable, facts["labels"]["classes"] if options.labels else ())
    print(stdout.rendered(options.json, facts, lambda n: "\n".join(names) if options.labels else _text(facts, n)))
    return 0


def _text(facts: Mapping[str, Any], columns: int) -> str:
    rows = [(name, "\n".join(printable(line) for line in value.splitlines())) for name, value in _rows(facts)]
    width = max(len(name) for name, _ in rows)
    out = []
    for name, value in rows:
        room = max(20, columns - width - 2)
        lines = [part for line in value.splitlines() for part in textwrap.wrap(line, room, break_on_hyphens=False)]
        for i, line in enumerate(lines or [""]):
            out.append(f"{name if i == 0 else '':{width}}  {line}".rstrip())
    return "\n".join(out)


def _rows(facts: Mapping[str, Any]) -> list[tuple[str, str]]:
    network, front_end, audio = facts["network"], facts["front_end"], facts["input"]
    size = "" if network["size"] == "custom" else f"{network['size']}: "
    total = network["encoder_parameters"] + network["head_parameters"]
    head = f", {network['head_parameters']:,} of them in the head" if network["head_parameters"] else ""
    patch, stride, grid = (" x ".join(map(str, network[name])) for name in ("patch", "stride", "grid"))
    before = network["tokens_before_patches"]
    overlap = "" if network["stride"] == network["patch"] else f", every {stride}"
    rows = [
        ("model", str(facts["source"])),
        *([("folder", facts["folder"])] if facts["folder"] not in (None, facts["source"]) else []),
        ("kind", facts["kind"]),
        ("network", f"{size}{network['depth']} blocks, width {network['width']}, {network['heads']} heads"),
        ("parameters", f"{total:,}{head}"),
        ("patches", f"{patch} frames x mel bins{overlap}; a grid of {grid} (time x mel), {network['tokens']} tokens"),
        *([("", f"{before} tokens before the patches: class and distillation")] if before > 1 else []),
        (
            "input",
            f"{audio['seconds']:g} s at {audio['rate']} Hz: {audio['frames']} frames of {audio['mels']} mel bins",
        ),
        ("", f"one column of patches every {1000 * audio['column_seconds']:g} ms"),
        (
            "front end",
            f"log-mel, window {front_end['window_ms']:g} ms, hop {front_end['shift_ms']:g} ms, from "
            f"{front_end['low_hz']:g} Hz; mean {front_end['mean']:.5g}, std {front_end['std']:.5g}; short clips are "
            f"padded by {front_end['padding']}; resampled by {front_end['resampler']}",
        ),
        ("labels", _labels(facts["labels"])),
        ("license", str(facts["license"] or "not in the card")),
        ("data", _facts(facts["data"]) if facts["data"] else "not in the card"),
        ("training", _facts(facts["training"]) or "not in the card"),
    ]
    for score in facts["scores"]:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in score["metrics"].items() if value is not None)
        rows.append(("scored", f"{score['split']}, {score['clips']} clips: {shown}"))
    rows += [("file", f"{one['name']}, {_bytes(one['bytes'])}, sha256 {one['sha256']}") for one in facts["files"]]
    if facts["format"] is not None:
        rows.append(("format", f"{facts['format']}, written by asit {facts['asit']}"))
    return rows


def _labels(labels: Mapping[str, Any] | None) -> str:
    if labels is None:
        return "none: an encoder, for embeddings; asit finetune makes a classifier of it"
    several = "a clip may have several (sigmoid)" if labels["multi"] else "a clip has one (softmax)"
    first = ", ".join(labels["classes"][:_FIRST])
    more = f", ... (asit info --labels lists all {labels['count']})" if labels["count"] > _FIRST else ""
    return f"{labels['count']}; {several}; read from {labels['pooling']}\n{first}{more}"


def _facts(value: Any) -> str:
    """Return facts of a card as lines "name: value"."""
    if not isinstance(value, Mapping):
        return _short(value, len(value) if isinstance(value, list) else 0)
    lines = []
    for name, held in value.items():
        inner = [f"{n} {_short(v)}" for n, v in held.items()] if isinstance(held, Mapping) else [_short(held)]
        lines.append(f"{name}: {'; '.join(inner)}")
    return "\n".join(lines)


def _short(value: Any, most: int = 5) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {held}" for name, held in value.items())
    if not isinstance(value, list):
        return str(value)
    return ", ".join(map(str, value[:most])) + (f", ... ({len(value)} in all)" if len(value) > most else "")


def _bytes(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


@dataclass
class ModelsOptions:
    names: Annotated[list[str], tyro.conf.Positional] = field(default_factory=list)
    """Short names of the models to list; none: all."""
    json: bool = False
    """Print everything as JSON."""


def models(prog: str, summary: str, given: list[str]) -> int:
    options = parse(ModelsOptions, prog, summary, given)
    from asit.interop import model_registry

    for name in options.names:
        if name not in model_registry.MODELS:
            raise ConfigError(
                f"there is no model {name}{model_registry.hint(name)}",
                "a short name of the registry: " + ", ".join(model_registry.MODELS),
                "asit models lists them; any other model is named by its path or the hub's owner/name",
            )
    found = [one for one in model_registry.list_models() if one.name in options.names or not options.names]
    facts = [{**one.model_dump(mode="json"), "automatic": one.automatic} for one in found]
    print(stdout.rendered(options.json, facts, lambda columns: _listed(found, columns)))
    return 0


def _listed(found: list[RegisteredModel], columns: int) -> str:
    """Return the facts of models as text, with numbers for the pages that they are from."""
    pages: dict[str, int] = {}

    def with_page(text: str, source: str) -> str:
        return f"{text} [{pages.setdefault(source, len(pages) + 1)}]"

    out = []
    for one in found:
        rows = [("family", one.family + (f" (asit convert --kind {one.kind})" if one.kind else ""))]
        named = {"size": one.size, "input": one.input, "data": one.data, "license": one.license}
        rows += [(name, with_page(fact.value, fact.source)) for name, fact in named.items() if fact is not None]
        if one.license is None:
            rows.append(("license", "none is stated by a source"))
        rows += [
            ("scored", with_page(f"{score.task}: {score.metric} {score.value:g}, {score.of}", score.source))
            for score in one.scores
        ]
        if one.folder:
            rows.append(("from", f"asit itself: {one.folder_path}"))
        elif one.automatic:
            where = one.url or f"{one.repository} of the Hugging Face hub"
            rows.append(("from", f"{where}, automatically"))
        else:
            what = one.file or "the file of weights"
            rows.append(("from", f"{one.page}, by hand: {one.by_hand}; download {what}, then give its path"))
        out.append(f"{one.name}: {one.title}")
        for name, text in rows:
            lines = textwrap.wrap(text, max(20, columns - 12), break_on_hyphens=False, break_long_words=False)
            out += [f"  {name if i == 0 else '':8}  {line}".rstrip() for i, line in enumerate(lines)]
    out.append("sources")
    out += [f"  [{number}]  {page}" for page, number in pages.items()]
    return "\n".join(out)
