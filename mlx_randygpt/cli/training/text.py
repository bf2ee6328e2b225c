"""The text of a run: found, read, and turned into tokens, with a line for what was lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_randygpt import settings
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.data import cache
from mlx_randygpt.data.corpus import Corpus, Loader
from mlx_randygpt.data.download import fetch_tiny_shakespeare
from mlx_randygpt.data.files import default_source, find_files
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import Vocabulary, choose_tokenizer
from mlx_randygpt.tokenizers import Tokenizer

N_SHOWN = 5  # kinds of unknown characters named in a message
READING = ("encoding", "text_field")  # options that make other text of the same files


def files_of(paths: Sequence[str]) -> list[Path]:
    """The files that paths name; without paths, what the search order of docs/cli.md finds."""
    if paths:
        return find_files(paths)
    files, note = default_source(Path(), download_shakespeare)
    click.echo(note, err=True)
    return files


def requested_tokenizer(given: Mapping[str, Any]) -> Tokenizer | Vocabulary:
    """The tokenizer that the options of a new run ask for."""
    return choose_tokenizer(given.get("tokenizer", "char"), given.get("vocab_size", 0))


def tokenizer_options(tokenizer: Tokenizer, given: Mapping[str, Any]) -> dict[str, Any]:
    """The options that ask for this tokenizer again."""
    kind = tokenizer.to_json()["type"]
    learned = kind not in ("file", "table")
    named = {"tokenizer": kind if learned else given.get("tokenizer")}
    size = given.get("vocab_size") if kind == "char" else tokenizer.vocab_size
    named |= {"vocab_size": size if learned else None}
    return {name: value for name, value in named.items() if value is not None}


def reading(given: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Reading:
    """How files are read: what was given, over what the checkpoint's `data` remembers."""
    values = {name: given.get(name) or (saved or {}).get(name) for name in READING}
    return Reading(**{name: str(value) for name, value in values.items() if value})


def load(
    files: Sequence[Path], how: Reading, tokenizer: Tokenizer | Vocabulary
) -> tuple[Tokenizer, Corpus]:
    """The corpus of files, with a bar on stderr where that is a terminal and it takes a while."""
    with ProgressBar() as bar:
        return loader(how, bar).load(files, tokenizer)


def loader(how: Reading, bar: ProgressBar) -> Loader:
    """A loader on all cores, with the cache where the environment says."""
    from mlx_randygpt.backends.numpy.backend import available_cores

    return Loader(how, cache.place(), available_cores(), bar)


class ProgressBar:
    """What is being done and how far it is, on stderr where that is a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn())
        self._bar = Progress(
            *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal,
            transient=True,
        )  # fmt: skip
        self._task: tuple[str, Any] = "", None

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, what: str, done: int, size: int) -> None:
        name, task = self._task
        if what != name:
            task = self._bar.add_task(what, total=size)
            self._task = what, task
        self._bar.update(task, completed=done, total=size)


def download_shakespeare(path: Path) -> None:
    """Tiny Shakespeare as `path`, with a bar on stderr where that is a terminal."""
    with ProgressBar() as bar:
        fetch_tiny_shakespeare(
            path, lambda done, size: bar("Downloading tiny Shakespeare", done, size)
        )


def unknown_line(counts: Mapping[str, int]) -> str:
    """One line about the characters that are lost; "" where there are none."""
    if not counts:
        return ""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{character!r} × {n}" for character, n in most[:N_SHOWN])
    more = f" and {len(most) - N_SHOWN} more kinds" if len(most) > N_SHOWN else ""
    total = sum(counts.values())
    what, are = ("characters", "are") if total > 1 else ("character", "is")
    return f"{total:,} {what} {are} not in the vocabulary and {are} lost: {named}{more}"


def describe(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """The data line of the screen."""
    names = corpus.names
    what = Path(names[0]).name if len(names) == 1 else f"{len(names)} files"
    tokens = f"{len(corpus.tokens):,} tokens"
    amount = f"{corpus.characters:,} characters" if corpus.characters else tokens
    if corpus.characters and tokenizer.to_json()["type"] != "char":
        amount += f" in {tokens}"
    return f"{what}: {amount}, vocabulary {tokenizer.vocab_size}"


def advice(corpus: Corpus, model: ModelConfig) -> str:
    """One line where the text is too short or too long for the model; "" too where its length is
    not known, as of token files."""
    return settings.text_advice(model, corpus.n_bytes) if corpus.n_bytes else ""


def provenance(corpus: Corpus, how: Reading, respect_documents: bool) -> dict[str, Any]:
    """What a checkpoint remembers of its text, and of how it became tokens."""
    return {
        "paths": [str(Path(name).resolve()) for name in corpus.names],
        "characters": corpus.characters,
        "sha256": corpus.sha256,
        **{name: getattr(how, name) for name in READING},
        "respect_documents": respect_documents,
    }
