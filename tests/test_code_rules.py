"""The rules of the house that a machine can hold us to (docs/design.md)."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.metadata
import inspect
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import asit

REPOSITORY = Path(__file__).parents[1]
SOURCE = REPOSITORY / "src" / "asit"
MODULES = sorted(SOURCE.rglob("*.py"))

# Constructors of generators of one's own; all else in these modules draws from, or seeds, a global one.
OWN_GENERATORS = {
    "random": {"Random", "SystemRandom"},
    "numpy.random": {
        *("default_rng", "Generator", "BitGenerator", "SeedSequence", "PCG64", "PCG64DXSM", "Philox", "RandomState"),
    },
}
TORCH_DRAWS = {
    *("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson"),
    *("rand_like", "randn_like", "randint_like"),
}
TENSOR_DRAWS = {
    *("normal_", "uniform_", "bernoulli_", "random_", "exponential_", "log_normal_", "geometric_", "cauchy_"),
    *("trunc_normal_", "xavier_uniform_", "xavier_normal_", "kaiming_uniform_", "kaiming_normal_"),
}
TORCH_SEEDS = {"manual_seed", "seed", "set_rng_state"}


def dotted(node: ast.expr) -> str:
    """`a.b.c` of an expression; "" where it is something else."""
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return node.id if isinstance(node, ast.Name) else ""


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def global_draws(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and name of every draw from, or seeding of, a global generator."""
    names = {"np": "numpy"}  # local name -> full name
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname or alias.name.split(".")[0]: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        head, _, rest = dotted(node.func).partition(".")
        full = names.get(head, head) + ("." + rest if rest else "")
        module, _, name = full.rpartition(".")
        own = any(keyword.arg == "generator" for keyword in node.keywords)
        method = node.func.attr if isinstance(node.func, ast.Attribute) else name
        if (
            (module in OWN_GENERATORS and name not in OWN_GENERATORS[module])
            or (module == "torch" and name in TORCH_DRAWS and not own)
            or (module in ("torch", "torch.random", "torch.cuda") and name in TORCH_SEEDS)
            or (method in TENSOR_DRAWS and not own)
        ):
            yield node.lineno, full or method


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("import numpy as np; np.random.rand(3)", True),
        ("import numpy as np; np.random.seed(0)", True),
        ("import numpy as np; rng = np.random.default_rng(0); rng.random(3)", False),
        ("import numpy as np; np.random.RandomState(0).shuffle([1])", False),
        ("from numpy.random import shuffle; shuffle([1])", True),
        ("import random; random.choice([1])", True),
        ("import random; random.Random(0).choice([1])", False),
        ("import torch; torch.randn(3)", True),
        ("import torch; torch.randn(3, generator=g)", False),
        ("import torch; torch.manual_seed(3)", True),
        ("import torch; torch.Generator().manual_seed(3)", False),
        ("x.normal_()", True),
        ("from torch import nn; nn.init.trunc_normal_(w, std=0.02)", True),
        ("from torch import nn; nn.init.trunc_normal_(w, std=0.02, generator=g)", False),
    ],
)
def test_the_search_for_global_draws_finds_them(line: str, found: bool) -> None:
    assert bool(list(global_draws(ast.parse(line)))) == found


def test_no_global_draws() -> None:
    hits = [
        f"{path.relative_to(REPOSITORY)}:{line} {name}" for path in MODULES for line, name in global_draws(parsed(path))
    ]
    assert not hits


def test_library_does_not_print() -> None:
    """The command line may; nothing else."""
    may = ("cli.py", "commands/")
    hits = [
        f"{name}:{node.lineno}"
        for path in MODULES
        if not (name := path.relative_to(SOURCE).as_posix()).startswith(may)
        for node in ast.walk(parsed(path))
        if isinstance(node, ast.Call)
        and dotted(node.func) in ("print", "sys.stdout.write", "sys.stderr.write", "builtins.print")
    ]
    assert not hits


def test_no_cupboards() -> None:
    assert not [p for p in MODULES if p.stem.strip("_") in ("utils", "util", "common", "helpers", "misc")]


def test_command_is_installed() -> None:
    scripts = importlib.metadata.entry_points(group="console_scripts", name="asit")
    assert [script.value for script in scripts] == ["asit.cli:main"]
    assert callable(next(iter(scripts)).load())


def test_version_is_the_distributions() -> None:
    assert asit.__version__ == importlib.metadata.version("asit-audio")
    assert f"## {asit.__version__}" in (REPOSITORY / "CHANGELOG.md").read_text("utf-8")


def test_public_names_are_there_and_explained() -> None:
    functions = {"build_catalogue", "create_encoder", "finetune", "list_models", "load", "pretrain", "report"}
    settings = {"FinetuneSettings", "FrontEndSettings", "PretrainSettings", "TableSettings"}
    others = {"AsitError", "AudioModel", "Catalogue", "Embedder", "Embedding", "TableRow", "__version__"}
    assert set(asit.__all__) == functions | settings | others
    assert set(asit.__all__) <= set(dir(asit))
    for name in asit.__all__:
        public = getattr(asit, name)
        if name != "__version__":
            assert (inspect.getdoc(public) or "").strip(), f"asit.{name} has no docstring"
            assert public.__doc__, f"asit.{name} has no docstring of its own"
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(asit, "nonsense")  # noqa: B009  (mypy would refuse the plain form)


def test_modules_say_what_they_are() -> None:
    modules = [path for path in MODULES if path.name != "__init__.py"]
    assert not [path for path in modules if not ast.get_docstring(parsed(path))]


def test_links_in_the_docs_lead_somewhere() -> None:
    """Those to the reference, which is written with the site, are checked by its strict build (tests/test_site.py)."""
    dead = [
        f"{page.name}: {target}"
        for page in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
        for target in re.findall(r"\]\((?!\w+:)([^)#\s]+)", page.read_text("utf-8"))
        if not ((page.parent / target).exists() or re.match(r"(\.\./)?reference/", target))
    ]
    assert not dead


def test_no_machine_in_the_files() -> None:
    """Neither a path of whoever wrote a file nor the host of a package index."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    if listed.returncode:
        pytest.skip("not a git checkout")
    homes = "|".join(("home", "Users", "root", "work", "workspace", "mnt", "opt"))
    hosts = "|".join(("pypi" + r"\.org", "pythonhosted" + r"\.org", "download" + r"\.pytorch\.org"))
    pattern = re.compile(rf"(?<![\w.\-/])/(?:{homes})/[\w.\-]+|{hosts}|{re.escape(str(REPOSITORY))}(?![\w.\-])")
    assert pattern.search("x = '/" + "home/me/file'")
    assert not pattern.search("https://example.org/work/of/art and src/work/out")
    hits = []
    for name in filter(None, listed.stdout.split("\0")):
        path = REPOSITORY / name
        if path.is_symlink() or not path.is_file():
            continue
        try:
            text = path.read_text("utf-8")
        except UnicodeDecodeError:
            continue
        hits += [f"{name}: {match.group()}" for match in pattern.finditer(text)]
    assert not hits


def test_import_contracts() -> None:
    tool = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([tool, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout[-3000:]


def test_constraints_pin_all_that_is_installed() -> None:
    pins: dict[str, str] = {}
    for line in (REPOSITORY / "constraints.txt").read_text("utf-8").splitlines():
        if line and not line.startswith("#"):
            requirement = Requirement(line)
            assert re.fullmatch(r"==[\w.]+", str(requirement.specifier)), line
            assert not requirement.url
            pins[canonicalize_name(requirement.name)] = str(requirement.specifier)
    assert pins["torch"] == "==2.13.0"
    for name, pin in pins.items():
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            if not SpecifierSet(pin).contains(importlib.metadata.version(name), prereleases=True):
                pytest.skip(f"{name} is not the pinned one: what this environment needs is not what is pinned")
    seen: set[tuple[str, str]] = set()
    waiting = [("asit-audio", "dev"), ("asit-audio", "all"), ("asit-audio", "demo")]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for text in importlib.metadata.requires(name) or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                wanted = canonicalize_name(requirement.name)
                # A CUDA build of torch brings its own libraries and pins them itself.
                if not wanted.startswith(("nvidia-", "cuda-", "triton")):
                    waiting += [(wanted, e) for e in {"", *requirement.extras}]
    assert {name for name, _ in seen} - {"asit-audio"} <= set(pins)
