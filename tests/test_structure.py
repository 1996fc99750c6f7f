"""The package's own rules: imports go down, start-up is light, the examples in docstrings are true."""

import ast
import doctest
import importlib
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "normfree"
# From top to bottom; a module imports from its own row or from rows below. `recipes` may import `config` alone.
ROWS = [
    {"__main__"},
    {"cli"},
    {"tasks", "deploy", "analysis", "recipes"},
    {"engine"},
    {"models", "data", "optim"},
    {"weights", "layers", "functional"},
    {"config", "native"},
]
ALONE = {"optim": "models", "weights": "models", "data": "models", "models": "optim"}  # side by side, yet strangers


def imported(path: Path) -> set[str]:
    """First parts of the normfree modules that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        found |= {name.split(".")[1] for name in names if name.startswith("normfree.")}
    return found


def part(path: Path) -> str:
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_down(path):
    row = {name: i for i, names in enumerate(ROWS) for name in names}
    here = part(path)
    assert here in row, f"{here} is in no row"
    for name in imported(path):
        assert row[name] >= row[here], f"{path.name} imports {name}, which is above it"
        assert ALONE.get(here) != name, f"{here} must not know {name}"
    if here == "recipes":
        assert imported(path) <= {"config", "recipes"}


ROOT = PACKAGE.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def distributions(requirements: list[str]) -> set[str]:
    """The names in requirements such as `pyright[nodejs]>=1.1`."""
    return {re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-") for requirement in requirements}


@pytest.mark.parametrize(
    ("folder", "extras"),
    [
        ("normfree", set(PROJECT["optional-dependencies"]) - {"dev"}),
        ("tests", {"dev"}),
        ("benchmarks", {"dev"}),
        ("experiments", {"dev"}),
    ],
)
def test_what_is_imported_is_declared(folder, extras):
    """Not what happens to be there since another library needs it; for the package, in an extra that users may name."""
    declared = PROJECT["dependencies"] + [r for extra in extras for r in PROJECT["optional-dependencies"][extra]]
    known, paths = importlib.metadata.packages_distributions(), list((ROOT / folder).rglob("*.py"))
    ours = {"normfree", *(path.stem for path in paths)}
    missing = {}
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module]
            for name in {name.partition(".")[0] for name in names} - ours - sys.stdlib_module_names:
                if not distributions(known.get(name, [name])) & distributions(declared):
                    missing.setdefault(name, path.name)
    assert paths
    assert not missing


def test_importing_the_package_does_not_import_torch():
    code = "import sys, normfree, normfree.config, normfree.recipes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_public_names_are_there():
    import normfree

    assert all(callable(getattr(normfree, name)) for name in normfree.__all__)
    with pytest.raises(AttributeError, match="no attribute 'create_modle'"):
        normfree.create_modle  # noqa: B018


@pytest.mark.parametrize(
    "module",
    [
        "normfree.models",
        "normfree.analysis.signal",
        "normfree.optim.agc",
        "normfree.optim.ema",
        "normfree.optim.schedule",
        "normfree.weights.deepmind",
        "normfree.weights.hub",
        "normfree.weights.states",
        "normfree.weights.timm",
    ],
)
def test_docstring_examples(module):
    results = doctest.testmod(importlib.import_module(module), extraglobs={"torch": importlib.import_module("torch")})
    assert results.failed == 0
    assert results.attempted > 0
