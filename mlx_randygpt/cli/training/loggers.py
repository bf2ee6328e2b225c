"""`--log`: send the rows of metrics.jsonl to TensorBoard, Weights & Biases or Trackio.

Each library is an optional extra. metrics.jsonl stays the record of a run: a logger that fails is
dropped for the rest of it, with a message.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.config import UserError, install_command
from mlx_randygpt.files import resolve
from mlx_randygpt.training.reports import Report
from mlx_randygpt.words import one_line

PROJECT = "mlx-randygpt"


class LoggerError(UserError, RuntimeError):
    """A logger that is not installed or cannot start."""


@dataclass(frozen=True)
class Logger:
    """A running logger."""

    log: Callable[[dict[str, float], int], object]  # values by name, step
    close: Callable[[], object]


def _tensorboard(module: Any, folder: Path, settings: dict[str, Any]) -> Logger:
    writer = module.SummaryWriter(logdir=str(folder / "tensorboard"))

    def log(values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Logger(log, writer.close)


def _wandb(module: Any, folder: Path, settings: dict[str, Any]) -> Logger:
    name = resolve(folder).name
    run = module.init(project=PROJECT, name=name, config=settings, dir=str(folder))
    return Logger(lambda values, step: run.log(values, step=step), run.finish)


def _trackio(module: Any, folder: Path, settings: dict[str, Any]) -> Logger:
    module.init(project=PROJECT, name=resolve(folder).name, config=settings)
    return Logger(lambda values, step: module.log(values, step=step), module.finish)


LOGGERS = {  # name -> module and how to start it; the extra has the logger's name
    "tensorboard": ("tensorboardX", _tensorboard),
    "wandb": ("wandb", _wandb),
    "trackio": ("trackio", _trackio),
}


class Loggers:
    """The loggers of a run; their libraries are imported here, so that none is missing later."""

    def __init__(self, names: Sequence[str], note: Callable[[str], object]) -> None:
        self._modules = {name: _import(name) for name in names}
        self._open: dict[str, Logger] = {}
        self.note = note

    def begin(self, folder: Path, settings: dict[str, Any]) -> None:
        """Start every logger; raise LoggerError if one cannot start."""
        for name, module in self._modules.items():
            try:
                self._open[name] = LOGGERS[name][1](module, folder, settings)
            except Exception as error:
                raise LoggerError(
                    f"--log {name} cannot start: {one_line(error)}; leave it out"
                ) from error

    def record(self, report: Report, log_every: int) -> None:
        """Send the row of a report to every logger."""
        row = metrics_row(report, log_every)
        step = row.pop("step", 0)
        values = {name: value for name, value in row.items() if value is not None}
        if values:
            self._each(lambda logger: logger.log(values, step))

    def close(self) -> None:
        """Close every logger."""
        self._each(lambda logger: logger.close())
        self._open.clear()

    def _each(self, call: Callable[[Logger], object]) -> None:
        for name, logger in list(self._open.items()):
            try:
                call(logger)
            except Exception as error:
                del self._open[name]
                self.note(
                    f"--log {name} stopped: {one_line(error)}; metrics.jsonl is still written"
                )


def _import(name: str) -> Any:
    try:
        return import_module(LOGGERS[name][0])
    except ImportError as error:
        raise LoggerError(
            f"--log {name} needs {LOGGERS[name][0]}; {install_command(name)}"
        ) from error
