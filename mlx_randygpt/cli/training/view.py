"""Where a run is shown, and what happens when that goes away."""

from __future__ import annotations

from collections.abc import Callable

from rich.console import Console

from mlx_randygpt.screen.dashboard import Dashboard
from mlx_randygpt.screen.plain import PlainLog
from mlx_randygpt.training.reports import Report


def choose_console(plain: bool) -> tuple[Console, bool]:
    """The live screen goes to stderr; plain lines go to a piped stdout, where they are wanted."""
    out, err = Console(), Console(stderr=True)
    if plain or not out.file.isatty():
        return out, True
    return err, not err.file.isatty()


class GuardedView:
    """A view whose output may go away: then it falls silent and `lost` is true, so that the run
    stops and saves."""

    def __init__(self, view: Dashboard | PlainLog) -> None:
        self._view, self.lost = view, False
        self.why = ""  # it is lost

    def __enter__(self) -> GuardedView:
        self._try(self._view.__enter__)
        return self

    def __exit__(self, *error: object) -> None:
        self._try(lambda: self._view.__exit__(*error))

    def show(self, report: Report) -> None:
        self._try(lambda: self._view.show(report))

    def note(self, text: str) -> None:
        self._try(lambda: self._view.note(text))

    def restore(self) -> None:
        self._try(self._view.restore)

    def take(self) -> None:
        self._try(self._view.take)

    def _try(self, call: Callable[[], object]) -> None:
        if self.lost:
            return
        try:
            call()
        except OSError as error:
            self.lost, self.why = True, error.strerror or str(error)
