"""The signals that stop a program: Ctrl-C, SIGTERM and SIGHUP, and who handles them when.

Until a command runs, Ctrl-C ends the process; in a command it is a KeyboardInterrupt. In a training
run the first signal only sets a flag, because an exception inside a compiled step would destroy the
arrays it holds; the second exits at once and writes nothing.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

from mlx_randygpt.cli.output import echo

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL_SIGNALS = (signal.SIGTSTP, signal.SIGQUIT)  # Ctrl-Z and Ctrl-\
Handler = Callable[[int, FrameType | None], None]


@contextlib.contextmanager
def raise_on_ctrl_c() -> Iterator[None]:
    """Make Ctrl-C a KeyboardInterrupt inside the block."""
    old = signal.getsignal(signal.SIGINT)
    if old == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def install(handler: Handler) -> dict[int, Any]:
    """Install `handler` for the stop signals; return the previous handlers.

    SIGHUP stays ignored if nohup ignores it.
    """
    return {
        number: signal.signal(number, handler)
        for number in STOP_SIGNALS
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    }


def uninstall(previous: dict[int, Any]) -> None:
    """Restore the handlers that `install` returned."""
    for number, handler in previous.items():
        signal.signal(number, handler)


class CtrlC:
    """Context manager in which Ctrl-C sets a flag, and interrupts only inside `interrupting`."""

    def __init__(self) -> None:
        self.pressed = False
        self._interrupts = False

    def __enter__(self) -> CtrlC:
        self._old = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._old)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Make Ctrl-C a KeyboardInterrupt inside the block."""
        self._interrupts = True
        try:
            yield
        finally:
            self._interrupts = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        if self._interrupts:
            raise KeyboardInterrupt


class Stopped(SystemExit):
    """A signal before the training loop: there is nothing to save; the code is 128 + its number."""


class StopSignals:
    """Context manager that handles the stop signals of a training run."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal since `defer`; 0 if none
        self._deferring = False
        self._release_terminal: Callable[[], None] = lambda: None
        self._reclaim_terminal: Callable[[], None] = lambda: None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._old = install(self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        uninstall(self._old)
        if kind is Stopped:
            echo("\nInterrupted before the training began; nothing to save.", err=True)

    def defer(
        self,
        release_terminal: Callable[[], None] = lambda: None,
        reclaim_terminal: Callable[[], None] = lambda: None,
    ) -> None:
        """From now on, let the first signal only set `exit_code`.

        `release_terminal` is called before a second signal, Ctrl-Z or SIGQUIT takes effect, and
        `reclaim_terminal` after Ctrl-Z and `fg`.
        """
        self._deferring = True
        self._release_terminal, self._reclaim_terminal = release_terminal, reclaim_terminal
        for number in TERMINAL_SIGNALS:
            if signal.getsignal(number) == signal.SIG_DFL:
                self._old[number] = signal.signal(number, self._suspend)

    @property
    def exit_code(self) -> int:
        """128 + the number of the first signal, or 0."""
        return 128 + self.received if self.received else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise Stopped(128 + number)
        if self.received:
            with contextlib.suppress(Exception):
                self._release_terminal()
            os._exit(128 + number)
        self.received = number

    def _suspend(self, number: int, frame: FrameType | None) -> None:
        """Do what the system does by default, with the terminal released meanwhile."""
        with contextlib.suppress(Exception):
            self._release_terminal()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # SIGQUIT does not return; SIGTSTP does after `fg`
        signal.signal(number, self._suspend)
        with contextlib.suppress(Exception):
            self._reclaim_terminal()
