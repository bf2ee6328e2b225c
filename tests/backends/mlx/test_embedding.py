"""The gradient of a wide embedding equals sums in float64, and depends on no order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.mlx import embedding
from mlx_randygpt.backends.mlx.embedding import embed, sum_rows
from mlx_randygpt.check import distance
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

V, C = 40, 3


def positions(kind: str, n: int) -> Array:
    """Return ids (n,), int32."""
    random = rng(n, "check")
    ids = {
        "one": np.full(n, 7),
        "distinct": random.permutation(V)[:n],
        "frequent": np.minimum(random.geometric(0.2, n), V - 1),
    }[kind]
    return ids.astype(np.int32)


@pytest.mark.parametrize("max_rows", [embedding.MAX_ONE_HOT_ROWS, 0])
@pytest.mark.parametrize(
    ("kind", "n"),
    [
        ("one", 1),
        ("one", 33),
        ("distinct", 2),
        ("distinct", V),
        ("frequent", 64),
        ("frequent", 601),
    ],
)
def test_the_gradient_is_the_sum_over_all_positions_of_an_id(
    kind: str, n: int, max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_ONE_HOT_ROWS", max_rows)
    ids, table = positions(kind, n), mx.array(rng(0, "check").normal(size=(V, C)), mx.float32)
    weights = rng(1, "check").normal(size=(1, n, C)).astype(np.float32)

    def weighted_sum(table: mx.array) -> mx.array:
        return (embed(table, mx.array(ids)[None]) * weights).sum()

    total, grad = mx.value_and_grad(weighted_sum)(table)
    expected = np.zeros((V, C))
    np.add.at(expected, ids, weights[0].astype(np.float64))
    np.testing.assert_allclose(grad, expected, atol=1e-5)  # measured: 2e-6
    assert float(total) == pytest.approx(float((np.array(table)[ids] * weights).sum()), rel=1e-4)


def test_each_row_of_the_table_gets_one_sum_whatever_order_a_device_adds_in() -> None:
    ids = np.sort(positions("frequent", 601))
    sums = np.array(
        sum_rows(mx.array(rng(1, "check").normal(size=(601, C)), mx.float32), mx.array(ids))
    )
    added = ids[(sums != 0).any(axis=1)]
    assert added.tolist() == sorted(set(ids.tolist()))


def test_a_wide_vocabulary_trains_as_on_numpy(
    tiny_model: Callable[..., ModelConfig], lively: Callable[[ModelConfig], Params]
) -> None:
    model = tiny_model("modern", vocab_size=embedding.MAX_ONE_HOT_ROWS + 1)
    state, batch = (
        TrainState(0, lively(model), {}),
        Batch.of(rng(2, "check").integers(9, size=(8, 17))),
    )
    backends: list[Any] = [
        make_backend(name, model, TrainConfig(threads=1), state) for name in ("mlx", "numpy")
    ]
    grad, expected = (b.loss_and_grads(batch)[1]["wte.weight"] for b in backends)
    assert distance(grad, expected) < 1e-5
