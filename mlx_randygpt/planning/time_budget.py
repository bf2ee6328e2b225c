"""Which preset and how many steps a time allows: short measured steps, and the expected loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mlx_randygpt import settings
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import flops_per_token
from mlx_randygpt.planning.expected_loss import TextFacts, expected_loss
from mlx_randygpt.recipes import SIZES_FOR_TIMES
from mlx_randygpt.words import format_duration

LEAST_STEPS = 50  # that a preset has to reach in the time, for a larger one to be tried
TRIAL_SHARE = 0.01  # of the time, for the trial steps of a preset

Measure = Callable[
    [ModelConfig, TrainConfig, float], float
]  # at most so long; seconds of a micro-batch


@dataclass(frozen=True)
class TimedRun:
    """A run that fits into a time."""

    model: ModelConfig
    train: TrainConfig
    step_seconds: float
    loss: float  # expected, in nats per token
    is_full: bool  # whether it uses all of the time

    @property
    def seconds(self) -> float:
        """Return the time of its steps."""
        return self.train.iters * self.step_seconds


def choose_run(
    options: settings.Options,
    seconds: float,
    vocab_size: int,
    text: TextFacts,
    measure: Measure,
) -> TimedRun:
    """Return the run with the least expected loss that ends within `seconds`.

    `options` are those that the user gave; what they fix (preset, sizes, number of steps) stays,
    the rest follows. Raises ConfigError if they fix everything.
    """
    if "iters" in options and _has_sizes(options):
        raise ConfigError(
            "the time decides the preset or the number of steps, and both are given: "
            "omit the time, --iters, or --preset and the sizes"
        )
    runs = [*_runs(options, seconds, vocab_size, text, measure)]
    fitting = [run for run in runs if run.seconds <= seconds] or runs[:1]
    return min(fitting, key=lambda run: run.loss)


def describe(run: TimedRun, seconds: float, *, knows_loss: bool = True) -> str:
    """Return the line that states the choice; the loss of answers alone is not known before."""
    time = format_duration(seconds)
    choice = f"preset {run.train.preset}, about {run.train.iters:,} steps"
    short = (
        ""
        if run.is_full
        else f" The run ends after about {format_duration(run.seconds)}: "
        "more steps would learn this text by heart."
    )
    loss = f"; expected validation loss {run.loss:.2f}" if knows_loss else ""
    return f"Chosen for {time}: {choice}{loss}.{short}"


def _has_sizes(options: settings.Options) -> bool:
    return any(name in options for name in ("preset", *settings.MODEL_SIZES))


def _runs(
    options: settings.Options,
    seconds: float,
    vocab_size: int,
    text: TextFacts,
    measure: Measure,
) -> Iterator[TimedRun]:
    """Yield a run for each preset from the smallest on, until the time is too short for more."""
    presets = [{}] if _has_sizes(options) else [{"preset": name} for name in SIZES_FOR_TIMES]
    last: TimedRun | None = None
    for preset in presets:
        model, train = settings.resolve_new(options | preset, vocab_size, text.n_tokens)
        if last and seconds / _scaled(last, model, train) < LEAST_STEPS:
            return
        step = train.grad_accum * measure(model, train, TRIAL_SHARE * seconds)
        last = fit_run(model, train, options, seconds, step, text)
        yield last


def fit_run(
    model: ModelConfig,
    train: TrainConfig,
    options: settings.Options,
    seconds: float,
    step_seconds: float,
    text: TextFacts,
) -> TimedRun:
    """Return the run of as many steps as the time, the options and the text allow."""
    steps, is_full = train.iters, False
    if "iters" not in options:
        affordable = max(1, int(seconds / step_seconds))
        steps = min(affordable, settings.most_iters(model, train, text.n_tokens))
        is_full = steps == affordable
    train = replace(train, iters=steps)
    loss = expected_loss(model, train, text)
    return TimedRun(model, train, step_seconds=step_seconds, loss=loss, is_full=is_full)


def _scaled(run: TimedRun, model: ModelConfig, train: TrainConfig) -> float:
    """Return the time of a step of another model, at the same FLOP/s."""

    def flops(model: ModelConfig, train: TrainConfig) -> float:
        return flops_per_token(model) * model.block_size * train.sequences_per_step

    return run.step_seconds * flops(model, train) / flops(run.model, run.train)
