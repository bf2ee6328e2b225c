"""Where text is generated faster: a small model on the CPU, a large one on the GPU.

A token of one text is a hundred small operations. A GPU takes most of a millisecond to start
them, however small they are; NumPy compiled by numba has finished a small model by then. The more
parameters and texts there are, the less the start weighs. Both write the same text.
"""

from __future__ import annotations

import math
from importlib.util import find_spec

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameter_count
from mlx_randygpt.words import format_count

# Parameters from which a GPU is faster. They follow from the operations of a token and the time
# that Metal takes to start them, and were not measured on a Mac.
ONE_STREAM = 12e6
MANY, MANY_STREAMS = 32, 1e6
WITHOUT_NUMBA = 4.0  # times slower on the CPU


def gpu_from(n_streams: int, *, compiled: bool) -> float:
    """Return the number of parameters from which a GPU is faster than NumPy at so many texts."""
    slope = math.log(ONE_STREAM / MANY_STREAMS) / math.log(MANY)
    break_even: float = ONE_STREAM / n_streams**slope
    return break_even if compiled else break_even / WITHOUT_NUMBA


def faster_on(model: ModelConfig, n_streams: int) -> tuple[str, str]:
    """Return the faster backend for a machine with a GPU, "mlx" or "numpy", and the reason."""
    n = parameter_count(model)
    compiled = find_spec("numba") is not None and not model.is_gpt2
    streams = f"{n_streams:,} text{'s' if n_streams > 1 else ''} at once"
    size = f"with {format_count(n)} parameters and {streams}"
    if n < gpu_from(n_streams, compiled=compiled):
        return "numpy", f"faster than the GPU {size}"
    return "mlx", f"faster than NumPy {size}"
