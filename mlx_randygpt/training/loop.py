"""The training loop: batch, learning rate, step, report; the same for every backend.

`train` is a generator of reports, and its consumer decides what to show. The loop owns the order
of events (evaluate, sample, save, step) and never touches a terminal, a signal or a device.
"""

from __future__ import annotations

import math
import time
import weakref
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mlx_randygpt.backends import release_memory, text_scorer
from mlx_randygpt.backends.base import Backend, StepResult
from mlx_randygpt.checkpoint import NEWEST, Checkpoint
from mlx_randygpt.config import ModelConfig, TrainConfig, UserError
from mlx_randygpt.data.windows import (
    Conversations,
    Windows,
    batch_of_passes,
    eval_batches,
    sample_batch,
)
from mlx_randygpt.dialogue import Turn, render_prompt
from mlx_randygpt.progress import Progress
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate
from mlx_randygpt.state import IGNORED, Batch, Tokens, TrainState
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.training.early import COST_SECONDS, EarlyLooks
from mlx_randygpt.training.evaluation import EVAL_BATCH_TOKENS, Score, overfitting, score_batches
from mlx_randygpt.training.reports import (
    EarlyEvalLog,
    EarlySampleLog,
    EndLog,
    EvalLog,
    NoteLog,
    Pace,
    Report,
    SampleLog,
    StepLog,
    TargetLog,
)
from mlx_randygpt.training.saving import Folder, Saver
from mlx_randygpt.training.schedule import is_due, learning_rate
from mlx_randygpt.training.time_limit import TimeLimit

MAX_SKIPS = 10  # consecutive steps that `--on-nan skip` skips before it stops the run
MAX_ROLLBACKS = 3  # per run; each halves the learning rate
EVAL_TOKENS = 1 << 17  # validation tokens per evaluation; `mlxgpt eval` reads the whole split

Pending = tuple[int, float, int, int, StepResult]  # step, rate, targets, their bytes, result


class TrainingDiverged(UserError, ArithmeticError):
    """A loss or gradient that is not finite; no checkpoint is written after it."""


@dataclass(frozen=True)
class Run:
    """Everything that defines a run, except the backend that holds its weights."""

    model: ModelConfig
    train: TrainConfig
    tokenizer: Tokenizer
    train_tokens: Tokens  # (n,)
    val_tokens: Tokens
    data: dict[str, Any]  # recorded in the checkpoint: where the text came from
    progress: Progress = field(default_factory=Progress)
    windows: Windows | None = None  # the rule of training windows; None: anywhere
    val_windows: Conversations | None = None  # that are evaluated; None: all tokens, in order
    text_backend: str = ""  # the name of the one that writes samples; "": the one that trains
    recent_loss: float = math.nan  # of a resumed run: the moving average of its training loss


def train(
    run: Run,
    backend: Backend,
    out: Folder | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
    sync_logs: Callable[[], object] = lambda: None,
    early: Collection[str] = (),
) -> Iterator[Report]:
    """Train from the backend's step to `run.train.iters`; yield a report for every event.

    With `run.train.minutes`, the target moves so that the last step ends with that time.

    Every `save_every`, a snapshot is written to `out` by another thread (None: nothing is saved).
    When `should_stop` returns true, the current step is finished, both files are saved, and the
    generator ends. The other thread calls `sync_logs` before it writes, so that the log lines of
    all earlier reports are on the disk. `early` names the kinds of early looks, of `early.KINDS`.
    Raises TrainingDiverged if the loss or the gradient stops being finite.
    """
    saver, looks = Saver(run.train, out, clock, sync_logs), EarlyLooks(early, clock)
    try:
        yield from Trainer(run, backend, saver, should_stop, clock, looks).run_to_target()
    finally:
        saver.close()
        release_memory(backend)


def step_batches(
    config: TrainConfig,
    tokens: Tokens,
    block_size: int,
    step: int,
    windows: Windows | None = None,
) -> list[Batch]:
    """Return the micro-batches of the step that follows `step` finished ones."""
    size, seed, micros = config.batch_size, config.seed, range(config.grad_accum)
    if config.order == "random":
        return [sample_batch(tokens, size, block_size, seed, step, i, windows) for i in micros]
    first = step * config.sequences_per_step
    return [
        batch_of_passes(tokens, size, block_size, seed, first + i * size, windows) for i in micros
    ]


def step_rate(config: TrainConfig, step: int, reductions: int = 0) -> float:
    """Return the learning rate of the step that follows `step` finished ones."""
    return learning_rate(
        step,
        iters=config.iters,
        warmup=config.warmup,
        lr=config.lr,
        min_lr=config.min_lr,
        schedule=config.schedule,
        reductions=reductions,
    )


class Trainer:
    """A run in progress: the generator methods behind `train` and the state between them."""

    def __init__(
        self,
        run: Run,
        backend: Backend,
        saver: Saver,
        should_stop: Callable[[], bool],
        clock: Callable[[], float],
        early: EarlyLooks,
    ) -> None:
        self.run, self.backend, self.saver = run, backend, saver
        self.should_stop, self.clock, self.early = should_stop, clock, early
        self.progress = run.progress
        self.step = backend.step
        self.token_bytes = run.tokenizer.token_bytes()
        self.pending: Pending | None = None  # a step whose loss was not read yet
        self.pace = Pace(clock)
        self.started = clock() - run.progress.seconds
        rolls_back = run.train.on_nan == "rollback"
        self.safe: TrainState | None = (
            backend.state() if rolls_back else None
        )  # the last saved state
        self.last_copy: Callable[[], TrainState | None] = lambda: (
            None
        )  # weak reference: reuse the copy while a writer holds it
        self.skipped = 0  # consecutive steps
        self.recent_loss = run.recent_loss  # moving average of the training loss
        self.warned = False
        self.limit = TimeLimit(run.train, clock, self.started)

    def run_to_target(self) -> Iterator[Report]:
        """Yield the reports of all events until the target, a stop or the end of patience."""
        if self.step == 0:
            self.saver.save(NEWEST, self._checkpoint)  # from now on the folder belongs to this run
        yield from self._warn()  # again, in a resumed run
        yield from self._evaluate()  # the untrained model first
        while not (self._at_target() or self.should_stop() or self._out_of_patience()):
            previous, self.pending = self.pending, self._take_step()
            if previous:
                yield self._report(previous)  # read one step late, so that the device never waits
            if self._something_due():
                yield from self._flush()
                yield from self._evaluate()
                if is_due(self.step, self.run.train.sample_every) and not self._at_target():
                    yield from self._sample()
                self.saver.save_due(self.step, self._checkpoint)
            if self.early.is_due():
                yield from self._flush()
                yield from self._look()
            yield from self.saver.finished()
            yield from self._move_target()
        yield from self._flush()
        yield from self._finish()

    def _take_step(self) -> Pending:
        run, progress = self.run, self.progress
        block_size = run.model.block_size
        batches = step_batches(run.train, run.train_tokens, block_size, self.step, run.windows)
        lr = step_rate(run.train, self.step, progress.plateau.reductions) * 0.5**progress.rollbacks
        result = self.backend.train_step(batches, lr)
        self.pace.step()
        self.step += 1
        targets = np.concatenate([batch.y().ravel() for batch in batches])
        targets = targets[targets != IGNORED]
        return self.step, lr, len(targets), int(self.token_bytes[targets].sum()), result

    def _report(self, pending: Pending) -> Report:
        step, lr, n_targets, n_bytes, result = pending
        loss, grad_norm = result.loss, result.grad_norm
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            return self._not_finite(step, lr, loss, grad_norm)
        self.skipped = 0
        self.early.start()
        old = loss if math.isnan(self.recent_loss) else self.recent_loss
        self.recent_loss = old + 0.05 * (loss - old)
        n_tokens = self.run.train.sequences_per_step * self.run.model.block_size
        self.progress = replace(self.progress, tokens=self.progress.tokens + n_tokens)
        return StepLog(
            step=step,
            loss=loss,
            lr=lr,
            grad_norm=grad_norm,
            tokens=self.progress.tokens,
            tokens_per_second=n_tokens * self.pace.steps_per_second,
            seconds=self._seconds(),
            memory_bytes=self.backend.memory_bytes(),
            bits_per_byte=loss * n_targets / math.log(2) / max(1, n_bytes),
        )

    def _not_finite(self, step: int, lr: float, loss: float, grad_norm: float) -> Report:
        """Apply the `on_nan` policy; the backend has left its weights unchanged."""
        policy, self.skipped = self.run.train.on_nan, self.skipped + 1
        problem = f"loss is {loss:.4g} and gradient norm {grad_norm:.4g} at step {step}"
        if policy == "stop" and self.run.train.dtype == "float16" and math.isfinite(loss):
            policy = "skip"  # a gradient too large for the type says nothing of the next step
        if policy == "skip" and self.skipped < MAX_SKIPS:
            return NoteLog(step, f"Skipped: {problem}.")
        if policy == "rollback" and self.progress.rollbacks < MAX_ROLLBACKS and self.safe:
            rollbacks = self.progress.rollbacks + 1
            self.progress = replace(self.progress, rollbacks=rollbacks)
            self.pending = None
            self.backend.restore(replace(self.safe, step=self.step))
            return NoteLog(
                step,
                f"Back to the weights of step {self.safe.step}, at half the "
                f"learning rate: {problem}.",
            )
        raise TrainingDiverged(
            f"{problem} (learning rate {lr:g}); "
            "try a lower --lr, a longer --warmup or a smaller --grad-clip"
        )

    def _move_target(self) -> Iterator[Report]:
        """Move the target to the step at which the time ends, if the run has a time."""
        iters = self.run.train.iters if self._at_target() else self.limit.target(self.step)
        if iters != self.run.train.iters:
            self.run = replace(self.run, train=replace(self.run.train, iters=iters))
            yield TargetLog(self.step, iters)

    def _flush(self) -> Iterator[Report]:
        """Read the pending step, so that the following event sees a finished state."""
        if self.pending:
            pending, self.pending = self.pending, None
            log = self._report(pending)
            self.pace.wait()
            yield log

    def _something_due(self) -> bool:
        sample_due = is_due(self.step, self.run.train.sample_every)
        return self._evaluation_due() or sample_due or self.saver.due(self.step)

    def _evaluation_due(self) -> bool:
        due = self.step == 0 or is_due(self.step, self.run.train.eval_every)
        return (due or self._at_target()) and self.progress.eval_step < self.step

    def _evaluate(self) -> Iterator[Report]:
        if not self._evaluation_due():
            return
        run, old = self.run, self.progress
        began = self.clock()
        score = self._score(EVAL_TOKENS)
        self.limit.closing_seconds = self.clock() - began
        if score is None:
            return  # interrupted; a resumed run evaluates this step again
        if not math.isfinite(score.loss):
            raise TrainingDiverged(f"validation loss is {score.loss} at step {self.step}")
        if self.step > 0:
            self.early.end("evaluation")
        is_best = score.loss < old.best_loss
        self.progress = replace(
            old,
            val_loss=score.loss,
            bits_per_byte=score.bits_per_byte,
            eval_step=self.step,
            best_loss=score.loss if is_best else old.best_loss,
            best_step=self.step if is_best else old.best_step,
            plateau=old.plateau.observe(score.loss, run.train.patience, run.train.schedule),
        )
        yield EvalLog(
            step=self.step,
            val_loss=score.loss,
            bits_per_byte=score.bits_per_byte,
            best_loss=self.progress.best_loss,
            best_step=self.progress.best_step,
            seconds=self._seconds(),
        )
        if is_best:
            self.saver.save_best(self.step, self._checkpoint)  # after its report, which it implies
        yield from self._warn()
        self.pace.restart()

    def _score(self, max_tokens: int) -> Score | None:
        run, size = self.run, self.run.model.block_size
        batch_size = max(run.train.batch_size, EVAL_BATCH_TOKENS // size)
        batches = eval_batches(run.val_tokens, size, batch_size, max_tokens, run.val_windows)
        return score_batches(self.backend, batches, self.token_bytes, self.should_stop)

    def _warn(self) -> Iterator[Report]:
        """Warn once if the last evaluation shows that the model overfits."""
        progress = self.progress
        waited = progress.plateau.evaluations_without_best
        note = overfitting(self.recent_loss, progress.val_loss, waited, progress.best_step)
        if note and not self.warned:
            self.warned = True
            yield NoteLog(self.step, note)

    def _sample(self) -> Iterator[Report]:
        self.early.end("sample")
        text = self._generate(math.inf)
        if text or not self.should_stop():  # a stop can come before the first token
            yield SampleLog(self.step, self._shown_prompt, text)
        self.pace.restart()

    def _generate(self, seconds: float) -> str:
        """Return a sample, or what there is of it `seconds` after its first token."""
        run, end = self.run, math.inf
        prompt = run.tokenizer.encode(run.train.prompt)
        if self._answers:
            prompt = render_prompt([Turn("user", run.train.prompt)], run.tokenizer)
        config = SampleConfig(seed=run.train.seed + self.step)
        text = ""
        scorer = text_scorer(run.text_backend, run.model, self.backend)
        for samples in generate(
            scorer, run.model, run.tokenizer, prompt.tolist(), config, 1, self.should_stop
        ):
            text, now = samples[0].text, self.clock()
            end = min(end, now + seconds)
            if now >= end:
                break
        return text

    @property
    def _answers(self) -> bool:
        """Whether the run learns answers, so that the prompt of its samples is a question."""
        return self.run.val_windows is not None

    @property
    def _shown_prompt(self) -> str:
        return self.run.train.prompt + "\n" * self._answers

    def _look(self) -> Iterator[Report]:
        """Yield an early validation loss and an early sample; the run's own state stays."""
        next_seconds = self.early.postpone()
        if "evaluation" in self.early:
            n_tokens = self.run.train.sequences_per_step * self.run.model.block_size
            speed = n_tokens * self.pace.steps_per_second
            if score := self._score(min(self.early.n_tokens(speed), EVAL_TOKENS)):
                yield EarlyEvalLog(
                    step=self.step,
                    val_loss=score.loss,
                    bits_per_byte=score.bits_per_byte,
                    tokens=score.tokens,
                    next_seconds=next_seconds,
                )
        if "sample" in self.early and not self.should_stop():
            text = self._generate(COST_SECONDS)
            yield EarlySampleLog(self.step, self._shown_prompt, text, next_seconds)
        self.pace.restart()

    def _checkpoint(self) -> Checkpoint:
        run = self.run
        progress = replace(self.progress, seconds=self._seconds())
        state = self.last_copy()  # reused for a second file of the same step
        if state is None or state.step != self.step:
            state = self.backend.state()
            self.last_copy = weakref.ref(state)
        self.safe = state if run.train.on_nan == "rollback" else None
        return Checkpoint(
            model=run.model,
            train=run.train,
            progress=progress,
            tokenizer=run.tokenizer.to_json(),
            data=run.data,
            backend=self.backend.name,
            state=state,
        )

    def _finish(self) -> Iterator[Report]:
        reached = self._at_target()
        stopped = not reached and not self._out_of_patience()
        yield EndLog(self.step, "target" if reached else "stopped" if stopped else "patience")
        yield from self.saver.finish(self._checkpoint)
        if not self.should_stop():
            yield from self._sample()

    def _at_target(self) -> bool:
        return self.step >= self.run.train.iters

    def _out_of_patience(self) -> bool:
        return self.progress.plateau.exhausted(self.run.train.patience)

    def _seconds(self) -> float:
        return self.clock() - self.started
