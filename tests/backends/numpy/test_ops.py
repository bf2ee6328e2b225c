"""Each operation against loops over single numbers, its backward against finite differences.

All in float64, errors relative to the largest number of the array. Measured: against loops at
most 4e-16, against finite differences at most 9e-10.

Legend: B sequences, T time, C n_embd, H heads, D = C/H, V vocab, N = B·T.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mlx_randygpt.backends.numpy import ops
from mlx_randygpt.model import rope_rates
from mlx_randygpt.state import IGNORED, rng

B, T, H, D = 2, 5, 3, 4
C = H * D
Array = Any
BASE = 500.0  # of the rotary positions
EPS = 1e-6  # of a central difference
EXACT, FINITE = 1e-14, 1e-8


def normal(*shape: int, seed: int = 0) -> Array:
    return rng(seed, "check").standard_normal(shape)


def slopes(f: Callable[[Array], float], x: Array) -> Array:
    """Return df/dx by central differences, number by number."""
    result = np.empty_like(x)
    for i in np.ndindex(x.shape):
        above, below = x.copy(), x.copy()
        above[i] += EPS
        below[i] -= EPS
        result[i] = (f(above) - f(below)) / (2 * EPS)
    return result


def close(got: Array, expected: Array, rel: float) -> bool:
    return bool(abs(got - expected).max() <= rel * abs(expected).max())


def normed(x: Array) -> Array:
    out, inv = np.empty_like(x), np.empty(x.shape[:-1])
    ops.rms_norm(x, out, inv)
    return out


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x = normal(B, T, C)
    for row, got in zip(x.reshape(-1, C), normed(x).reshape(-1, C), strict=True):
        root = (sum(v * v for v in row) / C + 1e-5) ** 0.5
        assert close(got, np.array([v / root for v in row]), EXACT)


def test_rms_norm_in_place_is_the_same() -> None:
    x = normal(B, T, C)
    expected = normed(x)
    ops.rms_norm(x, x, np.empty((B, T)))
    assert np.array_equal(x, expected)


def test_rms_norm_backward() -> None:
    x, toward = normal(T, C), normal(T, C, seed=1)
    y, inv, dy = np.empty_like(x), np.empty(T), toward.copy()
    ops.rms_norm(x, y, inv)
    ops.rms_norm_backward(dy, y, inv, np.empty_like(x))
    expected = slopes(lambda at: float((normed(at) * toward).sum()), x)
    assert close(dy, expected, FINITE)


def rotated(x: Array, positions: Array, head: int = D) -> Array:
    x = x.copy()
    ops.rotate(
        x, ops.rope_phases(positions, rope_rates(head, BASE), x.shape[-1] // head, np.float64)
    )
    return x


def test_rotate_moves_pair_j_by_t_times_omega_j() -> None:
    x, positions = normal(B, T, C), np.array([0, 1, 2, 7, 1000])
    got = rotated(x, positions)
    for b, t, pair in np.ndindex(B, T, C // 2):
        angle = positions[t] * BASE ** (-2 * (pair % (D // 2)) / D)
        (x0, x1), c, s = x[b, t, 2 * pair : 2 * pair + 2], np.cos(angle), np.sin(angle)
        expected = np.array([x0 * c - x1 * s, x0 * s + x1 * c])
        assert close(got[b, t, 2 * pair : 2 * pair + 2], expected, EXACT)


def test_rotate_leaves_the_last_value_of_an_odd_head() -> None:
    x, positions = normal(1, T, 2 * 5), np.arange(T)  # two heads of five
    got = rotated(x, positions, head=5)
    assert np.array_equal(got[:, :, [4, 9]], x[:, :, [4, 9]])
    pairs = [0, 1, 2, 3, 5, 6, 7, 8]
    assert close(got[:, :, pairs], rotated(x[:, :, pairs], positions), EXACT)


def test_rotated_products_depend_on_the_distance_alone() -> None:
    q, k = normal(1, 1, D), normal(1, 1, D, seed=1)

    def product(at_q: int, at_k: int) -> float:
        return float((rotated(q, np.array([at_q])) * rotated(k, np.array([at_k]))).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), rel=1e-14)
    assert product(9, 4) != pytest.approx(product(9, 5), rel=1e-3)


def test_rotation_backward_is_the_conjugate_rotation() -> None:
    x, toward, positions = normal(1, T, C), normal(1, T, C, seed=1), np.arange(T)
    dx = toward.copy()
    ops.rotate(dx, ops.rope_phases(positions, rope_rates(D, BASE), H, np.float64).conj())
    expected = slopes(lambda at: float((rotated(at, positions) * toward).sum()), x)
    assert close(dx, expected, FINITE)


def test_phases_of_float32_are_rounded_once() -> None:
    rates = rope_rates(64, BASE)
    exact = ops.rope_phases(np.array([100_000]), rates, 1, np.float64)
    rounded = ops.rope_phases(np.array([100_000]), rates, 1, np.float32)
    assert rounded.dtype == np.complex64
    assert abs(rounded - exact).max() < 1e-7  # float32 angles would be off by 4e-3


@pytest.mark.parametrize("bounded", [True, False])
@pytest.mark.parametrize("size", [0.1, 3, 1000])
def test_causal_softmax_sees_the_past_and_itself(bounded: bool, size: float) -> None:
    scores = min(size, 3 if bounded else size) * normal(B, H, T, 3)  # queries T−3 to T−1
    p = scores.copy()
    ops.causal_softmax(p, T - 3, bounded)
    for b, h, i in np.ndindex(B, H, 3):
        seen = scores[b, h, : T - 3 + i + 1, i]
        e = np.exp(seen - seen.max())
        assert close(p[b, h, : len(e), i], e / e.sum(), EXACT)
        assert not p[b, h, len(e) :, i].any()


def attended(qkv: Array, bounded: bool = False) -> tuple[Array, Array]:
    p, y, qt = np.zeros((B, H, T, T)), np.empty((B, T, C)), np.empty((1, H, D, T))
    ops.attention(qkv, qt, p, y, qk_norm=bounded)
    return y, p


@pytest.fixture(params=[64, 2], ids=["whole", "blocks"])
def _blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "ATTENTION_BLOCK", request.param)


@pytest.mark.usefixtures("_blocks")
def test_attention_is_a_weighted_mean_of_values() -> None:
    qkv = normal(B, T, 3 * C)
    y, _ = attended(qkv)
    for b, t, h in np.ndindex(B, T, H):
        q, k, v = (qkv[b, :, i * C + h * D : i * C + (h + 1) * D] for i in range(3))
        weights = [np.exp(sum(q[t] * k[s]) / D**0.5) for s in range(t + 1)]
        expected = sum(w * v[s] for s, w in enumerate(weights)) / sum(weights)
        assert close(y[b, t, h * D : (h + 1) * D], expected, EXACT)


@pytest.mark.usefixtures("_blocks")
@pytest.mark.parametrize("bounded", [True, False])
def test_attention_backward(bounded: bool) -> None:
    qkv, toward = 0.5 * normal(B, T, 3 * C), normal(B, T, C, seed=1)
    y, p = attended(qkv, bounded)
    dqkv = np.empty_like(qkv)
    dyt, ds = np.empty((1, H, D, T)), np.empty((1, H, T, T))
    ops.attention_backward(toward, y, qkv, p, dyt, ds, dqkv)
    expected = slopes(lambda at: float((attended(at, bounded)[0] * toward).sum()), qkv)
    assert close(dqkv, expected, FINITE)


def test_heads_are_views_in_the_published_order() -> None:
    x = normal(B, T, 3 * C)
    for part, view in enumerate(ops.heads(x, H, 3)):
        for b, h, t in np.ndindex(B, H, T):
            at = part * C + h * D
            assert np.array_equal(view[b, h, t], x[b, t, at : at + D])
        assert np.shares_memory(view, x)


def test_relu_squared_and_its_backward() -> None:
    h, toward = normal(T, C), normal(T, C, seed=1)
    r, a, dh = h.copy(), np.empty_like(h), toward.copy()
    ops.relu_squared(r, a)
    ops.relu_squared_backward(dh, r)
    assert np.array_equal(a, np.where(h > 0, h * h, 0))
    expected = slopes(lambda at: float((np.where(at > 0, at * at, 0) * toward).sum()), h)
    assert close(dh, expected, FINITE)


TARGETS = np.array([3, 0, IGNORED, 6, 6, IGNORED])


def naive_nll(logits: Array) -> float:
    """Return Σ −log p(target) from plain sums of exponentials."""
    counted = [(row, t) for row, t in zip(logits, TARGETS, strict=True) if t != IGNORED]
    return sum(float(np.log(np.exp(row).sum()) - row[t]) for row, t in counted)


def test_cross_entropy_skips_ignored_targets() -> None:
    logits = normal(6, 7)
    p = logits.copy()
    assert ops.cross_entropy(p, TARGETS) == pytest.approx(naive_nll(logits), rel=1e-14)
    assert close(p, np.exp(logits) / np.exp(logits).sum(-1, keepdims=True), EXACT)


def test_cross_entropy_of_large_logits_is_their_difference() -> None:
    logits = np.array([[1000.0, 0.0, -1000.0]])
    assert ops.cross_entropy(logits.copy(), np.array([0])) == 0
    assert ops.cross_entropy(logits.copy(), np.array([1])) == 1000
    assert ops.cross_entropy(logits.copy(), np.array([2])) == 2000


def test_cross_entropy_backward() -> None:
    logits = normal(6, 7)
    dlogits = logits.copy()
    ops.cross_entropy(dlogits, TARGETS)
    ops.cross_entropy_backward(dlogits, TARGETS, 0.25)
    assert close(dlogits, slopes(lambda at: 0.25 * naive_nll(at), logits), FINITE)
    assert not dlogits[TARGETS == IGNORED].any()


def test_embedding_backward_sums_the_gradients_of_each_token() -> None:
    tokens, dx = np.array([4, 1, 4, 0, 1, 4]), normal(6, C)
    dwte = normal(6, C, seed=1)
    expected = dwte.copy()
    for token, row in zip(tokens, dx, strict=True):
        expected[token] += row
    ops.embedding_backward(dx, tokens, dwte)
    assert close(dwte, expected, EXACT)


def test_dropout_masks_keep_the_mean_and_follow_their_generator() -> None:
    mask, again = np.empty((1000, 20)), np.empty((1000, 20))
    ops.dropout_mask(rng(1, "dropout", 3), 0.2, mask)
    ops.dropout_mask(rng(1, "dropout", 3), 0.2, again)
    assert np.array_equal(mask, again)
    assert set(np.unique(mask)) == {0.0, 1.25}
    assert mask.mean() == pytest.approx(1, abs=0.015)  # 4 standard deviations
