"""Pages of the documentation site that are written from the code when it is built (mkdocs.yml names this file).

Commands come from the verbs' parsers, settings from the pydantic models and the presets, the Python reference from
signatures and docstrings, the model table from models.yaml, examples and changes from their files.
"""

from __future__ import annotations

import importlib
import inspect
import json
import os
import re
import sys
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import docstring_parser
import tyro
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from pydantic import BaseModel

REPOSITORY = Path(__file__).resolve().parents[2]
if str(REPOSITORY / "src") not in sys.path:  # the checkout that the site is built from, installed or not
    sys.path.insert(0, str(REPOSITORY / "src"))

import asit  # noqa: E402
from asit import cli, commands  # noqa: E402
from asit.config import FinetuneSettings, PretrainSettings, RunSettings, presets, yaml  # noqa: E402

LANGUAGES = {".py": "python", ".sh": "bash", ".html": "html", ".js": "javascript", ".yaml": "yaml"}
API = {
    "Functions and classes": [f"asit.{name}" for name in asit.__all__ if name != "__version__"],
    "Results of a model": ["asit.model.inference.tagging.Tags", "asit.model.inference.tagging.Tag"],
    "Errors": [
        f"asit.errors.{name}"
        for name in ("AudioError", "CatalogueError", "CheckpointError", "ConfigError", "StoreError", "TrainingError")
    ],
}
"""Titles of the Python reference, and the dotted names below each."""


# ---------------------------------------------------------------- the hooks of MkDocs


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {
        "reference/commands.md": commands_page(),
        "reference/pretrain-settings.md": settings_page(PretrainSettings, "pretraining", "preset"),
        "reference/finetune-settings.md": settings_page(FinetuneSettings, "fine-tuning", "task"),
        "reference/api.md": api_page(),
        "reference/models.md": models_page(),
        "reference/asit-small-general.md": included_page(),
        "changelog.md": (REPOSITORY / "CHANGELOG.md").read_text("utf-8").replace("](docs/", "]("),
        **example_pages(),
    }
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Link files of examples/ to their pages, and set drawings into the page, so that they follow its colours."""
    markdown = re.sub(r"\]\((?:\.\./)+(examples/[^)#]+)\)", lambda m: f"]({_up(page, m[1])}.md)", markdown)
    card = _up(page, "reference/asit-small-general.md")
    markdown = re.sub(r"\]\((?:\.\./)+src/asit/models/asit-small-general/README\.md\)", f"]({card})", markdown)

    def drawing(found: re.Match[str]) -> str:
        svg = (Path(config.docs_dir) / page.file.src_uri).parent / found[2]
        return f'<figure markdown="0" aria-label="{found[1]}">\n{svg.read_text("utf-8").strip()}\n</figure>'

    return re.sub(r"^!\[([^\]]*)\]\(([^)]+\.svg)\)$", drawing, markdown, flags=re.MULTILINE)


def _up(page: Page, target: str) -> str:
    return os.path.relpath(target, Path(page.file.src_uri).parent).replace(os.sep, "/")


# ---------------------------------------------------------------- commands


class _ParserError(Exception):
    """Raised with what a verb gives to tyro, so that it stops there."""


def parsers() -> Iterator[tuple[str, Any]]:
    """Yield each verb with its argparse parser; `asit doctor` has one of the standard library itself."""

    def stop(kind: Any, **options: Any) -> None:
        raise _ParserError(kind, {name: value for name, value in options.items() if name != "args"})

    for verb, summary in cli.SUMMARIES.items():
        if verb == "doctor":
            continue
        with mock.patch.object(tyro, "cli", stop):
            try:
                commands.verb(verb)(f"asit {verb}", summary, [])
                raise AssertionError(f"asit {verb} parsed no options")
            except _ParserError as found:
                kind, options = found.args
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)
            yield verb, tyro.extras.get_parser(kind, **options)


def commands_page() -> str:
    out = [
        "# Commands",
        "The options of every verb, from the parsers themselves: the same as `asit VERB --help`. "
        "`asit -v VERB ...` logs details, `asit --version` prints the version. Exit status: 0, 2 for a mistake that "
        "can be fixed, 130 or 143 when stopped.",
    ]
    settings = {
        "pretrain": ("pretrain-settings.md", set(yaml.names(PretrainSettings))),
        "finetune": ("finetune-settings.md", set(yaml.names(FinetuneSettings))),
    }
    found = dict(parsers())
    for verb, summary in cli.SUMMARIES.items():
        out += [f"## asit {verb}", f"{summary[0].upper()}{summary[1:]}."]
        if verb in settings:
            out.append(f"[Every setting]({settings[verb][0]}) is also a flag: `optim.lr` is `--optim.lr`.")
        actions = [a for a in found[verb]._actions if a.dest != "help"] if verb in found else []
        leave = settings.get(verb, ("", set()))[1]
        rows = [_option(a) for a in actions if a.dest.replace("-", "_") not in leave]
        out.append(table(("option", "value", "meaning"), rows) if rows else "`--json` writes the findings as JSON.")
    return "\n\n".join(out) + "\n"


def _option(action: Any) -> tuple[str, str, str]:
    given = action.option_strings  # a flag's --no- is left out
    flags = [name for name in given if not (name.startswith("--no-") and f"--{name[5:]}" in given)]
    names = ", ".join(f"`{name}`" for name in flags) or f"`{action.dest.upper()}`"
    several = re.fullmatch(r"\[*(\w+) \[\1 \.\.\.\]*", action.metavar or "")
    value = f"{several[1]} ..." if several else (action.metavar or "").replace("{None}|", "")
    text = " ".join((action.help or "").split())
    text = re.sub(r" ?\(default: (None|''|False|)\)$", "", text).replace("(required)", "Required.")
    text = re.sub(r"\(default: (.*)\)$", r"Default: `\1`.", text)
    return names, f"`{value}`" if value else "", escaped(text)


# ---------------------------------------------------------------- settings


def settings_page(kind: type[RunSettings], title: str, recipe: str) -> str:
    """One table for each group: name, default, values, meaning, and what the other presets or tasks have."""
    default = presets.build(kind, None)
    values = dict(yaml.flat(default.model_dump(mode="json")))
    others: dict[str, dict[str, list[str]]] = {}  # setting: value: recipes that have it
    for name in presets.recipes(kind):
        for setting, (_, value) in yaml.differences(default, presets.build(kind, name)).items():
            others.setdefault(setting, {}).setdefault(_plain(value), []).append(name)
    out = [
        f"# Settings of {title}",
        f"Written from the code. A setting is a key of the YAML file given as `--config` and a flag: `--epochs 50`, "
        f"`--optim.lr 1e-4`. *Default* is that of the command; *`--{recipe}`* lists the values of others.",
    ]
    for group, rows in _groups(kind, ""):
        out.append(f"## {group}" if group else "## General")
        out.append(
            table(
                ("setting", "default", "values", "meaning", f"`--{recipe}`"),
                (
                    (f"`{name}`", f"`{_plain(values.get(name))}`", kinds, meaning, _of_recipes(others.get(name, {})))
                    for name, kinds, meaning in rows
                ),
            )
        )
    return "\n\n".join(out) + "\n"


def _groups(kind: type[BaseModel], prefix: str) -> Iterator[tuple[str, list[tuple[str, str, str]]]]:
    schema = kind.model_json_schema()["properties"]
    rows, below = [], []
    for name, field in kind.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            below.append((name, field.annotation))
            continue
        rows.append((prefix + name, _values(schema[name]), escaped(" ".join((field.description or "").split()))))
    if rows:
        yield prefix.rstrip("."), rows
    for name, inner in below:
        yield from _groups(inner, f"{prefix}{name}.")


def _values(schema: dict[str, Any]) -> str:
    """Return the values that a JSON schema allows, in words."""
    if "anyOf" in schema:
        return " or ".join(_values(part) for part in schema["anyOf"])
    if "const" in schema or "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    bounds = {"minimum": "≥ {:g}", "exclusiveMinimum": "> {:g}", "maximum": "≤ {:g}", "exclusiveMaximum": "< {:g}"}
    limits = [text.format(schema[key]) for key, text in bounds.items() if abs(schema.get(key, 1e9)) < 1e9]
    name = {"null": "none", "array": "list", "object": "mapping"}.get(schema.get("type", ""), schema.get("type", "any"))
    return " ".join([name, ", ".join(limits)]).strip()


def _of_recipes(values: dict[str, list[str]]) -> str:
    return "; ".join(f"`{value}`: {', '.join(names)}" for value, names in values.items())


def _plain(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value or '""'


# ---------------------------------------------------------------- Python


def api_page() -> str:
    out = ["# Python reference", "Written from the docstrings. How these are used: [a model in Python](../python.md)."]
    for title, names in API.items():
        out.append(f"## {title}")
        for name in names:
            out += list(documented(name, resolve(name)))
    return "\n\n".join(out) + "\n"


def resolve(name: str) -> Any:
    """Return what a dotted name is, importing its module."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def documented(name: str, value: Any) -> Iterator[str]:
    """Yield the Markdown of a function or class, with the public methods and properties of a class."""
    yield f"### `{name}`"
    yield _signature(name.rpartition(".")[2], value)
    yield from docstring(value)
    if not inspect.isclass(value) or issubclass(value, (BaseModel, BaseException)):
        return
    rows = []
    for member, inner in vars(value).items():
        if member.startswith("_") or not (
            inner.__doc__ and (callable(inner) or isinstance(inner, (property, classmethod)))
        ):
            continue
        if isinstance(inner, property):
            rows.append((f"`{member}`", escaped(docstring_parser.parse(inner.__doc__).short_description or "")))
            continue
        yield f"#### `{value.__name__}.{member}`"
        yield _signature(member, getattr(value, member))
        yield from docstring(inner)
    if rows:
        yield table(("property", "is"), rows)


class _Name(str):
    """An annotation, which a signature shows without quotes."""

    __repr__ = str.__str__


def _signature(name: str, value: Any) -> str:
    if inspect.isclass(value) and issubclass(value, (BaseModel, BaseException)):
        return ""
    signature = inspect.signature(value)
    rest = [p.replace(annotation=_short(p.annotation)) for p in signature.parameters.values() if p.name != "self"]
    result = signature.empty if inspect.isclass(value) else _short(signature.return_annotation)
    line = f"{name}{signature.replace(parameters=rest, return_annotation=result)}"
    if len(line) > 100:
        back = "" if result is signature.empty else f" -> {result}"
        line = f"{name}(\n" + "".join(f"    {p},\n" for p in _starred(rest)) + f"){back}"
    return f"```python\n{line}\n```"


def _short(annotation: Any) -> Any:
    """Return an annotation with names without their modules."""
    if annotation is inspect.Signature.empty:
        return annotation
    return _Name(re.sub(r"\b(?:[a-z_]\w*\.)+(?=\w)", "", inspect.formatannotation(annotation).strip("'\"")))


def _starred(parameters: list[inspect.Parameter]) -> Iterator[inspect.Parameter | str]:
    """Yield the parameters, with the bare star before those that are passed by keyword only."""
    starred = False
    for parameter in parameters:
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            yield "*"
        starred |= parameter.kind in (parameter.KEYWORD_ONLY, parameter.VAR_POSITIONAL)
        yield parameter


def docstring(value: Any) -> Iterator[str]:
    """Yield the parts of a docstring in Google's form as Markdown."""
    found = docstring_parser.parse(inspect.getdoc(value) or "")
    yield found.short_description or ""
    yield textwrap.dedent(found.long_description or "")
    if found.params:
        yield table(("argument", "meaning"), ((f"`{p.arg_name}`", escaped(p.description or "")) for p in found.params))
    if found.returns and found.returns.description:
        kind = f"`{found.returns.type_name}`: " if found.returns.type_name else ""
        yield f"*Returns* {kind}{found.returns.description}"
    for error in found.raises:
        yield f"*Raises* `{error.type_name}`: {error.description}"


# ---------------------------------------------------------------- models, examples


def models_page() -> str:
    from asit.interop.model_registry import list_models

    def row(model: Any) -> tuple[str, ...]:
        scores = "; ".join(f"{s.task}: {s.metric} {s.value:g} ({s.of})" for s in model.scores)
        licence = _fact(model.license) if model.license else ""
        source = "hub" if model.repository else "link" if model.url else "by hand"
        facts = (_fact(model.size), _fact(model.input), _fact(model.data), licence)
        return (f"[`{model.name}`]({_source(model.page)})", model.family, *facts, escaped(scores), source)

    head = ("name", "family", "size", "input", "trained on", "licence", "published scores", "obtained")
    about = (
        "From the registry, `src/asit/interop/models.yaml`, as `asit models` prints it. How a model is named: "
        "[models](../models.md). Each fact links to the page that says so; what no public source states is left out. "
        "The scores are those of the sources; none was reproduced here."
    )
    return f"# Public models\n\n{about}\n\n{table(head, map(row, list_models()))}\n"


def _fact(fact: Any) -> str:
    return f"[{escaped(fact.value)}]({_source(fact.source)})"


def _source(source: str) -> str:
    """The address of a source; of a model that is part of asit the page of its card."""
    return f"{source.split('/')[2]}.md" if source.startswith("asit/models/") else source


def included_page() -> str:
    """Return the card of the encoder that is part of asit, without links to the files beside it."""
    text = (REPOSITORY / "src" / "asit" / "models" / "asit-small-general" / "README.md").read_text("utf-8")
    return re.sub(r"\[([^\]]+)\]\((?:CREDITS\.md|LICENSE)\)", r"\1", text)


def example_pages() -> dict[str, str]:
    """Return a page for each file of examples/, and their index."""
    root = REPOSITORY / "examples"
    files = sorted(p for p in root.rglob("*") if p.suffix in (*LANGUAGES, ".ipynb", ".md") and ".ipynb_" not in str(p))
    pages = {f"examples/{path.relative_to(root).as_posix()}.md": example(path, root) for path in files}
    lines = [f"- [{name[9:-3]}]({name})" for name in pages]
    pages["examples.md"] = "# Examples\n\nThe files of the folder `examples/`.\n\n" + "\n".join(lines) + "\n"
    return pages


def example(path: Path, root: Path) -> str:
    text = path.read_text("utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix == ".ipynb":
        cells = [("".join(cell["source"]), cell["cell_type"] == "code") for cell in json.loads(text)["cells"]]
        body = "\n\n".join(f"```python\n{source}\n```" if code else source for source, code in cells)
        head, _, rest = body.partition("\n\n")
        return f"{head}\n\nA notebook: `examples/{path.relative_to(root).as_posix()}`.\n\n{rest}\n"
    return f"# {path.name}\n\n````{LANGUAGES[path.suffix]}\n{text}````\n"


# ---------------------------------------------------------------- Markdown


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    head = list(head)
    lines = [head, ["---"] * len(head), *(list(row) for row in rows)]
    cells = [[_outside_code(r"\|", r"\\|", " ".join(cell.split())) for cell in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)


def escaped(text: str) -> str:
    """Return text whose angle brackets, stars and underscores outside code are not read as markup."""
    return _outside_code(r"([<>*_\[\]])", r"\\\1", text)


def _outside_code(pattern: str, replacement: str, text: str) -> str:
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if i % 2 else re.sub(pattern, replacement, part) for i, part in enumerate(parts))
