"""The checks themselves: models without a gradient somewhere pass, and a wrong zero does not."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends import mlx_device
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.check import check_checkpoint, finite_differences, learned_rows, relative
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params
from mlx_randygpt.state import Batch, Params

Model = Callable[..., ModelConfig]
Lively = Callable[[ModelConfig], Params]

SMALL: list[dict[str, Any]] = [
    {"block_size": 1},
    {"n_layer": 1, "n_head": 8},  # two values a head
    {"vocab_size": 2, "block_size": 3},
    {"dropout": 0.2},
]


@pytest.mark.parametrize("recipe", ["classic", "modern", "gpt2", "lora"])
@pytest.mark.parametrize("sizes", SMALL, ids=str)
def test_a_model_that_cannot_learn_everything_passes(
    recipe: str, sizes: dict[str, Any], tiny_model: Model, tiny_train: Callable[..., TrainConfig],
    lively: Lively,
) -> None:  # fmt: skip
    model, train = tiny_model(recipe, **{"n_embd": 16, **sizes}), tiny_train(recipe)
    other = "mlx" if mlx_device()[0] else None
    for params in (
        initial_params(model, 1),
        lively(model),
    ):  # where B and projections are 0, or not
        findings = list(check_checkpoint(model, train, params, other))
        assert [f for f in findings if not f.holds] == []


def test_only_exact_zeros_agree_with_no_gradient() -> None:
    assert relative(0.0, 0.0) == 0.0
    assert relative(1e-30, 0.0) == math.inf
    assert math.isnan(relative(math.nan, 1.0))


def test_a_gradient_that_is_wrongly_zero_is_found(
    tiny_model: Model, lively: Lively, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = NumpyBackend.loss_and_grads

    def wrong(self: NumpyBackend, batch: Batch) -> tuple[float, Params]:
        loss, grads = exact(self, batch)
        return loss, grads | {"wte.weight": np.zeros_like(grads["wte.weight"])}

    monkeypatch.setattr(NumpyBackend, "loss_and_grads", wrong)
    model = tiny_model("modern", block_size=1)
    failed = [f for f in finite_differences(model, lively(model), 1) if not f.holds]
    assert [(f.tensor, f.error) for f in failed] == [("wte.weight", math.inf)]


@pytest.mark.parametrize(
    ("recipe", "block_size", "tensor", "parts"),
    [
        ("modern", 1, "h.0.attn.c_attn.weight", (False, False, True)),  # query, key, value
        ("lora", 1, "h.1.attn.c_attn.lora_b", (False, False, True)),
        ("modern", 2, "h.0.attn.c_attn.weight", (True, True, True)),
        ("gpt2", 1, "h.0.attn.c_attn.bias", (False, False, True)),
        ("gpt2", 2, "h.0.attn.c_attn.bias", (True, False, True)),
    ],
)
def test_queries_and_keys_are_left_out_where_they_learn_nothing(
    recipe: str, block_size: int, tensor: str, parts: tuple[bool, ...], tiny_model: Model,
    lively: Lively,
) -> None:  # fmt: skip
    model = tiny_model(recipe, block_size=block_size)
    rows = learned_rows(model, [lively(model)], 1)
    assert rows[tensor].tolist() == np.repeat(parts, model.n_embd).tolist()
    others = [name for name in rows if ".c_attn." not in name or name.endswith("lora_a")]
    assert all(rows[name].all() for name in others)


def test_a_weight_that_learns_later_is_compared_whole(tiny_model: Model, lively: Lively) -> None:
    model = tiny_model("modern")
    first, last = initial_params(model, 1), lively(model)  # output projections start at zero
    assert learned_rows(model, [first, last], 1)["h.0.attn.c_attn.weight"].all()
