"""The processes of `mlxgpt launch`: started, listened to, sent signals, and never left behind.

Each has a pipe as standard input that only ends when the launcher does, however that ends; a rank
that sees it end saves and stops (ranks._hold). Rank 0 has the launcher's own output, the lines
of the others are labelled.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Any

import click

from mlx_randygpt.cli.training.hosts import Hosts
from mlx_randygpt.cli.training.request import LAUNCH
from mlx_randygpt.cli.training.signals import give_back, take
from mlx_randygpt.cli.training.team import LIFELINE

ORDERLY = (0, 129, 130, 143)  # all ranks end with these together, rank 0 once it has saved
POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0  # for the others after one has failed; then SIGTERM, and as long again
SECOND_SECONDS = 5.0  # after a second signal, which a rank obeys at once if it can


class RankProcesses:
    """Context manager of the processes; the signals that end programs are theirs while it lasts."""

    def __init__(
        self, hosts: Hosts, starting_port: int, arguments: Sequence[str], launch: str
    ) -> None:
        self._hosts, self._starting_port = hosts, starting_port
        self._arguments, self._launch = arguments, launch
        self._processes: list[subprocess.Popen[bytes]] = []
        self._readers: list[threading.Thread] = []
        self._folder = tempfile.TemporaryDirectory(prefix="mlxgpt-launch-")
        self._old: dict[int, Any] = {}
        self._n_signals = 0
        self._deadline = float("inf")
        self._asked = False  # SIGTERM went to those that did not end by themselves

    def __enter__(self) -> RankProcesses:
        self._old = take(self._forward)
        ring = json.dumps([[address] for address in self._addresses()])
        hostfile = Path(self._folder.name, "hosts.json")
        hostfile.write_text(ring)
        for rank in range(len(self._hosts.hosts)):
            self._start(rank, ring, hostfile)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                process.stdin.close()
        for reader in self._readers:
            reader.join()
        give_back(self._old)
        self._folder.cleanup()

    def wait(self) -> int:
        """Until all have ended; the exit code of the first that failed."""
        first = 0
        running = dict(enumerate(self._processes))
        while running:
            for rank, process in [*running.items()]:
                if (code := process.poll()) is None:
                    continue
                del running[rank]
                first = first or (code if code >= 0 else 128 - code)
                if code not in ORDERLY:
                    self._within(GRACE_SECONDS)
                if code < 0:
                    name = signal.Signals(-code).name
                    click.echo(f"Rank {rank} was ended by {name}.", err=True)
            if time.monotonic() > self._deadline:
                self._end(running)
            time.sleep(POLL_SECONDS)
        return first

    def _end(self, running: dict[int, subprocess.Popen[bytes]]) -> None:
        """Whoever has not ended by itself: SIGTERM, later SIGKILL."""
        self._deadline = time.monotonic() + GRACE_SECONDS
        for process in running.values():
            process.send_signal(signal.SIGKILL if self._asked else signal.SIGTERM)
        self._asked = True

    def _within(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """To every rank once; each has a process group of its own, so that Ctrl-C at a terminal
        comes only from here. Through ssh it goes as a byte."""
        self._n_signals += 1
        if self._n_signals > 1:
            self._asked = True
            self._within(SECOND_SECONDS)
        for host, process in zip(self._hosts.hosts, self._processes, strict=False):
            if host.here:
                process.send_signal(number)
                continue
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), bytes([number]))

    def _addresses(self) -> list[str]:
        """Where each rank listens in the ring; free ports if all are on this machine."""
        hosts = self._hosts.hosts
        if not all(host.here for host in hosts):
            ports = range(self._starting_port, self._starting_port + len(hosts))
            return [f"{h.address}:{port}" for h, port in zip(hosts, ports, strict=True)]
        with contextlib.ExitStack() as open_ones:
            found = [open_ones.enter_context(socket.socket()) for _ in hosts]
            for one in found:
                one.bind(("127.0.0.1", 0))
            return [f"127.0.0.1:{one.getsockname()[1]}" for one in found]

    def _start(self, rank: int, ring: str, hostfile: Path) -> None:
        host = self._hosts.hosts[rank]
        command = [sys.executable, "-m", "mlx_randygpt", *self._arguments]
        own = {**self._hosts.environment, LIFELINE: "0", LAUNCH: self._launch}
        if len(self._hosts.hosts) > 1:
            own["MLX_RANK"] = str(rank)
        if host.here:
            if "MLX_RANK" in own:
                own["MLX_HOSTFILE"] = str(hostfile)
        else:
            command = ["ssh", "-o", "BatchMode=yes", host.name, remote_line(command, own, ring)]
            own = {}
        output = {} if rank == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, env={**os.environ, **own}, process_group=0, **output
        )  # type: ignore[call-overload]
        self._processes.append(process)
        if rank:
            reader = threading.Thread(target=_label, args=(rank, process.stdout), daemon=True)
            self._readers.append(reader)
            reader.start()


def remote_line(command: Sequence[str], environment: dict[str, str], ring: str) -> str:
    """What a shell on another machine runs: in the folder of the same name, with the ring in a
    file of its own."""
    names = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return (
        f"cd {shlex.quote(os.getcwd())} && ring=$(mktemp) && "
        f'printf %s {shlex.quote(ring)} > "$ring" && '
        f'exec env MLX_HOSTFILE="$ring" {names} {shlex.join(command)}'
    )


def _label(rank: int, output: IO[bytes]) -> None:
    """Pass the lines of a rank on to stderr, without the dozen in which MLX's ring tells that a
    connection is gone: the rank itself says it in one."""
    with output:
        for line in output:
            if line.startswith(b"[ring]"):
                continue
            click.echo(f"rank {rank}: {line.decode(errors='replace').rstrip()}", err=True)
