"""The processes of `mlxgpt launch`: start them, pass on output and signals, leave none behind.

The standard input of each is a pipe that ends when the launcher does, however that ends; a rank
that sees it end saves and stops (`team._hold`). Rank 0 has the launcher's own output; the lines of
the others are labelled.
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

from mlx_randygpt.cli.output import echo
from mlx_randygpt.cli.signals import install, uninstall
from mlx_randygpt.cli.training.hosts import Hosts
from mlx_randygpt.cli.training.request import LAUNCH
from mlx_randygpt.cli.training.team import LIFELINE

ORDERLY = (0, 129, 130, 143)  # exit codes with which all ranks end together, after saving
POLL_SECONDS = 0.05
GRACE_SECONDS = 15.0  # for the others after one has failed; SIGTERM follows, then SIGKILL
SECOND_SIGNAL_SECONDS = 5.0  # after a second signal, which makes a rank exit at once


class RankProcesses:
    """Context manager that runs the processes and forwards the stop signals to them."""

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
        self._terminated = False  # those that did not end by themselves got SIGTERM

    def __enter__(self) -> RankProcesses:
        self._old = install(self._forward)
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
        uninstall(self._old)
        self._folder.cleanup()

    def wait(self) -> int:
        """Wait until all have ended; return the exit code of the first that failed."""
        first_code = 0
        running = dict(enumerate(self._processes))
        while running:
            for rank, process in [*running.items()]:
                if (code := process.poll()) is None:
                    continue
                del running[rank]
                first_code = first_code or (code if code >= 0 else 128 - code)
                if code not in ORDERLY:
                    self._shorten_deadline(GRACE_SECONDS)
                if code < 0:
                    name = signal.Signals(-code).name
                    echo(f"Rank {rank} was killed by {name}.", err=True)
            if time.monotonic() > self._deadline:
                self._end(running)
            time.sleep(POLL_SECONDS)
        return first_code

    def _end(self, running: dict[int, subprocess.Popen[bytes]]) -> None:
        """Send SIGTERM to those that are still running, and SIGKILL the next time."""
        self._deadline = time.monotonic() + GRACE_SECONDS
        for process in running.values():
            process.send_signal(signal.SIGKILL if self._terminated else signal.SIGTERM)
        self._terminated = True

    def _shorten_deadline(self, seconds: float) -> None:
        self._deadline = min(self._deadline, time.monotonic() + seconds)

    def _forward(self, number: int, frame: FrameType | None) -> None:
        """Send a signal to every rank; through ssh it travels as a byte.

        Each rank has its own process group, so that Ctrl-C at a terminal reaches it only from here.
        """
        self._n_signals += 1
        if self._n_signals > 1:
            self._terminated = True
            self._shorten_deadline(SECOND_SIGNAL_SECONDS)
        for host, process in zip(self._hosts.hosts, self._processes, strict=False):
            if host.here:
                process.send_signal(number)
                continue
            assert process.stdin is not None
            with contextlib.suppress(OSError):
                os.write(process.stdin.fileno(), bytes([number]))

    def _addresses(self) -> list[str]:
        """Return where each rank listens in the ring; on one machine, choose free ports."""
        hosts = self._hosts.hosts
        if not all(host.here for host in hosts):
            ports = range(self._starting_port, self._starting_port + len(hosts))
            return [f"{h.address}:{port}" for h, port in zip(hosts, ports, strict=True)]
        with contextlib.ExitStack() as stack:
            sockets = [stack.enter_context(socket.socket()) for _ in hosts]
            for bound in sockets:
                bound.bind(("127.0.0.1", 0))
            return [f"127.0.0.1:{bound.getsockname()[1]}" for bound in sockets]

    def _start(self, rank: int, ring: str, hostfile: Path) -> None:
        host = self._hosts.hosts[rank]
        command = [sys.executable, "-m", "mlx_randygpt", *self._arguments]
        variables = {**self._hosts.environment, LIFELINE: "0", LAUNCH: self._launch}
        if len(self._hosts.hosts) > 1:
            variables["MLX_RANK"] = str(rank)
        if host.here:
            if "MLX_RANK" in variables:
                variables["MLX_HOSTFILE"] = str(hostfile)
        else:
            command = [
                "ssh",
                "-o",
                "BatchMode=yes",
                host.name,
                remote_line(command, variables, ring),
            ]
            variables = {}
        output = {} if rank == 0 else {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            env={**os.environ, **variables},
            process_group=0,
            **output,
        )  # type: ignore[call-overload]
        self._processes.append(process)
        if rank:
            reader = threading.Thread(target=_label, args=(rank, process.stdout), daemon=True)
            self._readers.append(reader)
            reader.start()


def remote_line(command: Sequence[str], environment: dict[str, str], ring: str) -> str:
    """Return the shell command for another machine.

    It runs in the folder of the same name and writes the ring to a temporary file there.
    """
    names = " ".join(f"{name}={shlex.quote(value)}" for name, value in environment.items())
    return (
        f"cd {shlex.quote(os.getcwd())} && ring=$(mktemp) && "
        f'printf %s {shlex.quote(ring)} > "$ring" && '
        f'exec env MLX_HOSTFILE="$ring" {names} {shlex.join(command)}'
    )


def _label(rank: int, output: IO[bytes]) -> None:
    """Pass the lines of a rank on to stderr.

    The dozen in which MLX's ring reports a lost connection are omitted: the rank prints its own.
    """
    with output:
        for line in output:
            if line.startswith(b"[ring]"):
                continue
            echo(f"rank {rank}: {line.decode(errors='replace').rstrip()}", err=True)
