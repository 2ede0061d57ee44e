"""The documentation site: it builds strictly, loads nothing from elsewhere, and its generated pages are complete."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType

import pytest

import asit
from asit import cli
from asit.config import FinetuneSettings, PretrainSettings, presets, yaml
from asit.interop.model_registry import list_models

REPOSITORY = Path(__file__).parents[1]
NOTEBOOKS = sorted((REPOSITORY / "examples" / "notebooks").glob("*.ipynb"))
NEEDED = "MkDocs is not installed (the extra docs)"


@pytest.fixture(scope="module")
def generate() -> ModuleType:
    pytest.importorskip("mkdocs", reason=NEEDED)
    spec = importlib.util.spec_from_file_location("generate", REPOSITORY / "docs" / "site" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _Loads(HTMLParser):
    """What a browser loads with a page: all but the links that are followed on a click."""

    def __init__(self) -> None:
        super().__init__()
        self.urls: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        held = dict(attrs)
        if tag != "a":
            self.urls += [held[name] or "" for name in ("src", "srcset", "href", "data", "poster") if name in held]


def loads(page: str) -> list[str]:
    parser = _Loads()
    parser.feed(page)
    return parser.urls


def test_what_a_page_loads_is_found() -> None:
    page = '<a href="https://a.example"></a><link href="https://b.example/x.css"><script src="y.js"></script>'
    assert loads(page) == ["https://b.example/x.css", "y.js"]


def test_it_builds_strictly_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    pytest.importorskip("material", reason=NEEDED)
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY / "src"), "NO_MKDOCS_2_WARNING": "1"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    ended = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    pages = sorted(path for path in (tmp_path / "site").rglob("*.html") if path.is_file())
    assert len(pages) > 40
    for page in pages:
        text = page.read_text("utf-8")
        assert [url for url in loads(text) if re.match(r"(https?:)?//", url)] == [], page
    styles = "".join(path.read_text("utf-8") for path in (tmp_path / "site").rglob("*.css"))
    assert re.findall(r"url\([\"']?(?:https?:)?//[^)]*\)|@import[^;]*", styles) == []


def test_every_verb_option_and_setting_is_in_the_reference(generate: ModuleType) -> None:
    commands = generate.commands_page()
    assert re.findall(r"^## asit (\S+)$", commands, re.MULTILINE) == list(cli.SUMMARIES)
    for option in ("--budget", "--dry-run", "--timeline-dir", "--baselines", "--int8", "--no-head", "--allow-host"):
        assert f"`{option}`" in commands
    assert "`--no-no-head`" not in commands
    for kind, recipe in ((PretrainSettings, "preset"), (FinetuneSettings, "task")):
        page = generate.settings_page(kind, "runs", recipe)
        groups = {name.rpartition(".")[0] for name in yaml.names(kind)}
        assert [name for name in yaml.names(kind) if name not in groups and f"| `{name}` |" not in page] == []
    rate = presets.build(PretrainSettings, None).optim.lr
    assert f"| `optim.lr` | `{rate}` |" in generate.settings_page(PretrainSettings, "pretraining", "preset")


def test_the_python_reference_has_every_public_name(generate: ModuleType) -> None:
    page = generate.api_page()
    assert [name for name in asit.__all__ if name != "__version__" and f"### `asit.{name}`" not in page] == []
    assert "#### `AudioModel.embed_batch`" in page
    assert "| `budget` | time that the run may take" in page


def test_the_model_table_has_every_model(generate: ModuleType) -> None:
    page = generate.models_page()
    assert [model.name for model in list_models() if f"[`{model.name}`](" not in page] == []


def _texts() -> list[str]:
    """The strings in the source, the parts of f-strings apart."""
    found = []
    for path in (REPOSITORY / "src").rglob("*.py"):
        nodes = ast.walk(ast.parse(path.read_text("utf-8")))
        found += [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return found


def test_the_messages_of_troubleshooting_are_those_of_the_code() -> None:
    text = (REPOSITORY / "docs" / "troubleshooting.md").read_text("utf-8")
    headings = re.findall(r"^#### (.*)$", text, re.MULTILINE)
    messages = [message for heading in headings for message in re.findall(r"`([^`]*)`", heading)]
    parts = [part.strip() for message in messages for part in message.split("…") if len(part.strip()) > 2]
    assert len(messages) > 15
    texts = _texts()
    assert [part for part in parts if not any(part in found for found in texts)] == []


LONGER = {
    "catalogue.md": 1900,
    "embed.md": 950,
    "evaluate.md": 1000,
    "finetune.md": 950,
    "pretrain.md": 1000,
    "python.md": 1000,
    "report.md": 1150,
    "serve.md": 1150,
    "tag.md": 950,
    "tasks/audioset.md": 1250,
    "tasks/speech-commands.md": 1000,
}
"""Pages over 900 words or close to it, and the most that each may have: to be shortened."""
APPENDIX = {"design.md", "experiments.md", "scaling.md", "speed.md"}


def test_pages_are_short() -> None:
    """Words of prose and tables; commands and code are not counted."""
    docs = REPOSITORY / "docs"
    for path in docs.rglob("*.md"):
        name = path.relative_to(docs).as_posix()
        text = re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)
        words = sum(1 for word in text.split() if re.search(r"\w", word))
        assert name in APPENDIX or words <= LONGER.get(name, 900), f"{name} has {words} words: move detail to a guide"


def test_notebooks_are_stripped() -> None:
    assert len(NOTEBOOKS) == 2
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text("utf-8"))["cells"]
        code = [cell for cell in cells if cell["cell_type"] == "code"]
        assert [cell for cell in code if cell["outputs"] or cell["execution_count"]] == []
        for cell in code:
            ast.parse("".join(cell["source"]))


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed (the extra docs)")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed (the extra docs)")
    pytest.importorskip("pretty_midi", reason="the SoundFont is not installed (the extra demo)")
    import nbformat

    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY / "src"))
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    assert (tmp_path / "notebook-run" / "data" / "labelled.csv").exists()
