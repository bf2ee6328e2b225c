"""Ctrl-C, SIGTERM and SIGHUP: the first asks, the second leaves at once and writes nothing.

The handler only sets a flag: an exception inside a compiled step would destroy the arrays it
holds. Before there is anything to save a signal simply ends the program. While there is a live
screen, Ctrl-Z and SIGQUIT give the terminal back before they do what they always do.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

import click

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
LEAVING = (signal.SIGTSTP, signal.SIGQUIT)


def take(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Let `handler` have the signals that stop a program; who had them, for `give_back`. SIGHUP
    stays ignored where nohup has seen to that."""
    return {
        number: signal.signal(number, handler)
        for number in STOPPING
        if not (number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN)
    }


def give_back(old: dict[int, Any]) -> None:
    """Undo `take`."""
    for number, handler in old.items():
        signal.signal(number, handler)


class Stopped(SystemExit):
    """A signal before the training loop: nothing to save, the code is 128 + its number."""


class StopSignals:
    """Context manager that owns the three signals while it lasts."""

    def __init__(self) -> None:
        self.received = 0  # number of the first signal since `defer`; 0 is none
        self._deferring = False
        self._leave: Callable[[], None] = lambda: None
        self._return: Callable[[], None] = lambda: None
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._old = take(self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        give_back(self._old)
        if kind is Stopped:
            click.echo("\nInterrupted before the training began; nothing to save.", err=True)

    def defer(self, leave: Callable[[], None], back: Callable[[], None] = lambda: None) -> None:
        """From now on signals only ask; `leave` gives the terminal back before a second one ends
        the process, and `back` takes it again after Ctrl-Z and `fg`."""
        self._deferring, self._leave, self._return = True, leave, back
        for number in LEAVING:
            if signal.getsignal(number) == signal.SIG_DFL:
                self._old[number] = signal.signal(number, self._as_ever)

    def _as_ever(self, number: int, frame: FrameType | None) -> None:
        """What the system does by itself, with the terminal given back meanwhile."""
        with contextlib.suppress(Exception):
            self._leave()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)  # SIGQUIT does not return; SIGTSTP does after `fg`
        signal.signal(number, self._as_ever)
        with contextlib.suppress(Exception):
            self._return()

    @property
    def exit_code(self) -> int:
        return 128 + self.received if self.received else 0

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._deferring:
            raise Stopped(128 + number)
        if self.received:
            with contextlib.suppress(Exception):
                self._leave()
            os._exit(128 + number)
        self.received = number
