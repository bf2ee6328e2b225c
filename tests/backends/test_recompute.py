"""Activation checkpointing and smaller passes: the same gradients from less memory.

Legend: B batch, T time.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.config import ARCHS, ModelConfig, TrainConfig
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Batch, Params, TrainState, rng

kinds = pytest.mark.parametrize("kind", ["classic", "modern", "gpt2"])
T = 16


@pytest.fixture
def build(
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> Callable[..., Backend]:
    """Return (kind, backend="numpy", dropout=0.1, **train) -> a backend of three layers."""

    def make(kind: str, backend: str = "numpy", dropout: float = 0.1, **train: Any) -> Backend:
        recipe = "classic" if kind == "gpt2" else kind
        switches = RECIPES[recipe]["model"] | ARCHS["gpt2" if kind == "gpt2" else "gpt"]
        model = tiny_model(recipe, **switches, n_layer=3, dropout=dropout)
        state = TrainState(0, lively(model), {})
        return make_backend(backend, model, tiny_train(recipe, **train), state)

    return make


def batch(rows: int, seed: int = 0) -> Batch:
    return Batch.of(rng(seed, "check").integers(0, 29, (rows, T + 1)))


def after(backend: Backend, n_steps: int, rows: int = 6) -> tuple[float, float]:
    """Return loss and gradient norm of the last of `n_steps`, each of two micro-batches."""
    batches = [batch(rows, seed) for seed in range(2)]
    result = [backend.train_step(batches, 0.01) for _ in range(n_steps)][-1]
    return result.loss, result.grad_norm


def difference(a: Params, b: Params) -> float:
    """Return the largest ‖a − b‖ / ‖b‖ of a tensor; tensors near zero count less."""
    assert a.keys() == b.keys()
    return max(float(np.linalg.norm(a[n] - b[n]) / (np.linalg.norm(b[n]) + 1e-3)) for n in a)


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_numpy_recomputes_to_the_bit(
    build: Callable[..., Backend], kind: str, dropout: float
) -> None:
    plain, recomputing = (
        build(kind, dropout=dropout, checkpoint_activations=on) for on in (False, True)
    )
    assert after(recomputing, 3) == after(plain, 3)
    assert difference(recomputing.state().params, plain.state().params) == 0


def test_numpy_keeps_the_activations_of_one_layer(build: Callable[..., Backend]) -> None:
    backend = build("modern", checkpoint_activations=True)
    assert isinstance(backend, NumpyBackend)
    backend.train_step([batch(6)], 0.01)
    chunk = backend._chunks[0]
    assert len({id(layer) for layer in chunk.layers}) == 1


@kinds
@pytest.mark.parametrize("change", [{"checkpoint_activations": True}, {"micro_batch": 4}])
def test_mlx_takes_the_same_steps(
    build: Callable[..., Backend], kind: str, change: dict[str, Any]
) -> None:
    """After one step AdamW's first moments are the gradients, including dropout."""
    pytest.importorskip("mlx.core", exc_type=ImportError)
    plain, other = (build(kind, "mlx", optimizer="adamw", **c) for c in ({}, change))
    losses, norms = zip(*(after(backend, 1) for backend in (plain, other)), strict=True)
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    first, second = (backend.state().moments["m"] for backend in (plain, other))
    assert difference(second, first) < 1e-5


@kinds
def test_mlx_checkpoints_without_changing_gradients(
    build: Callable[..., Backend], kind: str
) -> None:
    pytest.importorskip("mlx.core", exc_type=ImportError)
    loss, grads = build(kind, "mlx").loss_and_grads(batch(3))
    other_loss, others = build(kind, "mlx", checkpoint_activations=True).loss_and_grads(batch(3))
    numpy_loss, independent = build(kind).loss_and_grads(batch(3))
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert difference(others, grads) < 1e-6
    assert other_loss == pytest.approx(numpy_loss, rel=1e-5)
    assert difference(others, independent) < 1e-4


@pytest.mark.parametrize("kind", ["modern", "gpt2"])
def test_a_compiled_step_draws_dropout_again_and_keeps_none(
    build: Callable[..., Backend], kind: str, tmp_path: Path
) -> None:
    """A compiler that took both drawings for one would keep every mask until the backward pass.

    Fused kernels are compiled when they run, and nothing runs here.
    """
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)
    backend: Any = build(kind, "mlx", checkpoint_activations=True)
    x, n_places = mx.zeros((2, 16), mx.int32), 2 * backend._forward.config.n_layer
    step = mx.compile(backend._value_and_grad)
    keys = mx.zeros((n_places, 2, 2), mx.uint32)
    loss, grads = step(backend._named, x, x, mx.zeros((2, 16)), keys)
    mx.export_to_dot(str(tmp_path / "step.dot"), loss, *grads.values())
    assert (tmp_path / "step.dot").read_text().count("RandomBits") == 2 * n_places


def test_a_pass_draws_dropout_as_the_whole_batch() -> None:
    """Keys belong to sequences: a part of the batch gets those of its rows."""
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)
    from mlx_randygpt.backends.mlx.model import drop

    keys = mx.random.split(mx.random.key(3), 4)
    whole = drop(mx.ones((4, 5, 6)), 0.5, keys)
    part = drop(mx.ones((2, 5, 6)), 0.5, keys[2:])
    assert bool((whole[2:] == part).all())
    assert 0.2 < float(whole.mean()) / 2 < 0.8
    assert not bool((whole[0] == whole[1]).all())
