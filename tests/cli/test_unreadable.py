"""Unreadable is not missing and not damaged: every command names the path and the system's reason.

Paths lie in a folder that this user may not enter, or behind a link to itself.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from privileges import unprivileged

from mlx_randygpt.checkpoint import NEWEST
from mlx_randygpt.cli import group

SMALL = "--n-layer=1 --n-head=2 --n-embd=8 --block-size=8 --batch-size=4 --backend=numpy"
TRAIN = f"train --plain --iters=2 --out=new {SMALL}"
RUN = f"run/{NEWEST}"
PLACES = {"closed": "Permission denied", "loop": "Too many levels of symbolic links"}

# (words with PLACE, exit code); 2 where click reads the file
COMMANDS: list[tuple[str, int]] = [
    (f"{TRAIN} --data=PLACE/text.txt", 1),
    (f"{TRAIN} --data=PLACE", 1),
    (f"{TRAIN} --data=PLACE/*.txt", 1),
    (f"{TRAIN} --data=PLACE/**", 1),
    (f"{TRAIN} --data=text.txt --tokenizer=PLACE/tokenizer.json", 1),
    (f"{TRAIN} --data=text.txt --resume=PLACE/{NEWEST}", 1),
    (f"{TRAIN} --data=text.txt --init-from=PLACE/{NEWEST}", 1),
    (f"{TRAIN} --data=text.txt --out=PLACE/run", 1),
    (f"{TRAIN} --data=text.txt --config=PLACE/c.toml", 2),
    (f"train --plain --resume --out=PLACE/run {SMALL}", 1),
    ("data prepare --data=PLACE/text.txt", 1),
    ("data prepare --data=PLACE", 1),
    ("info PLACE/run", 1),
    (f"info PLACE/{NEWEST}", 1),
    ("runs PLACE", 1),
    ("runs PLACE/run", 1),
    ("plot PLACE/run", 1),
    ("sample --checkpoint=PLACE/run", 1),
    (f"sample --checkpoint={RUN} --backend=numpy --prompt-file=PLACE/prompt.txt", 2),
    ("eval --checkpoint=PLACE/run", 1),
    ("chat --checkpoint=PLACE/run", 1),
    ("inspect PLACE/run", 1),
    ("serve --port=0 --checkpoint=PLACE/run", 1),
    ("export PLACE/run -o new", 1),
    (f"export {RUN} -o PLACE/new", 1),
    (f"inspect {RUN} -o PLACE/page.html", 1),
    ("plot run -o PLACE/plot.svg", 1),
    ("import PLACE/model.bin -o new", 1),
    ("import exported -o PLACE/new.safetensors", 1),
    ("import exported -o new --vocab=PLACE/vocab.json", 1),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run, its export, a closed folder and a link to itself."""
    old, path = Path.cwd(), tmp_path_factory.mktemp("unreadable")
    os.chdir(path)
    Path("text.txt").write_text("the old red ship and a small grey bird over the hill.\n" * 20)
    assert call(TRAIN.replace("=new", "=run") + " --data=text.txt").exit_code == 0
    assert call(f"export {RUN} -o exported").exit_code == 0
    Path("loop").symlink_to("loop")
    Path("closed", "run").mkdir(parents=True)
    shutil.copy(RUN, "closed/run")
    shutil.copy("text.txt", "closed")
    Path("closed").chmod(0)
    yield path
    os.chdir(old)
    Path(path, "closed").chmod(0o700)


def call(words: str) -> Result:
    return CliRunner().invoke(group, words.split(), auto_envvar_prefix="MLXGPT")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("words", "code"), COMMANDS)
def test_a_path_out_of_reach_is_reported_with_the_reason(
    words: str, code: int, place: str, folder: Path
) -> None:
    if words.startswith("serve"):
        pytest.importorskip("starlette")
    with unprivileged():
        result = call(words.replace("PLACE", place))
    error = result.stderr.splitlines()[-1]
    assert result.exit_code == code, result.output
    assert error.startswith("Error: ")
    assert place in error
    assert PLACES[place] in error
    assert not any(wrong in error for wrong in ("not exist", "no such", "damaged", "unexpected"))
    assert not Path("new").exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="names are UTF-8 there")
@pytest.mark.parametrize(
    "words", ["plot RUN -o p.svg", "plot RUN -o p.html", "runs RUN", "info RUN"]
)
def test_a_name_that_is_not_utf8_is_shown_with_a_question_mark(
    words: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "run", name := os.fsdecode(b"r\xff"))
    result = call(words.replace("RUN", name))
    assert result.exit_code == 0, result.output
    assert not words.startswith("plot") or ">r?<" in Path(words.split()[-1]).read_text()


def test_runs_reports_a_folder_it_cannot_read_and_lists_the_others(folder: Path) -> None:
    with unprivileged():
        result = call("runs . --json")
    assert result.exit_code == 0, result.output
    assert '"run": "run"' in result.stdout
    assert "Skipped: closed cannot be read: Permission denied" in result.stderr
