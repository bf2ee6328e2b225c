"""Weights and moments in stacks are those with names, in any order of shapes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt.backends.mlx.stacks import DECAYED, VECTORS, Stacks
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import muon_matrices, parameter_shapes, second_moment_shapes
from mlx_randygpt.state import Params, rng


def normal(shapes: dict[str, tuple[int, ...]]) -> Params:
    return {
        name: rng(i, "check").standard_normal(shape).astype(np.float32)
        for i, (name, shape) in enumerate(shapes.items())
    }


@pytest.mark.parametrize("recipe", ["modern", "classic", "gpt2"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_views_are_the_weights_and_moments_that_were_stacked(
    recipe: str, optimizer: str, tiny_model: Callable[..., ModelConfig]
) -> None:
    model = tiny_model(recipe)
    train = TrainConfig(optimizer=optimizer, muon_beta2=0.9)
    muon = muon_matrices(model) if optimizer == "muon" else {}
    shapes, second = parameter_shapes(model), second_moment_shapes(model, train)
    stacks = Stacks(shapes, muon)
    for each in (shapes, second):
        named = normal(each)
        views = stacks.unpack(stacks.load(named), each)
        assert list(views) == list(each)
        np.testing.assert_equal({name: np.array(view) for name, view in views.items()}, named)
        packed = stacks.pack({name: mx.array(x) for name, x in named.items()})
        assert all(mx.array_equal(packed[s], x) for s, x in stacks.load(named).items())


def test_matrices_of_one_shape_lie_in_one_stack(tiny_model: Callable[..., ModelConfig]) -> None:
    model = tiny_model("gpt2")  # two layers of width 32
    shapes = parameter_shapes(model)
    stacks = Stacks(shapes, muon_matrices(model))
    found = {name: x.shape for name, x in stacks.load(normal(shapes)).items()}
    n_decayed = sum(np.prod(shapes[f"{name}.weight"]) for name in ("wte", "wpe"))
    n_vectors = sum(shape[0] for shape in shapes.values() if len(shape) == 1)
    assert found == {
        "32 × 32": (8, 32, 32),  # queries, keys, values and their projections
        "32 × 128": (4, 32, 128),
        DECAYED: (n_decayed,),
        VECTORS: (n_vectors,),
    }
    assert np.array(stacks.scale("32 × 128")).ravel().tolist() == [2, 1, 2, 1]  # c_fc grows
