"""A real process and real signals: the first one saves and leaves, the second leaves at once.

Nothing here sleeps: a signal is sent when a line on the pipe or a reader of a FIFO says that the
process is where it should be.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from threading import Timer

import numpy as np
import pytest

from mlx_randygpt.checkpoint import BEST, NEWEST, load_checkpoint

SIZES = ["--n-layer=2", "--n-head=4", "--n-embd=32", "--block-size=16", "--dropout=0.1"]
LONG = ["--iters", "1000000"]


class Process:
    """`mlxgpt train` in a folder of its own, with its output line by line."""

    def __init__(self, folder: Path, data: Path, *words: str, program: str = "") -> None:
        module = ["-c", program] if program else ["-m", "mlx_randygpt"]
        command = [sys.executable, *module, "train", "--plain", "--data", str(data)]
        self.out = folder / "out"
        self.process = subprocess.Popen(
            [*command, "--out", str(self.out), "--eval-every=5", "--batch-size=64", *SIZES, *words],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1,
        )  # fmt: skip
        self.watchdog = Timer(120, self.process.kill)  # a process that hangs fails its test
        self.watchdog.start()
        self.seen: list[str] = []

    def until(self, start: str) -> str:
        """The next line that begins so."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.seen.append(line.rstrip("\n"))
            if line.startswith(start):
                return self.seen[-1]
        raise AssertionError(f"no line {start!r} in {self.seen}: {self.process.stderr.read()}")

    def send(self, number: int) -> None:
        self.process.send_signal(number)

    def finish(self) -> tuple[int, list[str], str]:
        """Exit code, the lines not yet read, and stderr."""
        assert self.process.stdout
        assert self.process.stderr
        # Not `communicate`: it would pass over what iterating has read ahead.
        stdout, stderr = self.process.stdout.read(), self.process.stderr.read()
        return self.process.wait(), stdout.splitlines(), stderr


@pytest.fixture
def start(text: str, tmp_path: Path) -> Iterator[Callable[..., Process]]:
    """(*words, folder="run", data=a file with the text) -> a process, killed if it is left over."""
    started: list[Process] = []
    (tmp_path / "text.txt").write_text(text)

    def begin(
        *words: str, folder: str = "run", data: Path | None = None, program: str = ""
    ) -> Process:
        source = data or tmp_path / "text.txt"
        started.append(Process(tmp_path / folder, source, *words, program=program))
        return started[-1]

    yield begin
    for left in started:
        left.watchdog.cancel()
        left.process.kill()
        left.process.communicate()


Start = Callable[..., Process]


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_one_signal_finishes_the_step_saves_both_files_and_leaves(
    number: int, code: int, start: Start
) -> None:
    run = start(*LONG, "--backend", "numpy")
    run.until("eval 10 |")
    run.send(number)
    stopped = int(run.until("Interrupted at iteration ").split()[3].rstrip("."))
    assert run.seen[-1] == f"Interrupted at iteration {stopped}. Saving checkpoint..."
    returned, rest, errors = run.finish()
    assert (returned, errors) == (code, "")
    newest, best = load_checkpoint(run.out / NEWEST), load_checkpoint(run.out / BEST)
    assert newest.state.step == stopped >= 10
    assert f"✓ Saved {run.out / NEWEST} (iter {stopped})" in rest
    best_line = f"✓ Saved {run.out / BEST} (best loss {best.progress.best_loss:.4f} @"
    assert any(line.startswith(best_line) for line in rest)
    resume = f"mlxgpt train --resume --out {run.out} --backend numpy"
    assert f"Go on with: {resume}" in rest
    assert f"Let it write: mlxgpt sample --checkpoint {run.out}" in rest


BLOCKING = """
import os
from mlx_randygpt import files
from mlx_randygpt.cli import main
flush = files.flush
def wait(descriptor):
    if os.path.exists({fifo!r}):
        open({fifo!r}, "wb")
    flush(descriptor)
files.flush = wait
main()
"""


def test_a_second_signal_while_saving_leaves_at_once_and_spares_the_file(
    start: Start, tmp_path: Path
) -> None:
    blocked = tmp_path / "blocked"
    run = start(*LONG, "--backend", "numpy", program=BLOCKING.format(fifo=str(blocked)))
    run.until("eval 10 |")
    os.mkfifo(blocked)  # the writer opens it at its next flush, and waits for a reader
    before = (run.out / NEWEST).read_bytes()
    run.send(signal.SIGINT)
    run.until("Interrupted at iteration ")
    run.send(signal.SIGINT)
    code, rest, errors = run.finish()
    assert (code, rest, errors) == (130, [], "")
    assert (run.out / NEWEST).read_bytes() == before
    assert load_checkpoint(run.out / NEWEST).state.step == 0


def test_what_a_killed_process_leaves_behind_is_swept_up(start: Start) -> None:
    run = start(*LONG, "--backend", "numpy")
    run.until("eval 5 |")
    run.process.kill()
    run.finish()
    (run.out / f".{NEWEST}.1234.tmp").write_text("half a checkpoint")
    again = start("--resume", "--backend", "numpy", "--iters", "6")
    again.until("eval 6 |")
    assert again.finish()[0] == 0
    assert not list(run.out.glob(".*.tmp"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_training_leaves_with_nothing_to_save(
    number: int, code: int, start: Start, tmp_path: Path
) -> None:
    os.mkfifo(tmp_path / "slow.txt")
    run = start(*LONG, "--backend", "numpy", data=tmp_path / "slow.txt")
    with open(tmp_path / "slow.txt", "w"):  # opens when the process reads its text
        run.send(number)
        returned, lines, errors = run.finish()
    assert returned == code
    assert errors.split("\n") == ["", "Interrupted before the training began; nothing to save.", ""]
    assert lines == []
    assert not list(run.out.glob("*.safetensors"))


@pytest.mark.parametrize("recipe", ["classic", "modern"])
@pytest.mark.parametrize("backend", ["numpy", pytest.param("mlx", marks=pytest.mark.slow)])
def test_an_interrupted_run_ends_as_an_undisturbed_one(
    recipe: str, backend: str, start: Start
) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core", exc_type=ImportError)
    words = ["--iters", "60", "--recipe", recipe, "--backend", backend]
    straight = start(*words, folder="straight")
    assert straight.finish()[0] == 0
    run = start(*words)
    run.until("eval 10 |")
    run.send(signal.SIGINT)
    assert run.finish()[0] == 130
    stopped = load_checkpoint(run.out / NEWEST).state.step
    assert 10 <= stopped < 60
    assert start(*words, "--resume").finish()[0] == 0
    for name in (NEWEST, BEST):
        got, expected = (load_checkpoint(r.out / name) for r in (run, straight))
        np.testing.assert_equal(asdict(got.state), asdict(expected.state))
        assert got.progress.best_loss == expected.progress.best_loss


LEAVING = """
import os, signal, sys
from mlx_randygpt.cli.signals import StopSignals
say = lambda word: print(word, flush=True)
with StopSignals() as signals:
    signals.defer(lambda: say("left"), lambda: say("back"))
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
"""


@pytest.mark.parametrize("name", ["SIGTSTP", "SIGQUIT"])
def test_ctrl_z_and_sigquit_give_the_terminal_back_first(name: str) -> None:
    command = [sys.executable, "-c", LEAVING, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, process_group=0) as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        if name == "SIGQUIT":
            assert os.WTERMSIG(status) == signal.SIGQUIT
        else:
            assert os.WSTOPSIG(status) == signal.SIGTSTP
            process.send_signal(signal.SIGCONT)
        assert process.communicate()[0].split() == (
            ["left"] if name == "SIGQUIT" else ["left", "back"]
        )


LEARN = """
import random, signal, sys
from mlx_randygpt.cli import main
from mlx_randygpt.data import vocabulary

signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs of a shell ignore it
moment = sys.argv.pop(1)

def texts(*_):
    draws, n = random.Random(1), 0
    while moment == "learning" or n < 300:
        yield "".join(draws.choices("abcdefghijklmnopqrstuvwxyz", k=4000))
        n += 1
        if n == 1:
            print("learning", flush=True)
    print("merging", flush=True)

vocabulary._sample_evenly = texts
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["learning", "merging"])
def test_ctrl_c_while_a_vocabulary_is_learned_leaves_with_130(moment: str, tmp_path: Path) -> None:
    """Of a text without end, or of one that takes minutes to merge.

    Python's own end took the thread away inside the library, which aborted: code 134.
    """
    pytest.importorskip("tokenizers")
    (tmp_path / "a.txt").write_text("some text")
    words = f"data prepare --tokenizer=bpe --vocab-size=60000 --data={tmp_path / 'a.txt'}".split()
    command = [sys.executable, "-c", LEARN, moment, *words]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        while process.stdout.readline() not in (f"{moment}\n", ""):
            pass
        process.send_signal(signal.SIGINT)
        rest = process.communicate()
    assert (process.returncode, rest) == (130, ("", "\nInterrupted.\n"))


def test_ctrl_c_while_the_program_is_imported_leaves_without_a_traceback(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import signal\nsignal.raise_signal(signal.SIGINT)\n")
    path = os.pathsep.join((str(tmp_path), os.environ.get("PYTHONPATH", "")))
    command = [sys.executable, "-m", "mlx_randygpt", "--version"]
    env = os.environ | {"PYTHONPATH": path}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "")
