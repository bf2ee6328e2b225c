"""mlx-randygpt: train a GPT from scratch on your own text, on MLX and on NumPy.

The names below are the public API; each is imported when it is first asked for, so that
`import mlx_randygpt` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "new_run": "api",
    "load": "api",
    "LoadedModel": "api",
    "ModelConfig": "config",
    "TrainConfig": "config",
    "UserError": "config",
    "resolve": "settings",
    "PRESETS": "recipes",
    "RECIPES": "recipes",
    "Batch": "state",
    "TrainState": "state",
    "Params": "state",
    "initial_params": "model",
    "parameters": "model",
    "Tokenizer": "tokenizers",
    "tokenizer_from_json": "tokenizers",
    "CharTokenizer": "tokenizers.chars",
    "SubwordTokenizer": "tokenizers.subword",
    "Corpus": "data.corpus",
    "load_corpus": "data.corpus",
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
    "make_backend": "backends",
    "make_scorer": "backends",
    "Run": "training.loop",
    "train": "training.loop",
    "StepLog": "training.reports",
    "EvalLog": "training.reports",
    "SampleLog": "training.reports",
    "EarlyEvalLog": "training.reports",
    "EarlySampleLog": "training.reports",
    "evaluate": "training.evaluation",
    "SampleConfig": "sampling.filters",
    "generate": "sampling.generate",
    "neighbours": "analysis.insight",
    "parameter_count": "model",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


def __dir__() -> list[str]:
    return __all__
