"""What `import asit` gives: public names, modules in every form of import, and the names that documentation uses."""

from __future__ import annotations

import inspect
import pickle
import re
import subprocess
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import soundfile

import asit

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / name for name in ("README.md", "CHANGELOG.md", "bench/README.md")]
PAGES += sorted((REPOSITORY / "docs").rglob("*.md"))

# Every module by its dotted name after `import asit` alone, then by both forms of import.
WALK = r"""
import pkgutil, sys
import asit
assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
def walk(package):
    for found in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        yield found.name
        if found.ispkg:
            yield from walk(eval(found.name))
wrong, count = [], 0
for name in walk(asit):
    if name == "asit.__main__":
        continue
    parent, _, leaf = name.rpartition(".")
    forms = {}
    exec(f"import {name} as whole\nfrom {parent} import {leaf} as part", forms)
    count += 1
    for value in (eval(name), forms["whole"], forms["part"]):
        if value is not sys.modules[name]:
            wrong.append(f"{name} is {value!r}")
    if leaf not in dir(sys.modules[parent]):
        wrong.append(f"{name} is not in dir({parent})")
for name in sys.argv[1:]:
    try:
        eval(name)
    except AttributeError as error:
        wrong.append(f"{name}: {error}")
print(count)
sys.exit("\n".join(wrong) or 0)
"""


def names_in(text: str) -> Iterator[str]:
    """Dotted names that begin with asit; neither quoted keys nor parts of file names."""
    yield from re.findall(r"""(?<![\w./@"'-])asit(?:\.[A-Za-z_]\w*)+""", text)


def test_every_module_and_every_name_in_the_documentation() -> None:
    named = sorted({name for page in PAGES for name in names_in(page.read_text("utf-8"))})
    assert {"asit.load", "asit.training.prefetch", "asit.data.corpora.read"} <= set(named)
    done = subprocess.run([sys.executable, "-c", WALK, *named], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == len(list((REPOSITORY / "src" / "asit").rglob("*.py"))) - 2  # asit and its __main__


def test_a_package_that_is_a_function_when_it_is_imported_first() -> None:
    code = """
import asit.pretrain.masking as one, asit.report.charts as other
import asit
assert asit.pretrain.masking is one and asit.report.charts is other
for call in (lambda: asit.pretrain("no/such/folder", "run"), lambda: asit.report("no/such/run")):
    try:
        call()
    except asit.AsitError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "no/such/folder" in done.stdout
    assert "no/such/run" in done.stdout


def test_a_package_that_is_a_function_looks_like_one() -> None:
    from asit import api

    for package, function in (
        (asit.pretrain, api.pretrain),
        (asit.finetune, api.finetune),
        (asit.report, sys.modules["asit.report"].report),
    ):
        assert callable(package)
        assert inspect.signature(package) == inspect.signature(function)
        assert inspect.getdoc(package) == inspect.getdoc(function)
        assert pickle.loads(pickle.dumps(package)) is package
    with pytest.raises(AttributeError, match=r"module 'asit\.audio' has no attribute 'nonsense'"):
        asit.audio.nonsense  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError, match="nonsense"):
        from asit.audio import nonsense  # type: ignore[attr-defined]  # noqa: F401


def test_a_module_whose_import_fails_is_not_called_missing() -> None:
    code = "import sys\nsys.modules['soxr'] = None\nimport asit\nasit.audio.stream"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "soxr" in done.stderr
    assert "has no attribute" not in done.stderr


def own_types(annotation: object) -> Iterator[type]:
    """asit's classes within an annotation."""
    if isinstance(annotation, type) and annotation.__module__.startswith("asit."):
        yield annotation
    for inner in typing.get_args(annotation):
        yield from own_types(inner)


@pytest.mark.parametrize("name", ["build_catalogue", "finetune", "load", "pretrain", "report"])
def test_arguments_of_public_functions_are_made_from_public_names(name: str) -> None:
    public = {value for value in (getattr(asit, n) for n in asit.__all__) if isinstance(value, type)}
    function = getattr(asit, name)
    function = function._function if isinstance(function, types.ModuleType) else function
    source = re.findall(r"if TYPE_CHECKING:\n((?:(?:    .*)?\n)+)", inspect.getsource(sys.modules[function.__module__]))
    names: dict[str, object] = {}
    exec(inspect.cleandoc("\n" + "".join(source)), names)
    hints = typing.get_type_hints(function, localns=names)
    assert set(inspect.signature(function).parameters) <= set(hints)
    hints.pop("return")
    for parameter, annotation in hints.items():
        assert set(own_types(annotation)) <= public, f"{parameter} of asit.{name}"


def test_a_catalogue_from_public_names(tmp_path: Path) -> None:
    for name in ("a", "b"):
        soundfile.write(tmp_path / f"{name}.wav", np.random.default_rng(0).normal(0, 0.1, 8000), 8000)
    plain = asit.build_catalogue(tmp_path, tmp_path / "c.jsonl", workers=1)
    assert plain.header["front_end"]["rate"] == 16000
    rows = [asit.TableRow("a.wav", label="x", split="train"), asit.TableRow(str(tmp_path / "b.wav"), end=0.5)]
    front_end = asit.FrontEndSettings(rate=8000, mels=32)
    made = asit.build_catalogue(tmp_path, tmp_path / "d.jsonl", front_end=front_end, rows=rows, workers=1)
    assert made.header["front_end"]["rate"] == 8000
    read = asit.Catalogue.read(tmp_path / "d.jsonl")
    assert [len(read), read.labels.tolist()] == [2, ["x", None]]
