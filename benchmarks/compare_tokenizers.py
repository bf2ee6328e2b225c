"""Tokenizers at equal wall time: bits per byte on the whole validation split.

`--tokenizers` names them as KIND or KIND:SIZE. All models train in one process, the one that has
used the least time taking the next step, so that a slow spell of the machine hits all alike. The
number of steps of each follows from its pace, measured first, and with it the schedule: all end
when their time does. A vocabulary is learned from the first nine tenths of the text only: with the
rest it would hold whole phrases of a short text as tokens, and score too well. Bits per byte of
characters count only those that are not lost.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlx_randygpt import settings
from mlx_randygpt.backends import make_backend
from mlx_randygpt.cli.training import text
from mlx_randygpt.data import vocabulary
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.data.reading import Reading, pieces
from mlx_randygpt.data.split import TRAIN_SHARE
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.model import initial_state
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.training.evaluation import evaluate
from mlx_randygpt.training.loop import step_batches, step_rate

WARM_UP = 6  # steps, of which the first is not counted


@dataclass
class Learner:
    """A run as `mlxgpt train` with these options takes it."""

    given: dict[str, Any]
    tokenizer: Tokenizer
    corpus: Corpus
    backend_name: str
    seconds: float = 0.0
    steps: int = 0
    backend: Any = field(init=False)

    def __post_init__(self) -> None:
        n_train = len(self.corpus.train)
        self.model, self.train = settings.resolve_new(
            self.given, self.tokenizer.vocab_size, n_train
        )
        state = initial_state(self.model, self.train.seed)
        self.backend = make_backend(self.backend_name, self.model, self.train, state)

    def step(self) -> None:
        began = time.perf_counter()
        size = self.model.block_size
        batches = step_batches(self.train, self.corpus.train, size, self.steps)
        self.backend.train_step(batches, step_rate(self.train, self.steps))
        self.steps += 1
        self.seconds += time.perf_counter() - began

    def score(self) -> dict[str, Any]:
        sizes = self.tokenizer.token_bytes()
        score = evaluate(self.backend, self.corpus.val, self.model.block_size, 64, sizes)
        assert score is not None
        return {
            "vocab_size": self.model.vocab_size, "steps": self.steps, "seconds": self.seconds,
            "loss": score.loss, "bits_per_byte": score.bits_per_byte,
            "lost": sum(self.corpus.unknown.values()) / max(1, self.corpus.characters),
        }  # fmt: skip


def options_of(name: str) -> dict[str, Any]:
    """Return the options that ask for the tokenizer KIND or KIND:SIZE."""
    kind, _, size = name.partition(":")
    return {"tokenizer": kind} | ({"vocab_size": int(size)} if size else {})


def learn(files: list[Path], requested: Tokenizer | Vocabulary) -> Tokenizer:
    """Learn the tokenizer from the first nine tenths of the text, unless it is given."""
    if not isinstance(requested, Vocabulary):
        return requested
    whole = "".join(piece.text for file in files for piece in pieces(file))
    first = whole[: int(TRAIN_SHARE * len(whole))]
    return vocabulary.learn(requested, lambda: [first], len(first.encode()))[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--tokenizers", nargs="+", default=["char", "bpe"])
    parser.add_argument("--seconds", type=float, default=120, help="of training, each")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other options")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    given = {name: json.loads(value) for name, value in (s.split("=", 1) for s in options.set)}
    given.setdefault("prompt", "\n")
    files = text.files_of(options.data)
    kinds = {name: text.requested_tokenizer(options_of(name)) for name in options.tokenizers}
    texts = {name: text.load(files, Reading(), learn(files, kind)) for name, kind in kinds.items()}
    learners = {n: Learner(given, *texts[n], options.backend) for n in texts}
    for i in range(WARM_UP):
        for learner in learners.values():
            learner.seconds *= i > 1
            learner.step()
    for name, old in learners.items():
        iters = int(options.seconds / (old.seconds / (WARM_UP - 1)))
        learners[name] = Learner(given | {"iters": iters}, *texts[name], options.backend)
    waiting = list(learners.values())
    while waiting:
        next_one = min(waiting, key=lambda learner: learner.seconds)
        next_one.step()
        if next_one.steps == next_one.train.iters:
            waiting.remove(next_one)
    results = {name: learner.score() for name, learner in learners.items()}
    print(json.dumps(results, indent=2))
    if options.json:
        options.json.write_text(json.dumps(results) + "\n")


if __name__ == "__main__":
    main()
