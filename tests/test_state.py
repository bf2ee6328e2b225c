"""Weights, batches and random numbers are functions of settings and seed alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import initial_params, muon_matrices, parameter_count, parameter_shapes
from mlx_randygpt.recipes import PRESETS
from mlx_randygpt.state import IGNORED, PURPOSES, Batch, rng

Model = Callable[..., ModelConfig]


@pytest.mark.parametrize(
    ("preset", "count"),
    [
        ("mini", 16_832), ("tiny", 108_928), ("small4", 811_776), ("small", 1_204_992),
        ("medium", 4_785_664), ("large", 37_948_416),
    ],
)  # fmt: skip
def test_classic_presets_have_the_published_counts(
    preset: str, count: int, tiny_model: Model
) -> None:
    p = PRESETS[preset]
    sizes = {"n_layer": p.n_layer, "n_head": p.n_head, "n_embd": p.n_embd}
    model = tiny_model("classic", vocab_size=67, block_size=p.block_size, **sizes)
    by_hand = 2 * 67 * p.n_embd + p.block_size * p.n_embd + 12 * p.n_layer * p.n_embd**2
    assert parameter_count(model) == by_hand == count


def test_modern_has_no_learned_positions(tiny_model: Model) -> None:
    classic, modern = tiny_model("classic"), tiny_model("modern")
    assert parameter_count(classic) - parameter_count(modern) == 16 * 32
    assert parameter_shapes(classic).keys() - parameter_shapes(modern).keys() == {"wpe.weight"}


def test_muon_takes_the_matrices_of_the_blocks_and_query_key_value_apart(tiny_model: Model) -> None:
    assert muon_matrices(tiny_model("classic", n_layer=1)) == {
        "h.0.attn.c_attn.weight": 3,
        "h.0.attn.c_proj.weight": 1,
        "h.0.mlp.c_fc.weight": 1,
        "h.0.mlp.c_proj.weight": 1,
    }


@pytest.mark.parametrize("recipe", ["classic", "modern"])
def test_initial_weights_are_a_function_of_the_seed(recipe: str, tiny_model: Model) -> None:
    model = tiny_model(recipe)
    first, again, other = (initial_params(model, seed) for seed in (1, 1, 2))
    np.testing.assert_equal(first, again)
    drawn = [name for name in first if first[name].any()]
    assert not any(np.array_equal(first[name], other[name]) for name in drawn)
    assert {w.dtype for w in first.values()} == {np.dtype(np.float32)}
    assert len({first[name].flat[0] for name in drawn}) == len(drawn)  # no two draw the same


def test_modern_starts_its_output_projections_at_zero_and_nothing_else(tiny_model: Model) -> None:
    params = initial_params(tiny_model("modern"), 1)
    zero = {name for name, w in params.items() if not w.any()}
    assert zero == {f"h.{i}.{part}.c_proj.weight" for i in (0, 1) for part in ("attn", "mlp")}


def test_classic_starts_scaled_as_gpt_2(tiny_model: Model) -> None:
    params = initial_params(tiny_model("classic", n_embd=192, n_layer=8), 1)
    for name, w in params.items():
        expected = 192**-0.5 / (4 if name.endswith("c_proj.weight") else 1)  # √(2·8) = 4
        assert w.std() == pytest.approx(expected, rel=0.08)  # measured: 0.036, of 2,048 numbers
        assert abs(w.mean()) < 4 * expected / w.size**0.5


def test_a_batch_reads_windows_and_what_follows_them() -> None:
    batch = Batch(np.arange(10, 20, dtype=np.uint16), np.array([0, 5]), 4)
    assert batch.x().tolist() == [[10, 11, 12, 13], [15, 16, 17, 18]]
    assert batch.y().tolist() == [[11, 12, 13, 14], [16, 17, 18, 19]]
    assert batch.x().dtype == batch.y().dtype == np.int32
    assert batch.n_targets() == 8


def test_past_the_end_inputs_repeat_and_targets_do_not_count() -> None:
    batch = Batch(np.arange(10, 20, dtype=np.uint16), np.array([6, 8, 9, 10]), 4)
    no = IGNORED
    assert batch.x()[:, :2].tolist() == [[16, 17], [18, 19], [19, 19], [19, 19]]
    assert batch.y().tolist() == [[17, 18, 19, no], [19, no, no, no], [no] * 4, [no] * 4]
    assert batch.n_targets() == (batch.y() != IGNORED).sum() == 4


def test_ids_of_uint16_stay_positive() -> None:
    tokens = np.array([65_535, 0, 40_000], np.uint16)
    batch = Batch(tokens, np.array([0]), 2)
    assert batch.x().tolist() == [[65_535, 0]]
    assert batch.y().tolist() == [[0, 40_000]]


def test_a_batch_of_windows_gives_them_back() -> None:
    windows = np.arange(15).reshape(3, 5)
    batch = Batch.of(windows)
    assert np.array_equal(batch.x(), windows[:, :-1])
    assert np.array_equal(batch.y(), windows[:, 1:])


def test_each_key_has_its_own_random_numbers() -> None:
    indices = [(), (0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (7, 3)]
    keys = [(seed, p, *i) for seed in (0, 1, 1337) for p in PURPOSES for i in indices]
    first = [rng(*key).integers(2**62) for key in keys]
    assert first == [rng(*key).integers(2**62) for key in keys]
    assert len(set(first)) == len(keys)  # a trailing zero is part of the key
