"""Where tokens come from: files and a download (corpus, download), then windows of them.

Knows tokenizers and batches; knows nothing of models, backends, terminals or training.
"""

from mlx_randygpt.config import UserError


class DataError(UserError, ValueError):
    """Text the user can mend; one line says what was wrong, where, and what would be right."""
