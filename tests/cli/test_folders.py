"""A folder of a run stands for its best checkpoint, or for its newest on --resume."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.checkpoint import BEST, NEWEST, load_checkpoint
from mlx_randygpt.cli import group

TINY = ("--preset=mini", "--n-layer=1", "--n-embd=8", "--batch-size=4", "--backend=numpy")


def call(*words: str) -> Result:
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 0, done.output
    return done


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose best checkpoint is at step 2 and whose newest is at step 6."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text.txt").write_text("To be, or not to be,\nthat is the question. " * 80)
    run = folder / "run1"
    words = ("train", "--data", str(folder / "text.txt"), "--out", str(run), "--plain", *TINY)
    call(*words, "--iters=2")
    shutil.copy(run / BEST, folder / "kept")
    call("train", "--resume", "--out", str(run), "--plain", "--iters=6")
    shutil.move(folder / "kept", run / BEST)
    return run


@pytest.fixture
def here(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(trained, tmp_path / "run1")
    shutil.copy(trained.parent / "text.txt", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "sample --backend=numpy --max-tokens=9 --checkpoint",
        "eval --backend=numpy --checkpoint",
        "info",
        "check --checkpoint",
    ],
)
def test_a_folder_is_its_best_checkpoint(words: str, here: Path) -> None:
    assert load_checkpoint(here / "run1" / BEST).state.step == 2
    file, folder = (call(*words.split(), path).stdout for path in (f"run1/{BEST}", "run1"))
    assert folder.replace("run1\n", f"run1/{BEST}\n") == file


@pytest.mark.parametrize("words", ["inspect -o page.html", "export --json -o out"])
def test_a_page_and_an_export_are_of_the_best_checkpoint(words: str, here: Path) -> None:
    call(*words.split(), "run1")
    name, kind = ("page.html", BEST) if words.startswith("inspect") else ("out/README.md", "step 2")
    assert kind in (here / name).read_text()


def test_fine_tuning_begins_with_the_best_checkpoint(here: Path) -> None:
    for out, source in (("run2", "run1"), ("run3", f"run1/{BEST}")):
        call(
            "train", "--plain", "--data=text.txt", "--iters=1", "--init-from", source, "--out", out
        )
    by_folder, by_file = (load_checkpoint(here / out / NEWEST) for out in ("run2", "run3"))
    for name, weight in by_folder.state.params.items():
        assert (weight == by_file.state.params[name]).all()


def test_a_folder_is_resumed_from_its_newest_checkpoint(here: Path) -> None:
    done = call("train", "--plain", "--resume", "run1", "--iters=8")
    assert "step 7/8" in done.stdout
    assert load_checkpoint(here / "run1" / NEWEST).state.step == 8
    assert "Let it write: mlxgpt sample --checkpoint run1" in done.stdout


def test_a_folder_is_resumed_in_another(here: Path) -> None:
    done = call("train", "--plain", "--resume", "run1", "--out", "run2", "--iters=7")
    assert "step 7/7" in done.stdout
    assert load_checkpoint(here / "run1" / NEWEST).state.step == 6
    assert load_checkpoint(here / "run2" / NEWEST).state.step == 7
    assert json.loads(call("info", "run2", "--json").stdout)["path"].startswith("run2/")
