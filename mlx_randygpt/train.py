"""The training loop: batch, rate, step, report. One for every backend.

`train` is a generator of reports; who consumes them decides what to show. It owns the order of
things (evaluate, sample, save, step) and never touches a terminal, a signal or a device.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_randygpt.backends.base import Backend, StepResult
from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointError,
    Progress,
    load_checkpoint,
)
from mlx_randygpt.config import ModelConfig, TrainConfig, UserError, parse_interval
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.evaluation import evaluate, overfitting
from mlx_randygpt.reports import EndLog, EvalLog, NoteLog, Pace, Report, SampleLog, SaveLog, StepLog
from mlx_randygpt.sample import SampleConfig, generate
from mlx_randygpt.schedule import decay_start, learning_rate
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizer import Tokenizer
from mlx_randygpt.writer import CheckpointWriter, Saved

EVAL_BATCH_TOKENS = 4096  # at least, in one batch of an evaluation
EVAL_TOKENS = 1 << 17  # of the validation split during training; `mlxgpt eval` takes all of it


def kept_name(step: int) -> str:
    """The file of a checkpoint that later ones do not replace."""
    return f"checkpoint-{step}.safetensors"


class TrainingDiverged(UserError, ArithmeticError):
    """A loss or a gradient that is not finite; no checkpoint is written after it."""


@dataclass(frozen=True)
class Run:
    """Everything a run is made of, besides the backend that holds its weights."""

    model: ModelConfig
    train: TrainConfig
    tokenizer: Tokenizer
    train_tokens: Array  # (n,)
    val_tokens: Array
    data: dict[str, Any]  # for the checkpoint: where the text came from
    progress: Progress = field(default_factory=Progress)


def train(
    run: Run,
    backend: Backend,
    out: Path | None = None,
    should_stop: Callable[[], bool] = lambda: False,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Report]:
    """Train from the backend's step to `run.train.iters`, yielding a report for all that happens.

    Every `save_every` a snapshot goes to `out` (None: nothing is saved) from another thread; when
    `should_stop` turns true the step at hand is finished, both files are safe, and the generator
    ends. Raises TrainingDiverged where loss or gradient stop being finite.
    """
    writer = CheckpointWriter() if out is not None else None
    try:
        yield from Trainer(run, backend, out, writer, should_stop, clock).run_to_target()
    finally:
        if writer is not None:
            writer.close()


class Trainer:
    """One run in progress: the generator methods of `train` and the state between them."""

    def __init__(
        self,
        run: Run,
        backend: Backend,
        out: Path | None,
        writer: CheckpointWriter | None,
        should_stop: Callable[[], bool],
        clock: Callable[[], float],
    ) -> None:
        self.run, self.backend, self.out, self.writer = run, backend, out, writer
        self.should_stop, self.clock = should_stop, clock
        self.progress = run.progress
        self.step = backend.step
        self.pending: tuple[int, float, StepResult] | None = None  # a step whose loss is unread
        self.pace = Pace(clock)
        self.started = clock() - run.progress.seconds
        self.last_save = clock()
        self.recent_loss = math.nan  # of training, an average that forgets
        self.warned = False

    def run_to_target(self) -> Iterator[Report]:
        config = self.run.train
        if self.step == 0:
            self._submit(NEWEST)  # so that the folder holds this run from its first moment on
        yield from self._evaluate()  # the untrained model first
        while self.step < config.iters and not self.should_stop() and not self._out_of_patience():
            previous, self.pending = self.pending, self._take_step()
            if previous:
                yield self._report(previous)  # read one step late: the device is never kept waiting
            if self._something_due():
                yield from self._flush()
                yield from self._evaluate()
                if _is_due(self.step, config.sample_every) and self.step < config.iters:
                    yield from self._sample()
                yield from self._save_if_due()
            yield from self._saved()
        yield from self._flush()
        yield from self._finish()

    def _take_step(self) -> tuple[int, float, StepResult]:
        config = self.run.train
        batches = [
            sample_batch(
                self.run.train_tokens, config.batch_size, self.run.model.block_size,
                config.seed, self.step, micro,
            )
            for micro in range(config.grad_accum)
        ]  # fmt: skip
        lr = learning_rate(
            self.step, iters=config.iters, warmup=config.warmup, lr=config.lr,
            min_lr=config.min_lr, schedule=config.schedule,
            reductions=self.progress.plateau.reductions,
        )  # fmt: skip
        result = self.backend.train_step(batches, lr)
        self.pace.step()
        self.step += 1
        return self.step, lr, result

    def _report(self, pending: tuple[int, float, StepResult]) -> StepLog:
        step, lr, result = pending
        loss, grad_norm = result.loss, result.grad_norm
        for name, value in (("loss", loss), ("gradient norm", grad_norm)):
            if not math.isfinite(value):
                raise TrainingDiverged(
                    f"{name} is {value} at step {step} (learning rate {lr:g}, loss {loss:.4g}); "
                    "try a lower --lr, a longer --warmup or a smaller --grad-clip"
                )
        old = loss if math.isnan(self.recent_loss) else self.recent_loss
        self.recent_loss = old + 0.05 * (loss - old)
        n_tokens = self.run.train.sequences_per_step * self.run.model.block_size
        self.progress = replace(self.progress, tokens=self.progress.tokens + n_tokens)
        return StepLog(
            step, loss, lr, grad_norm, self.progress.tokens, n_tokens * self.pace.steps_per_second,
            self._seconds(), self.backend.memory_bytes(),
        )  # fmt: skip

    def _flush(self) -> Iterator[Report]:
        """Read the step that is still unread, so that what follows sees a finished state."""
        if self.pending:
            pending, self.pending = self.pending, None
            log = self._report(pending)
            self.pace.wait()
            yield log

    def _something_due(self) -> bool:
        config = self.run.train
        return (
            self._evaluation_due()
            or _is_due(self.step, config.sample_every)
            or self._keep_due()
            or self._save_due()
        )

    def _evaluation_due(self) -> bool:
        due = self.step == 0 or _is_due(self.step, self.run.train.eval_every)
        return (due or self.step == self.run.train.iters) and self.progress.eval_step < self.step

    def _evaluate(self) -> Iterator[Report]:
        if not self._evaluation_due():
            return
        run, old = self.run, self.progress
        score = evaluate(
            self.backend, run.val_tokens, run.model.block_size,
            max(run.train.batch_size, EVAL_BATCH_TOKENS // run.model.block_size),
            run.tokenizer.token_bytes(), self.should_stop, max_tokens=EVAL_TOKENS,
        )  # fmt: skip
        if score is None:
            return  # asked to stop; a resumed run evaluates this step again
        if not math.isfinite(score.loss):
            raise TrainingDiverged(f"validation loss is {score.loss} at step {self.step}")
        is_best = score.loss < old.best_loss
        self.progress = replace(
            old,
            val_loss=score.loss,
            eval_step=self.step,
            best_loss=score.loss if is_best else old.best_loss,
            best_step=self.step if is_best else old.best_step,
            plateau=old.plateau.observe(score.loss, run.train.patience, run.train.schedule),
        )
        if is_best:
            self._submit(BEST)
        yield EvalLog(
            self.step, score.loss, score.bits_per_byte,
            self.progress.best_loss, self.progress.best_step, self._seconds(),
        )  # fmt: skip
        waited = self.progress.plateau.evaluations_without_best
        note = overfitting(self.recent_loss, score.loss, waited, self.progress.best_step)
        if note and not self.warned:
            self.warned = True
            yield NoteLog(self.step, note)
        self.pace.restart()

    def _sample(self) -> Iterator[Report]:
        run = self.run
        prompt = run.tokenizer.encode(run.train.prompt)
        config = SampleConfig(seed=run.train.seed + self.step)
        text = ""
        for samples in generate(
            self.backend, run.model, run.tokenizer, prompt.tolist(), config, 1, self.should_stop
        ):
            text = samples[0].text
        yield SampleLog(self.step, run.train.prompt, text)
        self.pace.restart()

    # Saving

    def _save_due(self) -> bool:
        steps, seconds = parse_interval(self.run.train.save_every)
        return _is_due(self.step, steps) or 0 < seconds <= self.clock() - self.last_save

    def _keep_due(self) -> bool:
        config = self.run.train
        before_decay = config.schedule == "trapezoid" and self.step == decay_start(
            config.iters, config.warmup
        )
        return before_decay or _is_due(self.step, config.keep_every)

    def _save_if_due(self) -> Iterator[Report]:
        if self._keep_due():
            self._submit(kept_name(self.step))
        if self._save_due():
            self._submit(NEWEST)
            self.last_save = self.clock()
        yield from self._saved()

    def _submit(self, name: str) -> None:
        if self.writer is not None and self.out is not None:
            self.writer.submit(self.out / name, self._checkpoint())

    def _checkpoint(self) -> Checkpoint:
        run = self.run
        progress = replace(self.progress, seconds=self._seconds())
        return Checkpoint(
            run.model, run.train, progress, run.tokenizer.to_json(), run.data,
            self.backend.name, self.backend.state(),
        )  # fmt: skip

    def _saved(self) -> Iterator[Report]:
        if self.writer is not None:
            yield from (saved.log() for saved in self.writer.finished())

    def _finish(self) -> Iterator[Report]:
        reached = self.step >= self.run.train.iters
        stopped = not reached and not self._out_of_patience()
        yield EndLog(self.step, "target" if reached else "stopped" if stopped else "patience")
        yield from self._save_both()
        if not self.should_stop():
            yield from self._sample()

    def _save_both(self) -> Iterator[Report]:
        if self.writer is None or self.out is None:
            return
        self._submit(NEWEST)
        logs = [saved.log() for saved in self.writer.close()]
        yield from logs
        best = self.out / BEST
        if best.exists() and not any(log.best for log in logs):  # written earlier: read it again
            try:
                kept = load_checkpoint(best, weights_only=True)
                yield Saved(best, kept).log()
            except CheckpointError as error:
                yield SaveLog(self.progress.best_step, str(best), True, math.nan, str(error))

    def _out_of_patience(self) -> bool:
        return self.progress.plateau.exhausted(self.run.train.patience)

    def _seconds(self) -> float:
        return self.clock() - self.started


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step > 0 and step % every == 0
