"""The house of docs/architecture.md: who imports whom, what costs nothing, how long a file is."""

from __future__ import annotations

import ast
import inspect
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import mlx_randygpt

ROOT = Path(mlx_randygpt.__file__).parent
SHIPPED = ROOT / "exchange" / "shipped"  # copied into exports, imported by nobody here
FILES = sorted(file for file in ROOT.rglob("*.py") if file.parent != SHIPPED)
PACKAGE = ROOT.name
FLOORS = [  # from the ground up; a room sees its own floor and those below
    {"", "state", "config", "gpt2", "lora_names", "backends.base"},
    {"backends", "durable", "lora", "heartbeat"},
    {"checkpoint", "records", "data", "schedule", "rules", "extras"}
    | {"tokenizer", "char_table", "subword", "streaming"},
    {"reports"},
    {"writer"},
    {"tally", "curve", "metrics", "train", "filters", "sample", "beams", "evaluation"}
    | {"footprint", "devices"},
    {"dashboard", "chat", "serve", "exchange", "check", "bench", "find_lr", "charts", "insight"}
    | {"plan"},
    {"chart_png", "insight_page"},
    {"cli", "__main__"},
]
CORE = ("config", "state", "schedule", "checkpoint", "writer", "train", "evaluation")
CORE += ("sample", "records", "durable", "data.windows")
GUESTS = {  # the core runs without them: numba, GPT-2, fewer bits, a rate to compare, other ranks,
    # activations made again, adapters, the bits of a wide embedding's gradient
    "backends.numba_decode", "backends.numpy_gpt2", "backends.mlx_gpt2",
    "backends.numpy_speed", "backends.mlx_speed", "backends.mlx_quantized",
    "backends.group", "backends.mlx_group", "backends.numpy_ranks", "backends.mlx_ranks",
    "backends.numpy_recompute", "backends.mlx_recompute",
    "backends.numpy_lora", "backends.mlx_lora", "backends.mlx_wide",
}  # fmt: skip
MAY_IMPORT = {  # third parties, and where they may be named
    "mlx": ("backends.mlx_",),
    "numba": ("backends.numba_",),
    "matplotlib": ("chart_png",),
    "click": ("cli",),
    "rich": ("cli", "dashboard"),
    "starlette": ("serve", "cli.serve"),
    "uvicorn": ("cli.serve",),
    "gguf": ("exchange.export_gguf",),
    "threadpoolctl": ("cli", "backends."),
    "signal": ("cli",),
    "tokenizers": ("subword",),
    "pyarrow": ("data.",),
    "zstandard": ("data.",),
}


def module(file: Path) -> str:
    """Its dotted name inside the package; "" is the package itself."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {module(file): file for file in FILES}


def imports(name: str) -> Iterator[str]:
    """What the module imports, anywhere in it: `a.b` for `import a.b` and `from a import b`."""
    return imports_of(MODULES[name])


def imports_of(file: Path) -> Iterator[str]:
    """The same of any file."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or file.parent == SHIPPED, "the package imports by full names"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def rooms(name: str) -> set[str]:
    """The modules of the package that the module imports."""
    found = set()
    for target in imports(name):
        inside = target.removeprefix(PACKAGE).removeprefix(".")
        if target.split(".")[0] == PACKAGE:
            found.add(inside if inside in MODULES else inside.rpartition(".")[0])
    return found


def floor(name: str) -> int:
    """The floor of a module: its own, or that of the folder it is in."""
    for level, names in enumerate(FLOORS):
        if name in names or (name not in FLOORS[0] and name.split(".")[0] in names):
            return level
    raise AssertionError(f"{name} has no place in the house")


@pytest.mark.parametrize("name", sorted(set(mlx_randygpt.__all__) - {"__version__"}))
def test_a_public_name_is_one_thing_whatever_was_imported(name: str) -> None:
    import mlx_randygpt.train

    assert not inspect.ismodule(getattr(mlx_randygpt, name))


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    upwards = {target for target in rooms(name) if floor(target) > floor(name)}
    assert not upwards


def test_no_two_modules_need_each_other() -> None:
    TopologicalSorter({name: rooms(name) - {name} for name in MODULES}).prepare()


@pytest.mark.parametrize("library", MAY_IMPORT)
def test_a_library_is_imported_only_where_it_belongs(library: str) -> None:
    users = {name for name in MODULES if library in {i.split(".")[0] for i in imports(name)}}
    assert users
    assert not [name for name in users if not name.startswith(MAY_IMPORT[library])]


@pytest.mark.parametrize("name", [name for name in MODULES if floor(name) < len(FLOORS) - 1])
def test_only_the_command_line_owns_the_process(name: str) -> None:
    owned = {"sys.stdout", "sys.stderr", "sys.stdin", "sys.exit", "os._exit"}
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in owned
        if isinstance(node, ast.Name):
            assert node.id not in ("print", "input", "exit", "SystemExit")


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_and_version_import_nothing_heavy(arguments: list[str]) -> None:
    command = [sys.executable, "-X", "importtime", "-m", PACKAGE, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert PACKAGE in imported
    assert not imported & {"numpy", "mlx", "mlx.core", "rich"}
    assert "mlxgpt" in done.stdout


@pytest.mark.parametrize("file", [*FILES, *SHIPPED.glob("*.py")], ids=lambda file: file.stem)
def test_a_file_stops_at_300_lines(file: Path) -> None:
    assert len(file.read_text().splitlines()) <= 300


@pytest.mark.parametrize("file", [ROOT / "backends" / "mlx_model.py", *SHIPPED.glob("*.py")])
def test_what_exports_ship_runs_without_us(file: Path) -> None:
    assert PACKAGE not in {target.split(".")[0] for target in imports_of(file)}


def code_lines(file: Path) -> int:
    """Lines that hold code: no blank ones, comments or docstrings."""
    source = file.read_text()
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in empty and token.type != tokenize.ENDMARKER:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            lines -= set(range(node.lineno, node.value.end_lineno + 1))
    return len(lines)


def test_the_core_is_read_in_an_evening() -> None:
    """Model, training, checkpoints, sampling and the windows they read; not fetching text."""
    core = {n for n in MODULES if n in CORE or n.split(".")[0] == "backends"} - GUESTS
    assert core > set(CORE)
    assert sum(code_lines(MODULES[name]) for name in core) < 2500
