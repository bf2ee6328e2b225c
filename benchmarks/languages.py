"""Texts in many languages, each as `mlxgpt train` takes it, beside nanoGPT's recipe.

    pip install '.[bench]'
    python benchmarks/languages.py --data zh=zh.txt c=gnulib.c [--steps 250] [--seed 1337]
        [--tokenizers auto bpe:2048 ...] [--who modern nanogpt nanogpt-bpe] [--json languages.json]

All have 4 layers × 4 heads × 128 and 12 × 64 tokens a step, on one thread. `modern` reads the
tokens of `--tokenizers`, by default those that the rule chooses; nanoGPT's recipe reads characters,
with a table of all that occur in the text, as its prepare.py makes it; `nanogpt-bpe` is that recipe
with the tokens of `modern` if these are not characters. Bits per byte are those of the last tenth
of the tokens of `modern`, the same text for all. Seconds are of the processor.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import learning
import numpy as np
from compare_tokenizers import options_of

from mlx_randygpt.cli.training import text
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.data.reading import Reading, pieces
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import FixedCharTokenizer

NANOGPT_BPE = "nanogpt-bpe"
WHO = ("modern", learning.NANOGPT, NANOGPT_BPE)
GIVEN = {**learning.CPU_SIZES, "threads": 1}
COLUMNS = ("text", "bytes", "who", "tokens_of", "vocab_size", "lost", "steps", "bits_per_byte",
           "bytes_per_token", "seconds")  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """A text in the tokens of one learner."""

    name: str  # of their kind
    tokenizer: Tokenizer
    train: Array
    val: Array
    lost: int  # characters

    def bits_per_byte(self, loss: float) -> float:
        """Convert the loss over `val`, in nats per token."""
        return loss / math.log(2) / self.bytes_per_token()

    def bytes_per_token(self) -> float:
        """Return the mean over the tokens of `val` that are predicted."""
        return float(np.mean(self.tokenizer.token_bytes()[self.val[1:]]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", required=True, type=named_file, metavar="NAME=FILE")
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--tokenizers", nargs="+", default=["auto"], metavar="KIND[:SIZE]")
    parser.add_argument("--who", nargs="+", default=WHO, choices=WHO)
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other options")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()

    results: list[dict[str, Any]] = []
    print(f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|", flush=True)
    for name, file in options.data:
        for result in runs(options, file):
            results.append({"text": name, "bytes": file.stat().st_size, **result})
            print(f"| {' | '.join(cell(results[-1][c]) for c in COLUMNS)} |", flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")


def named_file(value: str) -> tuple[str, Path]:
    name, equals, file = value.partition("=")
    if not (name and equals and Path(file).is_file()):
        raise argparse.ArgumentTypeError(f"{value!r} is not NAME=FILE with a file that exists")
    return name, Path(file)


def cell(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def runs(options: argparse.Namespace, file: Path) -> Iterator[dict[str, Any]]:
    """Every learner with every tokenizer on this text; the characters of nanoGPT come last."""
    for requested in options.tokenizers:
        kind = text.requested_tokenizer(options_of(requested))
        tokenizer, corpus = text.load([file], Reading(), kind)
        lost = sum(corpus.unknown.values())
        name = str(tokenizer.to_json()["type"])
        tokens = Tokens(name, tokenizer, corpus.train, corpus.val, lost)
        if "modern" in options.who:
            yield one_run(options, "modern", tokens, corpus)
        if NANOGPT_BPE in options.who and name != "char":
            yield one_run(options, NANOGPT_BPE, tokens, corpus)
    if learning.NANOGPT in options.who:
        yield one_run(options, learning.NANOGPT, characters(file, tokenizer, corpus), corpus)


def characters(file: Path, tokenizer: Tokenizer, corpus: Corpus) -> Tokens:
    """Return the text in characters, cut where `corpus` cuts its tokens."""
    whole = "".join(piece.text for piece in pieces(file))
    n_train = len(tokenizer.decode(np.asarray(corpus.train)))
    table = FixedCharTokenizer(tuple(sorted(set(whole))))
    return Tokens("all", table, table.encode(whole[:n_train]), table.encode(whole[n_train:]), 0)


def one_run(
    options: argparse.Namespace, who: str, tokens: Tokens, corpus: Corpus
) -> dict[str, Any]:
    recipe = "modern" if who == "modern" else learning.NANOGPT
    learner = learning.make(
        options, recipe, GIVEN, options.steps, options.seed, tokens.tokenizer, corpus
    )
    if recipe == learning.NANOGPT:
        hold_to_one_thread()
    began = time.process_time()
    for i in range(options.steps):
        learner.step(i, tokens.train)
    seconds = time.process_time() - began
    loss = learner.loss(tokens.val)
    return {
        "who": who, "tokens_of": tokens.name, "vocab_size": tokens.tokenizer.vocab_size,
        "lost": tokens.lost, "steps": options.steps, "bits_per_byte": tokens.bits_per_byte(loss),
        "bytes_per_token": tokens.bytes_per_token(), "loss": loss, "seconds": seconds,
    }  # fmt: skip


def hold_to_one_thread() -> None:
    """PyTorch, that is: the others have `threads`."""
    import torch

    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
