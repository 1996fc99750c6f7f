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
# From top to bottom. A module imports from its own row or from rows below.
ROWS = [
    {"__main__"},
    {"cli"},
    {"deploy", "analysis"},
    {"tasks", "conversion"},
    {"recipes"},
    {"engine"},
    {"models"},
    {"weights", "data", "optim", "layers"},
    {"functional"},
    {"native", "config"},
    {"errors", "files", "_compat"},
]
ROW = {name: i for i, names in enumerate(ROWS) for name in names}
FORBIDDEN = {("optim", "layers"), ("weights", "layers")}  # the same row: optimizers and files know tensors alone
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def dotted(path: Path) -> str:
    """A file's name as a module, without "normfree."."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {dotted(path): path for path in FILES}


def imported(path: Path) -> set[str]:
    """The modules of normfree that a file imports, inside functions too."""
    found = set()
    package = path.relative_to(PACKAGE.parent).parent.parts
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = [*package[: len(package) - node.level + 1]] if node.level else []
            names = [".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            name = name.removeprefix("normfree.") if name.startswith("normfree.") else ""
            name = name if name in MODULES else name.rpartition(".")[0]  # a class or function in it
            found |= {name} if name in MODULES else set()
    return found - {dotted(path)}


@pytest.mark.parametrize("path", FILES, ids=dotted)
def test_imports_go_down(path):
    here = dotted(path).split(".")[0]
    assert here in ROW, f"{here} is in no row"
    others = {name.split(".")[0] for name in imported(path)}
    for name in others:
        assert ROW[name] >= ROW[here], f"{path.name} imports {name}, which is above it"
        assert (here, name) not in FORBIDDEN, f"{here} must not know {name}"
    if here == "recipes":
        assert others <= {"config", "errors", "recipes"}


def test_no_two_files_import_each_other_in_a_circle():
    graph = {name: imported(path) for name, path in MODULES.items()}
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> None:
        assert name not in way, " -> ".join([*way[way.index(name) :], name])
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, [*way, name])
            done.add(name)

    for name in graph:
        visit(name, [])


def test_imports_are_found_in_every_form(tmp_path, monkeypatch):
    package = tmp_path / "normfree"
    (package / "optim").mkdir(parents=True)
    text = "from . import sam\nfrom .sam import SAM\nfrom ..errors import InputError\nimport normfree.files\n"
    (package / "optim" / "sgd.py").write_text(text)
    monkeypatch.setattr("test_structure.PACKAGE", package)
    assert imported(package / "optim" / "sgd.py") == {"optim.sam", "errors", "files"}


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


def test_optim_imports_nothing_beyond_torch_and_numpy():
    """Not even further parts of torch, some of which take seconds."""
    code = (
        "import sys, numpy, torch; before = set(sys.modules); import normfree.optim;"
        "print(*{name.partition('.')[0] for name in set(sys.modules) - before})"
    )
    result = subprocess.run([sys.executable, "-c", code], timeout=60, capture_output=True, text=True, check=True)
    added = set(result.stdout.split())
    assert "normfree" in added
    assert not added - sys.stdlib_module_names - {"normfree"}


DEFINITIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """All functions and methods of the package, nested ones included."""
    trees = (ast.parse(path.read_text(encoding="utf-8")) for path in FILES)
    return [node for tree in trees for node in ast.walk(tree) if isinstance(node, DEFINITIONS[:2])]


def public_definitions() -> dict[str, bool]:
    """Public functions, classes and methods, and whether each has a docstring; nested functions are left out."""
    found: dict[str, bool] = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, DEFINITIONS) and not node.name.startswith("_"):
                found[f"{prefix}.{node.name}"] = ast.get_docstring(node) is not None
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}.{node.name}")

    for name, path in MODULES.items():
        if not any(part.startswith("_") for part in name.split(".")):
            visit(ast.parse(path.read_text(encoding="utf-8")).body, name)
    return found


def test_public_names_have_docstrings():
    found = public_definitions()
    missing = [name for name, documented in found.items() if not documented]
    share = 1 - len(missing) / len(found)
    assert share >= 0.9, f"{share:.1%} of {len(found)} public names have a docstring; without one:\n" + "\n".join(
        missing
    )


def test_functions_are_short():
    """Lines from `def` to the end, docstring included."""
    lengths = sorted((node.end_lineno - node.lineno + 1, node.name) for node in functions())
    median, p90, longest = (lengths[int(share * (len(lengths) - 1))] for share in (0.5, 0.9, 1.0))
    print(f"{len(lengths)} functions: median {median[0]} lines, p90 {p90[0]}, longest {longest[0]} ({longest[1]})")
    assert p90[0] <= 25
    assert longest[0] <= 150


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
