"""From paths to one array of tokens: finding files, reading them strictly, encoding, splitting.

Owns what counts as text (UTF-8, nothing else) and where it is looked for when nobody says. How
a file is fetched comes in as an argument; what is reported, and how, is the caller's.
"""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import count
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.data import DataError
from mlx_randygpt.tokenizer import Tokenizer

SUFFIXES = (".txt", ".md")
TRAIN_SHARE = 0.9


@dataclass(frozen=True)
class Document:
    """One file as it was read."""

    name: str
    characters: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """Documents as tokens: BOS document EOS BOS document EOS …

    `train` and `val` are the same array objects at every call, so a backend may keep them.
    """

    documents: tuple[Document, ...]
    sha256: str  # of the texts in UTF-8, with a NUL between documents
    tokens: NDArray[np.int32]  # (n,)

    @property
    def characters(self) -> int:
        return sum(document.characters for document in self.documents)

    @cached_property
    def train(self) -> NDArray[np.int32]:
        """The first 90 % of the tokens, a view."""
        return self.tokens[: _split(len(self.tokens))]

    @cached_property
    def val(self) -> NDArray[np.int32]:
        """The last 10 % of the tokens, a view."""
        return self.tokens[_split(len(self.tokens)) :]


def encode_corpus(texts: Mapping[str, str], tokenizer: Tokenizer) -> Corpus:
    """The corpus of texts by name, in their order."""
    digest = sha256()
    parts: list[NDArray[np.int32]] = []
    for text in texts.values():
        digest.update((b"\0" if parts else b"") + text.encode("utf-8", "surrogatepass"))
        ids = tokenizer.encode(text)
        parts.append(np.concatenate([[tokenizer.bos], ids, [tokenizer.eos]], dtype=np.int32))
    documents = tuple(Document(name, len(text)) for name, text in texts.items())
    return Corpus(documents, digest.hexdigest(), np.concatenate(parts))


def check_length(corpus: Corpus, block_size: int) -> None:
    """DataError unless train and validation each hold one block and the token after it."""
    n, fits = len(corpus.tokens), min(len(corpus.train), len(corpus.val)) - 1
    if fits >= block_size:
        return
    least = max(n, int(block_size / (1 - TRAIN_SHARE)) - 1)
    need = next(m for m in count(least) if min(_split(m), m - _split(m)) > block_size)
    smaller = f" or a --block-size of at most {fits}" if fits > 0 else ""
    raise DataError(
        f"the text has {corpus.characters} characters ({n} tokens); a context of {block_size} needs"
        f" at least {need} tokens (train and validation each one block and one token);"
        f" give more text{smaller}"
    )


def read_texts(files: Iterable[Path]) -> dict[str, str]:
    """The text of each file by its name; see `read_text`."""
    return {str(file): read_text(file) for file in files}


def read_text(file: Path) -> str:
    r"""The text of a UTF-8 file, without its byte order mark and with "\r\n" and "\r" as "\n".

    DataError where it cannot be read, is empty, binary or not UTF-8.
    """
    try:
        raw = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file} is UTF-16, not UTF-8; {_iconv(file, 'utf-16')}")
    if (nul := raw.find(0)) >= 0:
        raise DataError(f"{file} is binary, not text: a NUL byte {_place(raw, nul)}")
    try:
        text = raw.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file} is not UTF-8 text: byte {raw[error.start]:#04x} {_place(raw, error.start)};"
            f" if it is in an older encoding, {_iconv(file, 'latin1')}"
        ) from error
    if not text:
        raise DataError(f"{file} is empty; put text into it or leave it out")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def find_files(paths: Sequence[str]) -> list[Path]:
    """The files that paths name: files, directories (their .txt and .md files at any depth,
    sorted, without hidden ones) and globs; each file once, in the order of its first mention."""
    found: dict[Path, Path] = {}
    for name in paths:
        try:
            for file in _expand(name):
                found.setdefault(file.resolve(), file)
        except OSError as error:
            raise DataError(f"{error.filename or name} cannot be read: {error.strerror}") from error
    return list(found.values())


def default_source(cwd: Path, download: Callable[[Path], None]) -> tuple[list[Path], str]:
    """Files to train on when nobody named any, and one line for the user that says which.

    ./train.txt; else data/*.txt; else `download` makes data/shakespeare.txt; else, where it
    raises DataError or the folder cannot be made, the sample corpus inside the package.
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
        return _sample(f"{target.parent} cannot be made: {error.strerror}")
    except DataError as error:
        return _sample(str(error))
    return [target], f"Text: tiny Shakespeare, downloaded to {target}"


def sample_corpus_path() -> Path:
    """The corpus that comes with the package."""
    return Path(__file__).with_name("sample.txt")


def _sample(reason: str) -> tuple[list[Path], str]:
    return [sample_corpus_path()], f"Text: the sample corpus inside the package ({reason})"


def _expand(name: str) -> Iterator[Path]:
    path = Path(name).expanduser()
    if path.is_dir() and name:
        yield from _texts_under(path)
    elif path.exists() and name:
        yield path
    elif set(name) & set("*?["):
        files = [Path(file) for file in sorted(glob.glob(str(path), recursive=True))]
        if not any(file.is_file() for file in files):
            raise DataError(f"no file matches {name!r} (looked in {Path.cwd()})")
        yield from (file for file in files if file.is_file())
    else:
        raise DataError(_no_such_file(name, path))


def _texts_under(folder: Path) -> list[Path]:
    def stop(error: OSError) -> None:
        raise error

    files: list[Path] = []
    for parent, folders, names in os.walk(folder, onerror=stop):
        folders[:] = [name for name in folders if not name.startswith(".")]
        files += (Path(parent, name) for name in names if name.lower().endswith(SUFFIXES))
    if texts := sorted(file for file in files if _is_visible_file(file)):
        return texts
    raise DataError(f"{folder} holds no text: no {' or '.join(SUFFIXES)} file in it or below")


def _is_visible_file(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".")


def _no_such_file(name: str, path: Path) -> str:
    looked = "" if path.is_absolute() else f" (looked in {Path.cwd()})"
    siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, siblings, 1)
    hint = f"; is it {path.with_name(near[0])}?" if near else ""
    return f"no such file: {name!r}{looked}{hint}"


def _split(n: int) -> int:
    return int(TRAIN_SHARE * n)


def _place(raw: bytes, offset: int) -> str:
    return f"at offset {offset} (line {len((raw[:offset] + b'.').splitlines())})"


def _iconv(file: Path, encoding: str) -> str:
    return f"convert it, e.g. iconv -f {encoding} -t utf-8 {file} > {file.stem}-utf8{file.suffix}"
