"""Text and tokens: files and downloads become a corpus, a corpus becomes windows of tokens.

This package depends on tokenizers and batches, but not on models, backends or terminals.
"""

from mlx_randygpt.config import UserError


class DataError(UserError, ValueError):
    """Invalid or unreadable text. The message is one line: the file, the problem, the remedy."""
