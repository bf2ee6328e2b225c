"""The presets and recipes: tables of numbers without logic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Preset:
    """The sizes of one named model and its batch size."""

    n_layer: int
    n_head: int
    n_embd: int
    block_size: int
    batch_size: int = 64


PRESETS: dict[str, Preset] = {
    "mini": Preset(1, 4, 32, 8),
    "tiny": Preset(2, 4, 64, 32),
    "small4": Preset(4, 8, 128, 64),
    "small": Preset(6, 8, 128, 64),
    "medium": Preset(6, 8, 256, 128),
    "large": Preset(12, 16, 512, 256),
    "xs": Preset(3, 4, 116, 256),
    "s": Preset(8, 4, 128, 256),
    "ds": Preset(12, 4, 128, 256),
    "m": Preset(6, 6, 192, 256),
    "l": Preset(6, 8, 256, 256),
    "deep": Preset(16, 6, 192, 256),
    "xl": Preset(8, 8, 384, 256),
    "flux-small": Preset(2, 4, 128, 64),
    "flux-medium": Preset(4, 8, 256, 64),
    "flux-large": Preset(6, 16, 512, 64),
    "gpt2": Preset(12, 12, 768, 1024, batch_size=8),
    "gpt2-medium": Preset(24, 16, 1024, 1024, batch_size=8),
    "gpt2-large": Preset(36, 20, 1280, 1024, batch_size=8),
    "gpt2-xl": Preset(48, 25, 1600, 1024, batch_size=8),
}
DEFAULT_PRESET = "small"
SIZES_FOR_TIMES = ("mini", "tiny", "small4", "small", "medium", "large")  # for --minutes

# What a recipe decides, for the model and for the run; every field may be overridden by name.
RECIPES: dict[str, dict[str, dict[str, Any]]] = {
    "classic": {
        "model": {
            "position": "learned", "qk_norm": False, "final_norm": False, "token_shift": False,
            "zero_init": False,
        },
        "train": {
            "optimizer": "adamw", "lr": 3e-3, "min_lr": 3e-4, "weight_decay": 0.1,
            "beta1": 0.9, "beta2": 0.99, "schedule": "cosine", "warmup": 100,
        },
    },
    "modern": {
        "model": {
            "position": "rope", "qk_norm": True, "final_norm": True, "token_shift": True,
            "zero_init": True,
        },
        "train": {
            "optimizer": "muon", "lr": 0.02, "min_lr": 0.0, "weight_decay": 0.0,
            "beta1": 0.8, "beta2": 0.95, "momentum": 0.9, "muon_beta2": 0.95,
            "schedule": "linear", "warmup": 30, "order": "passes",
        },
    },
}  # fmt: skip
RECIPES["portable"] = {  # modern without what no published architecture has: it is an Arcee
    "model": {**RECIPES["modern"]["model"], "qk_norm": False, "token_shift": False},
    "train": RECIPES["modern"]["train"],
}
