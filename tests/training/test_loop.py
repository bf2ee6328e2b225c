"""The loop: its order, its exactness across a stop, and what makes it end.

`Fake` is a backend without arithmetic: its losses are a function of the step, so that what the
loop makes of them can be worked by hand. Exactness is tested on the real ones.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends.base import Backend, StepResult
from mlx_randygpt.checkpoint import BEST, NEWEST, PREVIOUS, Checkpoint, Progress, load_checkpoint
from mlx_randygpt.config import TrainConfig
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.model import initial_params
from mlx_randygpt.progress import Plateau
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Batch, TrainState
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.early import EarlyLooks
from mlx_randygpt.training.evaluation import evaluate
from mlx_randygpt.training.loop import (
    MAX_SKIPS,
    Run,
    Trainer,
    TrainingDiverged,
    step_batches,
    train,
)
from mlx_randygpt.training.reports import (
    EndLog,
    EvalLog,
    NoteLog,
    Report,
    SampleLog,
    SaveLog,
    StepLog,
)
from mlx_randygpt.training.saving import Saver, save_log

Make = Callable[..., tuple[Run, Backend]]
each_model = pytest.mark.parametrize("recipe", ["classic", "modern", "gpt2"])


@pytest.fixture(params=["numpy", "mlx"])
def name(request: pytest.FixtureRequest) -> str:
    if request.param == "mlx":
        pytest.importorskip("mlx.core", exc_type=ImportError)
    return str(request.param)


class Fake:
    """Losses by step instead of a model; a clock that a step moves by one second."""

    name, device = "fake", "paper"

    def __init__(
        self,
        run: Run,
        loss: Callable[[int], float] = lambda step: 3.0,
        val: Callable[[int], float] = lambda step: 3.0 / (1 + step),
    ) -> None:
        self.step, self.now, self.n_steps = 0, 0.0, 0
        self.loss_at, self.val_at = loss, val
        self.grad_norm_at: Callable[[int], float] = lambda step: 0.5
        self.rates: list[float] = []
        self.batches: list[list[Batch]] = []
        self.evaluated: list[int] = []
        self.restored: list[int] = []
        self.params = initial_params(run.model, 1)

    def clock(self) -> float:
        return self.now

    def train_step(self, batches: Sequence[Batch], lr: float) -> StepResult:
        self.step += 1
        self.now += 1.0
        self.rates.append(lr)
        self.batches.append(list(batches))
        return StepResult(self.loss_at(self.step), self.grad_norm_at(self.step))

    def loss(self, batch: Batch) -> float:
        self.evaluated.append(self.step)
        return self.val_at(self.step)

    def new_cache(self, batch_size: int) -> Any:
        return SimpleNamespace(reset=lambda rows: None, lengths=np.zeros(batch_size))

    def logits(self, tokens: Any, cache: Any, rows: slice, lengths: Any = None) -> Any:
        return np.zeros((len(tokens), self.params["wte.weight"].shape[0]), np.float32)

    def state(self) -> TrainState:
        return TrainState(self.step, self.params, {})

    def restore(self, state: TrainState) -> None:
        self.restored.append(state.step)

    def memory_bytes(self) -> int:
        return 0


class Recorder:
    """A checkpoint writer that only notes what it is given."""

    def __init__(self) -> None:
        self.submitted: list[tuple[str, int]] = []
        self._finished: list[SaveLog] = []

    def __call__(self, sync: object) -> Recorder:
        return self

    def submit(self, path: Path, checkpoint: Checkpoint) -> None:
        self.submitted.append((path.name, checkpoint.state.step))
        self._finished.append(save_log(path, checkpoint))

    def finished(self) -> list[SaveLog]:
        done, self._finished = self._finished, []
        return done

    close = finished


@pytest.fixture
def writer(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr("mlx_randygpt.training.saving.CheckpointWriter", recorder)
    return recorder


@pytest.fixture
def faked(make_run: Make) -> Callable[..., tuple[Run, Fake]]:
    """(loss=, val=, **train) -> a run under a constant rate of 1 and its fake backend."""

    def build(*functions: Callable[[int], float], **settings: Any) -> tuple[Run, Fake]:
        constant = {"schedule": "constant", "warmup": 0, "lr": 1.0}
        run, _ = make_run("modern", model={"n_embd": 8}, **constant | settings)
        return run, Fake(run, *functions)

    return build


def of(kind: type[Any], reports: Sequence[Report]) -> list[Any]:
    return [report for report in reports if isinstance(report, kind)]


def described(reports: Sequence[Report]) -> list[str]:
    """`step 1`, `eval 0`, … in order, without the saves, which come when the disk is done."""
    names = {StepLog: "step", EvalLog: "eval", SampleLog: "sample", EndLog: "end"}
    return [f"{names[type(r)]} {r.step}" for r in reports if not isinstance(r, SaveLog)]


# Order


@pytest.mark.parametrize("on_disk", [True, False])
def test_reports_come_in_order(on_disk: bool, make_run: Make, tmp_path: Path) -> None:
    run, backend = make_run("modern", iters=6, eval_every=2, sample_every=3)
    reports = list(train(run, backend, tmp_path if on_disk else None))
    assert described(reports) == [
        "eval 0", "step 1", "step 2", "eval 2", "step 3", "sample 3", "step 4", "eval 4",
        "step 5", "step 6", "eval 6", "end 6", "sample 6",
    ]  # fmt: skip
    written = {path.name for path in tmp_path.iterdir()} - {PREVIOUS}  # if it was not overtaken
    assert written == ({NEWEST, BEST} if on_disk else set())


def test_a_step_tells_its_numbers(faked: Callable[..., tuple[Run, Fake]]) -> None:
    run, backend = faked(lambda step: 4.0 - step, iters=3, batch_size=8, grad_accum=2)
    steps = of(StepLog, list(train(run, backend, clock=backend.clock)))
    assert [(s.step, s.loss, s.lr, s.grad_norm) for s in steps] == [
        (1, 3.0, 1.0, 0.5), (2, 2.0, 1.0, 0.5), (3, 1.0, 1.0, 0.5),
    ]  # fmt: skip
    assert [s.tokens for s in steps] == [256, 512, 768]  # 2 × 8 sequences of 16
    assert steps[-1].seconds == 3


@each_model
def test_the_untrained_model_comes_first_and_knows_nothing(recipe: str, make_run: Make) -> None:
    run, backend = make_run(recipe, model={"init_scale": 0.05})
    first = next(iter(train(run, backend)))
    assert isinstance(first, EvalLog)
    assert (first.step, first.best_step, first.best_loss) == (0, 0, first.val_loss)
    assert first.val_loss == pytest.approx(
        math.log(run.model.vocab_size), rel=0.01
    )  # measured: 1e-3


@each_model
def test_a_repeating_text_is_learned(recipe: str, make_run: Make, name: str) -> None:
    run, backend = make_run(recipe, name, on="the cat sat. " * 300, iters=60, warmup=5)
    reports = list(train(run, backend))
    assert of(StepLog, reports)[-1].loss < 0.2  # measured: 0.02
    assert of(EvalLog, reports)[-1].val_loss < 0.3  # measured: 0.08


# Exactness


@each_model
def test_resume_is_bit_exact(recipe: str, name: str, make_run: Make, tmp_path: Path) -> None:
    model, settings = {"dropout": 0.2}, {"iters": 20, "grad_accum": 2, "eval_every": 5}
    run, straight = make_run(recipe, name, model=model, **settings)
    whole = list(train(run, straight))
    run, first = make_run(recipe, name, model=model, **settings)
    list(train(run, first, tmp_path, should_stop=lambda: first.step >= 9))
    saved = load_checkpoint(tmp_path / NEWEST)
    assert saved.state.step == 9
    run, second = make_run(recipe, name, model=model, state=saved.state, **settings)
    rest = list(train(replace(run, progress=saved.progress), second))
    np.testing.assert_equal(asdict(second.state()), asdict(straight.state()))
    losses = [(s.step, s.loss, s.lr, s.tokens) for s in of(StepLog, whole)]
    assert [(s.step, s.loss, s.lr, s.tokens) for s in of(StepLog, rest)] == losses[9:]
    assert of(SampleLog, rest) == of(SampleLog, whole)


def test_a_pass_reads_every_window_once_whatever_the_batches() -> None:
    tokens = np.arange(1000, dtype=np.int32)

    def starts(n_steps: int, **given: Any) -> list[int]:
        train = TrainConfig(**{**RECIPES["modern"]["train"], **given})
        steps = [step_batches(train, tokens, 10, step) for step in range(n_steps)]
        return [int(start) for batches in steps for b in batches for start in b.starts]

    whole = starts(3, batch_size=33)  # 990 starts are 99 windows
    assert starts(1, batch_size=33, grad_accum=3) == starts(9, batch_size=11) == whole
    assert (np.diff(sorted(whole))[1:-1] == 10).all()
    assert starts(3, batch_size=33, order="random") != whole
    assert starts(3, batch_size=33, seed=2) != whole


def test_stopping_again_and_again_changes_nothing(make_run: Make, tmp_path: Path) -> None:
    settings = {"iters": 20, "schedule": "plateau", "patience": 1, "eval_every": 2, "lr": 0.5}
    run, straight = make_run("modern", **settings)
    whole = list(train(run, straight))
    state, progress, parts = None, Progress(), []
    for stop in (3, 4, 11, 99):
        run, backend = make_run("modern", state=state, **settings)
        at = lambda b=backend, stop=stop: b.step >= stop  # noqa: E731
        parts += list(train(replace(run, progress=progress), backend, tmp_path, at))
        saved = load_checkpoint(tmp_path / NEWEST)
        state, progress = saved.state, saved.progress
    assert [(s.step, s.loss, s.lr) for s in of(StepLog, parts)] == [
        (s.step, s.loss, s.lr) for s in of(StepLog, whole)
    ]
    assert len({s.lr for s in of(StepLog, whole)}) > 2  # the plateau rule was at work
    assert [e.val_loss for e in of(EvalLog, parts)] == [e.val_loss for e in of(EvalLog, whole)]


# Evaluation


@each_model
def test_evaluation_is_the_mean_over_windows_one_at_a_time(
    recipe: str, name: str, make_run: Make
) -> None:
    run, backend = make_run(recipe, name)
    tokens, t, sizes = run.val_tokens, run.model.block_size, run.tokenizer.token_bytes()
    score = evaluate(backend, tokens, t, 7, sizes)
    assert score == evaluate(backend, tokens, t, 7, sizes)
    nats = 0.0
    for start in range(0, len(tokens) - 1, t):
        window = Batch(tokens, np.array([start]), t)
        nats += backend.loss(window) * min(t, len(tokens) - 1 - start)
    assert score is not None
    assert score.tokens == len(tokens) - 1
    assert score.loss == pytest.approx(nats / score.tokens, rel=1e-6)  # measured: 4e-8
    assert score.perplexity == pytest.approx(math.exp(nats / score.tokens), rel=1e-5)


def test_bits_per_byte_are_worked_by_hand(faked: Callable[..., tuple[Run, Fake]]) -> None:
    tokenizer = CharTokenizer.train("naïve 龍🐉")
    tokens = encode_corpus({"a": "ï龍🐉n"}, tokenizer).tokens  # <bos> ï 龍 🐉 n <eos>
    _, backend = faked(lambda _: 0.0, lambda _: 2.0)
    score = evaluate(backend, tokens, 4, 1, tokenizer.token_bytes())  # type: ignore[arg-type]
    assert score is not None
    assert (score.loss, score.tokens) == (2.0, 5)
    # 5 tokens of 2 nats, over 2 + 3 + 4 + 1 bytes; <eos> costs nats and is no byte.
    assert score.bits_per_byte == pytest.approx(5 * 2 / math.log(2) / 10, rel=1e-12)


def test_a_stop_during_evaluation_drops_it_and_a_resumed_run_makes_it_up(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    run, backend = faked(iters=6, eval_every=2)
    stop = lambda: backend.step >= 4  # noqa: E731
    reports = list(train(run, backend, tmp_path, stop, backend.clock))  # type: ignore[arg-type]
    assert described(reports)[-4:] == ["eval 2", "step 3", "step 4", "end 4"]
    progress = load_checkpoint(tmp_path / NEWEST).progress
    assert progress.eval_step == 2
    rest = list(train(replace(run, progress=progress), backend))  # type: ignore[arg-type]
    assert described(rest) == ["eval 4", "step 5", "step 6", "eval 6", "end 6", "sample 6"]


@pytest.mark.parametrize("iters", [3, 9])
def test_memory_that_is_kept_for_reuse_is_given_back_at_the_end(
    iters: int, faked: Callable[..., tuple[Run, Fake]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether the run reaches its target or is stopped before."""
    run, backend = faked(iters=iters)
    released: list[int] = []
    module = sys.modules[Run.__module__]
    monkeypatch.setattr(module, "release_memory", lambda given: released.append(given.step))
    list(train(run, backend, should_stop=lambda: backend.step >= 5))  # type: ignore[arg-type]
    assert released == [min(iters, 5)]


def test_a_resumed_run_does_not_evaluate_twice(faked: Callable[..., tuple[Run, Fake]]) -> None:
    run, backend = faked(iters=6, eval_every=2)
    backend.step = 4
    rest = train(replace(run, progress=Progress(eval_step=4)), backend)  # type: ignore[arg-type]
    assert next(iter(described(list(rest)))) == "step 5"


def test_long_splits_are_sampled_evenly(
    faked: Callable[..., tuple[Run, Fake]], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[Run.__module__]  # `mlx_randygpt.training.loop` is the function
    monkeypatch.setattr(module, "EVAL_TOKENS", 64)
    monkeypatch.setattr(module, "EVAL_BATCH_TOKENS", 16)
    run, backend = faked(iters=1, batch_size=1)
    list(train(run, backend))  # type: ignore[arg-type]
    assert backend.evaluated == [0] * 4 + [1] * 4  # four windows of 16 at each


# Rates and ends


def test_plateau_halves_the_rate_and_stops_early(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    run, backend = faked(
        lambda _: 3.0, lambda step: 3.0 if step < 2 else 2.0, iters=1000,
        schedule="plateau", patience=2, eval_every=1,
    )  # fmt: skip
    reports = list(train(run, backend, tmp_path))  # type: ignore[arg-type]
    # The best comes at step 2; then two more evaluations for each halving, and two to give up.
    assert backend.rates == [1, 1, 1, 1, 0.5, 0.5, 0.25, 0.25, 0.125, 0.125]
    assert of(EndLog, reports) == [EndLog(10, "patience")]
    assert load_checkpoint(tmp_path / NEWEST).progress.plateau == Plateau(2.0, 2, 3)
    assert load_checkpoint(tmp_path / BEST).progress.best_step == 2


def test_a_text_learned_by_heart_is_told_once(make_run: Make) -> None:
    letters = np.random.default_rng(1).choice(list("abcdefgh"), 400)  # nothing to learn but itself
    run, backend = make_run("modern", on="".join(letters), iters=120, eval_every=10, warmup=5)
    notes = [report for report in train(run, backend) if isinstance(report, NoteLog)]
    assert len(notes) == 1
    assert "Overfitting: training loss" in notes[0].text


def test_a_resumed_run_warns_at_once(faked: Callable[..., tuple[Run, Fake]]) -> None:
    past = Progress(val_loss=3.0, eval_step=0, best_loss=2.0, plateau=Plateau(2.0, 3))
    run, backend = faked(iters=2)
    reports = list(train(replace(run, progress=past, recent_loss=1.0), backend))  # type: ignore[arg-type]
    assert isinstance(reports[0], NoteLog)
    assert "training loss 1.000, validation loss 3.000" in reports[0].text


def test_a_text_that_is_learned_is_no_overfitting(make_run: Make) -> None:
    run, backend = make_run("modern", on="the cat sat. " * 300, iters=60, eval_every=5)
    assert not any(isinstance(report, NoteLog) for report in train(run, backend))


def test_early_stop_without_plateau(faked: Callable[..., tuple[Run, Fake]]) -> None:
    run, backend = faked(lambda _: 1.0, lambda _: 1.0, iters=1000, patience=3, eval_every=2)
    assert of(EndLog, list(train(run, backend))) == [EndLog(6, "patience")]  # type: ignore[arg-type]


def test_reaching_the_target_and_being_stopped_are_told_apart(
    faked: Callable[..., tuple[Run, Fake]],
) -> None:
    run, backend = faked(iters=5)
    assert of(EndLog, list(train(run, backend))) == [EndLog(5, "target")]  # type: ignore[arg-type]
    run, backend = faked(iters=5)
    reports = list(train(run, backend, None, lambda: backend.step == 2))  # type: ignore[arg-type]
    assert of(EndLog, reports) == [EndLog(2, "stopped")]
    assert of(SampleLog, reports) == []  # nobody waits for a text then


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_and_spares_the_file(
    value: float, faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    run, backend = faked(lambda step: value if step == 7 else 2.0, iters=20, save_every="2")
    with pytest.raises(TrainingDiverged, match=f"loss is {value} and .* at step 7 .*--lr"):
        list(train(run, backend, tmp_path))  # type: ignore[arg-type]
    assert load_checkpoint(tmp_path / NEWEST).state.step == 6


def test_a_step_that_is_not_finite_is_skipped_if_asked(
    faked: Callable[..., tuple[Run, Fake]],
) -> None:
    bad = (3, 4, 9)
    run, backend = faked(lambda step: math.nan if step in bad else 2.0, iters=12, on_nan="skip")
    reports = list(train(run, backend))  # type: ignore[arg-type]
    assert [note.step for note in of(NoteLog, reports)] == list(bad)
    assert all(note.text.startswith("Skipped: loss is nan") for note in of(NoteLog, reports))
    assert len(of(StepLog, reports)) == 12 - len(bad)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_only_a_gradient_that_overflows_float16_is_skipped_unasked(
    dtype: str, faked: Callable[..., tuple[Run, Fake]]
) -> None:
    run, backend = faked(iters=12, dtype=dtype)
    backend.grad_norm_at = lambda step: math.inf if step in (3, 4, 9) else 0.5
    if dtype == "bfloat16":
        with pytest.raises(TrainingDiverged, match="gradient norm inf at step 3"):
            list(train(run, backend))  # type: ignore[arg-type]
        return
    reports = list(train(run, backend))  # type: ignore[arg-type]
    assert [note.step for note in of(NoteLog, reports)] == [3, 4, 9]
    run, backend = faked(lambda step: math.nan if step == 3 else 2.0, iters=12, dtype=dtype)
    with pytest.raises(TrainingDiverged, match="loss is nan"):
        list(train(run, backend))  # type: ignore[arg-type]


def test_skipping_ends_where_nothing_else_is_left(
    faked: Callable[..., tuple[Run, Fake]],
) -> None:
    run, backend = faked(lambda step: math.nan if step > 2 else 2.0, iters=50, on_nan="skip")
    with pytest.raises(TrainingDiverged, match=f"at step {2 + MAX_SKIPS}"):
        list(train(run, backend))  # type: ignore[arg-type]


def test_a_rollback_returns_to_what_was_saved_at_half_the_rate(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    settings = {"iters": 10, "on_nan": "rollback", "save_every": "2", "eval_every": 0}
    run, backend = faked(lambda step: math.nan if step == 5 else 2.0, **settings)
    reports = list(train(run, backend, tmp_path))  # type: ignore[arg-type]
    assert [note.text[:30] for note in of(NoteLog, reports)] == ["Back to the weights of step 4,"]
    assert backend.rates[4] == 1.0
    assert backend.rates[-1] == 0.5
    assert load_checkpoint(tmp_path / NEWEST).progress.rollbacks == 1


@pytest.mark.parametrize("name", ["numpy", "mlx"])
@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_a_real_run_survives_a_step_that_is_not_finite(
    policy: str, name: str, make_run: Make
) -> None:
    if name == "mlx":
        pytest.importorskip("mlx.core", exc_type=ImportError)
    run, backend = make_run("modern", name, iters=8, on_nan=policy)
    poisoned = backend.state()
    poisoned.params["lm_head.weight"][:] = np.nan
    good = backend.state()
    with np.errstate(all="ignore"):
        backend.restore(poisoned)
        batch = sample_batch(run.train_tokens, 8, run.model.block_size, 1, 0)
        assert not math.isfinite(backend.train_step([batch], 0.1).loss)
        np.testing.assert_equal(backend.state().params, poisoned.params)  # nothing has moved
    backend.restore(good)
    np.testing.assert_equal(asdict(backend.state()), asdict(good))
    reports = list(train(run, backend))
    assert of(StepLog, reports)[-1].step == 8


def test_an_evaluation_that_is_not_finite_stops_the_run(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    run, backend = faked(lambda _: 2.0, lambda step: math.nan if step else 2.0, iters=4)
    with pytest.raises(TrainingDiverged, match="validation loss is nan at step 4"):
        list(train(run, backend, tmp_path))  # type: ignore[arg-type]
    assert load_checkpoint(tmp_path / NEWEST).state.step == 0


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_real_run_that_diverges_keeps_its_last_good_file(
    optimizer: str, name: str, make_run: Make, tmp_path: Path
) -> None:
    settings = {"optimizer": optimizer, "warmup": 0, "weight_decay": 0.0, "save_every": "1"}
    with np.errstate(all="ignore"):
        run, backend = make_run("classic", name, lr=1e25, min_lr=0.0, iters=50, **settings)
        with pytest.raises(TrainingDiverged, match=r"(nan|inf) at step"):
            list(train(run, backend, tmp_path))
    kept = load_checkpoint(tmp_path / NEWEST).state
    assert all(np.isfinite(w).all() for w in kept.params.values())


# Saving


def test_saves_follow_the_steps(
    faked: Callable[..., tuple[Run, Fake]], writer: Recorder, tmp_path: Path
) -> None:
    run, backend = faked(iters=7, save_every="3")
    list(train(run, backend, tmp_path))  # type: ignore[arg-type]
    newest = [step for path, step in writer.submitted if path == NEWEST]
    assert newest == [0, 3, 6, 7]
    assert [step for path, step in writer.submitted if path == BEST] == [0, 7]


def test_two_files_of_one_step_share_a_copy(make_run: Make, tmp_path: Path) -> None:
    run, backend = make_run("modern", iters=1)
    trainer = Trainer(
        run, backend, Saver(run.train, None, float), bool, float, EarlyLooks((), float)
    )
    first = trainer._checkpoint().state
    assert trainer._checkpoint().state is first
    backend.train_step(step_batches(run.train, run.train_tokens, run.model.block_size, 0), 0.1)
    trainer.step += 1
    assert trainer._checkpoint().state.step == 1
    assert not np.shares_memory(first.params["wte.weight"], backend.params["wte.weight"])


def test_saves_follow_the_clock(
    faked: Callable[..., tuple[Run, Fake]], writer: Recorder, tmp_path: Path
) -> None:
    run, backend = faked(iters=10, save_every="4s")  # a step takes a second
    list(train(run, backend, tmp_path, clock=backend.clock))  # type: ignore[arg-type]
    assert [step for path, step in writer.submitted if path == NEWEST] == [0, 4, 8, 10]


def test_a_stopped_run_saves_where_it_stands(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    run, backend = faked(iters=100, eval_every=2)
    stop = lambda: backend.step == 5  # noqa: E731
    saves = of(SaveLog, list(train(run, backend, tmp_path, stop)))  # type: ignore[arg-type]
    newest = [log for log in saves if not log.best][-1]
    best = [log for log in saves if log.best][-1]
    assert (newest.step, Path(newest.path).name) == (5, NEWEST)
    assert best == SaveLog(4, str(tmp_path / BEST), True, 3.0 / 5)
    assert load_checkpoint(tmp_path / NEWEST).state.step == 5
    assert load_checkpoint(tmp_path / BEST).state.step == 4


def test_milestones_are_kept(faked: Callable[..., tuple[Run, Fake]], tmp_path: Path) -> None:
    run, backend = faked(iters=10, keep_every=4)
    list(train(run, backend, tmp_path))  # type: ignore[arg-type]
    for step in (4, 8):
        assert load_checkpoint(tmp_path / f"checkpoint-{step}.safetensors").state.step == step
    assert len({path.name for path in tmp_path.iterdir()} - {PREVIOUS}) == 4


def test_a_kept_checkpoint_is_written_before_the_best_of_its_step(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    """A kill between them would leave a run that resumes beyond the kept one's step."""
    run, backend = faked(iters=8, keep_every=4, eval_every=4)
    saves = [Path(e.path).name for e in of(SaveLog, list(train(run, backend, tmp_path)))]  # type: ignore[arg-type]
    for step in (4, 8):
        assert saves.count(name := f"checkpoint-{step}.safetensors") == 1
        assert BEST in saves[saves.index(name) :]
    run, backend = faked(iters=4, keep_every=4, eval_every=4)
    order: list[str] = []
    saver = Saver(run.train, tmp_path, lambda: 0.0)
    saver.save = lambda name, _: order.append(name)  # type: ignore[method-assign]
    saver.save_best(4, lambda: None)  # type: ignore[arg-type, return-value]
    saver.save_due(4, lambda: None)  # type: ignore[arg-type, return-value]
    saver.close()
    assert order == ["checkpoint-4.safetensors", BEST]


def test_the_best_is_the_lowest_not_the_latest(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    run, backend = faked(lambda _: 1.0, lambda step: abs(step - 4) + 1.0, iters=8, eval_every=2)
    evals = of(EvalLog, list(train(run, backend, tmp_path)))  # type: ignore[arg-type]
    assert [(e.val_loss, e.best_loss, e.best_step) for e in evals] == [
        (5, 5, 0), (3, 3, 2), (1, 1, 4), (3, 1, 4), (5, 1, 4),
    ]  # fmt: skip
    assert load_checkpoint(tmp_path / BEST).state.step == 4


def test_a_failed_save_is_told_and_the_run_goes_on(
    faked: Callable[..., tuple[Run, Fake]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    run, backend = faked(iters=4, save_every="2")
    reports = list(train(run, backend, tmp_path / "file"))  # type: ignore[arg-type]
    assert described(reports)[-2:] == ["end 4", "sample 4"]
    saves = of(SaveLog, reports)
    assert saves
    assert all("File exists" in save.error for save in saves)


# Accumulation


def test_micro_batches_are_drawn_apart(faked: Callable[..., tuple[Run, Fake]]) -> None:
    run, backend = faked(iters=3, grad_accum=3, batch_size=4)
    list(train(run, backend))  # type: ignore[arg-type]
    starts = [tuple(batch.starts) for step in backend.batches for batch in step]
    assert [len(step) for step in backend.batches] == [3, 3, 3]
    assert len(set(starts)) == 9
    assert {len(s) for s in starts} == {4}
