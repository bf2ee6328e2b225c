"""The settings of a model and of a run: frozen records and their validation, and the user's errors.

It imports nothing heavy, because `mlxgpt --help` reads it.
"""

from __future__ import annotations

import math
import reprlib
from dataclasses import dataclass
from typing import Any

from mlx_randygpt.recipes import PRESETS, RECIPES


class UserError(Exception):
    """Raised for a mistake of the user: one line with the problem, the value and a remedy."""


class ConfigError(UserError, ValueError):
    """Raised for a setting that does not fit."""


class MissingExtra(UserError, ImportError):
    """Raised if a library is not installed; the message has the command that installs it."""


def missing(feature: str, library: str, extra: str) -> MissingExtra:
    """Return the error for a feature that needs `library`, which comes with `extra`."""
    return MissingExtra(
        f"{feature} needs the library {library}, which is not installed; {install_command(extra)}"
    )


def install_command(extra: str) -> str:
    """Return the command that installs an extra in the way this package was installed."""
    import json
    import os
    from importlib.metadata import PackageNotFoundError, distribution
    from urllib.parse import unquote, urlparse

    try:
        package = distribution("mlx-randygpt")
        origin = json.loads(package.read_text("direct_url.json") or "{}")
        installer = (package.read_text("INSTALLER") or "pip").strip()
    except (PackageNotFoundError, OSError, ValueError):
        origin, installer = {}, "pip"
    command = "uv pip install" if installer == "uv" else "pip install"
    url = str(origin.get("url", ""))
    if "vcs_info" in origin:
        return f"{command} 'mlx-randygpt[{extra}] @ git+{url}'"
    folder = unquote(urlparse(url).path) if "dir_info" in origin else ""
    try:
        here = os.path.samefile(folder, os.curdir)
    except OSError:  # no clone, or it is gone
        return f"{command} 'mlx-randygpt[{extra}]'"
    flag = "-e " if origin["dir_info"].get("editable") else ""
    return f"{command} {flag}'{'.' if here else folder}[{extra}]'"


LORA_TARGETS = (
    "c_attn",
    "c_proj",
    "c_fc",
    "all",
)  # of each block; c_proj is both the attention's and the MLP's
ROPE_BASE = 10000.0  # of Su et al. 2021, which other programs assume if a file names none
GPT2_ACTIVATIONS = ("gelu_tanh", "gelu")
GPT2_SWITCHES: dict[str, Any] = {  # they override those of a recipe
    "arch": "gpt2",
    "activation": "gelu_tanh",
    "bias": True,
    "position": "learned",
    "rope_base": ROPE_BASE,
    "qk_norm": False,
    "final_norm": True,
    "token_shift": False,
    "zero_init": False,
}
GPT2_FIXED = ("position", "qk_norm", "final_norm", "token_shift")  # the switches that arch decides


@dataclass(frozen=True)
class ModelConfig:
    """The sizes and switches of one GPT: everything that decides which weights exist."""

    vocab_size: int
    block_size: int = 64  # T, the context in tokens
    n_layer: int = 6
    n_head: int = 8
    n_embd: int = 128
    dropout: float = 0.0  # after the attention projection and after the MLP
    position: str = "rope"  # "rope" (rotary, interleaved pairs) | "learned" (wpe)
    rope_base: float = ROPE_BASE  # pair j of n turns by base^(−j/n) per position
    qk_norm: bool = True  # RMSNorm of each query and key, before the rotation
    final_norm: bool = True  # RMSNorm before the head
    token_shift: bool = False  # half of each block's input comes from the previous position
    zero_init: bool = True  # output projections start at zero instead of GPT-2's scaled normal
    init_scale: float = 1.0  # initial weights are normal(0, init_scale / √n_embd)
    arch: str = "gpt"  # "gpt" | "gpt2": LayerNorm, GELU, biases and a head that is wte
    activation: str = "relu2"  # of gpt2: "gelu_tanh" | "gelu", the exact one
    bias: bool = False  # of gpt2, in products and LayerNorms
    lora_rank: int = 0  # of adapters beside the blocks' matrices; 0: none, all weights are trained
    lora_alpha: float = 16.0  # adapters are multiplied by lora_alpha / lora_rank
    lora_targets: str = "all"  # comma-separated matrices: c_attn, c_proj, c_fc, or all

    @property
    def head_size(self) -> int:
        """Return D, the width of one head."""
        return self.n_embd // self.n_head

    @property
    def is_gpt2(self) -> bool:
        """Whether the architecture is GPT-2's."""
        return self.arch == "gpt2"

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            _at_least(name, getattr(self, name), 1)
            _at_most(name, getattr(self, name), LIMITS[name])
        if self.n_embd % self.n_head:
            raise ConfigError(
                f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}; "
                f"try {_nearest_divisor(self.n_embd, self.n_head)}"
            )
        if self.position not in ("rope", "learned"):
            raise ConfigError(f"position={self.position!r} is unknown; it is rope or learned")
        if self.position == "rope" and self.n_embd < 2:
            raise ConfigError(
                f"n_embd={self.n_embd} is too small; rotary positions turn pairs, so it must be at "
                "least 2"
            )
        if self.position == "rope" and self.head_size < 2:
            raise ConfigError(
                f"n_embd/n_head={self.head_size} is too small; rotary positions turn pairs, so "
                f"n_head must be at most {self.n_embd // 2}"
            )
        _between("rope_base", self.rope_base, 1.0, 1e9)
        _between("init_scale", self.init_scale, 0.0, 1e6)
        _between("dropout", self.dropout, 0.0, 1.0, top_open=True)
        _one_of("arch", self.arch, tuple(ARCHS))
        _one_of("activation", self.activation, GPT2_ACTIVATIONS if self.is_gpt2 else ("relu2",))
        for name in GPT2_FIXED if self.is_gpt2 else ("bias",):
            if getattr(self, name) != ARCHS[self.arch].get(name, False):
                raise ConfigError(f"{name}={getattr(self, name)} does not go with arch {self.arch}")
        _at_least("lora_rank", self.lora_rank, 0)
        _at_most("lora_rank", self.lora_rank, self.n_embd)
        _between("lora_alpha", self.lora_alpha, 1e-6, 1e6)
        for target in self.lora_targets.split(","):
            _one_of("lora_targets", target, LORA_TARGETS)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run; with the model and the data they decide every weight."""

    recipe: str = "modern"
    preset: str = "small"
    iters: int = 1000  # a target, not an addition
    minutes: float = 0.0  # time of the run, evaluations included, that iters follows; 0 is off
    batch_size: int = 64  # sequences per micro-batch
    grad_accum: int = 1  # micro-batches per step
    order: str = "random"  # of windows: "random", drawn one by one | "passes", each once in a pass
    optimizer: str = "muon"  # "muon" | "adamw"
    lr: float = 0.02  # of the matrices under Muon, of everything under AdamW
    min_lr: float = 0.0  # at the end of the decay
    adamw_lr_ratio: float = 0.5  # under Muon: rate of embeddings, head and gains, divided by `lr`
    weight_decay: float = 0.0  # decoupled, on matrices only
    grad_clip: float = 1.0  # largest global norm of the gradient; 0 turns clipping off
    beta1: float = 0.8
    beta2: float = 0.95
    adam_eps: float = 1e-8
    momentum: float = 0.95  # Muon's
    muon_beta2: float = (
        0.0  # of the mean squares of each row of Muon's updates; 0: rows as they are
    )
    schedule: str = "linear"  # cosine | linear | trapezoid | constant | plateau
    warmup: int = 30  # steps of linear warmup
    patience: int = 0  # evaluations without a new best before plateau halves the rate; 0 is off
    eval_every: int = 250
    sample_every: int = 500
    save_every: str = "60s"  # steps ("1000") or a time ("60s", "5m")
    log_every: int = 1
    keep_every: int = 0  # also keep checkpoint-<step>.safetensors every N steps; 0 is off
    on_nan: str = "stop"  # if loss or gradient are not finite: stop | skip | rollback
    dtype: str = "float32"  # compute type on a GPU; weights and moments stay float32
    threads: int = 0  # NumPy backend; 0 is all cores
    micro_batch: int = 0  # sequences of a pass, MLX backend; 0 is the whole micro-batch
    checkpoint_activations: bool = False  # keep each layer's input, recompute the rest
    seed: int = 1337
    prompt: str = ""  # of the samples; empty: ROMEO: or a newline

    @property
    def sequences_per_step(self) -> int:
        """Return the number of sequences of one optimizer step."""
        return self.batch_size * self.grad_accum

    def __post_init__(self) -> None:
        for name in ("iters", "batch_size", "grad_accum", "log_every"):
            _at_least(name, getattr(self, name), 1)
            _at_most(name, getattr(self, name), LIMITS.get(name, (1 << 63) - 1))
        intervals = ("eval_every", "sample_every", "keep_every")
        for name in ("warmup", "patience", *intervals, "threads", "seed", "micro_batch"):
            _at_least(name, getattr(self, name), 0)
            _at_most(name, getattr(self, name), LIMITS.get(name, (1 << 63) - 1))
        rates = ("lr", "min_lr", "weight_decay", "grad_clip", "adamw_lr_ratio")
        for name in ("minutes", *rates):
            value = getattr(self, name)
            if not math.isfinite(value) or value < 0:
                raise ConfigError(f"{name}={value} is not a finite number of at least 0")
        if self.lr == 0:
            raise ConfigError("lr=0.0 trains nothing; give a rate above 0, such as 0.001")
        if self.min_lr > self.lr:
            raise ConfigError(f"min_lr={self.min_lr} is above lr={self.lr}; it must not be")
        for name in ("beta1", "beta2", "momentum", "muon_beta2"):
            _between(name, getattr(self, name), 0.0, 1.0, top_open=True)
        # with 0, a weight whose gradient has always been zero would divide zero by zero
        _between("adam_eps", self.adam_eps, 1e-30, 1.0)
        _one_of("optimizer", self.optimizer, OPTIMIZERS)
        _one_of("order", self.order, ORDERS)
        _one_of("schedule", self.schedule, SCHEDULES)
        _one_of("on_nan", self.on_nan, ON_NAN)
        _one_of("dtype", self.dtype, DTYPES)
        _one_of("preset", self.preset, tuple(PRESETS))
        _one_of("recipe", self.recipe, tuple(RECIPES))
        parse_interval(self.save_every)


BACKENDS = {  # name -> module and class; a third backend is one more file and one more row
    "mlx": ("mlx_randygpt.backends.mlx.backend", "MLXBackend"),
    "numpy": ("mlx_randygpt.backends.numpy.backend", "NumpyBackend"),
}
LIMITS = {  # a larger number is a typing error, and would only hang or fill the memory
    "vocab_size": 1 << 24,
    "block_size": 1 << 20,
    "n_layer": 1000,
    "n_head": 1 << 12,
    "n_embd": 1 << 16,
    "iters": 1 << 40,
    "batch_size": 1 << 20,
    "grad_accum": 1 << 16,
    "threads": 1024,
}
ARCHS: dict[str, dict[str, Any]] = {"gpt": {}, "gpt2": GPT2_SWITCHES}  # overrides of the recipe
ORDERS = ("passes", "random")
OPTIMIZERS = ("adamw", "muon")
SCHEDULES = ("cosine", "linear", "trapezoid", "constant", "plateau")
ON_NAN = ("stop", "skip", "rollback")
DTYPES = ("float32", "bfloat16", "float16")


def parse_interval(text: str) -> tuple[int, float]:
    """Parse `"1000"` to (1000 steps, 0.0), and `"60s"`, `"5m"`, `"1h"` to (0, seconds)."""
    units = {"s": 1.0, "m": 60.0, "h": 3600.0}
    number, unit = (text[:-1], text[-1]) if text[-1:] in units else (text, "")
    try:
        if unit and math.isfinite(seconds := float(number) * units[unit]) and seconds > 0:
            return 0, seconds
        if not unit and int(number) > 0:
            return int(number), 0.0
    except ValueError:
        pass
    raise ConfigError(f"save_every={text!r} is neither steps (1000) nor a time (60s, 5m)")


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"{name}={value} is too small; it must be at least {least}")


def _at_most(name: str, value: int, most: int) -> None:
    if value > most:
        seen = reprlib.repr(value)
        raise ConfigError(f"{name}={seen} is too large; it must be at most {most}")


def _between(name: str, value: float, low: float, high: float, *, top_open: bool = False) -> None:
    if not (low <= value <= high) or (top_open and value == high):
        raise ConfigError(f"{name}={value} is not in [{low:g}, {high:g}{')' if top_open else ']'}")


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(
            f"{name}={reprlib.repr(value)} is unknown; it is one of {', '.join(known)}"
        )


def _nearest_divisor(n_embd: int, n_head: int) -> int:
    most = max(1, n_embd // 2)  # a head has at least a pair of values
    divisors = [n for n in range(1, most + 1) if n_embd % n == 0]
    return min(divisors, key=lambda n: (abs(n - n_head), n))
