"""The text of a run: find it, read it and turn it into tokens; lines about what was dropped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from mlx_randygpt import settings
from mlx_randygpt.backends.ranks.group import is_ranked
from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.training.team import LIFELINE
from mlx_randygpt.config import ConfigError, ModelConfig
from mlx_randygpt.data import DataError, cache
from mlx_randygpt.data.corpus import Corpus, Loader
from mlx_randygpt.data.download import fetch_tiny_shakespeare
from mlx_randygpt.data.files import default_source, find_files, is_pipe
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import Vocabulary, choose_tokenizer
from mlx_randygpt.tokenizers import Tokenizer

N_SHOWN = 5  # kinds of unknown characters named in a message
READING = ("encoding", "text_field")  # options that read other text from the same files


def files_of(paths: Sequence[str]) -> list[Path]:
    """Return the files that paths name; without paths, search as docs/cli.md describes."""
    pipe = next(filter(is_pipe, paths), "")
    if pipe and (LIFELINE in os.environ or is_ranked()):
        raise DataError(
            f"ranks cannot read stdin or a pipe, so --data {pipe} is not possible; name a file"
        )
    if paths:
        return find_files(paths, lambda line: echo(line, err=True))
    files, note = default_source(Path(), download_shakespeare)
    echo(note, err=True)
    return files


def requested_tokenizer(options: Mapping[str, Any]) -> Tokenizer | Vocabulary:
    """Return the tokenizer that the options of a new run ask for, or what learns it."""
    size = options.get("vocab_size")
    if size == 0:
        raise ConfigError("vocab_size=0 is too small; it must be at least 1, or left out")
    return choose_tokenizer(options.get("tokenizer", "char"), size or 0)


def tokenizer_options(tokenizer: Tokenizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that give this tokenizer again."""
    kind = tokenizer.to_json()["type"]
    learned = kind not in ("file", "table")
    name = kind if learned else options.get("tokenizer")
    size = options.get("vocab_size") if kind == "char" else tokenizer.vocab_size
    values = {"tokenizer": name, "vocab_size": size if learned else None}
    return {name: value for name, value in values.items() if value is not None}


def reading(options: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Reading:
    """Return how to read files: the options, over what the `data` of a checkpoint says."""
    values = {name: options.get(name) or (saved or {}).get(name) for name in READING}
    return Reading(**{name: str(value) for name, value in values.items() if value})


def load(
    files: Sequence[Path], how: Reading, tokenizer: Tokenizer | Vocabulary
) -> tuple[Tokenizer, Corpus]:
    """Load the corpus of files, with a progress bar on stderr if that is a terminal."""
    with ProgressBar() as bar:
        return loader(how, bar).load(files, tokenizer)


def loader(how: Reading, bar: ProgressBar) -> Loader:
    """Return a loader that uses all cores, and the cache folder of the environment."""
    from mlx_randygpt.backends.numpy.backend import available_cores

    return Loader(how, cache.default_folder(), available_cores(), bar)


class ProgressBar:
    """A progress bar on stderr, silent if that is not a terminal."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
            transient=True,
        )
        self._task: tuple[str, Any] = "", None

    def __enter__(self) -> ProgressBar:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def __call__(self, label: str, done: int, size: int) -> None:
        """Show `done` of `size` bytes; a new label begins a new bar."""
        name, task = self._task
        if label != name:
            task = self._bar.add_task(label, total=size)
            self._task = label, task
        self._bar.update(task, completed=done, total=size)


def download_shakespeare(path: Path) -> None:
    """Download tiny Shakespeare to `path`, with a progress bar."""
    with ProgressBar() as bar:
        fetch_tiny_shakespeare(
            path, lambda done, size: bar("Downloading tiny Shakespeare", done, size)
        )


def unknown_line(counts: Mapping[str, int]) -> str:
    """Return one line about characters that were dropped, or ""."""
    if not counts:
        return ""
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    names = ", ".join(f"{character!r} × {n}" for character, n in ordered[:N_SHOWN])
    more = f" and {len(ordered) - N_SHOWN} more kinds" if len(ordered) > N_SHOWN else ""
    total = sum(counts.values())
    if total == 1:
        return f"1 character is not in the vocabulary and was dropped: {names}"
    return f"{total:,} characters are not in the vocabulary and were dropped: {names}{more}"


def describe(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return the data line of the screen."""
    names = corpus.names
    source = Path(names[0]).name if len(names) == 1 else f"{len(names)} files"
    tokens = f"{len(corpus.tokens):,} tokens"
    amount = f"{corpus.characters:,} characters" if corpus.characters else tokens
    if corpus.characters and tokenizer.to_json()["type"] != "char":
        amount += f" in {tokens}"
    return f"{source}: {amount}, vocabulary {tokenizer.vocab_size}"


def advice(corpus: Corpus, model: ModelConfig) -> str:
    """Return one line if the text is too short or too long for the model, else "".

    The length of token files is unknown: for them the line is empty.
    """
    return settings.text_advice(model, corpus.n_bytes) if corpus.n_bytes else ""
