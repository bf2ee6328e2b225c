"""Memory by kind, against the arrays that are really allocated and against hand-worked sums."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.backends.numpy.model import Activations, BranchInput, Chunk
from mlx_randygpt.config import ARCHS, ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import initial_params, parameter_count
from mlx_randygpt.planning import footprint as foot
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Batch, TrainState, rng

kinds = pytest.mark.parametrize("kind", ["classic", "modern", "gpt2"])
GB = 10**9


@pytest.fixture
def sized(tiny_model: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    """(kind, **sizes) -> a small model of a recipe, or of GPT-2's architecture."""

    def build(kind: str, **changes: Any) -> ModelConfig:
        recipe = "classic" if kind == "gpt2" else kind
        arch = ARCHS["gpt2" if kind == "gpt2" else "gpt"]
        return tiny_model(recipe, **RECIPES[recipe]["model"] | arch | changes)

    return build


def arrays(thing: Any) -> Iterator[np.ndarray]:
    """All arrays of a chunk and its layers, but its gradients."""
    for name, value in vars(thing).items():
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, np.ndarray) and name != "flat_grads":
                yield one
            elif isinstance(one, Activations | BranchInput):
                yield from arrays(one)


def n_bytes(chunk: Chunk) -> int:
    return sum({id(array): array.nbytes for array in arrays(chunk)}.values())


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("recompute", [False, True])
def test_every_byte_of_a_chunk_is_counted(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig],
    kind: str, dropout: float, recompute: bool,
) -> None:  # fmt: skip
    model = sized(kind, n_layer=3, dropout=dropout)
    train = tiny_train("classic", checkpoint_activations=recompute, threads=2)
    backend = NumpyBackend(model, train, TrainState(0, initial_params(model, 1), {}))
    backend.train_step([Batch.of(rng(1, "check").integers(0, 29, (10, 17)))], 1e-3)
    chunk = backend._chunks[0]
    rows = foot.chunk_rows(model, 10, 2)
    assert (chunk.rows, len(backend._chunks)) == (rows, 2)
    assert 4 * sum(foot.chunk_numbers(model, rows, recompute).values()) == n_bytes(chunk)


def test_a_hand_worked_model(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> None:
    """2 layers of width 32 and 4 heads, 16 tokens, 29 symbols; 256 sequences of an evaluation on
    2 threads make chunks of 64 sequences, 1,024 tokens."""
    model = sized("classic")
    n = 2 * 12 * 32**2 + (29 + 16 + 29) * 32
    found = foot.footprint("numpy", model, tiny_train("classic"), 8, 2)
    assert parameter_count(model) == n
    assert found["weights"] == 4 * n
    assert found["gradients"] == found["moments"] == 8 * n
    assert found["attention"] == 2 * 4 * 2 * 64 * 4 * 16 * 16
    assert found["logits"] == 2 * 4 * 1024 * 29
    assert found["saving"] == 4 * 12 * n


def test_muon_keeps_one_moment_in_its_files(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> None:
    model, train = sized("modern"), tiny_train("modern")
    n, few = parameter_count(model), foot.adamw_count(model, train)
    assert few == 2 * 29 * 32
    assert foot.footprint("numpy", model, train, 8, 2)["saving"] == 16 * (2 * n + few)
    assert foot.adamw_count(model, replace(train, optimizer="adamw")) == n


@kinds
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_more_of_anything_never_takes_less(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig],
    kind: str, backend: str,
) -> None:  # fmt: skip
    train = tiny_train("classic")

    def total(sequences: int = 8, **sizes: int) -> int:
        return sum(foot.footprint(backend, sized(kind, **sizes), train, sequences, 2).values())

    for change in ({"n_layer": 4}, {"n_embd": 64}, {"vocab_size": 99}, {"block_size": 32}):
        assert total(**change) > total()
    assert total(sequences=100_000) >= total(sequences=100) >= total()


@kinds
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_checkpointing_takes_less_and_the_more_layers_the_more(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig],
    kind: str, backend: str,
) -> None:  # fmt: skip
    def activations(n_layer: int, recompute: bool) -> int:
        train = tiny_train("classic", checkpoint_activations=recompute)
        found = foot.footprint(backend, sized(kind, n_layer=n_layer), train, 64, 2)
        return found["activations"] + found["attention"]

    saved = [activations(n, False) / activations(n, True) for n in (2, 4, 8, 16)]
    assert saved == sorted(saved)
    assert saved[0] > 1.5


def test_the_largest_batch_is_the_last_that_fits() -> None:
    assert foot.largest_batch(lambda n: n <= 77) == 77
    assert foot.largest_batch(lambda n: False) == 0
    assert foot.largest_batch(lambda n: True) == 1 << 20


def test_an_automatic_micro_batch_fits_and_one_more_would_not(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> None:
    model = sized("classic", n_layer=12, n_embd=512, block_size=512)
    train = tiny_train("classic", batch_size=64)
    size = foot.micro_batch("mlx", model, train, 20 * GB)

    def needs(n: int) -> int:
        return sum(foot.footprint("mlx", model, train, n, 1).values())

    assert 0 < size < 64
    assert needs(size) <= 20 * GB < needs(size + 1)
    assert foot.micro_batch("mlx", model, train, 500 * GB) == 0
    assert foot.micro_batch("numpy", model, train, 20 * GB) == 0
    with pytest.raises(ConfigError, match=r"one sequence takes 3\.\d GB, and there are 1\.0 GB"):
        foot.micro_batch("mlx", model, train, GB)
