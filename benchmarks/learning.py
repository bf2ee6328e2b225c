"""How well the recipes learn, beside nanoGPT's: every figure of docs/recipes.md with one command.

    pip install '.[bench]'
    python benchmarks/learning.py [--rows short cpu default wall large sizes] [--data FILE ...]
        [--seeds 1337 1338 1339] [--backend numpy] [--set NAME=VALUE ...]
        [--json learning.json] [--plot learning.svg]
        [--sizes width-384 text-5kB ...] [--results sizes.jsonl]

Losses are those of `mlxgpt eval`: the whole last tenth of the text, nats per character. Without
--data it is the text that `mlxgpt train` takes. `default` takes 20 minutes a seed on two cores;
`large` is for a GPU. Results are written after each run, so an interrupted call keeps them.
`sizes` are the rules of rates and of short texts at many sizes (benchmarks/learning_sizes.py);
`--sizes` takes some of them, and runs that are in the results file are not repeated.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mlx_randygpt import settings
from mlx_randygpt.backends import make_backend
from mlx_randygpt.cli.training import text
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import Vocabulary
from mlx_randygpt.model import initial_state
from mlx_randygpt.recipes import PRESETS
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.training.evaluation import evaluate
from mlx_randygpt.training.loop import step_batches, step_rate

NANOGPT = "nanogpt"


@dataclass(frozen=True)
class Row:
    """One line of the table: who trains at which sizes for how long."""

    who: tuple[str, ...]
    steps: int
    given: dict[str, Any] = field(default_factory=dict)  # options of `mlxgpt train`


CPU_SIZES = {"preset": "small4", "n_head": 4, "batch_size": 12}  # 4/4/128, 12 × 64 characters
LARGE_SIZES = {"preset": "xl", "n_layer": 6, "n_head": 6}  # 6/6/384, 64 × 256 characters
ROWS = {
    "short": Row(("modern",), 250, CPU_SIZES),
    "cpu": Row(("modern", "classic", NANOGPT), 2000, CPU_SIZES),
    "default": Row(("modern",), 5000),
    "large": Row(("modern",), 5000, LARGE_SIZES),
}
WALL = {"modern": 170, NANOGPT: 2000}  # steps that are timed in turns, at CPU_SIZES


class Learner(Protocol):
    def step(self, i: int, tokens: Array) -> None: ...
    def loss(self, tokens: Array) -> float: ...


class Ours:
    """A run as `mlxgpt train` with these options takes it."""

    def __init__(
        self, given: dict[str, Any], tokenizer: Tokenizer, corpus: Corpus, backend: str
    ) -> None:
        given = {"prompt": "\n", **given}
        self.tokenizer = tokenizer
        self.model, self.train = settings.resolve_new(
            given, tokenizer.vocab_size, len(corpus.train)
        )
        state = initial_state(self.model, self.train.seed)
        self.backend = make_backend(backend, self.model, self.train, state)

    def step(self, i: int, tokens: Array) -> None:
        batches = step_batches(self.train, tokens, self.model.block_size, i)
        self.backend.train_step(batches, step_rate(self.train, i))

    def loss(self, tokens: Array) -> float:
        score = evaluate(
            self.backend, tokens, self.model.block_size, 64, self.tokenizer.token_bytes()
        )
        assert score is not None
        return score.loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    rows = [*ROWS, "wall", "sizes"]
    parser.add_argument("--rows", nargs="+", default=["short", "cpu", "wall"], choices=rows)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1337, 1338, 1339])
    parser.add_argument("--who", nargs="+", help="only these recipes")
    parser.add_argument("--backend", default="numpy")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="other options")
    parser.add_argument("--sizes", nargs="+", help="only these rows of `sizes`")
    parser.add_argument("--results", type=Path, default=Path("sizes.jsonl"), help="of `sizes`")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, help="a picture of all curves (needs matplotlib)")
    options = parser.parse_args()

    files = text.files_of(options.data)
    tokenizer, corpus = text.load(files, Reading(), Vocabulary())
    results: list[dict[str, Any]] = []
    for name in options.rows:
        if name == "sizes":
            from learning_sizes import run_sizes

            run_sizes(options, tokenizer, corpus)
            continue
        runs = (
            wall(options, tokenizer, corpus)
            if name == "wall"
            else row(options, name, tokenizer, corpus)
        )
        for result in runs:
            results.append({"row": name, **result})
            if options.json:
                about = {key: str(value) for key, value in vars(options).items()}
                options.json.write_text(json.dumps({"options": about, "runs": results}, indent=1))
    if options.plot:
        plot(results, options.plot)


def row(
    options: argparse.Namespace, name: str, tokenizer: Tokenizer, corpus: Corpus
) -> Iterator[dict[str, Any]]:
    """Every seed of every learner of this row, with the mean and spread of each printed."""
    spec = ROWS[name]
    for who in (who for who in spec.who if who in (options.who or spec.who)):
        losses = []
        for seed in options.seeds:
            run = one_run(options, who, spec, seed, tokenizer, corpus)
            losses.append(run["loss"])
            yield run
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        print(f"{name} {who}: {statistics.mean(losses):.4f} ± {spread:.4f}, {len(losses)} seeds")


def one_run(
    options: argparse.Namespace, who: str, spec: Row, seed: int,
    tokenizer: Tokenizer, corpus: Corpus,
) -> dict[str, Any]:  # fmt: skip
    learner = make(options, who, spec.given, spec.steps, seed, tokenizer, corpus)
    every, curve, seconds = -(-spec.steps // 10), {}, 0.0
    for i in range(spec.steps):
        started = time.perf_counter()
        learner.step(i, corpus.train)
        seconds += time.perf_counter() - started  # of training alone
        if (i + 1) % every == 0 or i + 1 == spec.steps:
            curve[i + 1] = learner.loss(corpus.val)
    loss = curve[spec.steps]
    best = min(curve, key=lambda step: curve[step])
    print(
        f"  {who} seed {seed}, {spec.steps} steps: {loss:.4f}, best {curve[best]:.4f} at {best}, "
        f"{seconds:.0f} s",
        flush=True,
    )
    about = asdict(learner.model) | asdict(learner.train) if isinstance(learner, Ours) else {}
    return {
        "who": who, "seed": seed, "steps": spec.steps, "loss": loss, "best_loss": curve[best],
        "best_step": best, "seconds": seconds, "curve": curve, "settings": about,
    }  # fmt: skip


def make(
    options: argparse.Namespace, who: str, given: dict[str, Any], steps: int, seed: int,
    tokenizer: Tokenizer, corpus: Corpus,
) -> Learner:  # fmt: skip
    if who != NANOGPT:
        more = dict(parse(options.set))
        all_given = {"recipe": who, "iters": steps, "seed": seed, **given, **more}
        return Ours(all_given, tokenizer, corpus, options.backend)
    from nanogpt import NanoGPT

    sizes = asdict(PRESETS[given["preset"]]) | given
    names = ("block_size", "n_layer", "n_head", "n_embd", "batch_size")
    return NanoGPT(tokenizer.vocab_size, **{n: sizes[n] for n in names}, steps=steps, seed=seed)


def wall(
    options: argparse.Namespace, tokenizer: Tokenizer, corpus: Corpus
) -> Iterator[dict[str, Any]]:
    """The time of nanoGPT's steps beside that of the few of ours that reach its loss. Both train
    in turns, in proportion, so that a slow spell of the machine hits both."""
    learners = {
        who: make(options, who, CPU_SIZES, steps, options.seeds[0], tokenizer, corpus)
        for who, steps in WALL.items()
    }
    seconds, done = dict.fromkeys(WALL, 0.0), dict.fromkeys(WALL, 0)
    for turn in range(min(WALL.values())):
        for who, learner in learners.items():
            goal = WALL[who] * (turn + 1) // min(WALL.values())
            started = time.perf_counter()
            while done[who] < goal:
                learner.step(done[who], corpus.train)
                done[who] += 1
            seconds[who] += time.perf_counter() - started
    losses = {who: learner.loss(corpus.val) for who, learner in learners.items()}
    for who in WALL:
        print(f"wall {who}: {losses[who]:.4f} after {WALL[who]} steps in {seconds[who]:.1f} s")
        yield {"who": who, "steps": WALL[who], "loss": losses[who], "seconds": seconds[who]}
    print(f"wall: nanoGPT takes {seconds[NANOGPT] / seconds['modern']:.1f} times as long")


def parse(pairs: list[str]) -> Iterator[tuple[str, Any]]:
    for pair in pairs:
        name, value = pair.split("=")
        yield name, json.loads(value)


def plot(results: list[dict[str, Any]], path: Path) -> None:
    """Validation loss over tokens, one panel a row."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(r["row"] for r in results if "curve" in r))
    figure = Figure(figsize=(5.5 * max(1, len(names)), 4), layout="constrained")
    for index, name in enumerate(names):
        axes = figure.add_subplot(1, len(names), index + 1)
        axes.set(title=name, xlabel="steps", ylabel="validation loss (nats per character)")
        axes.grid(alpha=0.3)
        colors: dict[str, str] = {}
        for run in (r for r in results if r["row"] == name):
            who = run["who"]
            label = who if who not in colors else None
            colors.setdefault(who, f"C{len(colors)}")
            axes.plot(list(run["curve"]), list(run["curve"].values()), color=colors[who],
                      label=label, linewidth=1.2)  # fmt: skip
        axes.legend()
    figure.savefig(path)


if __name__ == "__main__":
    main()
