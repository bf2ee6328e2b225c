"""Learning rates against numbers worked by hand."""

from __future__ import annotations

import math

import pytest

from mlx_randygpt.config import SCHEDULES
from mlx_randygpt.progress import MAX_REDUCTIONS, Plateau
from mlx_randygpt.training.schedule import learning_rate


def rate(step: int, schedule: str, **changes: float) -> float:
    """110 steps, 10 of them warmup, from 1.0 down to 0.2."""
    settings = {"iters": 110, "warmup": 10, "lr": 1.0, "min_lr": 0.2, "reductions": 0}
    return learning_rate(step, schedule=schedule, **(settings | changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("schedule", "step", "expected"),
    [
        *[(s, step, lr) for s in SCHEDULES for step, lr in ((0, 0.1), (4, 0.5), (9, 1), (10, 1))],
        ("constant", 109, 1),
        ("linear", 35, 0.8), ("linear", 60, 0.6), ("linear", 109, 0.208),
        ("cosine", 60, 0.6), ("cosine", 35, 0.6 + 0.4 * math.sqrt(0.5)),
        ("cosine", 109, 0.2 + 0.4 * (1 - math.cos(math.pi / 100))),
        ("trapezoid", 66, 1), ("trapezoid", 88, 0.6), ("trapezoid", 109, 0.2 + 0.8 / 44),
        ("plateau", 109, 1),
    ],
)  # fmt: skip
def test_rates_are_those_worked_by_hand(schedule: str, step: int, expected: float) -> None:
    assert rate(step, schedule) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("iters", [1, 2, 3, 10, 11, 1000])
@pytest.mark.parametrize("warmup", [0, 1, 10, 2000])
def test_no_step_is_lost(schedule: str, iters: int, warmup: int) -> None:
    rates = [rate(s, schedule, iters=iters, warmup=warmup, min_lr=0) for s in range(iters)]
    assert min(rates) > 0
    assert max(rates) <= 1


@pytest.mark.parametrize(("reductions", "expected"), [(0, 1), (1, 0.5), (2, 0.25), (3, 0.2)])
def test_plateau_halves_down_to_min_lr(reductions: int, expected: float) -> None:
    assert rate(50, "plateau", reductions=reductions) == expected


def watched(losses: list[float], patience: int, schedule: str = "plateau") -> Plateau:
    plateau = Plateau()
    for loss in losses:
        plateau = plateau.observe(loss, patience, schedule)
    return plateau


def test_a_new_best_starts_the_waiting_anew() -> None:
    assert watched([3, 3, 2.9], 2) == Plateau(2.9, 0, 0)
    assert watched([3, 3, 2.9, 2.9], 2) == Plateau(2.9, 1, 0)
    assert watched([3, 3, 2.9, 2.9, 3.1], 2) == Plateau(2.9, 0, 1)


def test_plateau_halves_three_times_and_is_then_exhausted() -> None:
    states = [watched([1.0] * n, 2) for n in range(1, 10)]  # the first is the best
    assert [s.reductions for s in states] == [0, 0, 1, 1, 2, 2, 3, 3, 3]
    assert [s.exhausted(2) for s in states] == [False] * 8 + [True]
    assert watched([1.0] * 100, 2).reductions == MAX_REDUCTIONS == 3


def test_other_schedules_stop_when_patience_is_over() -> None:
    assert not watched([1.0, 1.1, 1.1], 3, "cosine").exhausted(3)
    assert watched([1.0, 1.1, 1.1, 1.0], 3, "cosine") == Plateau(1.0, 3, 0)
    assert watched([1.0, 1.1, 1.1, 1.0], 3, "cosine").exhausted(3)


def test_without_patience_nothing_is_ever_exhausted() -> None:
    assert watched([1.0] * 50, 0) == Plateau(1.0, 49, 0)
    assert not watched([1.0] * 50, 0).exhausted(0)
