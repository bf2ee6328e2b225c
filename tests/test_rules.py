"""What follows from sizes and text: the stated rules at worked numbers, and who may overrule."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mlx_randygpt import settings
from mlx_randygpt.config import ConfigError, ModelConfig, TrainConfig

Model = Callable[..., ModelConfig]
SHAKESPEARE = 1_003_854  # training characters
DEFAULT = {"iters": 5000, "prompt": "\n"}


@pytest.mark.parametrize(
    ("optimizer", "steps"), [("muon", [0, 1, 5, 30, 30]), ("adamw", [0, 5, 25, 30, 30])]
)
def test_warmup_is_a_small_part_of_the_run(optimizer: str, steps: list[int]) -> None:
    runs = [TrainConfig(optimizer=optimizer, iters=iters) for iters in (1, 50, 250, 1500, 5000)]
    assert [settings.warmup_steps(train) for train in runs] == steps


@pytest.mark.parametrize(
    ("options", "rate"),
    [
        ({}, 0.02),
        ({"preset": "large"}, 0.013),
        ({"n_embd": 256, "n_layer": 4, "batch_size": 12}, 0.01),  # a quarter of the tokens
        ({"n_layer": 4, "batch_size": 1}, 0.0058),
        ({"n_layer": 4, "batch_size": 1, "grad_accum": 12}, 0.02),
        ({"n_layer": 4, "batch_size": 1, "recipe": "classic"}, 3e-3),
        ({"n_layer": 4, "batch_size": 1, "lr": 0.03}, 0.03),
    ],
)
def test_muon_s_rate_follows_from_tokens_per_step_and_weights(
    options: dict[str, Any], rate: float
) -> None:
    assert settings.resolve_new({**DEFAULT, **options}, 68, SHAKESPEARE)[1].lr == rate


def test_a_lower_rate_by_rule_forgets_as_fast_as_the_full_one() -> None:
    given = {**DEFAULT, "n_layer": 4, "batch_size": 3}
    _, train = settings.resolve_new(given, 68, SHAKESPEARE)
    assert train.lr == 0.01
    assert train.weight_decay * train.lr == pytest.approx(2 * 3 * 64 / SHAKESPEARE, rel=0.02)


@pytest.mark.parametrize(
    ("options", "n_tokens", "preset", "iters"),
    [
        ({}, SHAKESPEARE, "small", 1000),
        ({}, 0, "small", 1000),
        ({}, 90_000, "small", 300),
        ({}, 18_000, "tiny", 180),
        ({}, 4_500, "tiny", 23),
        ({}, 500, "tiny", 20),
        ({"preset": "small"}, 18_000, "small", 27),
        ({"iters": 5000}, 18_000, "tiny", 5000),
        ({"n_embd": 64}, 18_000, "small", 54),
    ],
)
def test_a_short_text_has_a_smaller_preset_and_fewer_steps(
    options: dict[str, Any], n_tokens: int, preset: str, iters: int
) -> None:
    _, train = settings.resolve_new(options, 68, n_tokens)
    assert (train.preset, train.iters) == (preset, iters)
    note = settings.choices_note(options, train, n_tokens)
    assert (f"preset {preset}" in note) == (preset == "tiny")
    assert (f"{iters} steps" in note) == (iters != 1000 and "iters" not in options)


def test_passes_count_how_often_a_token_is_read(tiny_model: Model) -> None:
    model = tiny_model("modern", block_size=10)
    train = TrainConfig(iters=30, batch_size=5, grad_accum=2)
    assert settings.count_passes(model, train, 1000) == pytest.approx(3)


def test_decay_makes_weights_forget_in_half_a_pass() -> None:
    _, train = settings.resolve_new(DEFAULT, 68, SHAKESPEARE)
    steps_per_pass = SHAKESPEARE / (64 * 64)
    assert train.weight_decay * train.lr * steps_per_pass == pytest.approx(2, rel=0.02)
    assert train.weight_decay == 0.41
    _, twice = settings.resolve_new({**DEFAULT, "batch_size": 128}, 68, SHAKESPEARE)
    assert twice.weight_decay == 0.82
    _, slow = settings.resolve_new({**DEFAULT, "lr": 0.01}, 68, SHAKESPEARE)
    assert slow.weight_decay == 0.41  # a lower rate forgets more slowly as well


def test_a_tiny_text_does_not_wipe_the_weights_out() -> None:
    _, train = settings.resolve_new(DEFAULT, 68, 500)
    assert train.weight_decay * train.lr == pytest.approx(settings.MAX_FORGOTTEN)


def test_decay_is_the_recipe_s_where_the_text_is_unknown_or_adamw_trains() -> None:
    assert settings.resolve_new(DEFAULT, 68)[1].weight_decay == 0
    for given in ({"recipe": "classic"}, {"optimizer": "adamw"}):
        assert settings.resolve_new({**DEFAULT, **given}, 68, SHAKESPEARE)[1].weight_decay == 0.1


def test_dropout_comes_with_many_passes_over_a_text_that_is_short_for_the_model() -> None:
    assert settings.resolve_new(DEFAULT, 68, SHAKESPEARE)[0].dropout == 0  # 20 passes, 1.2 a token
    assert settings.resolve_new(DEFAULT, 68, SHAKESPEARE // 3)[0].dropout == 0.1  # 61 passes, 3.6
    assert settings.resolve_new({**DEFAULT, "preset": "xl"}, 68, SHAKESPEARE)[0].dropout == 0.1
    assert settings.resolve_new(DEFAULT, 68)[0].dropout == 0


@pytest.mark.parametrize(
    ("n_embd", "rank", "rate"),
    [(64, 0, 1e-3), (128, 0, 1e-3), (768, 0, 1.7e-4), (128, 8, 1e-2), (1600, 8, 8e-4)],
)
def test_a_trained_model_takes_smaller_steps_of_adamw(n_embd: int, rank: int, rate: float) -> None:
    model = ModelConfig(vocab_size=68, n_embd=n_embd, lora_rank=rank)
    given = {"recipe": "classic"}
    assert settings.fine_tuning_options(given, model)["lr"] == rate
    assert settings.fine_tuning_options({**given, "lr": 0.5}, model)["lr"] == 0.5


def test_muon_keeps_its_rate_on_a_trained_model_and_has_none_for_adapters() -> None:
    given, sizes = {"recipe": "modern"}, {"vocab_size": 68}
    assert settings.fine_tuning_options(given, ModelConfig(**sizes)) == given | {"lr": 0.02}
    adapted = ModelConfig(**sizes, lora_rank=8)
    found = settings.fine_tuning_options({**given, "weight_decay": 0.3}, adapted)
    assert (found["optimizer"], found["lr"], found["min_lr"]) == ("adamw", 1e-2, 0.0)
    assert found["weight_decay"] == 0.3
    _, train = settings.resolve_new(found, 68, SHAKESPEARE)
    assert (train.optimizer, train.lr, train.weight_decay, train.warmup) == ("adamw", 1e-2, 0.3, 30)


def test_what_is_given_wins() -> None:
    given = {**DEFAULT, "warmup": 100, "weight_decay": 0.0, "dropout": 0.25, "iters": 50}
    model, train = settings.resolve_new(given, 68, 10_000)
    assert (train.warmup, train.weight_decay, model.dropout) == (100, 0.0, 0.25)


@pytest.mark.parametrize(
    ("n_embd", "n_bytes", "said"),
    [
        (
            64,
            9_000,
            "Short text: 9 kB for 105,216 parameters (at least 10 kB, better 50 kB). Use more text",
        ),
        (64, 10_000, ""),
        (64, 500_000, ""),
        (
            64,
            1_115_394,
            "Long text: 1.12 MB for 105,216 parameters (at most about 500 kB is of use)",
        ),
        (256, 400_000, "Short text: 400 kB for 4,746,240 parameters (at least 500 kB"),
        (256, 10_000_000, ""),
    ],
)
def test_a_text_is_told_where_it_does_not_fit_the_model(
    tiny_model: Model, n_embd: int, n_bytes: int, said: str
) -> None:
    n_layer = {64: 2, 256: 6}[n_embd]
    model = tiny_model("modern", n_embd=n_embd, n_layer=n_layer, vocab_size=54)
    advice = settings.text_advice(model, n_bytes)
    assert advice.startswith(said)
    assert bool(advice) == bool(said)


def test_python_resolves_options_as_the_command_line_does() -> None:
    options = {"preset": "tiny", "iters": 50, "n_embd": 32}
    assert settings.resolve(68, 10_000, **options) == settings.resolve_new(options, 68, 10_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"itres": 5}, "itres is not an option; it must be one of arch, n_layer"),
        ({"preset": "huge"}, "preset='huge' is unknown; it is one of mini"),
        ({"recipe": "old"}, "recipe='old' is unknown; it is one of classic, modern"),
    ],
)
def test_python_gets_one_line_for_a_wrong_option(options: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings.resolve(68, **options)  # type: ignore[arg-type]
