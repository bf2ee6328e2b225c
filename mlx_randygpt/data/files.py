"""Text files: expand files, folders and patterns, and find the default text.

This module lists the supported suffixes. The function that downloads a file is an argument.
"""

from __future__ import annotations

import difflib
import glob
import os
import re
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mlx_randygpt.data import DataError, cache
from mlx_randygpt.data.own_files import is_own
from mlx_randygpt.files import open_to_read

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
Note = Callable[[str], None]  # shows a line about files that are left out
ROWS = (".jsonl", ".ndjson", ".parquet")  # many documents in a file
PACKED = (".gz", ".zst")
SUFFIXES = (*PROSE, *SOURCE, *ROWS)
TOKENS = ".bin"
TOKEN_NAMES = re.compile(r"(.+[_.-])?(train|val|valid|validation)([_-]\d+)?")  # nanoGPT, llm.c
TRAIN = re.compile(r"(^|[_.-])train([_.-]|$)")
VALIDATION = re.compile(r"(^|[_.-])(val|valid|validation)([_.-]|$)")


def kind(file: Path) -> str:
    """Return the suffix without compression, in lower case: `.jsonl` for `a.jsonl.zst`."""
    name = file.name.lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return os.path.splitext(name)[1]


def is_packed(file: Path) -> bool:
    """Return whether the text of a file can be much longer than the file."""
    return file.name.lower().endswith((*PACKED, ".parquet"))


def is_tokens(file: Path) -> bool:
    """Return whether a file holds token ids, in the format of nanoGPT or llm.c."""
    return file.name.lower().endswith(TOKENS)


def is_validation(file: Path) -> bool:
    """Return whether a token file is the validation split: val.bin, fineweb_val_000000.bin."""
    return bool(VALIDATION.search(file.stem.lower()))


def find_files(paths: Sequence[str], note: Note = lambda line: None) -> list[Path]:
    """Return the files of paths, folders and globs, each file once, in the order of the paths.

    A folder stands for the texts in it at any depth, sorted and without hidden files, or for its
    token files if it holds a train.bin. What this program wrote is left out of folders and globs.
    """
    files: dict[Path, Path] = {}
    for name in paths:
        try:
            for file in _expand(name, note):
                files.setdefault(file.resolve(), file)
        except OSError as error:
            raise DataError(f"{error.filename or name} cannot be read: {error.strerror}") from error
    return list(files.values())


def is_pipe(name: str) -> bool:
    """Return whether a path is stdin or a pipe, which one process can read, and only once."""
    path = Path(os.path.expanduser(name))
    return name == "-" or name.startswith("/dev/fd/") or path.is_fifo()


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


def _expand(name: str, note: Note) -> Iterator[Path]:
    path = Path(os.path.expanduser(name))  # pathlib raises for an unknown ~user
    if name == "-":
        yield _kept_text(Path("/dev/stdin"))
    elif path.is_dir() and name:
        yield from _texts_under(path, note)
    elif path.exists() and name:
        yield path if path.is_file() else _kept_text(path)
    elif set(name) & set("*?["):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not any(file.is_file() for file in files):
            raise DataError(f"no file matches {name!r} (looked in {Path.cwd()})")
        yield from _without_own([file for file in files if file.is_file()], name, note)
    else:
        raise DataError(_no_such_file(name, path))


def _kept_text(pipe: Path) -> Path:
    """Copy the text of stdin or a pipe; raise DataError for a device."""
    with open_to_read(pipe) as stream:
        mode = os.fstat(stream.fileno()).st_mode
        if stat.S_ISBLK(mode) or (stat.S_ISCHR(mode) and not stream.isatty()):
            raise DataError(f"{pipe} is a device; give a file, a folder or a pipe")
        return cache.keep_text(stream)


def _texts_under(folder: Path, note: Note) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(parent, name) for name in names)
    visible = sorted(file for file in files if _is_visible_file(file))
    texts = [file for file in visible if kind(file) in SUFFIXES]
    tokens = [file for file in visible if is_tokens(file) and _is_split(file)]
    if any(TRAIN.search(file.stem.lower()) for file in tokens):
        if texts:
            note(
                f"Left out: {_count(len(texts), 'text')} of {folder}, which holds token files "
                f"({tokens[0].name}); name texts to train on them."
            )
        return tokens
    if texts := _without_own(texts, str(folder), note):
        return texts
    raise DataError(
        f"{folder} holds no text: no .txt, .md, .jsonl or .parquet file in it or below, and no "
        "source code or train.bin"
    )


def _is_split(file: Path) -> bool:
    return bool(TOKEN_NAMES.fullmatch(file.stem.lower()))


def _without_own(files: list[Path], place: str, note: Note) -> list[Path]:
    """Return the files without those that this program wrote, and report how many these are."""
    own = {file for file in files if is_own(file)}
    if own:
        first = next(file for file in files if file in own)
        note(
            f"Left out: {_count(len(own), 'file')} of {place} that mlxgpt wrote ({first.name}); "
            "name files to read them."
        )
    return [file for file in files if file not in own]


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}{'s' if n > 1 else ''}"


def _is_visible_file(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _no_such_file(name: str, path: Path) -> str:
    searched = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    hint = f"; is it {path.with_name(near[0])}?" if near else ""
    return f"no such file: {name!r}{searched}{hint}"
