"""`--micro-batch` and `--checkpoint-activations` of `mlxgpt train`: what is asked for, runs."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.checkpoint import NEWEST, load_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.config import TrainConfig
from mlx_randygpt.planning import devices
from mlx_randygpt.planning.footprint import footprint

BOX = devices.DEVICES["m3-max"]
SMALL = ["--n-layer=2", "--n-head=2", "--n-embd=8", "--block-size=8", "--batch-size=4"]


@pytest.fixture(autouse=True)
def folder(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The working directory, with text.txt in it."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(text)


def call(*words: str) -> Result:
    return CliRunner().invoke(group, ["train", "--plain", "--data", "text.txt", *SMALL, *words])


def settings() -> TrainConfig:
    return load_checkpoint(Path("checkpoints", NEWEST)).train


def test_a_resumed_run_may_begin_and_cease_to_recompute() -> None:
    """The same weights each way: on NumPy recomputing is exact."""
    numpy = ["--backend", "numpy", "--dropout", "0.1"]
    for out, first, then in (
        ("a", [], []),
        ("b", ["--checkpoint-activations"], ["--keep-activations"]),
    ):
        done = call("--iters=2", "--out", out, *numpy, *first)
        assert done.exit_code == 0, done.output
        done = call("--iters=4", "--out", out, "--resume", *numpy, *then)
        assert done.exit_code == 0, done.output
    a, b = (load_checkpoint(Path(out, NEWEST)) for out in "ab")
    assert not b.train.checkpoint_activations
    assert all((a.state.params[name] == w).all() for name, w in b.state.params.items())


def test_the_settings_name_the_micro_batch_and_read_it_back() -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    done = call("--iters=1", "--backend", "mlx", "--micro-batch", "3")
    assert done.exit_code == 0, done.output
    assert settings().micro_batch == 3
    written = Path("checkpoints/config.toml")
    assert tomllib.loads(written.read_text())["micro_batch"] == 3
    again = CliRunner().invoke(group, ["train", "--config", str(written), "--plain", "--overwrite"])
    assert again.exit_code == 0, again.output


def test_auto_takes_what_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device with room for three of the four sequences."""
    pytest.importorskip("mlx.core", exc_type=ImportError)
    call("--iters=1", "--backend", "numpy", "--out", "first")
    saved = load_checkpoint(Path("first", NEWEST))
    room = sum(footprint("mlx", saved.model, saved.train, 3, 1).values())
    monkeypatch.setattr(devices, "here", lambda backend: replace(BOX, memory=room))
    done = call("--iters=1", "--backend", "mlx", "--micro-batch", "auto")
    assert done.exit_code == 0, done.output
    assert settings().micro_batch == 3
    assert "Micro-batch: 3 sequences per pass, to fit into this device." in done.output


def test_auto_where_nothing_fits_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    monkeypatch.setattr(devices, "here", lambda backend: replace(BOX, memory=1000))
    done = call("--iters=1", "--backend", "mlx", "--micro-batch", "auto")
    assert done.exit_code == 1
    assert "Error: one sequence needs 0.0 GB, only 0.0 GB are available" in done.output


@pytest.mark.parametrize(("word", "kept"), [("auto", 0), ("2", 2)])
def test_numpy_says_that_it_changes_nothing(word: str, kept: int) -> None:
    done = call("--iters=1", "--backend", "numpy", "--micro-batch", word)
    assert done.exit_code == 0, done.output
    assert settings().micro_batch == kept
    assert "--micro-batch has no effect" in done.output


@pytest.mark.parametrize(
    ("word", "code", "message"),
    [
        ("few", 2, "'few' is neither a number of sequences nor auto"),
        ("-1", 1, "micro_batch=-1 is too small; it must be at least 0"),
    ],
)
def test_a_wrong_micro_batch_is_refused(word: str, code: int, message: str) -> None:
    done = call("--iters=1", "--backend", "numpy", "--micro-batch", word)
    assert done.exit_code == code
    assert message in done.output


def test_settings_without_the_fields_are_those_of_old_files() -> None:
    assert (TrainConfig().micro_batch, TrainConfig().checkpoint_activations) == (0, False)
    assert replace(TrainConfig(), micro_batch=2) != TrainConfig()
