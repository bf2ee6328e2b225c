"""The screen of a run, and what happens when its terminal or pipe closes."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from mlx_randygpt.screen.dashboard import Dashboard
from mlx_randygpt.screen.plain import PlainLog
from mlx_randygpt.training.reports import Report


def choose_console(plain: bool) -> tuple[Console, bool]:
    """Return the console of a run, and whether to print plain lines on it.

    The live screen goes to stderr. Plain lines go to stdout with --plain and if stdout is piped.
    """
    out, err = Console(), Console(stderr=True)
    if plain or not out.file.isatty():
        return out, True
    return err, not err.file.isatty()


class GuardedView:
    """A view that falls silent when its output closes; `lost` is then true, and the run stops."""

    def __init__(self, view: Dashboard | PlainLog) -> None:
        self._view, self.lost = view, False
        self.reason = ""  # why it is lost

    def __enter__(self) -> GuardedView:
        self._try(self._view.__enter__)
        return self

    def __exit__(self, *error: object) -> None:
        self._try(lambda: self._view.__exit__(*error))

    def show(self, report: Report) -> None:
        """Show a report."""
        self._try(lambda: self._view.show(report))

    def note(self, text: str) -> None:
        """Show one line for the user."""
        self._try(lambda: self._view.note(text))

    def release_terminal(self) -> None:
        """Release the terminal, for a signal handler."""
        self._try(self._view.release_terminal)

    def reclaim_terminal(self) -> None:
        """Reclaim the terminal after `release_terminal`."""
        self._try(self._view.reclaim_terminal)

    def _try(self, call: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            call()
        except OSError as error:
            self.lost, self.reason = True, error.strerror or str(error)
