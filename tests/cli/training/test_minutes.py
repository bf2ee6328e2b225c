"""`--minutes`: what it decides, what it leaves, and that a run ends and resumes by it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.cli import group

SIZES = ("--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8", "--batch-size=2")


@pytest.fixture
def folder(tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "text").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(*words: str) -> Result:
    return CliRunner().invoke(group, [*words])


def train(*words: str) -> Result:
    return call("train", "--plain", "--backend=numpy", "--threads=1", "--out=run", *words)


def test_a_run_ends_with_its_time(folder: Path) -> None:
    done = train("--minutes=0.02", "--data=text", *SIZES)
    assert done.exit_code == 0, done.output
    assert "Chosen for" in done.output
    assert "expected validation loss" in done.output
    saved = load_checkpoint(folder / "run" / "checkpoint.safetensors")
    assert saved.train.minutes == 0.02
    assert saved.state.step == saved.train.iters == saved.progress.eval_step
    again = train("--resume")
    assert "Nothing to train" in again.output


def test_more_minutes_continue_a_finished_run(folder: Path) -> None:
    train("--minutes=0.02", "--data=text", *SIZES)
    before = load_checkpoint(folder / "run" / "checkpoint.safetensors")
    done = train("--resume", "--minutes=0.04")
    assert done.exit_code == 0, done.output
    after = load_checkpoint(folder / "run" / "checkpoint.safetensors")
    assert after.train.minutes == 0.04
    assert after.state.step > before.state.step
    assert after.progress.seconds > before.progress.seconds


def test_iters_end_a_run_that_had_a_time(folder: Path) -> None:
    train("--minutes=0.02", "--data=text", *SIZES)
    step = load_checkpoint(folder / "run" / "checkpoint.safetensors").state.step
    done = train("--resume", f"--iters={step + 3}")
    assert done.exit_code == 0, done.output
    after = load_checkpoint(folder / "run" / "checkpoint.safetensors")
    assert (after.state.step, after.train.minutes) == (step + 3, 0.0)


def test_given_steps_stay(folder: Path) -> None:
    done = train("--minutes=60", "--iters=3", "--data=text")
    assert done.exit_code == 0, done.output
    saved = load_checkpoint(folder / "run" / "checkpoint.safetensors")
    assert (saved.state.step, saved.train.minutes) == (3, 0.0)


def test_the_configuration_of_the_run_repeats_it(folder: Path) -> None:
    train("--minutes=0.02", "--data=text", *SIZES)
    lines = (folder / "run" / "config.toml").read_text().splitlines()
    assert "minutes = 0.02" in lines
    assert not any(line.startswith("iters") for line in lines)


def test_a_trained_model_is_trained_further_for_a_time(folder: Path) -> None:
    train("--iters=2", "--data=text", *SIZES)
    done = call(
        *("train", "--plain", "--backend=numpy", "--threads=1", "--out=more", "--data=text"),
        *("--init-from=run/checkpoint.safetensors", "--minutes=0.02"),
    )
    assert done.exit_code == 0, done.output
    saved = load_checkpoint(folder / "more" / "checkpoint.safetensors")
    assert saved.train.minutes == 0.02
    assert saved.state.step == saved.train.iters


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--minutes=0"], "0.0 is not in the range x>0"),
        (["--minutes=nan"], "nan is not a finite number"),
        (["--minutes=1", "--hours=1"], "omit one"),
        (["--minutes=1", "--resume", "--iters=5"], "omit one of them"),
    ],
)
def test_times_that_make_no_sense(folder: Path, words: list[str], message: str) -> None:
    done = train("--data=text", *words)
    assert done.exit_code == 2
    assert message in done.output


def test_time_steps_and_preset_together_are_refused(folder: Path) -> None:
    done = train("--minutes=1", "--iters=5", "--preset=mini", "--data=text")
    assert done.exit_code == 1
    assert "both are given" in done.output


def test_plan_shows_the_choice(folder: Path) -> None:
    done = call("plan", "--minutes=0.05", "--data=text", "--backend=numpy", "--json")
    assert done.exit_code == 0, done.output
    plan = json.loads(done.stdout)
    assert plan["preset"] in ("mini", "tiny", "small4", "small")
    assert plan["steps"] == plan["iters"]
    assert 0 < plan["expected_loss"] < 5
    words = call("plan", "--hours=1", "--device=m4-max").output
    assert "Chosen for" in words


def test_plan_refuses_two_amounts(folder: Path) -> None:
    done = call("plan", "--minutes=1", "--tokens=1000")
    assert done.exit_code == 2
    assert "omit one" in done.output


@pytest.mark.parametrize("words", [["plan", "--device=m4-max"], ["train", "--plain"]])
def test_plan_and_train_refuse_a_text_that_is_too_short(folder: Path, words: list[str]) -> None:
    (folder / "short").write_text("ab")
    done = call(*words, "--minutes=1", "--data=short")
    assert (done.exit_code, "give more text" in done.output) == (1, True), done.output


def test_plan_expects_no_loss_of_answers(folder: Path) -> None:
    rows = ({"prompt": f"What is {i}?", "completion": f"It is {i}."} for i in range(200))
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ("plan", "--minutes=1", "--device=m4-max", "--data=talks.jsonl")
    assert json.loads(call(*words, "--json").stdout)["expected_loss"] is None
    assert "expected validation loss" not in call(*words).output
