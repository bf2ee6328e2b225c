"""Several ranks on one machine: the same run as one, one end for all, nobody left behind.

Real processes on loopback, each with a watchdog; nothing sleeps: a signal is sent when a line on a
pipe says that the process is where it should be.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from threading import Timer
from typing import Any

import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

from mlx_randygpt.checkpoint import NEWEST, load_checkpoint

SIZES = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=7"]
QUIET = ["--plain", "--sample-every=0", "--eval-every=20", "--prompt=The"]
LONG = ["--iters=1000000", "--save-every=10"]
STEADY = ["--schedule=constant", "--warmup=30", "--dropout=0", "--weight-decay=0"]  # for any target
TWO = ["-n", "2"]
MOST_SECONDS = 180  # after which a process that hangs is killed and its test fails
PROMISED_SECONDS = 30  # within which a lost rank is noticed
Metrics = list[dict[str, Any]]


class Process:
    """A command with its lines, killed by a watchdog."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlx_randygpt", *words], env={**os.environ, **environment},
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.watchdog = Timer(MOST_SECONDS, self.process.kill)
        self.watchdog.start()
        self.seen: list[str] = []

    def until(self, start: str) -> None:
        """Read on to the next line of stdout that begins so."""
        assert self.process.stdout
        for line in self.process.stdout:
            self.seen.append(line)
            if line.startswith(start):
                return
        raise AssertionError(f"no line {start!r} in {self.seen}: {self.process.stderr.read()}")

    def finish(self) -> tuple[int, str, str]:
        """Exit code and what is left of stdout and stderr."""
        assert self.process.stdout
        assert self.process.stderr
        out, err = self.process.stdout.read(), self.process.stderr.read()
        return self.process.wait(), out, err


@pytest.fixture
def start(tmp_path: Path, text: str) -> Iterator[Callable[..., Process]]:
    """(*words, launch=[], out="out", **environment) -> a process of `mlxgpt train`, by
    `mlxgpt launch` with these options where there are any."""
    (tmp_path / "text.txt").write_text(text)
    started: list[Process] = []

    def call(
        *words: str, launch: Sequence[str] = (), out: str = "out", **environment: str
    ) -> Process:
        first = ["launch", *launch, "--"] if launch else []
        data = ["--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / out)]
        started.append(Process(*first, "train", *data, *SIZES, *QUIET, *words, **environment))
        return started[-1]

    yield call
    for one in started:
        one.watchdog.cancel()
        one.process.kill()
        one.process.wait()
        for pipe in (one.process.stdout, one.process.stderr):
            if pipe:
                pipe.close()


@pytest.fixture
def by_hand(start: Callable[..., Process], tmp_path: Path) -> Callable[..., list[Process]]:
    """(*words, own={rank: words}) -> two ranks, as a person starts them without a launcher."""

    def call(*words: str, own: dict[int, list[str]] | None = None) -> list[Process]:
        open_ones = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        ring = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in open_ones]
        for one in open_ones:
            one.close()
        (tmp_path / "hosts.json").write_text(json.dumps(ring))
        place = {"MLX_HOSTFILE": str(tmp_path / "hosts.json")}
        return [
            start(*words, *(own or {}).get(rank, []), MLX_RANK=str(rank), **place)
            for rank in range(2)
        ]

    return call


def finished(process: Process, code: int = 0) -> tuple[str, str]:
    found, out, err = process.finish()
    assert found == code, out + err
    return out, err


def metrics(folder: Path) -> Metrics:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def worst(one: Metrics, other: Metrics) -> float:
    """The largest relative difference of a loss between two runs that report the same steps."""
    pairs = list(zip(one, other, strict=True))
    assert all(a["step"] == b["step"] for a, b in pairs)
    names = ("loss", "val_loss", "grad_norm")
    return max(abs(a[n] - b[n]) / abs(a[n]) for a, b in pairs for n in names if n in a)


@pytest.mark.parametrize(
    ("backend", "ranks"),
    [
        ("numpy", 2),
        pytest.param("numpy", 4, marks=pytest.mark.slow),
        pytest.param("mlx", 2, marks=pytest.mark.slow),
        pytest.param("mlx", 4, marks=pytest.mark.slow),
    ],
)
def test_any_number_of_ranks_is_the_same_run(
    start: Callable[..., Process], tmp_path: Path, backend: str, ranks: int
) -> None:
    """Shares of 7 sequences are uneven; on NumPy dropout draws by sequence. Measured: 4e-7."""
    words = ["--iters=50", "--grad-accum=2", "--backend", backend]
    words += ["--dropout", "0.1" if backend == "numpy" else "0"]
    finished(start(*words, out="one"))
    _, err = finished(start(*words, launch=["-n", str(ranks)], out="several"))
    assert not err
    assert worst(metrics(tmp_path / "one"), metrics(tmp_path / "several")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_ranks_train_on_conversations_as_one(
    start: Callable[..., Process], tmp_path: Path, backend: str
) -> None:
    """Targets are unevenly shared, and a window can have few. Measured: 3e-7."""
    rows = [{"prompt": f"Say {i}!", "completion": f"{i}" * (1 + i % 5)} for i in range(60)]
    talks = tmp_path / "talks.jsonl"
    talks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--iters=30", f"--backend={backend}", "--data", f"{talks}:0.5", "--dropout=0"]
    finished(start(*words, out="one"))
    finished(start(*words, launch=TWO, out="several"))
    assert worst(metrics(tmp_path / "one"), metrics(tmp_path / "several")) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_adapters_train_on_ranks_too(
    start: Callable[..., Process], tmp_path: Path, backend: str
) -> None:
    """Only rank 0 reads the checkpoint. Measured: 4e-7."""
    finished(start("--iters=3", out="base"))
    whole = str(tmp_path / "base" / NEWEST)
    words = ["--iters=20", "--lora-rank=2", f"--backend={backend}", "--init-from", whole]
    finished(start(*words, "--dropout=0", out="one"))
    finished(start(*words, "--dropout=0", launch=TWO, out="several"))
    assert worst(metrics(tmp_path / "one"), metrics(tmp_path / "several")) < 1e-5


def test_only_rank_0_writes_and_draws(by_hand: Callable[..., list[Process]]) -> None:
    first, second = by_hand("--iters=3")
    assert "loss" in finished(first)[0]
    assert finished(second) == ("", "")


def test_a_signal_to_any_rank_stops_all_at_one_step(
    by_hand: Callable[..., list[Process]], tmp_path: Path
) -> None:
    first, second = by_hand(*LONG)
    first.until("step")
    second.process.send_signal(signal.SIGTERM)
    out, _ = finished(first, 143)
    assert finished(second, 143) == ("", "")
    assert "Interrupted at iteration" in out
    assert "Go on with: mlxgpt train" in out
    load_checkpoint(tmp_path / "out" / NEWEST)


def test_a_rank_that_dies_ends_all_and_the_run_goes_on_with_fewer(
    by_hand: Callable[..., list[Process]], start: Callable[..., Process], tmp_path: Path
) -> None:
    first, second = by_hand(*LONG, *STEADY)
    first.until("step 40")
    second.process.kill()
    Timer(PROMISED_SECONDS, first.process.kill).start()
    _, err = finished(first, 1)
    error = err.splitlines()[-1]
    assert error.startswith("Error: rank 1 is lost: its process has ended. Saved last: ")
    assert "--resume --out" in error
    reached = load_checkpoint(tmp_path / "out" / NEWEST).state.step
    words = [*STEADY, f"--iters={reached + 20}"]
    finished(start(*words, "--resume"))
    finished(start(*words, out="undisturbed"))
    whole, resumed = metrics(tmp_path / "undisturbed"), metrics(tmp_path / "out")
    assert worst(whole[-20:], resumed[-20:]) < 1e-4  # no more than its rounding grows


@pytest.mark.slow
def test_a_rank_that_stands_still_is_noticed(by_hand: Callable[..., list[Process]]) -> None:
    first, second = by_hand(*LONG, "--rank-timeout=5")
    first.until("✓ Saved")
    second.process.send_signal(signal.SIGSTOP)
    Timer(PROMISED_SECONDS, first.process.kill).start()
    _, err = finished(first, 1)
    assert "rank 1 is lost: nothing was heard of it for 5 s. Saved last" in err


def test_ranks_that_do_not_agree_are_refused(by_hand: Callable[..., list[Process]]) -> None:
    for process in by_hand("--iters=3", own={1: ["--lr=0.001"]}):
        _, err = finished(process, 1)
        assert "Error: rank 1 has another setting than rank 0" in err


def test_the_launcher_passes_a_signal_on_and_its_code_back(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    launcher = start(*LONG, launch=TWO)
    launcher.until("step")
    launcher.process.send_signal(signal.SIGINT)
    out, _ = finished(launcher, 130)
    assert "Go on with: mlxgpt launch -n 2 -- train" in out


def test_no_rank_outlives_a_launcher_that_is_killed(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    launcher = start(*LONG, launch=TWO)
    launcher.until("✓ Saved")
    launcher.process.kill()
    launcher.until("Let it write")  # rank 0, which has the same stdout
    assert launcher.process.stdout
    assert launcher.process.stdout.read() == ""  # until nobody is left to write
    lock = (tmp_path / "out" / ".lock").read_text()
    assert lock == ""  # let go of, in order


def test_a_failing_rank_ends_the_launch_with_its_code(start: Callable[..., Process]) -> None:
    _, err = finished(start("--iters=3", "--batch-size=1", launch=TWO), 1)
    assert err == (
        "Error: --batch-size 1 is too small for 2 ranks; each needs a sequence, "
        "so give at least 2, or fewer ranks\n"
    )
    _, err = finished(start("--iters=3", "--nonsense", launch=TWO), 2)
    assert "\nrank 1: Error: No such option" in f"\n{err}"


def free(port: int) -> bool:
    """Whether a rank can have it; those from 32,768 on the system gives to anyone who asks."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError:
        return False
    return True


def test_ssh_starts_a_rank_on_another_machine(
    start: Callable[..., Process], tmp_path: Path
) -> None:
    """A stand-in runs here what ssh would run there."""
    stand_in = tmp_path / "ssh"
    stand_in.write_text('#!/bin/sh\n[ "$1 $3" = "-o far" ] && exec sh -c "$4"\n')
    stand_in.chmod(0o755)
    hosts = [{"ssh": "localhost", "ips": ["127.0.0.1"]}, {"ssh": "far", "ips": ["127.0.0.1"]}]
    (tmp_path / "hosts.json").write_text(json.dumps(hosts))
    port = next(port for port in range(20_000, 30_000, 10) if free(port) and free(port + 1))
    words = ["--hostfile", str(tmp_path / "hosts.json"), f"--starting-port={port}"]
    launcher = start(*LONG, launch=words, PATH=f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    launcher.until("step")
    launcher.process.send_signal(signal.SIGTERM)
    finished(launcher, 143)
