"""The range test of learning rates."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.cli import group
from mlx_randygpt.state import Batch
from mlx_randygpt.training.find_lr import (
    BACK_OFF,
    TOO_HIGH,
    Trial,
    is_worth_trying,
    range_test,
    suggest,
)
from mlx_randygpt.training.loop import Run, step_batches

Make = Callable[..., tuple[Run, Backend]]


def trials_of(make_run: Make, recipe: str, highest: float = 10.0) -> list[Trial]:
    run, backend = make_run(recipe, on="the cat sat on a mat. " * 200)
    return list(range_test(backend, batches_of(run, 60), lowest=1e-5, highest=highest))


def batches_of(run: Run, steps: int) -> list[Batch]:
    size = run.model.block_size
    return [b for i in range(steps) for b in step_batches(run.train, run.train_tokens, size, i)]


def test_the_suggestion_keeps_its_distance_from_the_lowest_loss() -> None:
    trials = [Trial(10.0**k, abs(k + 2) + 1.0) for k in range(-5, 1)]  # lowest at 0.01
    assert suggest([*trials, Trial(10.0, math.nan)]) == pytest.approx(BACK_OFF * 0.01)


def test_rates_grow_by_a_ratio_and_the_test_ends_where_the_loss_turns(make_run: Make) -> None:
    trials = trials_of(make_run, "classic")
    ratios = np.array([b.lr / a.lr for a, b in itertools.pairwise(trials)])
    np.testing.assert_allclose(ratios, 1e6 ** (1 / 59), rtol=1e-9)
    assert len(trials) < 60
    assert not trials[-1].loss <= TOO_HIGH * min(trial.loss for trial in trials)


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_a_run_at_the_suggestion_learns_and_one_far_above_does_not(
    recipe: str, make_run: Make
) -> None:
    rate = suggest(trials_of(make_run, recipe))
    losses = []
    for lr in (rate, 300 * rate):
        run, backend = make_run(recipe, on="the cat sat on a mat. " * 200)
        trials = range_test(backend, batches_of(run, 40), lowest=lr, highest=1.0001 * lr)
        losses.append(list(trials)[-1].loss)
    assert losses[0] < 1.0 < 10.0 < losses[1]  # measured: 0.2 against 57 and more


def test_the_command_prints_one_object(text: str, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text(text)
    words = ["find-lr", "--data", str(tmp_path / "t.txt"), "--preset", "mini", "--iters", "10"]
    result = CliRunner().invoke(group, [*words, "--backend", "numpy", "--json"])
    found = json.loads(result.stdout)
    assert found.keys() == {"suggestion", "recipe_lr", "trials", "worth_trying"}
    assert next(trial["lr"] for trial in found["trials"]) == 1e-4
    drawn = CliRunner().invoke(group, [*words, "--backend", "numpy"])
    assert "Suggested: --lr" in drawn.stdout
    assert max(map(len, drawn.stdout.splitlines())) <= 80


def test_rates_that_do_not_grow_are_refused() -> None:
    result = CliRunner().invoke(group, ["find-lr", "--from", "0.1", "--to", "0.01"])
    assert result.exit_code == 2
    assert "rates must grow" in result.stderr


@pytest.mark.parametrize(
    ("rate", "worth"), [(0.02, False), (0.05, False), (0.07, True), (6e-3, True)]
)
def test_a_suggestion_close_to_the_rule_is_not_worth_trying(rate: float, worth: bool) -> None:
    assert is_worth_trying(rate, 0.02) is worth


def test_a_short_text_is_tested_with_the_preset_that_it_is_trained_with(
    text: str, tmp_path: Path
) -> None:
    (tmp_path / "t.txt").write_text(text[:400])  # too short for the context of `small`
    words = ["find-lr", "--data", str(tmp_path / "t.txt"), "--iters", "2", "--backend", "numpy"]
    result = CliRunner().invoke(group, words)
    assert result.exit_code == 0, result.output
    assert "preset tiny" in result.stderr
