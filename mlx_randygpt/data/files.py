"""Text files: expand files, folders and patterns, and find the default text.

This module lists the supported suffixes. The function that downloads a file is an argument.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from mlx_randygpt.data import DataError, cache
from mlx_randygpt.data.own_files import is_own
from mlx_randygpt.files import exists, is_file, is_folder, open_to_read, resolve, walk

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
WEIGHT = re.compile(r"[0-9]*\.?[0-9]+")  # behind a path and a colon
WILDCARDS = frozenset("*?[")
TOKENS = ".bin"
TOKEN_NAMES = re.compile(r"(.+[_.-])?(train|val|valid|validation)([_-]\d+)?")  # nanoGPT, llm.c
TRAIN = re.compile(r"(^|[_.-])train([_.-]|$)")
VALIDATION = re.compile(r"(^|[_.-])(val|valid|validation)([_.-]|$)")


class TextSource(NamedTuple):
    """A file to read, and the share of the training windows that the path which named it has."""

    file: Path
    path: str = ""  # that was given a weight; "": without one
    weight: float = 0.0


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
    token files if it holds a train.bin. Links are followed. What this program wrote is left out of
    folders and globs. Raises DataError for a path, folder or link that leads nowhere or is closed.
    """
    return [source.file for source in find_sources(paths, note)]


def find_sources(paths: Sequence[str], note: Note = lambda line: None) -> list[TextSource]:
    """Return the files as `find_files` does, with the weights of paths such as `talks.jsonl:0.3`.

    Raises DataError for a weight that is no share, or whose files earlier paths have named.
    """
    sources: dict[Path, TextSource] = {}
    for given in paths:
        with _data_errors(given):
            name, weight = split_weight(given)
            n_before = len(sources)
            for file in _expand(name, note):
                source = TextSource(file, name, weight) if weight else TextSource(file)
                sources.setdefault(resolve(file), source)
            if weight and len(sources) == n_before:
                raise DataError(f"--data {given}: an earlier --data names its files already")
    _check_weights([*sources.values()])
    return [*sources.values()]


def split_weight(given: str) -> tuple[str, float]:
    """Return path and weight of `talks.jsonl:0.3`; 0 without a weight."""
    name, _, number = given.rpartition(":")
    if not name or not WEIGHT.fullmatch(number) or exists(Path(os.path.expanduser(given))):
        return given, 0.0
    if not 0 < float(number) < 1:
        raise DataError(f"--data {given}: a weight is above 0 and below 1, such as {name}:0.3")
    return name, float(number)


def _check_weights(sources: Sequence[TextSource]) -> None:
    total = sum({source.path: source.weight for source in sources}.values())
    if total >= 1 and any(not source.path for source in sources):
        raise DataError(
            f"the weights of --data add up to {total:g}, which leaves nothing for the texts without"
            " a weight; give weights that add up to less than 1"
        )


@contextlib.contextmanager
def _data_errors(name: object) -> Iterator[None]:
    """Raise DataError for an OSError in the block."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or name} cannot be read: {error.strerror}") from error


def is_pipe(name: str) -> bool:
    """Return whether a path is stdin or a pipe, which one process can read, and only once."""
    name = split_weight(name)[0]
    path = Path(os.path.expanduser(name))
    return name == "-" or name.startswith("/dev/fd/") or path.is_fifo()


def default_source(
    cwd: Path, download: Callable[[Path], None], note: Note = lambda line: None
) -> tuple[list[Path], str]:
    """Return the files to train on if the user names none, and a line that reports them.

    They are ./train.txt, else data/*.txt, else data/shakespeare.txt, which `download` makes. If it
    raises DataError or the folder cannot be created, it is the sample corpus of the package.
    """
    with _data_errors(cwd):
        if is_file(own := cwd / "train.txt"):
            return [own], f"Text: {own}"
        if files := _regular(_matches_in(cwd / "data", "*.txt"), str(cwd / "data"), note):
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
    elif name and is_folder(path):
        yield from _texts_under(path, note)
    elif name and exists(path):
        yield path if is_file(path) else _kept_text(path)
    elif set(name) & WILDCARDS:
        files = _regular(_matches(path), name, note)
        if not files:
            raise DataError(f"no file matches {name!r} (looked in {Path.cwd()})")
        yield from _without_own(files, name, note)
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
    known = (file for file in _visible_below(folder) if kind(file) in SUFFIXES or _is_split(file))
    files = _regular(known, str(folder), note)
    texts = [file for file in files if kind(file) in SUFFIXES]
    tokens = [file for file in files if _is_split(file)]
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
    return is_tokens(file) and bool(TOKEN_NAMES.fullmatch(file.stem.lower()))


def _visible_below(folder: Path) -> Iterator[Path]:
    """Yield what lies below a folder, without folders and hidden names; raise OSError."""

    def stop(error: OSError) -> None:
        raise error

    below = walk(folder, lambda entry: not entry.name.startswith("."), stop)
    return (path for path in below if not path.name.startswith("."))


def _matches(pattern: Path) -> list[Path]:
    """Return the paths that match a pattern; unlike glob.glob, raise OSError for closed folders."""
    paths = [Path(pattern.anchor)]
    for part in pattern.parts[bool(pattern.anchor) :]:
        paths = [match for path in paths for match in _matches_in(path, part)]
    return paths


def _matches_in(folder: Path, part: str) -> list[Path]:
    """Return the paths in a folder that match one part of a pattern."""
    if not is_folder(folder):
        return []
    if part == "**":
        below = list(_visible_below(folder))
        return list(dict.fromkeys([folder, *(path.parent for path in below), *below]))
    if not set(part) & WILDCARDS:
        path = folder / part
        return [path] if os.path.islink(path) or exists(path) else []
    names = (name for name in os.listdir(folder) if fnmatch(name, part))
    return [folder / name for name in names if not name.startswith(".") or part.startswith(".")]


def _regular(paths: Iterable[Path], place: str, note: Note) -> list[Path]:
    """Return the files among `paths`, sorted; report pipes and devices, raise for dead links."""
    files, others = list[Path](), list[Path]()
    for path in sorted(paths):
        if is_file(path):
            files.append(path)
        elif not exists(path):
            target = f" is a link to {os.readlink(path)}, which" if path.is_symlink() else ""
            raise DataError(f"{path}{target} does not exist; remove it or put the text there")
        elif not is_folder(path):
            others.append(path)
    if others:
        note(
            f"Left out: {_count(len(others), 'pipe or device', 'pipes or devices')} of {place} "
            f"({others[0].name}); name a pipe to read it."
        )
    return files


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


def _count(n: int, noun: str, plural: str = "") -> str:
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def _no_such_file(name: str, path: Path) -> str:
    searched = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
    siblings: list[str] = []
    with contextlib.suppress(OSError):  # a hint only
        siblings = os.listdir(path.parent)
    near = difflib.get_close_matches(path.name, siblings, 1)
    hint = f"; is it {path.with_name(near[0])}?" if near else ""
    return f"no such file: {name!r}{searched}{hint}"
