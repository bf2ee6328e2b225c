"""The memory of training by kind, against sums worked out by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mlx_randygpt.config import ARCHS, ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.model import parameter_count
from mlx_randygpt.planning import footprint as foot
from mlx_randygpt.recipes import RECIPES

kinds = pytest.mark.parametrize("kind", ["classic", "modern", "gpt2"])
GB = 10**9


@pytest.fixture
def sized(tiny_model: Callable[..., ModelConfig]) -> Callable[..., ModelConfig]:
    """Return a factory (kind, **sizes) of small models of a recipe, or of GPT-2's architecture."""

    def build(kind: str, **changes: Any) -> ModelConfig:
        recipe = "classic" if kind == "gpt2" else kind
        arch = ARCHS["gpt2" if kind == "gpt2" else "gpt"]
        return tiny_model(recipe, **RECIPES[recipe]["model"] | arch | changes)

    return build


def test_a_hand_worked_model(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> None:
    """2 layers of width 32 and 4 heads, 16 tokens, 29 symbols; 256 sequences of an evaluation on
    2 threads make chunks of 64 sequences, 1,024 tokens."""
    model = sized("classic")
    n = 2 * 12 * 32**2 + (29 + 16 + 29) * 32
    by_kind = foot.footprint("numpy", model, tiny_train("classic"), 8, 2)
    assert parameter_count(model) == n
    assert by_kind["weights"] == 4 * n
    assert by_kind["gradients"] == by_kind["moments"] == 8 * n
    # a layer keeps ten (N, C) arrays, two norms' and 2H heads' inverse roots
    assert by_kind["activations"] == 2 * 4 * 2 * 1024 * (10 * 32 + 2 + 2 * 4)
    assert by_kind["attention"] == 2 * 4 * 2 * 64 * 4 * 16 * 16
    assert by_kind["logits"] == 2 * 4 * 1024 * 29
    # x, dx, branch, scratch, final, 4 of the MLP, 3 of qkv; ds and qᵀ of 64 sequences; phases;
    # the largest gradient; NumPy's own (N, C)
    working = 12 * 1024 * 32 + 1024 + 64 * 4 * 16 * (16 + 8) + 2 * 2 * 16 * 8 * 4 + 4 * 32**2
    assert by_kind["working"] == 2 * 4 * (working + 1024 * 32)
    assert by_kind["saving"] == 4 * 12 * n


@kinds
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_recomputing_keeps_one_layer_and_the_inputs_of_the_others(
    sized: Callable[..., ModelConfig], kind: str, dropout: float
) -> None:
    model = sized(kind, n_layer=3, dropout=dropout)
    kept, recomputed = (foot.chunk_numbers(model, 5, recompute) for recompute in (False, True))
    inputs = 2 * 5 * 16 * 32
    assert recomputed["activations"] == kept["activations"] // 3 + inputs
    assert recomputed["attention"] == kept["attention"] // 3
    assert (recomputed["logits"], recomputed["working"]) == (kept["logits"], kept["working"])


def test_muon_keeps_one_moment_and_a_number_per_neuron_in_its_files(
    sized: Callable[..., ModelConfig], tiny_train: Callable[..., TrainConfig]
) -> None:
    model, train = sized("modern"), tiny_train("modern", muon_beta2=0.0)
    n, n_adamw = parameter_count(model), foot.adamw_count(model, train)
    assert n_adamw == 2 * 29 * 32
    assert foot.footprint("numpy", model, train, 8, 2)["saving"] == 16 * (2 * n + n_adamw)
    assert foot.adamw_count(model, replace(train, optimizer="adamw")) == n
    neurons = model.n_layer * (3 + 1 + 4 + 4) * 32  # of c_attn, c_proj, c_fc, and c_proj's inputs
    train = replace(train, muon_beta2=0.95)
    assert foot.second_moment_count(model, train) == n_adamw + neurons


@kinds
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_more_of_anything_never_takes_less(
    sized: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    kind: str,
    backend: str,
) -> None:
    train = tiny_train("classic")

    def total(sequences: int = 8, **sizes: int) -> int:
        return sum(foot.footprint(backend, sized(kind, **sizes), train, sequences, 2).values())

    for change in ({"n_layer": 4}, {"n_embd": 64}, {"vocab_size": 99}, {"block_size": 32}):
        assert total(**change) > total()
    assert total(sequences=100_000) >= total(sequences=100) >= total()


@kinds
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_checkpointing_takes_less_and_the_more_layers_the_more(
    sized: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    kind: str,
    backend: str,
) -> None:
    def activations(n_layer: int, recompute: bool) -> int:
        train = tiny_train("classic", checkpoint_activations=recompute)
        by_kind = foot.footprint(backend, sized(kind, n_layer=n_layer), train, 64, 2)
        return by_kind["activations"] + by_kind["attention"]

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
    with pytest.raises(ConfigError, match=r"one sequence needs 3\.\d GB, only 1\.0 GB are"):
        foot.micro_batch("mlx", model, train, GB)
