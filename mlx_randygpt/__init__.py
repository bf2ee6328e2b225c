"""mlx-randygpt: train a GPT from scratch on your own text, on MLX and on NumPy.

The names below are the public API; each is imported when it is first asked for, so that
`import mlx_randygpt` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": "config",
    "TrainConfig": "config",
    "PRESETS": "recipes",
    "RECIPES": "recipes",
    "Batch": "state",
    "TrainState": "state",
    "CharTokenizer": "tokenizers.chars",
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "make_backend": "backends",
    "train": "training.loop",
    "evaluate": "training.evaluation",
    "generate": "sampling.generate",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
