"""Libraries that only some uses need: the line for the one that is missing."""

from __future__ import annotations

from mlx_randygpt.config import UserError


class MissingExtra(UserError, ImportError):
    """A library that is not installed, and the command that installs it."""


def missing(what: str, library: str, extra: str) -> MissingExtra:
    """The error for `what`, which needs `library`, which comes with `extra`."""
    return MissingExtra(
        f"{what} needs the library {library}, which is not installed; "
        f"pip install 'mlx-randygpt[{extra}]'"
    )
