"""The checks of `mlxgpt check`.

Finite differences prove NumPy, NumPy proves MLX, and a short trajectory proves the optimizers.
Weights are larger than initial ones, and none is zero, so that no error hides in tiny activations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.config import ARCHS, ModelConfig, TrainConfig
from mlx_randygpt.model import Role, parameters
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

WEIGHT_STD = 0.15  # of the checked weights; GPT-2 starts at 0.02
N_SEQUENCES = 4  # of a batch, or as many as have MIN_TOKENS
MIN_TOKENS = 64  # Muon makes whole steps of rounding where a gradient has few directions
DIFFERENCE_STEP = 1e-5  # of the finite differences, along a direction of length 1
GRADIENT_BOUND = 1e-5  # NumPy against MLX, float32
DIFFERENCE_BOUND = 5e-6  # NumPy float64 against finite differences
ROUNDING = 1e-12  # a part of a float64 gradient that is smaller than this share of it is nothing
VARIANTS = ARCHS | {"lora": {**RECIPES["modern"]["model"], "lora_rank": 4}}  # of a recipe
SUBJECTS = (*RECIPES, "gpt2", "lora")
# Steps, rate and bound. AdamW turns a gradient as small as its rounding into a whole step, so a
# difference of 1e-7 grows with the rate; 1e-3 is a usual one.
TRAJECTORIES = {"adamw": (50, 1e-3, 1e-5), "muon": (20, 0.04, 1e-4)}


@dataclass(frozen=True)
class Finding:
    """One comparison of one tensor; `error` is relative to the tensor's own norm."""

    check: str
    tensor: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is within the bound."""
        return self.error <= self.bound  # a nan does not hold


def check_model(subject: str) -> ModelConfig:
    """Return a small model of this recipe or variant that has every kind of tensor."""
    switches = RECIPES[recipe_of(subject)]["model"] | VARIANTS.get(subject, {})
    return ModelConfig(vocab_size=67, block_size=32, n_layer=2, n_head=4, n_embd=64, **switches)


def recipe_of(subject: str) -> str:
    """Return the recipe with which a subject is trained."""
    return subject if subject in RECIPES else "classic"


def finite_differences(
    model: ModelConfig, params: Params, seed: int, batch: Batch | None = None
) -> Iterator[Finding]:
    """Compare NumPy's gradients in float64 with finite differences, tensor by tensor.

    The slope dloss/dε along a random unit direction is compared with the gradient along it. Errors
    are relative to the gradient's norm over √n, its size along such a direction. A gradient of zero
    has to be met by a loss that does not change at all.
    """
    backend = _in_float64(model, params, seed)
    batch = batch or _batch(model, seed, 0)
    _, grads = backend.loss_and_grads(batch)
    for index, (name, weight) in enumerate(backend.trained.params.items()):
        direction = rng(seed, "check", 1, index).standard_normal(weight.shape)
        direction /= np.linalg.norm(direction)
        kept, losses = weight.copy(), []
        for sign in (1, -1):
            weight[...] = kept + sign * DIFFERENCE_STEP * direction
            backend.trained.merge()
            losses.append(backend.loss(batch))
        weight[...] = kept
        measured = (losses[0] - losses[1]) / (2 * DIFFERENCE_STEP)
        size = np.linalg.norm(grads[name]) / weight.size**0.5
        error = relative(abs(measured - float((grads[name] * direction).sum())), size)
        yield Finding("finite differences (float64) · NumPy", name, error, DIFFERENCE_BOUND)


def cross_check(
    model: ModelConfig,
    params: Params,
    seed: int,
    other: str,
    *,
    dtype: str = "float32",
    bound: float = GRADIENT_BOUND,
    batch: Batch | None = None,
) -> Iterator[Finding]:
    """Compare NumPy's float32 gradients with another backend's in `dtype`, tensor by tensor."""
    batch, state = batch or _batch(model, seed, 0), TrainState(0, params, {})
    train = TrainConfig(optimizer="adamw", seed=seed)
    _, ours = make_backend("numpy", model, train, state).loss_and_grads(batch)
    train = replace(train, dtype=dtype)
    _, theirs = make_backend(other, model, train, state).loss_and_grads(batch)
    for name in ours:
        error = distance(theirs[name], ours[name])
        yield Finding(f"gradients · NumPy, {other}", name, error, bound)


def trajectory(
    model: ModelConfig, params: Params, train: TrainConfig, other: str, steps: int, bound: float
) -> Iterator[Finding]:
    """Compare the weights of both backends after `steps` optimizer steps from the same start."""
    backends = [
        make_backend(name, model, train, TrainState(0, params, {})) for name in ("numpy", other)
    ]
    for step in range(steps):
        for backend in backends:
            backend.train_step([_batch(model, train.seed, step)], train.lr)
    ours, theirs = (backend.state().params for backend in backends)
    rows = learned_rows(model, (params, ours), train.seed)
    for name in ours:
        learned = rows.get(name, slice(None))  # beside adapters, frozen weights are compared whole
        error = distance(theirs[name][learned], ours[name][learned])
        yield Finding(f"{steps} {train.optimizer} steps · NumPy, {other}", name, error, bound)


def learned_rows(
    model: ModelConfig, states: Sequence[Params], seed: int
) -> dict[str, NDArray[np.bool_]]:
    """Return which rows of each trained weight an optimizer moves by more than rounding.

    The part of a query, key or value does not count if its gradient is zero in every state, as that
    of a key's bias, which adds the same to all scores of a query, and of both in a context of 1.
    Of rounding AdamW and Muon make whole steps.
    """
    table = {weight.name: weight for weight in parameters(model)}
    rows: dict[str, NDArray[np.bool_]] = {}
    for params in states:
        _, grads = _in_float64(model, params, seed).loss_and_grads(_batch(model, seed, 0))
        for name, grad in grads.items():
            n_parts = table[table[name].adapts or name].stacked
            n_parts = n_parts if len(grad) == n_parts * model.n_embd else 1  # a lora_a is not split
            sizes = [np.linalg.norm(part) for part in np.split(grad, n_parts)]
            learned = np.array(sizes) > ROUNDING * np.linalg.norm(grad)
            rows[name] = rows.get(name, False) | learned.repeat(len(grad) // n_parts)
    return {name: learned if learned.any() else ~learned for name, learned in rows.items()}


def check_recipe(subject: str, other: str | None, seed: int = 1337) -> Iterator[Finding]:
    """Run all checks of one subject; `other` is the backend to compare with, if there is one."""
    model, recipe = check_model(subject), recipe_of(subject)
    train = TrainConfig(recipe=recipe, seed=seed, **RECIPES[recipe]["train"])
    params = scaled_up(model, seed)
    yield from finite_differences(model, params, seed)
    if other is None:
        return
    yield from cross_check(model, params, seed, other)
    steps, lr, bound = TRAJECTORIES[train.optimizer]
    yield from trajectory(model, params, replace(train, lr=lr, min_lr=0.0), other, steps, bound)


def check_checkpoint(
    model: ModelConfig, train: TrainConfig, params: Params, other: str | None
) -> Iterator[Finding]:
    """Check the gradients at a trained model's own weights, and a 20-step trajectory from there."""
    model = replace(model, dropout=0.0)
    yield from finite_differences(model, params, train.seed)
    if other is None:
        return
    yield from cross_check(model, params, train.seed, other)
    _, lr, bound = TRAJECTORIES[train.optimizer]
    train = replace(train, dtype="float32", lr=0.1 * lr, min_lr=0.0)
    yield from trajectory(model, params, train, other, 20, bound)


def scaled_up(model: ModelConfig, seed: int) -> Params:
    """Return weights from normal(0, WEIGHT_STD), gains from normal(1, WEIGHT_STD), in float32."""
    params: Params = {}
    for index, weight in enumerate(parameters(model)):
        normal = rng(seed, "check", 2, index).standard_normal(weight.shape, dtype=np.float32)
        mean = np.float32(weight.role is Role.GAIN)
        params[weight.name] = normal * np.float32(WEIGHT_STD) + mean
    return params


def distance(a: Array, b: Array) -> float:
    """Return ‖a − b‖ / ‖b‖."""
    return relative(float(np.linalg.norm(a - b)), float(np.linalg.norm(b)))


def relative(error: float, size: float) -> float:
    """Return error / size; of a size of zero, 0 if there is no error at all, else infinity."""
    if size == 0:
        return 0.0 if error == 0 else math.inf
    return float(error / size)


def _in_float64(model: ModelConfig, params: Params, seed: int) -> NumpyBackend:
    train = TrainConfig(optimizer="adamw", seed=seed)
    return NumpyBackend(model, train, TrainState(0, params, {}), dtype=np.float64)


def _batch(model: ModelConfig, seed: int, step: int) -> Batch:
    shape = (max(N_SEQUENCES, MIN_TOKENS // model.block_size), model.block_size + 1)
    return Batch.of(rng(seed, "check", 3, step).integers(0, model.vocab_size, shape))
