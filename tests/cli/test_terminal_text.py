"""Names, paths and the text of a model cannot act on a terminal, whichever command prints them;
files and pipes get every character.
"""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from mlx_randygpt.checkpoint import NEWEST
from mlx_randygpt.cli import group, output
from mlx_randygpt.data import corpora

EVIL = "\x1b]0;owned\x07\x9b2J\u202e"  # sets a title, clears the screen, turns the direction
MARKS = ("\x1b]", "\x07", "\x9b", "\u202e")
FOLDER = f"r{EVIL}n"
FILE = f"{FOLDER}/{NEWEST}"
TEXT = f"to be {EVIL} or not to be\n" * 200
SMALL = ["--preset=mini", "--backend=numpy", "--plain", "--iters=1"]
COMMANDS = [  # words, and whether they succeed
    (["train", f"--data={FOLDER}/a.txt", f"--out={FOLDER}/new", *SMALL], 0),
    (["train", f"--out={FOLDER}", "--resume", *SMALL], 0),
    (["train", f"--data={FOLDER}/none", *SMALL], 1),
    (["train", f"--out={FOLDER}", *SMALL], 1),
    (["find-lr", f"--data={FOLDER}/none"], 1),
    (["sample", f"--checkpoint={FILE}", f"--prompt={EVIL}", "--max-tokens=9"], 0),
    (["sample", f"--checkpoint={FILE}", f"--prompt={EVIL}", "--max-tokens=9", "--json"], 0),
    (["sample", f"--checkpoint={FILE}", f"--prompt={EVIL}", "--max-tokens=9", "--show-probs"], 0),
    (["sample", f"--checkpoint={FILE}", f"--prompt={EVIL}", "--num-samples=2"], 0),
    (["chat", f"--checkpoint={FILE}", "--max-tokens=9"], 0),
    (["chat", f"--checkpoint={FILE}", f"--replay={FOLDER}/none"], 1),
    (["serve", f"--checkpoint={FOLDER}/none"], 1),
    (["serve", f"--checkpoint={FILE}", f"--host={EVIL}"], 1),
    (["eval", f"--checkpoint={FILE}"], 0),
    (["info", FOLDER], 0),
    (["info", FILE, "--json"], 0),
    (["info", f"{FOLDER}/none"], 1),
    (["data", "prepare", f"--data={FOLDER}"], 0),
    (["data", "prepare", f"--data={FOLDER}/none", "--json"], 1),
    (["data", "fetch", "text8", f"--out={FOLDER}"], 0),
    (["data", "fetch", EVIL], 1),
    (["import", FOLDER, f"--output={FOLDER}/new.safetensors"], 1),
    (["import", f"{FOLDER}/exported", f"--output={FOLDER}/new.safetensors", "--overwrite"], 0),
    (["plot", FOLDER], 0),
    (["plot", FOLDER, f"--output={FOLDER}/a.svg"], 0),
    (["plot", FOLDER, f"--output={FOLDER}/a.gif"], 2),
    (["runs", "."], 0),
    (["runs", f"{FOLDER}/none"], 1),
    (["inspect", FILE, f"--output={FOLDER}/a.html", "--max-tokens=99"], 0),
    (["export", FILE, f"--output={FOLDER}/exported", "--overwrite"], 0),
    (["launch", f"--hostfile={FOLDER}/none", "--", "train"], 1),
    (["launch", "-n", "1", "--", EVIL], 2),
    (["check", f"--checkpoint={FOLDER}/none"], 1),
    (["bench", EVIL], 2),
    (["plan", f"--device={EVIL}"], 1),
    (["presets", EVIL], 2),
    (["doctor", f"--{EVIL}"], 2),
    ([f"--{EVIL}"], 2),
    ([EVIL], 2),
    (["train", f"--config={FOLDER}/a.txt"], 2),
]


def call(words: list[str]) -> Result:
    return CliRunner().invoke(group, words, input=f"{EVIL}\n/show\n/temp {EVIL}\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and an export whose names and text are hostile."""
    folder = tmp_path_factory.mktemp("terminal")
    (folder / FOLDER).mkdir()
    (folder / FOLDER / "a.txt").write_text(TEXT)
    (folder / FOLDER / "metrics.html").write_text("<title>mlxgpt inspect")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in (
            ["train", f"--data={FOLDER}/a.txt", f"--out={FOLDER}", *SMALL],
            ["export", FILE, f"--output={FOLDER}/exported"],
        ):
            result = call(words)
            assert result.exit_code == 0, result.output
    return folder


@pytest.fixture(autouse=True)
def inside(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(run)
    monkeypatch.setattr(corpora, "install", lambda corpus, out, download: out / corpus.target)


@pytest.mark.parametrize(("words", "code"), COMMANDS, ids=lambda x: ascii(x)[:40])
def test_nothing_acts_on_a_terminal(
    words: list[str], code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if words[0] == "serve":
        pytest.importorskip("starlette")
    monkeypatch.setattr(output, "is_terminal", lambda stream: True)
    result = call(words)
    assert result.exit_code == code, result.output
    assert not [mark for mark in MARKS if mark in result.output]
    assert "�" in result.output or "\\x1b" in result.output or code == 0


def test_a_pipe_gets_every_character() -> None:
    result = call(["sample", f"--checkpoint={FILE}", f"--prompt={EVIL}", "--max-tokens=0"])
    assert result.stdout == EVIL + "\n"
    result = call(["import", f"{FOLDER}/exported", f"--output={FOLDER}/b.safetensors"])
    assert f"written to {FOLDER}/b.safetensors" in result.stdout


@pytest.mark.parametrize("command", ["sample", "chat"])
def test_a_real_terminal_is_left_alone(command: str) -> None:
    words = [sys.executable, "-m", "mlx_randygpt", command, f"--checkpoint={FILE}"]
    words += ["--backend=numpy", "--max-tokens=20", "--logit-bias=\x1b=100"]
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=end, stderr=end,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip
    os.close(end)
    process.communicate(b"to be\n")
    written = b""
    while part := _read(terminal):
        written += part
    os.close(terminal)
    assert process.returncode == 0, written
    assert written.decode().count("�") >= 20
    assert b"\x1b" not in written


def _read(terminal: int) -> bytes:
    """What a terminal got; b"" when the other end is closed."""
    try:
        return os.read(terminal, 1 << 16)
    except OSError:
        return b""
