"""GPT-2's architecture: its published counts, its operations, and both backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends.numpy import gpt2 as ops
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.check import SUBJECTS, cross_check, finite_differences, scaled_up
from mlx_randygpt.config import ARCHS, ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params, parameter_count
from mlx_randygpt.recipes import PRESETS
from mlx_randygpt.state import Batch, TrainState, rng

KINDS = [(a, b) for a in ("gelu_tanh", "gelu") for b in (True, False)]


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
    ],
)
def test_sizes_are_those_of_the_published_models(preset: str, count: int) -> None:
    sizes = asdict(PRESETS[preset])
    del sizes["batch_size"]
    assert parameter_count(ModelConfig(50257, **sizes, **ARCHS["gpt2"])) == count


@pytest.mark.parametrize(
    "wrong",
    [
        {"position": "rope"},
        {"qk_norm": True},
        {"final_norm": False},
        {"token_shift": True},
        {"activation": "relu2"},
    ],
)
def test_options_that_gpt2_does_not_have_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        ModelConfig(67, **(ARCHS["gpt2"] | wrong))


@pytest.mark.parametrize("option", [{"bias": True}, {"activation": "gelu"}, {"arch": "llama"}])
def test_options_of_gpt2_alone_are_refused(option: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(option))):
        ModelConfig(67, **option)


def test_gelu_is_that_of_the_error_function() -> None:
    h = np.linspace(-12, 12, 20_001)
    exact, gelu = np.array([x * 0.5 * math.erfc(-x / math.sqrt(2)) for x in h]), np.empty_like(h)
    ops.gelu(h, gelu)
    np.testing.assert_allclose(gelu, exact, rtol=0, atol=1e-13)  # measured: 9e-15
    single = np.empty_like(h, np.float32)
    ops.gelu(h.astype(np.float32), single)
    np.testing.assert_allclose(single, exact, rtol=1e-6, atol=2e-6)  # measured: 8e-7 of 12


@pytest.mark.parametrize(
    ("forward", "backward"),
    [
        (ops.gelu, ops.gelu_backward),
        (ops.gelu_tanh, ops.gelu_tanh_backward),
    ],
)
def test_slopes_of_activations(forward: Callable[..., None], backward: Callable[..., None]) -> None:
    h, slope = np.linspace(-9, 9, 1001), np.ones(1001)
    above, below = np.empty_like(h), np.empty_like(h)
    forward(h + 1e-6, above)
    forward(h - 1e-6, below)
    backward(slope, h)
    np.testing.assert_allclose(slope, (above - below) / 2e-6, atol=1e-8)


def test_a_layer_norm_has_mean_0_and_variance_1() -> None:
    x = rng(1, "check").normal(3, 5, (7, 64))
    hat, inv = np.empty_like(x), np.empty(7)
    ops.layer_norm(x, hat, inv)
    np.testing.assert_allclose(hat, (x - x.mean(-1)[:, None]) / np.sqrt(x.var(-1) + 1e-5)[:, None])
    np.testing.assert_allclose(inv, 1 / np.sqrt(x.var(-1) + 1e-5))


def small(activation: str, bias: bool) -> ModelConfig:
    switches = ARCHS["gpt2"] | {"activation": activation, "bias": bias}
    return ModelConfig(29, block_size=16, n_layer=2, n_head=4, n_embd=32, **switches)


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_every_gradient_is_proven(activation: str, bias: bool) -> None:
    model = small(activation, bias)
    checks = list(finite_differences(model, scaled_up(model, 1), 1))
    assert {c.tensor for c in checks} == set(initial_params(model, 1))
    assert not [c for c in checks if not c.holds]  # measured: 1.3e-7 of 5e-6


@pytest.mark.parametrize(("activation", "bias"), KINDS)
def test_mlx_computes_the_same(activation: str, bias: bool) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    model = small(activation, bias)
    checks = list(cross_check(model, scaled_up(model, 1), 1, "mlx"))
    assert not [c for c in checks if not c.holds]  # measured: 7.2e-7 of 1e-5


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_vectors_do_not_decay(optimizer: str) -> None:
    model = small("gelu_tanh", True)
    train = TrainConfig(optimizer=optimizer, weight_decay=0.5, threads=2)
    first = scaled_up(model, 1)
    kept, decayed = (
        NumpyBackend(model, settings, TrainState(0, first, {}))
        for settings in (TrainConfig(optimizer=optimizer, weight_decay=0.0, threads=2), train)
    )
    batch = Batch.of(rng(0, "check").integers(0, 29, (4, 17)))
    for backend in (kept, decayed):
        backend.train_step([batch], 0.01)
    same = {n for n, w in kept.params.items() if np.array_equal(w, decayed.params[n])}
    assert same == {name for name, w in first.items() if w.ndim == 1}


def test_check_covers_it() -> None:
    assert "gpt2" in SUBJECTS
