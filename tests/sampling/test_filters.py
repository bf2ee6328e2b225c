"""How likely each token is, against numbers worked by hand and against transformers' processors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mlx_randygpt.config import ConfigError
from mlx_randygpt.sampling.filters import LogitsError, SampleConfig, penalise, pick, probabilities
from mlx_randygpt.state import rng


def alone(**config: Any) -> SampleConfig:
    """The named filters and no others."""
    return SampleConfig(**{"temperature": 1.0, "top_p": 1.0} | config)


def chances(
    logits: Any, config: SampleConfig, seen: tuple[int, ...] = (), ids: tuple[int, ...] = ()
) -> Any:
    """Probabilities (V,) of the token after these."""
    scores = np.array(logits, np.float64)
    penalise(scores, config, seen, ids)
    return probabilities(scores[None], [config])[0]


def drawn_from(weights: list[float], seen: tuple[int, ...] = (), **config: Any) -> list[float]:
    """Probabilities of tokens with these weights, under the named filters alone."""
    with np.errstate(divide="ignore"):
        logits = np.log(weights)
    return chances(logits, alone(**config), seen).round(12).tolist()


def test_without_filters_it_is_the_softmax() -> None:
    assert drawn_from([1, 2, 3, 4]) == [0.1, 0.2, 0.3, 0.4]
    assert drawn_from([0, 1, 3]) == [0, 0.25, 0.75]


def test_temperature_is_a_power() -> None:
    assert drawn_from([1, 4, 4], temperature=0.5) == pytest.approx([1 / 33, 16 / 33, 16 / 33])
    assert drawn_from([1, 4, 4], temperature=2.0) == [0.2, 0.4, 0.4]


def test_temperature_zero_takes_the_first_of_the_best() -> None:
    assert drawn_from([1, 5, 2, 5], temperature=0) == [0, 1, 0, 0]
    assert drawn_from([1, 5, 2, 5], temperature=0, top_k=1, top_p=0.1) == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("top_k", "expected"),
    [
        (1, [0, 0, 0, 1]), (2, [0, 0.2, 0.2, 0.6]), (3, [0, 0.2, 0.2, 0.6]),
        (0, [0.1, 0.18, 0.18, 0.54]), (4, [0.1, 0.18, 0.18, 0.54]), (99, [0.1, 0.18, 0.18, 0.54]),
    ],
)  # fmt: skip
def test_top_k_keeps_all_that_tie_with_the_last(top_k: int, expected: list[float]) -> None:
    assert drawn_from([10, 18, 18, 54], top_k=top_k) == expected


@pytest.mark.parametrize(
    ("top_p", "kept"),
    [(0.0, [3]), (0.3, [3]), (0.4, [3]), (0.41, [3, 2]), (0.7, [3, 2]), (0.71, [3, 2, 1])],
)
def test_the_nucleus_is_the_fewest_that_reach_top_p(top_p: float, kept: list[int]) -> None:
    p = drawn_from([0.125, 0.1875, 0.25, 0.4375], top_p=0.5)
    assert np.flatnonzero(p).tolist() == [2, 3]  # 0.4375 is not enough
    found = drawn_from([1, 2, 3, 4.000001], top_p=top_p)
    assert np.flatnonzero(found).tolist() == sorted(kept)


def test_the_nucleus_takes_the_lower_of_equal_ids() -> None:
    assert drawn_from([1, 1, 1, 1], top_p=0.5) == [0.5, 0.5, 0, 0]


@pytest.mark.parametrize("v", [5, 300, 20_000])
def test_the_nucleus_of_many_rows_is_that_of_each_in_order_of_its_tokens(v: int) -> None:
    logits = np.round(2 * rng(1, "check").standard_normal((6, v)))  # with many ties
    logits[:, ::3] = -np.inf
    many = probabilities(logits, [alone(top_p=0.3 + 0.1 * i) for i in range(6)])
    for i, row in enumerate(np.exp(logits)):
        order = np.argsort(-row, kind="stable")
        ahead = np.cumsum(row[order]) - row[order]
        kept = order[ahead < (0.3 + 0.1 * i - 1e-12) * row.sum()]
        assert np.array_equal(np.flatnonzero(many[i]), np.sort(kept))
        np.testing.assert_allclose(many[i, kept], row[kept] / row[kept].sum(), rtol=1e-12)


def test_min_p_is_a_share_of_the_best() -> None:
    assert drawn_from([1, 2, 3, 4], min_p=0.5) == pytest.approx([0, 2 / 9, 3 / 9, 4 / 9])
    assert drawn_from([1, 2, 3, 4], min_p=1.0) == [0, 0, 0, 1]


def test_filters_apply_in_order_and_each_to_what_is_left() -> None:
    # top-k leaves 0.2, 0.3, 0.5 of the rest; their nucleus of 0.75 is 0.3 and 0.5.
    assert drawn_from([1, 2, 3, 5], top_k=3, top_p=0.75) == [0, 0, 0.375, 0.625]
    assert drawn_from([1, 2, 3, 5], top_k=3, top_p=0.75, min_p=0.7) == [0, 0, 0, 1]


def test_the_penalty_lowers_what_was_seen_whatever_its_sign() -> None:
    logits = np.array([2.0, -1.0, 0.0, 2.0])
    config = SampleConfig(temperature=1, top_p=1, repetition_penalty=2)
    p = chances(logits, config, (0, 1, 1, 2))  # being seen twice costs no more
    expected = np.exp([1.0, -2.0, 0.0, 2.0])
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-14)


def test_presence_and_frequency_count_what_was_written_and_not_the_prompt() -> None:
    config = alone(presence_penalty=0.5, frequency_penalty=0.25)
    p = chances([1.0, 1.0, 1.0, 1.0], config, (0, 0, 3), (1, 2, 2, 2))
    expected = np.exp([1.0, 0.25, -0.25, 1.0])  # 1 - 0.5 - 0.25, 1 - 0.5 - 3 * 0.25
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-14)


def test_a_bias_comes_before_the_penalty() -> None:
    config = alone(logit_bias=((0, 3.0), (2, -4.0)), repetition_penalty=2.0)
    p = chances([-1.0, 0.0, 2.0], config, (0, 2))
    expected = np.exp([1.0, 0.0, -4.0])  # (-1 + 3) / 2, and (2 - 4) * 2
    np.testing.assert_allclose(p, expected / expected.sum(), rtol=1e-14)


def test_typical_keeps_what_is_about_as_surprising_as_the_average() -> None:
    # Entropy of 0.5, 0.2, 0.2, 0.1 is 1.2206; surprises 0.6931, 1.6094, 1.6094, 2.3026.
    # Distances 0.5275, 0.3888, 0.3888, 1.0820: first the two of 0.2, then 0.5, then 0.1.
    assert np.flatnonzero(drawn_from([5, 2, 2, 1], typical_p=0.2)).tolist() == [1]
    assert np.flatnonzero(drawn_from([5, 2, 2, 1], typical_p=0.4)).tolist() == [1, 2]
    assert drawn_from([5, 2, 2, 1], typical_p=0.5) == pytest.approx([5 / 9, 2 / 9, 2 / 9, 0])
    assert np.flatnonzero(drawn_from([5, 2, 2, 1], typical_p=0.95)).tolist() == [0, 1, 2, 3]


def test_typical_comes_last_and_sees_what_is_left() -> None:
    # min-p leaves 5, 2, 2: entropy 0.995, surprises 0.588, 1.504: the 5 is now the nearest.
    assert drawn_from([5, 2, 2, 1], min_p=0.3, typical_p=0.5) == [1, 0, 0, 0]


def test_rows_side_by_side_have_settings_of_their_own() -> None:
    logits = rng(3, "check").normal(0, 3, (6, 50))
    configs = [
        alone(), alone(temperature=0), alone(top_k=3, top_p=0.9), SampleConfig(),
        alone(min_p=0.1, temperature=2.0), alone(typical_p=0.3, top_k=40),
    ]  # fmt: skip
    together = probabilities(logits, configs)
    for row, config in enumerate(configs):
        assert np.array_equal(together[row], chances(logits[row], config))


@pytest.mark.parametrize("top_p", [0.0, 0.3, 0.9, 0.99999])
@pytest.mark.parametrize("digits", [1, 8])  # 1: most tie with others
def test_of_a_wide_vocabulary_the_same_stay(top_p: float, digits: int) -> None:
    """Only likely tokens are sorted there; here all are."""
    logits = rng(4, "check").normal(0, 3, (3, 3000)).round(digits)
    found = probabilities(logits, [alone(top_p=top_p)] * 3)
    for row, p in zip(found, probabilities(logits, [alone()] * 3), strict=True):
        kept, mass = np.zeros(3000, bool), 0.0
        for token in sorted(range(3000), key=lambda t: (-p[t], t)):
            if mass >= top_p and kept.any():
                break
            kept[token] = True
            mass += p[token]
        assert np.array_equal(row > 0, kept)
        np.testing.assert_allclose(row[kept], p[kept] / p[kept].sum(), rtol=1e-12)


def test_of_a_wide_vocabulary_typical_and_top_k_keep_the_same() -> None:
    logits = rng(5, "check").normal(0, 3, (2, 3000)).round(1)
    p = probabilities(logits, [alone()] * 2)
    surprise = -np.log(p)
    distance = abs(surprise - (p * surprise).sum(axis=1, keepdims=True)).round(12)
    typical = probabilities(logits, [alone(typical_p=0.5)] * 2)
    best = probabilities(logits, [alone(top_k=20)] * 2)
    for row in range(2):
        kept = typical[row] > 0
        assert distance[row][kept].max() <= distance[row][~kept].min()
        assert p[row][kept].sum() >= 0.5
        assert np.array_equal(best[row] > 0, logits[row] >= np.sort(logits[row])[-20])


@pytest.mark.parametrize("width", [50, 3000])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_model_that_predicts_nothing_is_an_error(width: int, number: float) -> None:
    logits = np.zeros((2, width))
    logits[1] = number
    with pytest.raises(LogitsError, match=f"largest logit is {number};"):
        probabilities(logits, [SampleConfig()] * 2)


def test_what_is_impossible_stays_so() -> None:
    for config in ({"top_k": 3}, {"top_p": 0.99}, {"min_p": 0.0}, {"repetition_penalty": 2.0}):
        p = drawn_from([0, 1, 0, 1], (0, 1), **config)
        assert (p[0], p[2]) == (0, 0)


def test_pick_follows_the_distribution() -> None:
    p, random = np.array([0, 0.125, 0, 0.5, 0.375, 0]), rng(1, "check")
    draws = random.random(4000)
    counts = np.bincount(pick(np.tile(p, (4000, 1)), draws), minlength=6) / 4000
    np.testing.assert_allclose(counts, p, atol=0.032)  # 4 standard deviations; measured: 0.002


@pytest.mark.parametrize(
    ("number", "token"), [(0.0, 1), (0.2499, 1), (0.25, 3), (0.7, 3), (1 - 2**-53, 3)]
)
def test_pick_never_takes_what_has_no_chance(number: float, token: int) -> None:
    p = np.array([0, 0.25, 0, 0.75 - 1e-15, 0])  # sums to less than the largest draw
    assert pick(p[None], np.array([number])).tolist() == [token]


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": -1}, {"top_k": -1}, {"seed": -1}, {"temperature": -0.1}, {"top_p": 1.1},
        {"min_p": -0.1}, {"repetition_penalty": 0.0}, {"temperature": np.nan}, {"stop": ("",)},
        {"typical_p": 1.1}, {"presence_penalty": 101.0}, {"frequency_penalty": -101.0},
        {"logit_bias": ((3, 101.0),)}, {"logit_bias": ((3, np.nan),)},
    ],
)  # fmt: skip
def test_settings_out_of_range_are_named(wrong: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SampleConfig(**wrong)


# The same logits through transformers' own processors.

SETTINGS: list[dict[str, Any]] = [
    {"temperature": 0.7}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.05}, {"typical_p": 0.6},
    {"repetition_penalty": 1.3}, {"logit_bias": ((2, 4.0), (7, -3.0))},
    {"temperature": 1.4, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9,
     "repetition_penalty": 1.2, "logit_bias": ((1, 1.0),)},
]  # fmt: skip


def theirs(logits: Any, config: SampleConfig, seen: list[int]) -> Any:
    """The processors in the order in which `generate` of transformers applies them."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as p

    steps: list[Any] = []
    if config.logit_bias:
        steps.append(p.SequenceBiasLogitsProcessor([[[i], b] for i, b in config.logit_bias]))
    if config.repetition_penalty != 1:
        steps.append(p.RepetitionPenaltyLogitsProcessor(config.repetition_penalty))
    steps.append(p.TemperatureLogitsWarper(config.temperature))
    if config.top_k:
        steps.append(p.TopKLogitsWarper(config.top_k))
    if config.top_p < 1:
        steps.append(p.TopPLogitsWarper(config.top_p))
    if config.min_p:
        steps.append(p.MinPLogitsWarper(config.min_p))
    if config.typical_p < 1:
        steps.append(p.TypicalLogitsWarper(config.typical_p))
    scores, ids = torch.tensor(logits)[None], torch.tensor([seen])
    for step in steps:
        scores = step(ids, scores)
    return torch.softmax(scores, -1)[0].numpy()


@pytest.mark.slow
@pytest.mark.parametrize("settings", SETTINGS, ids=lambda s: "+".join(s))
def test_probabilities_are_those_of_transformers(settings: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    for seed in range(20):
        logits = rng(seed, "check").normal(0, 3, 60)
        seen = rng(seed, "check", 1).integers(0, 60, 12).tolist()
        config = alone(**settings)
        got, expected = chances(logits, config, tuple(seen)), theirs(logits, config, seen)
        assert np.array_equal(got > 0, expected > 0)
        np.testing.assert_allclose(got, expected, rtol=1e-12)
