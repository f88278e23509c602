"""The structure of src: no import circles, imports from packages above only, and short files."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "src" / "memvec"
FILES = {
    "memvec." + ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in ROOT.rglob("*.py")
}
MODULES = {name.removesuffix(".__init__"): path for name, path in FILES.items()}
BESIDE = (
    "lab",
    "companions",
    "usable",
    "arms",
    "big",
    "spaces",
    "encoders",
    "export",
    "engines",
    "hub",
    "workers",
    "progress_board",
    "graphs",
    "recipe_effect",
    "statistics",
    "machine",
    "versions",
    "plugins",
    "part_checks",
    "journal",
    "resume",
    "cli",
)
BELOW_THE_MODEL = ("errors", "registry", "versions", "machine", "plugins", "part_checks")
# What the core may import from BESIDE: the inputs around vectors, the encoder or trigger of a
# model's folder, graphs, workers, the Hub, the operating system, releases of libraries, plug-ins,
# the journal and what a run resumes from.
ON_REQUEST = {
    "memvec.big",
    "memvec.graphs",
    "memvec.companions.encoder_files",
    "memvec.companions.around",
    "memvec.companions.triggers",
    "memvec.workers",
    "memvec.hub",
    "memvec.machine",
    "memvec.versions",
    "memvec.plugins",
    "memvec.part_checks",
    "memvec.journal",
    "memvec.resume",
}


@functools.cache
def imports(name: str) -> set[str]:
    """Modules of memvec that a module imports, also inside functions, but not for types only."""
    tree = ast.parse(MODULES[name].read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    seen: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(MODULES)
            seen |= inner or {node.module}
        elif isinstance(node, ast.Import):
            seen |= {alias.name for alias in node.names}
    return (seen & set(MODULES)) - {name, "memvec"}


def reachable(name: str) -> set[str]:
    found: set[str] = set()
    todo = [name]
    while todo:
        for other in imports(todo.pop()) - found:
            found.add(other)
            todo.append(other)
    return found


def test_there_are_no_import_circles():
    assert [name for name in MODULES if name in reachable(name)] == []


def test_packages_have_no_import_circles():
    """A package is a folder or a file in src/memvec."""
    packages: dict[str, set[str]] = {}
    for name, others in ((name, imports(name)) for name in MODULES):
        if name not in ("memvec", "memvec.__main__"):
            own = name.split(".")[1]
            packages.setdefault(own, set()).update({o.split(".")[1] for o in others} - {own})
    while above := [p for p, others in packages.items() if not others & set(packages)]:
        for package in above:
            del packages[package]
    assert packages == {}


@pytest.mark.parametrize("name", [n for n in MODULES if n.startswith("memvec.model")])
def test_the_model_imports_only_itself_and_modules_above_it(name):
    allowed = ("memvec.model", *(f"memvec.{part}" for part in BELOW_THE_MODEL))
    assert [other for other in imports(name) if not other.startswith(allowed)] == []


@pytest.mark.parametrize("name", MODULES)
def test_nothing_imports_the_command_line(name):
    if not name.startswith(("memvec.cli", "memvec.__main__")):
        assert [other for other in imports(name) if other.startswith("memvec.cli")] == []


@pytest.mark.parametrize("name", MODULES)
def test_the_core_imports_only_listed_modules_from_beside_it(name):
    """ON_REQUEST lists these modules, and BESIDE what is beside the core."""
    if name.split(".")[1:2] not in [[part] for part in BESIDE] and name != "memvec.__main__":
        beside = {other for other in imports(name) if other.split(".")[1] in BESIDE}
        assert beside - ON_REQUEST == set()


@pytest.mark.parametrize("name", MODULES)
def test_only_the_command_line_imports_the_lab(name):
    if not name.startswith(("memvec.lab", "memvec.cli")):
        assert [other for other in imports(name) if other.startswith("memvec.lab")] == []


def test_modules_are_imported_inside_functions_for_an_optional_extra_only():
    """The command line is left out: it imports inside its verbs, so that --help is instant."""
    inside = set()
    for name, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                inside |= {
                    (name, statement.module)
                    for statement in ast.walk(node)
                    if isinstance(statement, ast.ImportFrom) and statement.module in MODULES
                }
    assert {pair for pair in inside if not pair[0].startswith("memvec.cli")} == {
        ("memvec.loading", "memvec.big"),  # torchao and accelerate
        ("memvec.usable.evaluate", "memvec.usable.harness"),  # lm-evaluation-harness
    }


def lines_of_code(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0])
        for node in ast.walk(tree)
        if isinstance(node, documented) and ast.get_docstring(node) is not None
    }
    held: set[int] = set()
    for node in ast.walk(tree):
        if (
            isinstance(node, ast.stmt | ast.expr | ast.arg | ast.keyword)
            and id(node) not in docstrings
        ):
            whole = isinstance(node, ast.stmt) and not hasattr(node, "body")
            held |= set(range(node.lineno, node.end_lineno + 1)) if whole else {node.lineno}
    return len(held)


def test_the_core_is_small():
    """The core is everything but BESIDE; its lines of code are counted."""
    core = [
        path for name, path in MODULES.items() if name.split(".")[1:2] not in [[p] for p in BESIDE]
    ]
    assert sum(lines_of_code(path) for path in core) < 5000


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_are_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 350
    functions = [
        node
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = {f.name: f.end_lineno - f.lineno for f in functions if f.end_lineno - f.lineno > 60}
    assert long == {}


def test_the_package_has_the_marker_of_type_hints():
    """Without it, type checkers of other projects take the package for untyped (PEP 561)."""
    assert (ROOT / "py.typed").is_file()
