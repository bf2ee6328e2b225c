"""Attention maps against the naive model, one query and head at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from naive_model import naive_logits

from mlx_randygpt.analysis.insight import attention_map
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import Params, rng


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_maps_are_those_of_the_naive_model(
    recipe: str, tiny_model: Callable[..., ModelConfig], lively: Callable[..., Params]
) -> None:
    model = tiny_model(recipe, n_layer=3)
    params, tokens = lively(model), rng(0, "check").integers(0, model.vocab_size, 11)
    expected: dict[tuple[int, int, int], Any] = {}
    naive_logits(params, model, tokens, shares=expected)
    for layer, head in np.ndindex(3, model.n_head):
        shares = attention_map(params, model, tokens, layer, head)
        assert shares.shape == (11, 11)
        for t in range(11):
            np.testing.assert_allclose(
                shares[t, : t + 1], expected[layer, head, t], rtol=2e-5
            )  # measured: 2.2e-6
            assert not shares[t, t + 1 :].any()
