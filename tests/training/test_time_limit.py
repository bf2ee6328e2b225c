"""When a run with a time ends, with a clock that is wound by hand."""

from __future__ import annotations

from mlx_randygpt.config import TrainConfig
from mlx_randygpt.training.time_limit import TimeLimit


class Clock:
    """A time that only moves when a step is taken."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def take_steps(limit: TimeLimit, clock: Clock, seconds_of_step: list[float], iters: int) -> int:
    """Take steps until the target and return the last."""
    target = iters
    for step, seconds in enumerate(seconds_of_step, start=1):
        clock.now += seconds
        if step == target:
            return step
        target = limit.target(step)
    raise AssertionError("the target was not reached")


def test_without_a_time_the_target_stays() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(iters=7), clock, 0.0)
    assert take_steps(limit, clock, [100.0] * 20, 7) == 7


def test_the_last_step_ends_with_the_time() -> None:
    for pace in (0.25, 0.5, 2.0):  # it began with 1 s a step
        clock = Clock()
        limit = TimeLimit(TrainConfig(iters=60, minutes=1), clock, 0.0)
        take_steps(limit, clock, [pace] * 300, 60)
        assert 60 - 2 * pace <= clock.now <= 60


def test_a_machine_that_slows_down_still_ends_in_time() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(iters=120, minutes=1), clock, 0.0)
    take_steps(limit, clock, [0.5] * 40 + [1.5] * 60, 120)
    assert 57 <= clock.now <= 61.5  # one step more than planned, at most


def test_the_last_evaluation_fits_in() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(iters=60, minutes=1), clock, 0.0)
    limit.closing_seconds = 10.0
    take_steps(limit, clock, [0.5] * 300, 60)
    assert 48 <= clock.now <= 50


def test_a_resumed_run_has_what_is_left() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(iters=60, minutes=1), clock, -40.0)  # 40 s were used before
    take_steps(limit, clock, [0.5] * 300, 60)
    assert 18.5 <= clock.now <= 20


def test_a_time_that_is_over_allows_one_more_step() -> None:
    clock = Clock()
    limit = TimeLimit(TrainConfig(iters=60, minutes=1), clock, -100.0)
    assert take_steps(limit, clock, [1.0] * 10, 60) == 3  # two to know the pace
