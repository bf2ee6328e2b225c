"""`--log`: the rows of metrics.jsonl to other people's screens as well.

Each library is an extra and imported only when it is asked for. metrics.jsonl stays the record of a
run: a logger that fails is left out for the rest of it, with a line that says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_randygpt.cli.training.folder import metrics_row
from mlx_randygpt.config import UserError
from mlx_randygpt.training.reports import Report

PROJECT = "mlx-randygpt"


class LoggerError(UserError, RuntimeError):
    """A logger that is not there, or cannot begin."""


@dataclass(frozen=True)
class Open:
    """A logger of one run."""

    log: Callable[[dict[str, float], int], object]  # values by name, step
    close: Callable[[], object]


def _tensorboard(module: Any, folder: Path, settings: dict[str, Any]) -> Open:
    writer = module.SummaryWriter(logdir=str(folder / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Open(log, writer.close)


def _wandb(module: Any, folder: Path, settings: dict[str, Any]) -> Open:
    name = folder.resolve().name
    run = module.init(project=PROJECT, name=name, config=settings, dir=str(folder))
    return Open(lambda values, step: run.log(values, step=step), run.finish)


def _trackio(module: Any, folder: Path, settings: dict[str, Any]) -> Open:
    module.init(project=PROJECT, name=folder.resolve().name, config=settings)
    return Open(lambda values, step: module.log(values, step=step), module.finish)


LOGGERS = {  # name -> module and how it begins; the extra has the logger's name
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}


class Loggers:
    """The loggers of a run by name, imported at once: one that is missing ends nothing halfway."""

    def __init__(self, names: Sequence[str], note: Callable[[str], object]) -> None:
        self._modules = {name: _imported(name) for name in names}
        self._open: dict[str, Open] = {}
        self.note = note

    def begin(self, folder: Path, settings: dict[str, Any]) -> None:
        """LoggerError where one cannot begin: nothing has been trained yet."""
        for name, module in self._modules.items():
            try:
                self._open[name] = LOGGERS[name][1](module, folder, settings)
            except Exception as error:
                why = " ".join(str(error).split())
                raise LoggerError(f"--log {name} cannot begin: {why}; leave it out") from error

    def record(self, report: Report, log_every: int) -> None:
        row = metrics_row(report, log_every)
        step = row.pop("step", 0)
        values = {name: value for name, value in row.items() if value is not None}
        if values:
            self._each(lambda logger: logger.log(values, step))

    def close(self) -> None:
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _each(self, call: Callable[[Open], object]) -> None:
        for name, logger in list(self._open.items()):
            try:
                call(logger)
            except Exception as error:
                del self._open[name]
                why = " ".join(str(error).split())
                self.note(f"--log {name} stopped: {why}; metrics.jsonl goes on")


def _imported(name: str) -> Any:
    try:
        return import_module(LOGGERS[name][0])
    except ImportError as error:
        raise LoggerError(
            f"--log {name} needs {LOGGERS[name][0]}; pip install 'mlx-randygpt[{name}]'"
        ) from error
