"""The rows `sizes` of benchmarks/learning.py: does the rule's rate hold at other sizes and batches,
and does a run on a short text end near its best?

A size is trained at half, once and twice the rate of the rule, at the same decay a step; the rule
holds if its loss is within WITHIN_BEST_RATE of the best. A text is trained on by default settings
alone; its last loss is to be within WITHIN_BEST_STEP of the best along the way.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learning import Ours, parse

from mlx_randygpt import settings
from mlx_randygpt.cli.training import text
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.tokenizers import Tokenizer

FACTORS = (0.5, 1.0, 2.0)  # of the rule's rate
WITHIN_BEST_RATE = 0.01
WITHIN_BEST_STEP = 0.03
EVALUATIONS = 10  # of a run on a text


@dataclass(frozen=True)
class Size:
    """One model and batch, trained for so many steps on the whole text."""

    n_layer: int
    n_embd: int
    batch_size: int
    steps: int
    block_size: int = 64

    def options(self) -> dict[str, Any]:
        sizes = {name: getattr(self, name) for name in ("n_layer", "n_embd", "batch_size")}
        return {**sizes, "block_size": self.block_size, "n_head": 4, "iters": self.steps}


SIZES = {
    "width-64": Size(4, 64, 12, 300),
    "width-128": Size(4, 128, 12, 300),
    "width-256": Size(4, 256, 12, 300),
    "width-384": Size(4, 384, 12, 1000),
    "width-512": Size(4, 512, 12, 1000),
    "depth-2": Size(2, 128, 12, 300),
    "depth-8": Size(8, 128, 12, 300),
    "depth-16": Size(16, 128, 12, 300),
    "batch-1": Size(4, 128, 1, 600),
    "batch-3": Size(4, 128, 3, 600),
    "batch-32": Size(4, 128, 32, 200),
    "batch-64": Size(4, 128, 64, 200),
    "context-256": Size(4, 128, 3, 300, block_size=256),
}
TEXTS = {"text-5kB": 5_000, "text-20kB": 20_000, "text-100kB": 100_000, "text-1MB": 1_000_000}
NAMES = (*SIZES, *TEXTS)


def run_sizes(options: argparse.Namespace, tokenizer: Tokenizer, corpus: Corpus) -> None:
    """Train what the results file lacks, one line a run, and print a line for each row."""
    path: Path = options.results
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    for name in options.sizes or NAMES:
        for seed in options.seeds:
            for run in runs(options, name, seed, tokenizer, corpus, done):
                done.append(run)
                with path.open("a") as file:
                    file.write(json.dumps(run) + "\n")
        print(verdict(name, [run for run in done if run["row"] == name]), flush=True)


def runs(
    options: argparse.Namespace,
    name: str,
    seed: int,
    tokenizer: Tokenizer,
    corpus: Corpus,
    done: list[dict[str, Any]],
) -> Iterator[dict[str, Any]]:
    """Yield the runs of this row and seed that are not done yet."""
    finished = {(run["row"], run["seed"], run.get("factor", 1.0)) for run in done}
    given = {"seed": seed, **dict(parse(options.set))}
    if name in TEXTS and (name, seed, 1.0) not in finished:
        tokenizer, corpus = beginning(options.data, TEXTS[name])
        learner = Ours(given, tokenizer, corpus, options.backend)
        yield {"row": name, "seed": seed, **curve(learner, corpus, EVALUATIONS)}
    for factor in FACTORS if name in SIZES else ():
        if (name, seed, factor) in finished:
            continue
        sizes = given | SIZES[name].options()
        _, rule = settings.resolve_new(sizes, tokenizer.vocab_size, len(corpus.train))
        rates = {"lr": factor * rule.lr, "weight_decay": rule.weight_decay / factor}
        learner = Ours(sizes | rates, tokenizer, corpus, options.backend)
        yield {"row": name, "seed": seed, "factor": factor, **curve(learner, corpus, 1)}


def curve(learner: Ours, corpus: Corpus, evaluations: int) -> dict[str, Any]:
    """Train to the end; return the losses on the way and what decided them."""
    train, losses, started = learner.train, {}, time.perf_counter()
    every = -(-train.iters // evaluations)
    for step in range(train.iters):
        learner.step(step, corpus.train)
        if (step + 1) % every == 0 or step + 1 == train.iters:
            losses[step + 1] = learner.loss(corpus.val)
    return {
        "loss": losses[train.iters],
        "best": min(losses.values()),
        "curve": losses,
        "preset": train.preset,
        "steps": train.iters,
        "lr": train.lr,
        "weight_decay": train.weight_decay,
        "dropout": learner.model.dropout,
        "seconds": round(time.perf_counter() - started),
    }


def beginning(data: list[str], n_bytes: int) -> tuple[Tokenizer, Corpus]:
    """Return the first bytes of the text as a text of its own."""
    content = b"".join(Path(file).read_bytes() for file in text.files_of(data))[:n_bytes]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "text.txt")
        path.write_text(content.decode(errors="ignore"))
        return text.load([path], Reading(), Vocabulary())


def verdict(name: str, runs: list[dict[str, Any]]) -> str:
    """Return a line with the mean losses of a row and whether the rule holds."""
    if name in TEXTS:
        gap = statistics.mean(run["loss"] - run["best"] for run in runs)
        losses = {"last": [run["loss"] for run in runs], "best": [run["best"] for run in runs]}
        bound = WITHIN_BEST_STEP
    else:
        losses = {
            f"x{factor:g}": [run["loss"] for run in runs if run["factor"] == factor]
            for factor in FACTORS
        }
        means = {factor: statistics.mean(values) for factor, values in losses.items()}
        gap, bound = means["x1"] - min(means.values()), WITHIN_BEST_RATE
    seen = ", ".join(f"{key} {statistics.mean(values):.4f}" for key, values in losses.items())
    said = "holds" if gap <= bound else "does not hold"
    n_seeds = len({run["seed"] for run in runs})
    about = f"{runs[0]['preset']}, " if name in TEXTS else ""
    return f"{name} ({about}{runs[0]['steps']} steps, {n_seeds} seeds): {seen}: {gap:.4f}, {said}"
