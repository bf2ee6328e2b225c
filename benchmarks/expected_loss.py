"""The constants of the expected loss (mlx_randygpt/planning/expected_loss.py), fitted to runs.

    python benchmarks/expected_loss.py --data data/shakespeare.txt [--results expected.jsonl]

Trains presets for so many steps, everything else by default, one seed; runs that are in the
results file are not repeated. Then prints each loss beside the formula's, and the constants that
fit best: for every choice of the powers the rest is linear. With --data of another text, the
constants stay and the table shows how far they carry.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
from learning import Ours

from mlx_randygpt.cli.training import text
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.planning.expected_loss import TextFacts, expected_loss, terms, text_facts
from mlx_randygpt.settings import resolve_new

GRID = {
    "mini": (1000,),
    "tiny": (300, 1500, 5000),
    "small4": (100, 350, 1000),
    "small": (100, 300, 900),
    "medium": (40, 100),
}
SEED = 1337
SIZE_POWERS, STEPS_POWERS = np.arange(0.1, 0.85, 0.05), np.arange(0.2, 1.05, 0.05)
CONTEXT_POWERS = np.arange(0.3, 1.6, 0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--results", type=Path, default=Path("expected.jsonl"))
    parser.add_argument("--no-runs", action="store_true", help="only fit what is in the results")
    options = parser.parse_args()
    tokenizer, corpus = text.load(text.files_of(options.data), Reading(), Vocabulary())
    facts = text_facts(corpus, tokenizer)
    rows = read(options.results)
    done = {(row["preset"], row["steps"]) for row in rows}
    todo = [(preset, n) for preset, steps in GRID.items() for n in steps]
    for preset, steps in [] if options.no_runs else todo:
        if (preset, steps) in done:
            continue
        learner = Ours({"preset": preset, "iters": steps, "seed": SEED}, tokenizer, corpus, "numpy")
        for i in range(steps):
            learner.step(i, corpus.train)
        rows.append({"preset": preset, "steps": steps, "loss": learner.loss(corpus.val)})
        with options.results.open("a") as file:
            file.write(json.dumps(rows[-1]) + "\n")
    show(rows, tokenizer.vocab_size, facts)
    fit(rows, tokenizer.vocab_size, facts)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def show(rows: list[dict[str, Any]], vocab_size: int, facts: TextFacts) -> None:
    print(f"difficulty {facts.difficulty:.3f}, {facts.bytes_per_token:.2f} bytes a token")
    errors = []
    for row in rows:
        options = {"preset": row["preset"], "iters": row["steps"]}
        expected = expected_loss(*resolve_new(options, vocab_size, facts.n_tokens), facts)
        errors.append(expected / row["loss"] - 1)
        print(
            f"  {row['preset']:7} {row['steps']:6} {row['loss']:.4f} {expected:.4f} "
            f"{errors[-1]:+.1%}"
        )
    print(f"largest error {max(map(abs, errors)):.1%}")


def fit(rows: list[dict[str, Any]], vocab_size: int, facts: TextFacts) -> None:
    """Print the constants with the least squared relative error; none below zero."""
    values = []
    for row in rows:
        options = {"preset": row["preset"], "iters": row["steps"]}
        values.append(terms(*resolve_new(options, vocab_size, facts.n_tokens), facts))
    weights, steps, context = (np.array(column) for column in zip(*values, strict=True))
    losses = np.array([row["loss"] for row in rows])
    per_byte = losses / facts.bytes_per_token / facts.difficulty
    best: tuple[float, Any, Any] = (np.inf, None, None)
    for powers in itertools.product(SIZE_POWERS, STEPS_POWERS, CONTEXT_POWERS):
        columns = [x**-power for x, power in zip((weights, steps, context), powers, strict=True)]
        table = np.stack([np.ones_like(weights), *columns], axis=1) / per_byte[:, None]
        solved = np.linalg.lstsq(table, np.ones(len(rows)))[0]
        error = float(np.square(table @ solved - 1).sum())
        if (solved >= 0).all() and error < best[0]:
            best = error, powers, solved
    print("powers of size, steps, context:", np.round(best[1], 3))
    print("floor, size, steps, context:", np.round(best[2], 4))
    print(f"root mean square error {np.sqrt(best[0] / len(rows)):.2%}")


if __name__ == "__main__":
    main()
