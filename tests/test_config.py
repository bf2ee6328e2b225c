"""A wrong setting is refused by name, with the value seen and one that fits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig, parse_interval
from mlx_randygpt.recipes import PRESETS, RECIPES


@pytest.mark.parametrize(
    ("n_embd", "n_head", "fitting"), [(116, 5, 4), (128, 12, 8), (130, 12, 13), (12, 100, 6)]
)
def test_a_width_that_does_not_divide_names_the_nearest_number_of_heads(
    n_embd: int, n_head: int, fitting: int
) -> None:
    with pytest.raises(ConfigError) as error:
        ModelConfig(vocab_size=10, n_embd=n_embd, n_head=n_head)
    divides = f"n_embd={n_embd} is not divisible by n_head={n_head}; try {fitting}"
    assert str(error.value) == divides
    ModelConfig(vocab_size=10, n_embd=n_embd, n_head=fitting, position="learned")


@pytest.mark.parametrize("value", [0, -3])
@pytest.mark.parametrize("name", ["vocab_size", "block_size", "n_layer", "n_head", "n_embd"])
def test_sizes_below_one_are_refused(name: str, value: int) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} is too small; it must be at least 1"):
        ModelConfig(**{"vocab_size": 10, name: value})


def test_rotary_heads_hold_at_least_one_pair() -> None:
    with pytest.raises(ConfigError, match=r"n_embd/n_head=1 is too small.*at most 6"):
        ModelConfig(vocab_size=10, n_embd=12, n_head=12)
    assert ModelConfig(vocab_size=10, n_embd=12, n_head=12, position="learned").head_size == 1


BAD_RUNS: list[tuple[str, Any, str]] = [
    *[(name, 0, "at least 1") for name in ("iters", "batch_size", "grad_accum", "log_every")],
    *[(name, -1, "at least 0") for name in ("warmup", "patience", "eval_every", "sample_every")],
    *[(name, -1, "at least 0") for name in ("keep_every", "threads", "seed")],
    *[(name, -0.1, "at least 0") for name in ("lr", "min_lr", "weight_decay", "grad_clip")],
    *[(name, v, "finite") for name in ("lr", "grad_clip") for v in (math.nan, math.inf)],
    ("lr", 0.0, "such as 0.001"),
    ("min_lr", 0.5, "min_lr=0.5 is above lr="),
    *[(name, 1.0, r"\[0, 1\)") for name in ("beta1", "beta2", "momentum")],
    ("adam_eps", 0.0, r"\[1e-30, 1\]"),
    ("optimizer", "sgd", "adamw, muon"),
    ("schedule", "step", "cosine, linear, trapezoid, constant, plateau"),
    ("dtype", "float8", "float32, bfloat16"),
    ("recipe", "ancient", "classic, modern"),
    ("save_every", "soon", "60s"),
]


@pytest.mark.parametrize(("name", "value", "fitting"), BAD_RUNS)
def test_a_run_names_the_setting_the_value_and_what_fits(
    name: str, value: Any, fitting: str
) -> None:
    with pytest.raises(ConfigError, match=fitting) as error:
        TrainConfig(**{name: value})
    assert f"{name}={value!r}" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dropout", [-0.1, 1.0, math.nan])
def test_dropout_leaves_something(dropout: float) -> None:
    with pytest.raises(ConfigError, match=r"dropout=\S+ is not in \[0, 1\)"):
        ModelConfig(vocab_size=10, dropout=dropout)


def test_an_unknown_position_is_named() -> None:
    with pytest.raises(ConfigError, match="position='alibi' is unknown; it is rope or learned"):
        ModelConfig(vocab_size=10, position="alibi")


@pytest.mark.parametrize(
    ("text", "interval"),
    [("1", (1, 0)), ("1000", (1000, 0)), ("60s", (0, 60)), ("1.5m", (0, 90)), ("2h", (0, 7200))],
)
def test_an_interval_is_steps_or_a_time(text: str, interval: tuple[int, float]) -> None:
    assert parse_interval(text) == interval


@pytest.mark.parametrize("text", ["", "0", "-5", "1.5", "0s", "-1m", "s", "5d", "nans", "infh"])
def test_other_intervals_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="neither steps"):
        parse_interval(text)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_fits_both_recipes(
    preset: str, recipe: str, tiny_model: Callable[..., ModelConfig]
) -> None:
    p = PRESETS[preset]
    sizes = {"n_layer": p.n_layer, "n_head": p.n_head, "n_embd": p.n_embd}
    model = tiny_model(recipe, block_size=p.block_size, **sizes)
    assert model.head_size * p.n_head == p.n_embd
    assert TrainConfig(**RECIPES[recipe]["train"], batch_size=p.batch_size).optimizer
