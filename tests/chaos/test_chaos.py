"""Whatever strikes a run, no checkpoint is lost or unreadable and it ends as if undisturbed.

The long plan is marked slow; MLXGPT_CHAOS_KILLS=300 pytest tests/chaos -m slow -rP shows all of it.
"""

from __future__ import annotations

import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults import (
    DAMAGES,
    bound_by_permissions,
    fill_disk,
    free_disk,
    freeze,
    kill,
    remove,
)
from harness import SIGNALS, Plan, Run, assert_same_end, carry_out, half_killed, readable

from mlx_randygpt.checkpoint import BEST, NEWEST, PREVIOUS, peek_step

N_KILLS = int(os.environ.get("MLXGPT_CHAOS_KILLS", "24"))
SEED = 5
NewRun = Callable[[], Run]
can_fill = pytest.mark.skipif(not hasattr(resource, "prlimit"), reason="only Linux has prlimit")
can_lock = pytest.mark.skipif(bound_by_permissions() is None, reason="root writes everywhere")


@pytest.fixture(scope="session")
def long_text(text: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Long enough that a tenth of the time goes into evaluations."""
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text * 8)
    return path


@pytest.fixture
def new_run(long_text: Path, tmp_path: Path) -> Iterator[NewRun]:
    """-> a run in a folder of its own, ended with the test."""
    runs: list[Run] = []

    def begin() -> Run:
        runs.append(Run(tmp_path / f"run{len(runs)}", long_text))
        return runs[-1]

    yield begin
    for run in runs:
        run.close()


@pytest.fixture
def run(new_run: NewRun) -> Run:
    return new_run()


@pytest.fixture(scope="session")
def undisturbed(long_text: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run that nothing happened to."""
    run = Run(tmp_path_factory.mktemp("undisturbed"), long_text)
    run.complete()
    return run


def saved(run: Run) -> str:
    """How the line of a newest checkpoint that is safe begins."""
    return f"✓ Saved {run.out / NEWEST}"


def test_a_short_plan_of_signals_costs_nothing(new_run: NewRun, undisturbed: Run) -> None:
    outcome = carry_out(Plan.drawn(SEED, list(SIGNALS)), new_run, undisturbed)
    assert not outcome.failures
    assert set(outcome.kills) == set(SIGNALS)


@pytest.mark.slow
def test_a_long_plan_of_signals_costs_nothing(new_run: NewRun, undisturbed: Run) -> None:
    plan = Plan.drawn(SEED, half_killed(N_KILLS))
    outcome = carry_out(plan, new_run, undisturbed)
    sys.stdout.write(f"{outcome}\n")
    assert not outcome.failures
    assert sum(outcome.kills.values()) == N_KILLS


def test_a_frozen_run_keeps_its_folder_and_goes_on(run: Run, undisturbed: Run) -> None:
    life = run.launch()
    life.until("eval 100 |")
    freeze(life)
    second = run.launch().finish()
    assert f"in use by another run (process {life.process.pid})" in second.errors
    life.send(signal.SIGCONT)
    assert life.finish().code == 0
    assert_same_end(run, undisturbed)


@can_fill
def test_a_full_disk_spares_the_old_checkpoint_and_ends_with_code_1(
    run: Run, undisturbed: Run
) -> None:
    life = run.launch()
    life.until("eval 100 |")
    fill_disk(life)
    assert life.finish().code == 1
    assert f"could not write {run.out / NEWEST}" in life.errors
    assert readable(run)
    assert not run.unfinished()
    run.complete()
    assert_same_end(run, undisturbed)


@can_fill
def test_a_disk_that_was_full_for_a_while_costs_nothing(run: Run, undisturbed: Run) -> None:
    life = run.launch()
    life.until("eval 100 |")
    fill_disk(life)
    life.until("✗ Could not save")
    free_disk(life)
    life.until(saved(run))
    assert life.finish().code == 0
    assert_same_end(run, undisturbed)


@can_lock
def test_a_folder_that_was_read_only_for_a_while_costs_nothing(run: Run, undisturbed: Run) -> None:
    life = run.launch(under=bound_by_permissions() or ())
    life.until("eval 100 |")
    run.out.chmod(0o555)
    life.until("✗ Could not save")
    run.out.chmod(0o755)
    assert life.finish().code == 0
    assert not run.unfinished()
    assert_same_end(run, undisturbed)


def test_a_folder_that_is_removed_is_made_again(run: Run, undisturbed: Run) -> None:
    life = run.launch()
    life.until("eval 100 |")
    remove(run.out)
    life.until(saved(run))
    assert life.finish().code == 0
    assert_same_end(run, undisturbed, best=False)


def test_a_folder_that_is_moved_is_followed(run: Run, undisturbed: Run) -> None:
    life = run.launch()
    life.until("eval 100 |")
    moved = run.out.with_name("moved")
    run.out.rename(moved)
    life.until(f"✓ Saved {moved / NEWEST}")
    assert life.finish().code == 0
    shutil.rmtree(run.out, ignore_errors=True)  # of a write that was under way
    moved.rename(run.out)
    assert_same_end(run, undisturbed)


def test_damaged_checkpoints_are_skipped_by_name(run: Run, undisturbed: Run) -> None:
    best = f"✓ Saved {run.out / BEST}"
    run.launch().until(best)
    for damage in DAMAGES.values():
        kill(run.lives[-1])
        damaged = run.newest()
        damage(damaged)
        life = run.launch()
        life.until(best)  # which leaves another one whole when the next is damaged
        assert life.said(f"Skipped: {damaged} ")
    assert life.finish().code == 0
    assert_same_end(run, undisturbed)


def test_the_previous_checkpoint_goes_on_where_newest_and_best_are_damaged(
    run: Run, undisturbed: Run
) -> None:
    life = run.launch()
    life.until(f"{saved(run)} (iter 0)")
    life.until(saved(run))
    kill(life)
    for name in (NEWEST, BEST):
        DAMAGES["zeros"](run.out / name)
    step = peek_step(run.out / PREVIOUS)
    life = run.complete()
    assert any(line.startswith(f"step {step + 1}/") for line in life.lines)
    assert_same_end(run, undisturbed)


def test_where_nothing_is_whole_nothing_is_written(run: Run) -> None:
    life = run.launch()
    life.until(f"{saved(run)} (iter 0)")
    life.until(saved(run))
    kill(life)
    for path in run.files():
        DAMAGES["zeros"](path)
    before = {path: path.read_bytes() for path in run.files()}
    life = run.launch().finish()
    assert (life.code, life.errors.count("\n")) == (1, 1)
    assert all(str(path) in life.errors for path in before)
    assert {path: path.read_bytes() for path in run.files()} == before


@can_lock
def test_a_parent_that_cannot_be_searched_for_a_while_costs_nothing(
    run: Run, undisturbed: Run
) -> None:
    life = run.launch(under=bound_by_permissions() or ())
    life.until("eval 100 |")
    run.out.parent.chmod(0o000)
    life.until("✗ Could not save")
    run.out.parent.chmod(0o755)
    life.until(saved(run))
    assert (life.finish().code, life.errors) == (0, "")
    assert not any("moved" in line or "removed" in line for line in life.lines)
    assert_same_end(run, undisturbed)


@pytest.mark.parametrize("name", [NEWEST, BEST])
def test_no_line_from_before_a_save_is_lost(run: Run, name: str) -> None:
    words = ["--save-every=50", "--eval-every=70"]  # which no second, and no evaluation, flushes
    life = run.launch(*words)
    life.until(f"✓ Saved {run.out / name} (iter 50)" if name == NEWEST else "eval 70 |")
    kill(life)
    step = peek_step(run.out / name)
    steps = {at for kind, at in run.metrics() if kind == "loss"}
    assert steps >= set(range(1, step + 1))
    assert name == NEWEST or ("val_loss", step) in run.metrics()


@pytest.mark.parametrize("state", ["older", "damaged", "missing"])
@pytest.mark.parametrize("named", [False, True])
def test_the_furthest_state_is_the_newest_before_nothing_is_left_to_train(
    run: Run, state: str, named: bool
) -> None:
    """As after a kill between the two files of the last step."""
    words = ["--iters=20", "--save-every=10"]
    run.launch(*words).finish()
    newest, best, previous = (run.out / name for name in (NEWEST, BEST, PREVIOUS))
    shutil.copyfile(newest, best)
    if state == "older":
        shutil.copyfile(previous, newest)
        os.utime(newest, (1, 1))
        assert peek_step(newest) < 20
    elif state == "damaged":
        DAMAGES["zeros"](newest)
    else:
        newest.unlink()
    life = run.launch(*([str(best)] if named else [])).finish()
    assert (life.code, life.errors) == (0, "")
    assert life.said("Already at iteration 20")
    assert peek_step(newest) == 20
    assert not list(run.out.glob(".*.tmp"))
