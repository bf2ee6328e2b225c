"""mlx-randygpt: train a GPT from scratch on your own text, on MLX and on NumPy.

The names below are the public API; each is imported when it is first asked for, so that
`import mlx_randygpt` costs nothing.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "ModelConfig": "config",
    "TrainConfig": "config",
    "PRESETS": "config",
    "RECIPES": "config",
    "Batch": "state",
    "TrainState": "state",
    "CharTokenizer": "tokenizer",
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "make_backend": "backends",
    "train": "train",
    "evaluate": "evaluation",
    "generate": "sample",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__


class _Package(ModuleType):
    """The import of a module sets its name here; `train` stays the function all the same."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
