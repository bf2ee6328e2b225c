"""The memory that MLX holds for this process on a GPU: measured, limited and released.

MLX keeps what it frees, to use it again: held is what is in use and what is kept.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_randygpt.backends.base import resident_bytes

WIRED_SHARE = 0.9  # of what Metal recommends: stays in memory whatever other programs do


class HeldMemory:
    """The most memory held so far, as seen at each reading; on a CPU that of the process."""

    def __init__(self, *, on_gpu: bool) -> None:
        self._on_gpu = on_gpu
        self._most = 0

    def read(self) -> int:
        """Return the most held so far, in bytes; read it after every step."""
        if not self._on_gpu:
            return resident_bytes()
        held = mx.get_active_memory() + mx.get_cache_memory()
        self._most = max(self._most, held, mx.get_peak_memory())
        return self._most


def limit(planned: int, recommended: int) -> None:
    """Make the host wait for Metal once `planned` bytes are in use, instead of running ahead.

    Without it the host queues hundreds of operations whose results lie in memory side by side. MLX
    takes the limit as a guideline: a step that needs more gets it. What MLX uses is kept in memory,
    up to WIRED_SHARE of the `recommended` bytes; before macOS 15 that has no effect.
    """
    mx.set_wired_limit(int(WIRED_SHARE * recommended))
    if planned:
        mx.set_memory_limit(min(planned, recommended))


def release() -> None:
    """Release the memory that MLX keeps for reuse."""
    mx.clear_cache()
