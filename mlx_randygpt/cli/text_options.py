"""The options that say which text and which tokens, for every command that reads text."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

F = TypeVar("F", bound=Callable[..., Any])


def tokenizer_options(function: F) -> F:
    """--tokenizer and --vocab-size, where a run begins."""
    for option in reversed(
        [
            click.option(
                "--tokenizer",
                metavar="NAME",
                help="char, bpe, wordpiece, or a tokenizer.json.  [default: char]",
            ),
            click.option(
                "--vocab-size",
                type=int,
                help="Characters at most, or tokens.  [default: 512 for char, else 1024]",
            ),
        ]
    ):
        function = option(function)
    return function


def reading_options(function: F) -> F:
    """--encoding and --text-field, where files are read."""
    for option in reversed(
        [
            click.option("--encoding", help="Of text files.  [default: utf-8]"),
            click.option(
                "--text-field", help="Of the rows of .jsonl and .parquet.  [default: text]"
            ),
        ]
    ):
        function = option(function)
    return function
