"""Text files: expand files, folders and patterns, and find the default text.

This module lists the supported suffixes. The function that downloads a file is an argument.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_randygpt.data import DataError, cache

PROSE = (".txt", ".md", ".markdown", ".rst", ".org", ".tex", ".html")
SOURCE = (
    ".c",
    ".cc",
    ".cpp",
    ".css",
    ".cu",
    ".go",
    ".h",
    ".hpp",
    ".hs",
    ".java",
    ".jl",
    ".js",
    ".kt",
    ".lua",
    ".m",
    ".metal",
    ".ml",
    ".php",
    ".pl",
    ".py",
    ".r",
    ".rb",
    ".rs",
    ".scala",
    ".sh",
    ".sql",
    ".swift",
    ".ts",
    ".zig",
)
ROWS = (".jsonl", ".ndjson", ".parquet")  # many documents in a file
PACKED = (".gz", ".zst")
SUFFIXES = (*PROSE, *SOURCE, *ROWS)
TOKENS = ".bin"
VALIDATION = re.compile(r"(^|[_.-])(val|valid|validation)([_.-]|$)")


def kind(file: Path) -> str:
    """Return the suffix without compression, in lower case: `.jsonl` for `a.jsonl.zst`."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def is_tokens(file: Path) -> bool:
    """Return whether a file holds token ids, in the format of nanoGPT or llm.c."""
    return file.name.lower().endswith(TOKENS)


def is_validation(file: Path) -> bool:
    """Return whether a token file is the validation split: val.bin, fineweb_val_000000.bin."""
    return bool(VALIDATION.search(file.stem.lower()))


def find_files(paths: Sequence[str]) -> list[Path]:
    """Return the files of paths, folders and globs, each file once, in the order of the paths.

    A folder stands for the texts in it at any depth, sorted and without hidden files, or for its
    token files if it holds a train.bin.
    """
    files: dict[Path, Path] = {}
    for name in paths:
        try:
            for file in _expand(name):
                files.setdefault(file.resolve(), file)
        except OSError as error:
            raise DataError(f"{error.filename or name} cannot be read: {error.strerror}") from error
    return list(files.values())


def default_source(cwd: Path, download: Callable[[Path], None]) -> tuple[list[Path], str]:
    """Return the files to train on if the user names none, and a line that reports them.

    They are ./train.txt, else data/*.txt, else data/shakespeare.txt, which `download` makes. If it
    raises DataError or the folder cannot be created, it is the sample corpus of the package.
    """
    if (own := cwd / "train.txt").is_file():
        return [own], f"Text: {own}"
    if files := sorted(file for file in (cwd / "data").glob("*.txt") if _is_visible_file(file)):
        return files, f"Text: {', '.join(map(str, files))}"
    target = cwd / "data" / "shakespeare.txt"
    try:
        target.parent.mkdir(exist_ok=True)
        download(target)
    except OSError as error:
        return _sample(f"{target.parent} cannot be created: {error.strerror}")
    except DataError as error:
        return _sample(str(error))
    return [target], f"Text: tiny Shakespeare, downloaded to {target}"


def sample_corpus_path() -> Path:
    """Return the path of the sample corpus in the package."""
    return Path(__file__).with_name("sample.txt")


def _sample(reason: str) -> tuple[list[Path], str]:
    return [sample_corpus_path()], f"Text: the sample corpus inside the package ({reason})"


def _expand(name: str) -> Iterator[Path]:
    path = Path(os.path.expanduser(name))  # pathlib raises for an unknown ~user
    if name == "-":
        yield _kept_text(Path("/dev/stdin"))
    elif path.is_dir() and name:
        yield from _texts_under(path)
    elif path.exists() and name:
        yield path if path.is_file() else _kept_text(path)
    elif set(name) & set("*?["):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not any(file.is_file() for file in files):
            raise DataError(f"no file matches {name!r} (looked in {Path.cwd()})")
        yield from (file for file in files if file.is_file())
    else:
        raise DataError(_no_such_file(name, path))


def _kept_text(pipe: Path) -> Path:
    with open(pipe, "rb") as stream:
        return cache.keep_text(stream)


def _texts_under(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(parent, name) for name in names)
    visible = sorted(file for file in files if _is_visible_file(file))
    tokens = [file for file in visible if is_tokens(file)]
    if any("train" in file.stem.lower() for file in tokens):
        return tokens
    if texts := [file for file in visible if kind(file) in SUFFIXES]:
        return texts
    raise DataError(
        f"{folder} holds no text: no .txt, .md, .jsonl or .parquet file in it or below, and no "
        "source code or train.bin"
    )


def _is_visible_file(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _no_such_file(name: str, path: Path) -> str:
    searched = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    hint = f"; is it {path.with_name(near[0])}?" if near else ""
    return f"no such file: {name!r}{searched}{hint}"
