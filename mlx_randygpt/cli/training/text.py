"""The text of a run: find it, read it and turn it into tokens; lines about what was dropped."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
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
from mlx_randygpt.data.files import TextSource, default_source, find_sources, is_pipe
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import AUTO, Vocabulary, choose_tokenizer
from mlx_randygpt.dialogue import has_dialogue
from mlx_randygpt.files import resolve
from mlx_randygpt.tokenizers import DIALOGUE_TOKENS, Tokenizer
from mlx_randygpt.tokenizers.chars import SURROGATES
from mlx_randygpt.words import format_share, unknown_line

READING = ("encoding", "text_field", "me", "as_text", "skip_bad_rows")


def files_of(paths: Sequence[str]) -> list[Path]:
    """Return the files that paths name; without paths, search as docs/cli.md describes."""
    return [source.file for source in sources_of(paths)]


def sources_of(paths: Sequence[str], heard: list[str] | None = None) -> list[TextSource]:
    """Return the files that paths name, with their weights; without paths, search for a text.

    What is chosen or left out is a line on stderr, and goes to `heard` too, for the live screen
    that will hide it.
    """
    is_rank = LIFELINE in os.environ or is_ranked()
    if pipe := next(filter(is_pipe, paths if is_rank else ()), ""):
        raise DataError(
            f"ranks cannot read stdin or a pipe, so --data {pipe} is not possible; name a file"
        )

    def note(line: str) -> None:
        echo(line, err=True, wrapped=True)
        if heard is not None:
            heard.append(line)

    if paths:
        return find_sources(paths, note)
    files, line = default_source(Path(), download_shakespeare, note)
    note(line)
    return [TextSource(file) for file in files]


def recorded_paths(sources: Sequence[TextSource]) -> list[str]:
    """Return the paths that name these files again, with their weights."""
    names = list[str]()
    for source in sources:
        is_read_once = not source.path or is_pipe(source.path)  # a pipe: its file is a copy
        place = source.file if is_read_once else Path(os.path.expanduser(source.path))
        names.append(f"{resolve(place)}{f':{source.weight:g}' if source.path else ''}")
    return list(dict.fromkeys(names))


def requested_tokenizer(options: Mapping[str, Any]) -> Tokenizer | Vocabulary:
    """Return the tokenizer that the options of a new run ask for, or what learns it."""
    size = options.get("vocab_size")
    if size == 0:
        raise ConfigError("vocab_size=0 is too small; it must be at least 1, or left out")
    return choose_tokenizer(options.get("tokenizer", AUTO), size or 0)


def tokenizer_options(tokenizer: Tokenizer, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that give this tokenizer again."""
    kind = tokenizer.to_json()["type"]
    learned = kind not in ("file", "table")
    name = kind if learned else options.get("tokenizer")
    n_more = len(DIALOGUE_TOKENS) * has_dialogue(tokenizer)  # added to what was learned
    size = options.get("vocab_size") if kind == "char" else tokenizer.vocab_size - n_more
    values = {"tokenizer": name, "vocab_size": size if learned else None}
    return {name: value for name, value in values.items() if value is not None}


def reading(options: Mapping[str, Any], saved: Mapping[str, Any] | None = None) -> Reading:
    """Return how to read files: the options, over what the `data` of a checkpoint says.

    A run that an older version began has read conversations as texts.
    """
    saved = {"as_text": True, **saved} if saved else {}
    values: dict[str, Any] = {name: options.get(name) or saved.get(name) for name in READING}
    return Reading(**{name: value for name, value in values.items() if value})


def load(
    files: Sequence[Path],
    how: Reading,
    tokenizer: Tokenizer | Vocabulary,
    saved: Mapping[str, Any] | None = None,
) -> tuple[Tokenizer, Corpus]:
    """Load the corpus of files, with a progress bar on stderr if that is a terminal.

    `saved` is the `data` of the checkpoint whose split and tokenizer it has; None: of a new run.
    Raises DataError if there are conversations but the checkpoint's model knows none.
    """
    keeps_copies = saved is None or bool(saved.get("keeps_copies", False))
    with ProgressBar() as bar:
        found, corpus = replace(loader(how, bar), keeps_copies=keeps_copies).load(files, tokenizer)
    if saved is not None and found != tokenizer:
        raise DataError(
            "the text has conversations, but the vocabulary of this model has no tokens for them; "
            "mlxgpt train --init-from teaches it dialogue, and --as-text reads them as plain text"
        )
    return found, corpus


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


def tokenizer_lines(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """Return a line about the choice of the tokenizer, and those about what is lost, if any."""
    chosen = [corpus.choice.describe(tokenizer)] if corpus.choice else []
    return chosen + loss_lines(corpus, tokenizer)


def loss_lines(corpus: Corpus, tokenizer: Tokenizer) -> list[str]:
    """Return lines about invalid rows and about characters that were left out, if any."""
    skipped = skipped_lines(corpus.n_skipped, corpus.first_skipped)
    if not (line := unknown_line(corpus.unknown)):
        return skipped
    if tokenizer.to_json()["type"] != "char":
        return [*skipped, line]
    share = format_share(sum(corpus.unknown.values()) / corpus.characters)
    halves = [char for char in corpus.unknown if ord(char) in SURROGATES]  # of characters
    rest = "only lone surrogates" if halves else "none"
    line = f"{line}; {share} of the text"
    if len(halves) == len(corpus.unknown):
        return [*skipped, line]
    return [*skipped, f"{line}; a new run with --tokenizer bpe loses {rest}"]


def skipped_lines(n: int, first: str) -> list[str]:
    """Return a line about `n` invalid rows that were left out, and the `first`, if any."""
    rows = f"{n:,} invalid row{'s' * (n > 1)}"
    return [f"Skipped: {rows}; the first: {first}"] if n else []


def split_lines(corpus: Corpus) -> list[str]:
    """Return a line about copies that the split keeps on one side, and one about the split."""
    line = f"Validation text: {corpus.validation}."
    if corpus.split is None or not corpus.split.n_copies:
        return [line]
    return [
        f"{corpus.split.n_copies:,} documents occur more than once, in the last tenth of the text "
        "and before it; the split keeps all copies of a document on one side.",
        line,
    ]


def describe(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return the data line of the screen."""
    names = corpus.names
    source = Path(names[0]).name if len(names) == 1 else f"{len(names)} files"
    tokens = f"{len(corpus.tokens):,} tokens"
    amount = f"{corpus.characters:,} characters" if corpus.characters else tokens
    if corpus.n_conversations:
        amount = f"{corpus.n_conversations:,} conversations, {amount}"
    if corpus.characters and tokenizer.to_json()["type"] != "char":
        amount += f" in {tokens}"
    return f"{source}: {amount}, vocabulary {tokenizer.vocab_size}"


def advice(corpus: Corpus, model: ModelConfig) -> str:
    """Return one line if the text is too short or too long for the model, else "".

    The length of token files is unknown: for them the line is empty.
    """
    return settings.text_advice(model, corpus.n_bytes) if corpus.n_bytes else ""
