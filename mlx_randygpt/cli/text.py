"""The text of a run: found, read, and turned into tokens, with a line for what was lost."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn

from mlx_randygpt.data.corpus import Corpus, default_source, find_files, read_texts
from mlx_randygpt.data.download import fetch_tiny_shakespeare
from mlx_randygpt.tokenizer import Tokenizer

N_SHOWN = 5  # kinds of unknown characters named in a message


def read(paths: Sequence[str]) -> dict[str, str]:
    """Texts by file name; without paths, what the search order of docs/cli.md finds."""
    if paths:
        return read_texts(find_files(paths))
    files, note = default_source(Path(), download_shakespeare)
    click.echo(note, err=True)
    return read_texts(files)


def download_shakespeare(path: Path) -> None:
    """Tiny Shakespeare as `path`, with a bar on stderr where that is a terminal."""
    columns = ("Downloading tiny Shakespeare", BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("download", total=None)
        fetch_tiny_shakespeare(
            path, lambda done, size: bar.update(task, completed=done, total=size)
        )


def unknown_line(texts: dict[str, str], tokenizer: Tokenizer) -> str:
    """One line about the characters that become `<unk>`; "" where there are none."""
    counts: dict[str, int] = {}
    for text in texts.values():
        for character, n in tokenizer.unknown(text).items():
            counts[character] = counts.get(character, 0) + n
    if not counts:
        return ""
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    named = ", ".join(f"{character!r} × {n}" for character, n in most[:N_SHOWN])
    more = f" and {len(most) - N_SHOWN} more kinds" if len(most) > N_SHOWN else ""
    total = sum(counts.values())
    plural = "characters that are" if total > 1 else "character that is"
    return f"{total:,} {plural} not in the vocabulary became <unk>: {named}{more}"


def describe(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """The data line of the screen."""
    names = [document.name for document in corpus.documents]
    what = Path(names[0]).name if len(names) == 1 else f"{len(names)} files"
    return f"{what}: {corpus.characters:,} characters, vocabulary {tokenizer.vocab_size}"


def provenance(corpus: Corpus) -> dict[str, Any]:
    """What a checkpoint remembers of its text."""
    return {
        "paths": [str(Path(document.name).resolve()) for document in corpus.documents],
        "characters": corpus.characters,
        "sha256": corpus.sha256,
    }
