"""`mlxgpt data`: download a corpus by name; check or tokenize a text before a run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command, Group
from mlx_randygpt.cli.options import (
    data_option,
    json_option,
    reading_options,
    tokenizer_options,
)
from mlx_randygpt.cli.output import echo, print_json, show, show_facts
from mlx_randygpt.cli.values import FilePath
from mlx_randygpt.words import format_bytes

if TYPE_CHECKING:
    from mlx_randygpt.data.download import Remote


@click.group("data", cls=Group)
def command() -> None:
    """Download a corpus by name; check or tokenize a text before a run."""


@command.command("list", cls=Command)
@json_option
def list_corpora(json: bool) -> None:
    """List the corpora that `mlxgpt data fetch` can download."""
    from rich.table import Table

    from mlx_randygpt.data.corpora import LIBRARY

    if json:
        keys = ("name", "what", "licence", "size")
        print_json({"corpora": [{k: getattr(c, k) for k in keys} for c in LIBRARY.values()]})
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for corpus in LIBRARY.values():
        table.add_row(corpus.name, format_bytes(corpus.size), corpus.what, corpus.licence)
    show(table)


@command.command("fetch", cls=Command)
@click.argument("name")
@click.option(
    "--out",
    type=FilePath(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Put the texts into this folder.",
)
@click.option(
    "--book",
    type=int,
    multiple=True,
    help="Fetch this book of Project Gutenberg, by its number; repeatable.",
)
def fetch(name: str, out: Path, book: tuple[int, ...]) -> None:
    """Download a corpus and unpack it to text files. An interrupted download resumes."""
    from mlx_randygpt.cli.training.text import ProgressBar
    from mlx_randygpt.data import corpora
    from mlx_randygpt.data.corpora import SHELF, gutenberg_url
    from mlx_randygpt.data.download import fetch as fetch_file

    corpus = corpora.find_corpus(name)
    if book and corpus.remote is not None:
        raise click.UsageError("--book needs the corpus gutenberg")
    if corpus.remote:
        source = corpus.remote.url
    else:
        source = f"{gutenberg_url(book[0] if book else next(iter(SHELF)))} and others"
    about = "" if corpus.remote and corpus.remote.size else "about "
    echo(f"{corpus.name}: {corpus.what}\nLicence: {corpus.licence}", err=True)
    echo(f"From {source}: {about}{format_bytes(corpus.size)}", err=True)
    with ProgressBar() as bar:

        def download(remote: Remote, path: Path) -> None:
            digest = fetch_file(
                remote, path, lambda done, size: bar(f"Downloading {path.name}", done, size)
            )
            if not remote.sha256:
                echo(f"{path.name}: no checksum is known; its SHA-256 is {digest}", err=True)

        if corpus.remote is None:
            folder, books = out / corpus.target, book or tuple(SHELF)
            corpora.install_books(books, folder, download, lambda line: echo(line, err=True))
            target = folder
        else:
            target = corpora.install(corpus, out, download)
    use = "--tokenizer" if name.endswith("-tokenizer") else "--data"
    echo(f"{target} is there. Train on it: mlxgpt train {use} {target}")


@command.command("example", cls=Command)
@click.argument("name", type=click.Choice(["additions"]))
@click.option(
    "--out",
    type=FilePath(path_type=Path),
    default=Path("data"),
    show_default=True,
    help="Write the two files to this folder.",
)
def example(name: str, out: Path) -> None:
    """Write an example of dialogues: rows to train on, and rows that are held out.

    additions: 7,444 questions such as "What is 47 + 38?", and 656 held-out ones.
    """
    import json

    from mlx_randygpt.data import DataError, examples
    from mlx_randygpt.files import write

    made = examples.EXAMPLES[name]()
    files = {f"{name}.jsonl": made.training, f"{name}-held-out.jsonl": made.held_out}
    try:
        out.mkdir(parents=True, exist_ok=True)
        for file, rows in files.items():
            write(out / file, "".join(json.dumps(row) + "\n" for row in rows).encode())
            echo(f"{out / file}: {len(rows):,} conversations")
    except OSError as error:
        raise DataError(f"{error.filename or out} cannot be written: {error.strerror}") from error
    echo(f"Train on it: mlxgpt train --data {out / name}.jsonl")


@command.command("prepare", cls=Command)
@data_option
@tokenizer_options
@reading_options
@json_option
def prepare(data: tuple[str, ...], json: bool, **options: Any) -> None:
    """Tokenize a text as `mlxgpt train` would, and report the result."""
    import numpy as np

    from mlx_randygpt.cli.training import text
    from mlx_randygpt.data.token_file import TokenFile
    from mlx_randygpt.state import plain_ids

    given = {name: value for name, value in options.items() if value is not None}
    files = text.files_of(data)
    tokenizer, corpus = text.load(files, text.reading(given), text.requested_tokenizer(given))
    for line in text.tokenizer_lines(corpus, tokenizer):
        echo(line, err=True, wrapped=True)
    first = plain_ids(np.asarray(corpus.tokens[:1_000_000]))
    n_bytes = int(tokenizer.token_bytes()[first].sum())
    cached = corpus.tokens.file.path if isinstance(corpus.tokens, TokenFile) else None
    values = {
        "files": len(files),
        "documents": len(corpus.starts),
        "conversations": corpus.n_conversations,
        "characters": corpus.characters,
        "tokens": len(corpus.tokens),
        "train_tokens": len(corpus.train),
        "validation": corpus.validation,
        "tokenizer": tokenizer.to_json()["type"],
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": n_bytes / max(1, len(first)),
        "cache": str(cached) if cached else None,
    }
    if json:
        print_json(values)
        return
    values["cache"] = values["cache"] or "none: a short text is read into memory"
    show_facts(
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in values.items()
    )


@command.command("check", cls=Command)
@click.argument("paths", nargs=-1)
@reading_options
@click.option("--no-time", is_flag=True, help="Do not measure how long a run would take here.")
@json_option
def check(paths: tuple[str, ...], no_time: bool, json: bool, **options: Any) -> None:
    """Report what could spoil a run on a text.

    It looks for copies, leaks, lost characters and repeated lines. It also names the
    validation text, and the tokenizer, preset and time that suit. Nothing is modified. Without
    PATHS it checks the text that `mlxgpt train` would find.
    """
    from mlx_randygpt.cli.audit import audit_facts, audit_json, suitable_run
    from mlx_randygpt.cli.training import text
    from mlx_randygpt.data import DataError
    from mlx_randygpt.data.audit import audit
    from mlx_randygpt.data.files import is_tokens
    from mlx_randygpt.data.reading import all_pieces

    how = text.reading({name: value for name, value in options.items() if value is not None})
    files = text.files_of(paths)
    if tokens := next(filter(is_tokens, files), None):
        raise DataError(f"{tokens} holds token ids; data check reads texts")
    skipped = dict[str, None]()  # the problems of invalid rows
    with text.ProgressBar() as bar:
        size = sum(file.stat().st_size for file in files)

        def pieces() -> Iterator[tuple[int, Any]]:
            done = 0

            def seen(n: int) -> None:
                nonlocal done
                done += n
                bar("Checking the text", done, size)

            return all_pieces(files, how, seen, lambda problem: skipped.setdefault(problem))

        found = audit(pieces)
    for line in text.skipped_lines(len(skipped), next(iter(skipped), "")):
        echo(line, err=True, wrapped=True)
    names = [str(file) for file in files]
    suits = suitable_run(found, measure=not no_time)
    if json:
        print_json(audit_json(found, names, how.encoding, suits))
    else:
        show_facts(audit_facts(found, names, how.encoding, suits))
