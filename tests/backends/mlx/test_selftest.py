"""The self-test, on kernels that are wrong, raise or are slow, and whole models with the kernels.

Times are invented; the kernels run on the CPU (`metal_on_cpu.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.mlx import kernels, selftest
from mlx_randygpt.backends.mlx.ops import MLX_STEPS, TRAINING
from mlx_randygpt.backends.mlx.selftest import VARIABLE, Verdict, compare, unavailable
from mlx_randygpt.check import (
    SUBJECTS,
    TRAJECTORIES,
    check_model,
    cross_check,
    distance,
    scaled_up,
    trajectory,
)
from mlx_randygpt.cli import group
from mlx_randygpt.config import TrainConfig
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Batch, TrainState, rng

ATTENTION = {"attend", "deltas", "attend_gradient"}
ROTATION = {"norm_rotate", "norm_rotate_gradient"}
ALL = {kernel.name for kernel in kernels.KERNELS}


class Clock:
    """A clock that stands still except while a function runs that takes time."""

    def __init__(self) -> None:
        self.now = 0.0

    def takes(
        self, seconds: float, function: Callable[..., list[mx.array]]
    ) -> Callable[..., list[mx.array]]:
        """Return the function as one that takes these seconds."""

        def run(*inputs: mx.array) -> list[mx.array]:
            self.now += seconds
            return function(*inputs)

        return run


def judge(
    ours: Callable[..., list[mx.array]], seconds: float = 1, plain_seconds: float = 2
) -> Verdict:
    """Compare a kernel for 2x and 3x, with their times."""
    clock, x = Clock(), mx.arange(1.0, 9.0)
    plain = clock.takes(plain_seconds, lambda x: [2.0 * x, 3.0 * x])
    functions = clock.takes(seconds, ours), plain
    return compare("double", *functions, [x], clock=lambda: clock.now, compile=lambda f: f)


def test_a_kernel_that_is_right_and_faster_is_used() -> None:
    assert judge(lambda x: [x + x, 3.0 * x]) == Verdict("double", "", 1, 2)
    assert judge(lambda x: [x + x, 3.0 * x], seconds=2).problem == ""


@pytest.mark.parametrize("factor", [3.001, float("nan"), float("inf"), 0])
def test_a_kernel_that_is_wrong_is_not_used(factor: float) -> None:
    verdict = judge(lambda x: [2.0 * x, factor * x])
    assert verdict.problem.startswith("its error is ")


def test_an_error_of_rounding_is_none() -> None:
    assert judge(lambda x: [2.0 * x, 3.00001 * x]).problem == ""


def test_a_kernel_that_raises_is_not_used() -> None:
    def refuse(x: mx.array) -> list[mx.array]:
        raise RuntimeError("[metal::Device] Unable to build metal library\nprogram_source:1:5: no")

    verdict = judge(refuse)
    assert verdict.problem == "RuntimeError: [metal::Device] Unable to build metal library"


def test_a_kernel_that_is_slower_is_not_used() -> None:
    verdict = judge(lambda x: [2.0 * x, 3.0 * x], seconds=0.0025, plain_seconds=0.002)
    assert verdict.problem == "it is slower, 2.500 ms instead of 2.000"
    assert verdict.seconds == pytest.approx(0.0025)


def test_kernels_need_metal_and_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.mx.metal, "is_available", lambda: False)
    assert unavailable() == "MLX has no Metal GPU here"
    monkeypatch.setattr(selftest.mx.metal, "is_available", lambda: True)
    monkeypatch.setattr(selftest.mx, "default_device", lambda: mx.Device(mx.gpu))
    assert unavailable() == ""
    monkeypatch.setenv(VARIABLE, "0")
    assert unavailable() == "MLXGPT_KERNELS=0 is set"


@pytest.mark.parametrize("subject", SUBJECTS)
def test_a_model_with_kernels_has_the_gradients_of_numpy(subject: str, launched: list[str]) -> None:
    model = check_model(subject)
    findings = list(cross_check(model, scaled_up(model, 1337), 1337, "mlx"))
    assert [f"{f.tensor}: {f.error}" for f in findings if not f.holds] == []  # measured: 2e-6
    assert set(launched) == (ALL if model.qk_norm else ATTENTION)


@pytest.mark.parametrize("kernel", selftest.FIELDS)
def test_each_kernel_computes_beside_mlx_s_operations(
    kernel: str, launched: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selftest, "verdicts", lambda _: (Verdict(kernel),))
    model = check_model("modern")
    findings = list(cross_check(model, scaled_up(model, 1337), 1337, "mlx"))
    assert [f"{f.tensor}: {f.error}" for f in findings if not f.holds] == []
    assert set(launched) in ({"norm_shift", "norm_shift_gradient"}, ROTATION, ATTENTION)


@pytest.mark.slow
def test_steps_with_kernels_are_those_of_numpy(launched: list[str]) -> None:
    model, (steps, lr, bound) = check_model("modern"), TRAJECTORIES["muon"]
    train = TrainConfig(**{**RECIPES["modern"]["train"], "lr": lr, "min_lr": 0.0})
    found = trajectory(model, scaled_up(model, 1337), train, "mlx", steps, bound)
    assert [f"{f.tensor}: {f.error}" for f in found if not f.holds] == []  # measured: 1.4e-6
    assert len(launched) > 20 * model.n_layer * len(ALL)


def test_a_run_says_which_kernels_are_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line = "Metal kernel for attention is off: it is slower, 2.000 ms instead of 1.500"
    monkeypatch.setattr(selftest, "notes", lambda _: (line,))
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("to be or not to be\n" * 100)
    words = ["train", "--plain", "--data=text.txt", "--preset=mini", "--iters=2", "--backend=mlx"]
    run = CliRunner().invoke(group, words)
    assert run.exit_code == 0, run.output
    assert line in run.stdout
    run = CliRunner().invoke(group, [*words, "--dtype=bfloat16", "--out=half"])
    assert run.exit_code == 0, run.output
    assert line not in run.stdout


def test_recomputed_activations_come_from_the_same_kernels(launched: list[str]) -> None:
    model = check_model("modern")
    state = TrainState(0, scaled_up(model, 1337), {})
    batch = Batch.of(rng(1, "check").integers(0, model.vocab_size, (2, model.block_size + 1)))
    n_launched = []
    grads = []
    for recomputes in (False, True):
        backend = make_backend("mlx", model, TrainConfig(checkpoint_activations=recomputes), state)
        before = len(launched)
        grads.append(backend.loss_and_grads(batch)[1])
        n_launched.append(len(launched) - before)
    assert n_launched[1] > n_launched[0] > 0
    assert max(distance(grads[1][name], g) for name, g in grads[0].items()) == 0


@pytest.mark.parametrize(
    ("changes", "windows", "dtype"),
    [
        ({"block_size": 36}, 32, "float32"),
        ({"n_head": 16}, 32, "float32"),
        ({}, 30, "float32"),
        ({}, 32, "bfloat16"),
    ],
)
def test_what_a_kernel_cannot_take_runs_without_it(
    changes: dict[str, int], windows: int, dtype: str, launched: list[str]
) -> None:
    """A context or heads that are no multiple of 8, a shorter window, half a float."""
    model = replace(check_model("modern"), **changes)
    state = TrainState(0, scaled_up(model, 1337), {})
    backend = make_backend("mlx", model, TrainConfig(dtype=dtype), state)
    backend.loss(Batch.of(rng(1, "check").integers(0, model.vocab_size, (2, windows + 1))))
    assert launched == []


def test_only_what_passed_is_used(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Verdict("attention", "it is slower, 2 ms instead of 1")
    passed = (Verdict("norm + token shift"), problem)
    monkeypatch.setattr(selftest, "verdicts", lambda _: passed)
    model = check_model("modern")
    steps = selftest.chosen(selftest.sizes_of(model))
    assert steps.norm_shift is kernels.norm_shift
    assert steps.attend is MLX_STEPS.attend
    assert steps.norm_rotate is MLX_STEPS.norm_rotate
    assert selftest.notes(model) == (
        "Metal kernel for attention is off: it is slower, 2 ms instead of 1",
    )


@pytest.mark.skipif(bool(unavailable()), reason=unavailable())
@pytest.mark.parametrize("subject", ["modern", "classic"])
def test_the_kernels_are_right_on_this_gpu(subject: str) -> None:
    found = selftest.verdicts(selftest.sizes_of(check_model(subject)))
    assert [v for v in found if v.problem and v.seconds is None] == []  # slower ones were right


def test_without_metal_nothing_is_tested_or_replaced() -> None:
    model = check_model("modern")
    if unavailable():
        assert selftest.operations(model) is TRAINING
        assert selftest.notes(model) == ()


@pytest.mark.parametrize("subject", ["modern", "classic"])
def test_the_comparison_itself_finds_the_kernels_right(
    subject: str, on_cpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on a Mac at the start, but for the times and `mx.compile`."""
    monkeypatch.setattr(selftest, "compare", partial(compare, compile=lambda f: f))
    monkeypatch.setattr(selftest, "N_TOKENS", 64)
    monkeypatch.setattr(selftest, "N_ROUNDS", 1)
    monkeypatch.setattr(selftest, "N_CALLS", 1)
    sizes = selftest.sizes_of(check_model(subject))
    found = selftest.verdicts.__wrapped__(sizes)
    assert len(found) == (3 if subject == "modern" else 1)
    assert all(v.problem == "" or v.problem.startswith("it is slower") for v in found)
