"""`mlxgpt data`: corpora by name, and tokens made ahead of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option, reading_options, tokenizer_options
from mlx_randygpt.cli.output import print_json, readable_bytes, show, show_facts

if TYPE_CHECKING:
    from mlx_randygpt.data.download import Remote


@click.group("data")
def command() -> None:
    """Fetch a corpus by name; make tokens ahead of a run."""


@command.command("list", cls=Command)
@json_option
def list_corpora(json: bool) -> None:
    """List the corpora that `mlxgpt data fetch` knows."""
    from rich.table import Table

    from mlx_randygpt.data.corpora import LIBRARY

    if json:
        facts = ("name", "what", "licence", "size")
        print_json({"corpora": [{f: getattr(c, f) for f in facts} for c in LIBRARY.values()]})
        return
    table = Table.grid(padding=(0, 2, 0, 0))
    for corpus in LIBRARY.values():
        table.add_row(corpus.name, readable_bytes(corpus.size), corpus.what, corpus.licence)
    show(table)


@command.command("fetch", cls=Command)
@click.argument("name")
@click.option(
    "--out", type=click.Path(path_type=Path), default=Path("data"), show_default=True,
    help="Folder of texts.",
)  # fmt: skip
@click.option("--book", type=int, multiple=True, help="Of gutenberg: number; may be repeated.")
def fetch(name: str, out: Path, book: tuple[int, ...]) -> None:
    """Fetch a corpus and make text files of it. A download that broke off goes on."""
    from mlx_randygpt.cli.training.text import ProgressBar
    from mlx_randygpt.data import corpora
    from mlx_randygpt.data.corpora import SHELF, gutenberg_url
    from mlx_randygpt.data.download import fetch as fetch_file

    corpus = corpora.find_corpus(name)
    if book and corpus.remote is not None:
        raise click.UsageError("--book goes with gutenberg alone")
    source = (
        corpus.remote.url
        if corpus.remote
        else gutenberg_url(book[0] if book else next(iter(SHELF)))
    )
    size = f"about {readable_bytes(corpus.size)}"
    if corpus.remote and corpus.remote.size:
        size = readable_bytes(corpus.size)
    click.echo(f"{corpus.name}: {corpus.what}\nLicence: {corpus.licence}", err=True)
    click.echo(f"From {source}{'' if corpus.remote else ' and others'}: {size}", err=True)
    with ProgressBar() as bar:

        def download(remote: Remote, path: Path) -> None:
            digest = fetch_file(
                remote, path, lambda done, size: bar(f"Downloading {path.name}", done, size)
            )
            if not remote.sha256:
                click.echo(f"{path.name}: no checksum is known; its SHA-256 {digest}", err=True)

        if corpus.remote is None:
            folder, books = out / corpus.target, book or tuple(SHELF)
            corpora.install_books(books, folder, download, lambda line: click.echo(line, err=True))
            target = folder
        else:
            target = corpora.install(corpus, out, download)
    use = "--tokenizer" if name.endswith("-tokenizer") else "--data"
    click.echo(f"{target} is there. Train on it: mlxgpt train {use} {target}")


@command.command("prepare", cls=Command)
@click.option("--data", multiple=True, help="As for train.")
@tokenizer_options
@reading_options
@json_option
def prepare(data: tuple[str, ...], json: bool, **options: Any) -> None:
    """Make the tokens of a text, as `train` would, and say what they are."""
    from mlx_randygpt.cli.training import text

    given = {name: value for name, value in options.items() if value is not None}
    files = text.files_of(data)
    tokenizer, corpus = text.load(files, text.reading(given), text.requested_tokenizer(given))
    n_bytes = int(tokenizer.token_bytes()[corpus.tokens[:1_000_000]].sum())
    cached = getattr(corpus.tokens, "filename", None)
    values = {
        "files": len(files),
        "documents": len(corpus.starts),
        "characters": corpus.characters,
        "tokens": len(corpus.tokens),
        "train_tokens": len(corpus.train),
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": n_bytes / max(1, min(1_000_000, len(corpus.tokens))),
        "cache": str(cached) if cached else None,
    }
    if json:
        print_json(values)
        return
    values["cache"] = cached or "none: a short text is read into memory"
    show_facts(
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) else str(value))
        for name, value in values.items()
    )
