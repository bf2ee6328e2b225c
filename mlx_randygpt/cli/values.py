"""The types of option values that click's own types would let through when they make no sense."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.files import exists


class FilePath(click.Path):
    """A path with `~` for the home folder, as a shell writes it; an empty one is refused.

    `Path("")` would be the current folder, and files and variables have no shell that expands `~`.
    """

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; fail if it is empty or holds a NUL character."""
        text = os.fspath(value)
        if text == "":
            self.fail("'' is empty; give a path, or leave it out", param, ctx)
        if "\0" in text:
            self.fail(f"{text!r} is not a path: it holds a NUL character", param, ctx)
        return super().convert(os.path.expanduser(text), param, ctx)


class ExistingFile(FilePath):
    """A path of an existing file; click's exists=True would call an unreachable one missing."""

    def __init__(self, *, allow_dash: bool = False) -> None:
        super().__init__(exists=True, dir_okay=False, allow_dash=allow_dash, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path; fail with the reason if it is not that of a file, or `-`."""
        try:
            if value != "-" and "\0" not in str(value):
                exists(Path(os.path.expanduser(value)))  # pathlib raises for an unknown ~user
        except OSError as error:
            self.fail(f"{value} cannot be read: {error.strerror}", param, ctx)
        return super().convert(value, param, ctx)


class Number(click.FloatRange):
    """A number in a range; nan, which every comparison lets through, and infinity are refused."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the number; fail if it is out of range or not finite."""
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{number} is not a finite number", param, ctx)
        return number
