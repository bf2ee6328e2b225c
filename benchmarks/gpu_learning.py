"""A whole run on the device MLX finds: how low the validation loss goes, and how soon."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from gpu_training import LARGE, TINY, goal, lacking, steps
from learning import Ours
from turns import timed

from mlx_randygpt.data.corpus import Corpus, Loader
from mlx_randygpt.data.files import find_files
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.tokenizers import Tokenizer

Found = Iterator[tuple[str, dict[str, Any]]]
MOST_STEPS = 2000
RUN_SECONDS = 50.0  # the run is as long as the device manages in them, for its rate ends at zero
GOAL_LOSS, GOAL_SECONDS = 1.47, 30.0
EVALUATIONS = 20


def learning(options: argparse.Namespace) -> Found:
    """Validation loss over steps and seconds, evaluations included, compilation too."""
    if not options.data:
        yield "skipped", {"why": "no text; give tiny Shakespeare with --data"}
        return
    case = TINY if options.small else LARGE
    if why := lacking(*case.settings(dtype="bfloat16")):
        yield "skipped", {"why": f"{case.name} {why}"}
        return
    tokenizer, corpus = Loader().load(find_files([options.data]), Vocabulary())
    given = {**case.given, "dtype": "bfloat16"}
    iters = 40 if options.small else affordable(given, tokenizer, corpus)
    run = Ours({**given, "iters": iters}, tokenizer, corpus, "mlx")
    started, best, reached = time.perf_counter(), float("inf"), None
    evaluations = 3 if options.small else EVALUATIONS
    for chunk in range(evaluations):
        target = iters * (chunk + 1) // evaluations
        steps(run.backend, run.train, corpus.train, target - run.backend.step)
        loss = run.loss(corpus.val)
        seconds = time.perf_counter() - started
        best = min(best, loss)
        reached = seconds if reached is None and loss <= GOAL_LOSS else reached
        yield "learning", {
            "step": target, "of": iters, "val_loss": round(loss, 4), "best": round(best, 4),
            "seconds": round(seconds, 2),
        }  # fmt: skip
    yield "goals", goal(f"seconds to a validation loss of {GOAL_LOSS}", reached, most=GOAL_SECONDS)


def affordable(given: dict[str, Any], tokenizer: Tokenizer, corpus: Corpus) -> int:
    """Steps that fit RUN_SECONDS, at the pace of a few."""
    trial = Ours({**given, "iters": MOST_STEPS}, tokenizer, corpus, "mlx")
    steps(trial.backend, trial.train, corpus.train, 5)
    pace = timed(lambda: steps(trial.backend, trial.train, corpus.train, 5)) / 5
    return max(EVALUATIONS, min(MOST_STEPS, int(RUN_SECONDS / pace)))
