"""The constants of the expected loss (mlx_randygpt/planning/expected_loss.py), fitted to runs.

    python benchmarks/expected_loss.py --data data/shakespeare.txt [--others c.txt russian.txt ...]
        [--results expected.jsonl] [--threads 0] [--no-runs]

Trains presets on --data for so many steps, everything else by default, one seed, and fewer of them
on each of the --others; runs that are in the results file are not repeated. Then prints each loss
beside the formula's, and the constants that fit --data best: for every choice of the powers the
rest is linear. The others say when compression counts, and how far the formula carries.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from learning import Ours
from numpy.typing import NDArray

from mlx_randygpt.cli.training import text
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import AUTO, Vocabulary
from mlx_randygpt.planning.expected_loss import TextFacts, expected_loss, terms, text_facts
from mlx_randygpt.settings import resolve_new
from mlx_randygpt.tokenizers import Tokenizer

GRID = {
    "mini": (1000,),
    "tiny": (400, 1800, 5000),
    "small4": (100, 400, 1600),
    "small": (100, 340, 1000),
    "medium": (40, 100),
}
OTHERS_GRID = {"tiny": (400,), "small4": (100, 400)}
SEED = 1337
SIZE_POWERS, STEPS_POWERS = np.arange(0.1, 0.85, 0.05), np.arange(0.2, 1.05, 0.05)
CONTEXT_POWERS = np.arange(0.3, 1.6, 0.1)


@dataclass
class Text:
    """A text, its facts, and the runs on it."""

    name: str
    tokenizer: Tokenizer
    corpus: Corpus
    facts: TextFacts
    rows: list[dict[str, Any]]

    def configs(self, row: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
        options = {"preset": row["preset"], "iters": row["steps"]}
        return resolve_new(options, self.tokenizer.vocab_size, self.facts.n_tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--others", nargs="*", default=[])
    parser.add_argument("--results", type=Path, default=Path("expected.jsonl"))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--no-runs", action="store_true", help="only fit what is in the results")
    options = parser.parse_args()
    texts = [read(path, options.results) for path in (options.data, *options.others)]
    for each in [] if options.no_runs else texts:
        run(each, GRID if each is texts[0] else OTHERS_GRID, options)
    for each in texts:
        show(each)
    per_byte = fit(texts[0])
    if options.others:
        fit_share(texts[1:], per_byte)


def read(path: str, results: Path) -> Text:
    tokenizer, corpus = text.load(text.files_of([path]), Reading(), Vocabulary(AUTO))
    lines = results.read_text().splitlines() if results.exists() else []
    rows = [json.loads(line) for line in lines]
    name = Path(path).stem
    rows = [row for row in rows if row["text"] == name]
    return Text(name, tokenizer, corpus, text_facts(corpus, tokenizer), rows)


def run(each: Text, grid: dict[str, tuple[int, ...]], options: argparse.Namespace) -> None:
    done = {(row["preset"], row["steps"]) for row in each.rows}
    todo = [(preset, n) for preset, steps in grid.items() for n in steps]
    for preset, steps in todo:
        if (preset, steps) in done:
            continue
        given = {"preset": preset, "iters": steps, "seed": SEED, "threads": options.threads}
        learner = Ours(given, each.tokenizer, each.corpus, "numpy")
        for i in range(steps):
            learner.step(i, each.corpus.train)
        row = {"text": each.name, "preset": preset, "steps": steps}
        each.rows.append(row | {"loss": learner.loss(each.corpus.val)})
        with options.results.open("a") as file:
            file.write(json.dumps(each.rows[-1]) + "\n")


def show(each: Text) -> None:
    facts = each.facts
    print(
        f"{each.name}: {facts.bytes_per_token:.2f} bytes a token, difficulty for n-grams "
        f"{facts.for_ngrams:.3f}, for compression {facts.for_compression:.3f}"
    )
    for row in each.rows:
        expected = expected_loss(*each.configs(row), facts)
        print(
            f"  {row['preset']:7} {row['steps']:6} {row['loss']:.4f} {expected:.4f} "
            f"{expected / row['loss'] - 1:+.1%}"
        )


def fit(each: Text) -> Any:
    """Print the constants with the least squared relative error; none below zero.

    Returns a function from terms to the fitted loss per byte of this text.
    """
    columns = _terms(each)
    per_byte = np.array([row["loss"] for row in each.rows]) / each.facts.bytes_per_token
    best: tuple[float, Any, Any] = (np.inf, None, None)
    for powers in itertools.product(SIZE_POWERS, STEPS_POWERS, CONTEXT_POWERS):
        table = _table(columns, powers) / per_byte[:, None]
        solved = np.linalg.lstsq(table, np.ones(len(table)))[0]
        error = float(np.square(table @ solved - 1).sum())
        if (solved >= 0).all() and error < best[0]:
            best = error, powers, solved
    print("powers of size, steps, context:", np.round(best[1], 3))
    print("floor, size, steps, context:", np.round(best[2], 4))
    print(f"root mean square error {np.sqrt(best[0] / len(per_byte)):.2%}")
    return lambda columns: _table(columns, best[1]) @ best[2]


def fit_share(texts: list[Text], per_byte: Any) -> None:
    """Print the share of compression in the difficulty, a line in log(weights x steps)."""
    tables, targets = [], []
    for each in texts:
        columns = _terms(each)
        losses = np.array([row["loss"] for row in each.rows]) / each.facts.bytes_per_token
        gap = math.log(each.facts.for_compression / each.facts.for_ngrams)
        line = np.stack([np.ones(len(losses)), np.log(columns[:, 0] * columns[:, 1])], axis=1)
        target = np.log(losses / per_byte(columns) / each.facts.for_ngrams)
        tables.append(gap * line / len(losses) ** 0.5)  # so that each text counts the same
        targets.append(target / len(losses) ** 0.5)
    table, target = np.concatenate(tables), np.concatenate(targets)
    constant, slope = np.linalg.lstsq(table, target)[0]
    error = np.sqrt(np.square(table @ [constant, slope] - target).sum() / len(texts))
    print(f"share of compression: {constant:.3f} + {slope:.4f} log(weights x steps)")
    print(f"root mean square error on the others {error:.1%}")


def _terms(each: Text) -> NDArray[np.float64]:
    """Return the inputs of the formula for each of n runs, (n, 3)."""
    return np.array([terms(*each.configs(row), each.facts) for row in each.rows])


def _table(columns: NDArray[np.float64], powers: Any) -> NDArray[np.float64]:
    return np.concatenate([np.ones((len(columns), 1)), columns ** -np.array(powers)], axis=1)


if __name__ == "__main__":
    main()
