"""Standard streams that are closed or refuse: one line, and nothing is lost."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mlx_randygpt.checkpoint import NEWEST, load_checkpoint

FULL = Path("/dev/full")
full = pytest.mark.skipif(not FULL.exists(), reason="only Linux has /dev/full")
SIZES = "--n-layer 1 --n-head 2 --n-embd 8 --block-size 8 --batch-size 2 --backend numpy"


def shell(command: str, folder: Path) -> tuple[int, str]:
    """Exit code and stderr of `mlxgpt COMMAND`, which may redirect."""
    words = f"'{sys.executable}' -m mlx_randygpt {command}"
    done = subprocess.run(["sh", "-c", words], cwd=folder, capture_output=True, text=True)
    return done.returncode, done.stderr


@full
@pytest.mark.parametrize("command", ["--help", "--version", "presets", "train --help"])
def test_output_that_is_refused_is_one_line(command: str, tmp_path: Path) -> None:
    line = "Error: the output cannot be written: No space left on device\n"
    assert shell(f"{command} > {FULL}", tmp_path) == (1, line)


@full
def test_a_run_whose_output_is_refused_says_why_and_how_to_go_on(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    code, told = shell(f"train --data a.txt --iters 9 --out run {SIZES} > {FULL}", tmp_path)
    assert (code, "(No space left on device)" in told, "--resume --out run" in told) == (
        1,
        True,
        True,
    )


def test_a_run_with_all_streams_closed_is_saved(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(text)
    words = f"train --data a.txt --iters 9 --out run {SIZES} <&- >&- 2>&-"
    assert shell(words, tmp_path) == (0, "")
    assert load_checkpoint(tmp_path / "run" / NEWEST).state.step == 9
    chat = f"chat --checkpoint run/{NEWEST} --backend numpy <&- >&-"
    code, told = shell(chat, tmp_path)  # its input has ended
    assert (code, "Error" in told) == (0, False)


@pytest.mark.parametrize("encoding", ["latin-1", "ascii", "utf-8"])
def test_json_is_json_whatever_stdout_is_encoded_in(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "日本.txt").write_text("日本 and – tales. " * 300)
    run = f"train --data 日本.txt --iters 1 --out run {SIZES} --plain > /dev/null 2>&1"
    assert shell(run, tmp_path)[0] == 0
    words = [sys.executable, "-m", "mlx_randygpt", "info", "run/checkpoint.safetensors", "--json"]
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, env=environment, check=True)
    assert json.loads(done.stdout.decode(encoding))["data"]["paths"][0].endswith("日本.txt")
