"""Models in and out: folders and files that other programs write and read.

What goes out is an exporter's, what comes in an importer's; neither knows the command line.
"""

from mlx_randygpt.config import UserError


class ExchangeError(UserError, ValueError):
    """A model that cannot be carried over, with the reason."""
