"""What a release needs: one version, a readme for the package index, files that the build names."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from pathlib import Path

import pytest
import yaml

import asit

REPOSITORY = Path(__file__).parents[1]
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))


def test_the_version_stands_in_every_place() -> None:
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text("utf-8"))
    assert citation["version"] == asit.__version__
    assert citation["license"] in PROJECT["project"]["license"].split(" AND ")  # the code's; weights have their own
    assert f"## {asit.__version__} " in (REPOSITORY / "CHANGELOG.md").read_text("utf-8")


def test_the_readme_of_the_package_index_has_no_relative_links() -> None:
    pytest.importorskip("hatchling", reason="hatchling is not installed; .ci/package checks the built metadata")
    spec = importlib.util.spec_from_file_location("hatch_build", REPOSITORY / "hatch_build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    convert = build.without_relative_links
    assert convert("see [tags](docs/tag.md#x), [`a.md`](a.md)") == "see tags (`docs/tag.md#x`), `a.md`"
    assert convert("[paper](https://arxiv.org/abs/1)") == "[paper](https://arxiv.org/abs/1)"
    text = convert((REPOSITORY / "README.md").read_text("utf-8"))
    assert re.findall(r"\]\((?!https://)", text) == []
    assert "docs/tutorial.md" in text


def test_the_files_that_the_build_names_are_there() -> None:
    targets = PROJECT["tool"]["hatch"]["build"]["targets"]
    assert [name for name in targets["sdist"]["include"] if not (REPOSITORY / name).exists()] == []
    for docker in ("Dockerfile", "Dockerfile.cuda"):
        text = (REPOSITORY / docker).read_text("utf-8")
        copied = [name for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE) for name in line.split()]
        ignored = (REPOSITORY / ".dockerignore").read_text("utf-8").splitlines()
        assert copied
        assert [name for name in copied if not (REPOSITORY / name).exists() or f"!{name}" not in ignored] == []


def test_workflows_and_issue_forms_are_well_formed() -> None:
    for path in (REPOSITORY / ".github" / "workflows").glob("*.yml"):
        for name, job in yaml.safe_load(path.read_text("utf-8"))["jobs"].items():
            assert job["timeout-minutes"] <= 120, name
            assert all(("uses" in step) != ("run" in step) for step in job["steps"]), name
    for path in (REPOSITORY / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        form = yaml.safe_load(path.read_text("utf-8"))
        assert path.name == "config.yml" or {"name", "description", "body"} <= set(form)
