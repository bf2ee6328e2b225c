"""Reporting what samples have copied from the training text, as lines on stderr and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mlx_randygpt.cli.output import echo, show
from mlx_randygpt.words import clean_text

if TYPE_CHECKING:
    from rich.text import Text

    from mlx_randygpt.analysis.copies import Copies, Span
    from mlx_randygpt.checkpoint import Checkpoint
    from mlx_randygpt.data.corpus import Corpus
    from mlx_randygpt.tokenizers import Tokenizer

CHANGED = (
    "The training text has changed since the checkpoint was written; "
    "the samples are compared with the new."
)


@dataclass(frozen=True)
class TrainingText:
    """The text that samples are compared with: the training part of a corpus, as tokens."""

    corpus: Corpus
    tokenizer: Tokenizer
    changed: bool  # whether it is another text than the checkpoint's

    def find(self, samples: Sequence[str]) -> list[Copies]:
        """Return what each sample has copied."""
        from mlx_randygpt.analysis.copies import find_copies
        from mlx_randygpt.data.decoding import decoded

        return find_copies(samples, decoded(self.corpus.train, self.tokenizer))


def load_training_text(
    saved: Checkpoint, tokenizer: Tokenizer, data: Sequence[str]
) -> TrainingText:
    """Load the text of `data`, or that of the run; raise DataError if it cannot be read.

    A line on stderr reports if the run's own text has changed.
    """
    from mlx_randygpt.cli.training import text
    from mlx_randygpt.data import DataError

    paths = data or saved.data.get("paths")
    if not paths:
        raise DataError(
            "the checkpoint does not record its training text, so copies cannot be found; "
            "give it with --data"
        )
    try:
        how = text.reading({}, saved.data)
        _, corpus = text.load(text.files_of(paths), how, tokenizer, saved.data)
    except DataError as error:
        if data:
            raise
        raise DataError(
            f"the training text cannot be read ({error}); give it with --data"
        ) from error
    changed = corpus.sha256 != saved.data.get("sha256")
    if changed and not data:
        echo(CHANGED, err=True, wrapped=True)
    return TrainingText(corpus, tokenizer, changed)


def copies_line(sample: str, copies: Copies) -> str:
    """Return the line that reports what a sample has copied."""
    from mlx_randygpt.analysis.copies import MIN_RUN

    start, stop = copies.longest
    run = f", {clean_text(sample[start:stop])!r}" if stop > start else ""
    return (
        f"{copies.share:.0%} in runs of {MIN_RUN} or more characters of the training text; "
        f"the longest run has {stop - start}{run}"
    )


def show_copies(samples: Sequence[str], copies: Sequence[Copies]) -> None:
    """Print a line per sample on stderr, and its passages.

    They are underlined in the text if the terminal can do that, and listed otherwise.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False, markup=False, emoji=False, soft_wrap=True)
    for number, (sample, found) in enumerate(zip(samples, copies, strict=True), start=1):
        name = f"Copied in sample {number}" if len(samples) > 1 else "Copied"
        echo(f"{name}: {copies_line(sample, found)}", err=True, wrapped=True)
        if not found.passages:
            continue
        if console.color_system is not None and not console.no_color:
            show(_underlined(sample, found.covered), console)
            continue
        for start, stop in found.passages:
            echo(f"  [{start}:{stop}] {clean_text(sample[start:stop])!r}", err=True)


def _underlined(sample: str, spans: Sequence[Span]) -> Text:
    from rich.text import Text

    text = Text(clean_text(sample, keep="\n"))
    for start, stop in spans:
        text.stylize("underline", start, stop)
    return text


def copies_json(sample: str, copies: Copies, changed: bool) -> dict[str, Any]:
    """Return the object that `--json` has for a sample."""

    def row(span: Span) -> dict[str, Any]:
        return {"start": span.start, "stop": span.stop, "text": sample[span.start : span.stop]}

    return {
        "share": copies.share,
        "longest": row(copies.longest),
        "passages": [row(span) for span in copies.passages],
        "text_changed": changed,
    }
