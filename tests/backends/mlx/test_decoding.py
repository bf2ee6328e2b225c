"""What one token takes on a GPU: each of these is a kernel, and starting it is most of its time."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.mlx.backend import MLXBackend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params
from mlx_randygpt.state import TrainState

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def one_token(
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[[str], Counter[str]]:
    """Return a function from a recipe to the operations that one token takes, by name."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    graph = importlib.import_module("mlx_graph")

    def count(recipe: str) -> Counter[str]:
        model = tiny_model(recipe)
        state = TrainState(0, initial_params(model, 1), {})
        with graph.exportable():
            built = make_backend("mlx", model, tiny_train(recipe), state)
        assert isinstance(built, MLXBackend)
        cache, calls = built.new_cache(2), Counter[str]()
        built.logits(np.zeros((2, 3), np.int32), cache)
        for name in ("rms_norm", "rope", "scaled_dot_product_attention"):
            real = getattr(mx.fast, name)

            def counted(*words: Any, name: str = name, real: Any = real, **options: Any) -> Any:
                calls[name] += 1
                return real(*words, **options)

            monkeypatch.setattr(mx.fast, name, counted)

        def token(ids: mx.array) -> list[mx.array]:
            logits, layers = built._forward.advance(None, ids, mx.array([3, 3]), cache.layers)
            return [logits, *(array for layer in layers for array in layer)]

        with graph.exportable():
            operations = graph.operations(token, [mx.zeros((2, 1), mx.int32)])
        return calls + Counter(operation["name"] for operation in operations)

    return count


@pytest.mark.parametrize("recipe", ["modern", "classic", "portable"])
def test_queries_and_keys_are_normed_and_rotated_together(
    one_token: Callable[[str], Counter[str]], recipe: str
) -> None:
    """Two layers: a norm before each branch, one for queries and keys, one at the end."""
    found = one_token(recipe)
    assert found["scaled_dot_product_attention"] == 2
    assert found["rope"] == (0 if recipe == "classic" else 2)
    norms = {"modern": 2 * 3 + 1, "classic": 2 * 2, "portable": 2 * 2 + 1}
    assert found["rms_norm"] == norms[recipe]


def test_the_shift_of_a_token_copies_nothing(one_token: Callable[[str], Counter[str]]) -> None:
    """On the CPU the operations of a rotation put its halves together; Metal has a kernel."""
    shifted, plain = one_token("modern"), one_token("portable")
    assert shifted["Concatenate"] == plain["Concatenate"]
    assert shifted["Select"] >= plain["Select"] + 2 * 2  # a choice between two arrays a branch
