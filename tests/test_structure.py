"""The structure of docs/architecture.md: imports point one way, libraries stay in their folders."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_randygpt

ROOT = Path(mlx_randygpt.__file__).parent
PACKAGE = ROOT.name
SHIPPED = ROOT / "exchange" / "shipped"  # copied into exports; never imported here
LAYERS = (  # lowest first; a module imports from its own layer and from those before it
    "words", "palette", "recipes", "config", "state", "model", "progress", "files", "settings",
    "backends", "tokenizers", "dialogue", "checkpoint", "data", "sampling", "training", "planning",
    "analysis",
    "check", "screen", "exchange", "serve", "api", "cli", "__main__", "",
)  # fmt: skip
MAY_IMPORT = {  # third parties, and the modules that name them
    "mlx": ("backends.mlx.", "backends.ranks.ring"),
    "llvmlite": ("backends.numpy.tiles",),
    "numba": ("backends.numpy.tiles",),
    "matplotlib": ("analysis.charts",),
    "click": ("cli",),
    "rich": ("cli", "screen"),
    "starlette": ("serve", "cli.commands.serve"),
    "uvicorn": ("serve.server", "cli.commands.serve"),
    "h11": ("serve.server",),
    "pydantic": ("serve.models", "serve.openapi", "cli.commands.serve"),
    "prometheus_client": ("serve.metrics", "cli.commands.serve"),
    "gguf": ("exchange.exporters.gguf", "exchange.importers.gguf"),
    "threadpoolctl": ("cli", "backends.", "planning.machine"),
    "signal": ("cli", "__main__"),
    "tokenizers": ("tokenizers.subword",),
    "charset_normalizer": ("data.recognition",),
    "pyarrow": ("data.",),
    "zstandard": ("data.",),
}


def module_name(file: Path) -> str:
    """Return the dotted name inside the package; "" is the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module_name(file): file for file in ROOT.rglob("*.py") if file.parent != SHIPPED}


def imports_of(file: Path) -> Iterator[str]:
    """Yield every import anywhere in a file: `a.b` for `import a.b` and `from a import b`."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.parent == SHIPPED, "the package imports by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def modules_imported_by(name: str) -> set[str]:
    """Return the modules of the package that a module imports."""
    inside = {
        target.removeprefix(PACKAGE).removeprefix(".")
        for target in imports_of(MODULES[name])
        if target.split(".")[0] == PACKAGE
    }
    return {target if target in MODULES else target.rpartition(".")[0] for target in inside}


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    layer = LAYERS.index(name.split(".")[0])
    imported = modules_imported_by(name) - {""}  # the version
    assert not {m for m in imported if LAYERS.index(m.split(".")[0]) > layer}


def test_no_two_modules_need_each_other() -> None:
    TopologicalSorter({name: modules_imported_by(name) - {name} for name in MODULES}).prepare()


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {n for n in MODULES if library in {i.split(".")[0] for i in imports_of(MODULES[n])}}
    assert users
    assert not [name for name in users if not name.startswith(MAY_IMPORT[library])]


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] not in ("cli", "__main__")])
def test_only_the_command_line_owns_the_process(name: str) -> None:
    owned = {"sys.stdout", "sys.stderr", "sys.stdin", "sys.exit", "os._exit"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in owned
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "input", "exit", "SystemExit")


@pytest.mark.parametrize("name", [name for name in MODULES if name != "files"])
def test_files_alone_asks_what_lies_at_a_path(name: str) -> None:
    """What pathlib and glob answer for a path out of reach may be "missing", or nothing at all."""
    vague = {"exists", "lexists", "is_file", "is_dir", "isfile", "isdir", "glob", "rglob", "walk"}
    vague |= {"resolve"}  # raises RuntimeError for a link to itself
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            assert node.func.attr not in vague or ast.unparse(node.func.value) == "files"


@pytest.mark.parametrize("name", [n for n in MODULES if n.split(".")[0] == "cli"])
def test_only_one_module_prints(name: str) -> None:
    if name == "cli.output":  # which keeps control characters away from terminals
        return
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called != "print"
            assert not called.endswith((".print", ".echo", "secho", "echo_via_pager")), called
            assert not called.startswith(("sys.stdout.write", "sys.stderr.write")), called


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", PACKAGE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert PACKAGE in imported
    assert not imported & {"numpy", "mlx", "mlx.core", "rich"}
    assert "mlxgpt" in done.stdout


@pytest.mark.parametrize("file", [ROOT / "backends" / "mlx" / "model.py", *SHIPPED.glob("*.py")])
def test_exported_code_runs_without_this_package(file: Path) -> None:
    assert PACKAGE not in {target.split(".")[0] for target in imports_of(file)}
