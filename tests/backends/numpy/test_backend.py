"""The NumPy backend against finite differences, a naive model in float64, and itself.

Errors are relative, per tensor where there are several. In float32 the order of sums is worth
7e-7 of a gradient (measured, as every number named so); bounds leave a factor of ten.

Legend: B batch, T time, C n_embd, H heads,
D = C/H, V vocab.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from naive_model import naive_logits, naive_loss

from mlx_randygpt.backends.numpy import optimizer
from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import muon_matrices
from mlx_randygpt.state import Batch, Params, TrainState, rng

V, T = 29, 16
Array = Any
each_model = pytest.mark.parametrize("recipe", ["classic", "modern", "gpt2"])


@pytest.fixture
def build(
    tiny_model: Callable[..., ModelConfig],
    tiny_train: Callable[..., TrainConfig],
    lively: Callable[..., Params],
) -> Callable[..., NumpyBackend]:
    """(recipe, dtype=float32, model={}, **train) -> a backend with weights far from zero."""

    def make(
        recipe: str, dtype: type = np.float32, model: dict[str, Any] | None = None, **train: Any
    ) -> NumpyBackend:
        config = tiny_model(recipe, **(model or {}))
        state = TrainState(0, lively(config), {})
        return NumpyBackend(config, tiny_train(recipe, **train), state, dtype=dtype)

    return make


def ids(*shape: int, seed: int = 0) -> Array:
    return rng(seed, "check").integers(0, V, shape)


def batch_of(rows: int, seed: int = 0) -> Batch:
    return Batch.of(ids(rows, T + 1, seed=seed))


def error(got: Array, expected: Array) -> float:
    """‖got − expected‖ / ‖expected‖."""
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


# The model once more, a query at a time, with real rotation matrices.


@each_model
@pytest.mark.parametrize("head", [8, 5])  # an odd one rotates all but its last value
def test_every_gradient_equals_finite_differences(
    recipe: str, head: int, build: Callable[..., NumpyBackend]
) -> None:
    b, batch, eps = build(recipe, np.float64, {"n_embd": 4 * head}), batch_of(3), 1e-5
    _, grads = b.loss_and_grads(batch)
    for name, w in b.params.items():
        toward = rng(5, "check").standard_normal(w.shape)
        toward *= 1 / np.linalg.norm(toward)
        toward += grads[name] / np.linalg.norm(grads[name])  # a slope that is not near zero
        first, losses = w.copy(), []
        for side in (eps, -eps):
            w[...] = first + side * toward
            losses.append(b.loss(batch))
        w[...] = first
        slope = (losses[0] - losses[1]) / (2 * eps)
        assert (grads[name] * toward).sum() == pytest.approx(slope, rel=5e-6), (
            name
        )  # measured: 5e-10


@each_model
def test_loss_equals_a_naive_model(recipe: str, build: Callable[..., NumpyBackend]) -> None:
    batch = Batch(ids(60), np.array([0, 17, 31, 50]), T)  # the last one runs past the end
    exact, single = build(recipe, np.float64), build(recipe)
    expected = naive_loss(exact.params, exact.model, batch)
    assert exact.loss(batch) == pytest.approx(expected, rel=1e-12)  # measured: 4e-16
    assert single.loss(batch) == pytest.approx(expected, rel=1e-6)  # measured: 5e-8


@each_model
def test_cached_decoding_equals_the_full_model(
    recipe: str, build: Callable[..., NumpyBackend]
) -> None:
    b, tokens = build(recipe), ids(2, T)
    cache = b.new_cache(2)
    full = np.array([naive_logits(b.params, b.model, row) for row in tokens])  # (B, T, V)
    for start, end in [(0, 5), (5, 6), (6, 13), (13, 16)]:
        got = b.logits(tokens[:, start:end], cache)
        assert error(got, full[:, end - 1]) < 5e-6  # measured: 6e-7
    assert cache.lengths.tolist() == [T, T]


def test_past_the_context_every_query_sees_the_last_keys(
    build: Callable[..., NumpyBackend],
) -> None:
    b, tokens = build("modern", model={"n_layer": 1}), ids(1, 50)
    cache = b.new_cache(1)
    got = [b.logits(tokens[:, t : t + 1], cache)[0] for t in range(50)]
    expected = naive_logits(b.params, b.model, tokens[0])
    assert error(np.array(got), expected) < 5e-6  # measured: 3e-7


def test_deeper_layers_keep_what_their_keys_saw(build: Callable[..., NumpyBackend]) -> None:
    b, tokens = build("modern"), ids(1, 50)
    cache = b.new_cache(1)
    b.logits(tokens[:, :T], cache)
    got = [b.logits(tokens[:, t : t + 1], cache)[0] for t in range(T, 50)]
    expected = naive_logits(b.params, b.model, tokens[0])[T:]
    assert error(np.array(got), expected) < 5e-6  # measured: 3e-7


def test_select_reorders_and_repeats_streams(build: Callable[..., NumpyBackend]) -> None:
    b, tokens = build("modern"), ids(3, 9)
    cache, chosen = b.new_cache(3), b.new_cache(3)
    b.logits(tokens[:, :8], cache)
    cache.select([2, 0, 2])
    b.logits(tokens[[2, 0, 2], :8], chosen)
    last = tokens[[2, 0, 2], 8:]
    assert error(b.logits(last, cache), b.logits(last, chosen)) < 1e-6


@pytest.mark.parametrize("bad", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(
    bad: int, build: Callable[..., NumpyBackend]
) -> None:
    b = build("modern")
    with pytest.raises(ValueError, match=f"0..{V - 1}"):
        b.logits(np.array([[bad]]), b.new_cache(1))


def test_positions_end_where_they_were_learned(build: Callable[..., NumpyBackend]) -> None:
    b = build("classic")
    cache = b.new_cache(1)
    with pytest.raises(ValueError, match="17 tokens at once"):
        b.logits(ids(1, T + 1), cache)
    b.logits(ids(1, T), cache)
    with pytest.raises(ValueError, match="16 \\+ 1 positions"):
        b.logits(ids(1, 1), cache)


@each_model
def test_threads_agree_and_repeat_themselves(
    recipe: str, build: Callable[..., NumpyBackend]
) -> None:
    batch = batch_of(7)  # does not divide by 2 or 3
    loss, grads = build(recipe, threads=1).loss_and_grads(batch)
    for threads in (1, 2, 3, 8):  # the last has more threads than sequences
        b = build(recipe, threads=threads)
        (first_loss, first), again = b.loss_and_grads(batch), b.loss_and_grads(batch)
        assert again[0] == first_loss == pytest.approx(loss, rel=1e-6)
        np.testing.assert_equal(again[1], first)
        assert max(error(first[name], grads[name]) for name in grads) < 1e-5


def test_a_share_of_several_chunks_is_the_same(
    build: Callable[..., NumpyBackend], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = batch_of(7)
    loss, grads = build("classic").loss_and_grads(batch)
    monkeypatch.setattr("mlx_randygpt.backends.numpy.backend.CHUNK_TOKENS", 2 * T)
    chunked_loss, chunked = build("classic").loss_and_grads(batch)
    assert chunked_loss == pytest.approx(loss, rel=1e-6)
    assert max(error(chunked[name], grads[name]) for name in grads) < 1e-5


@each_model
def test_two_half_batches_make_the_step_of_one_whole(
    recipe: str, build: Callable[..., NumpyBackend]
) -> None:
    windows = ids(8, T + 1)
    whole, halves = build(recipe), build(recipe)
    one = whole.train_step([Batch.of(windows)], 1e-3)
    two = halves.train_step([Batch.of(windows[:4]), Batch.of(windows[4:])], 1e-3)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)
    got, expected = halves.state().moments["m"], whole.state().moments["m"]
    assert max(error(got[name], expected[name]) for name in got) < 1e-5


@each_model
def test_micro_batches_weigh_as_much_as_they_count(
    recipe: str, build: Callable[..., NumpyBackend]
) -> None:
    tokens = ids(40)
    parts = [Batch(tokens, np.array([0, 30]), T), Batch(tokens, np.array([16, 35]), T)]
    whole = Batch(tokens, np.array([0, 30, 16, 35]), T)
    got = build(recipe).train_step(parts, 1e-3)
    expected = build(recipe).train_step([whole], 1e-3)
    assert got.loss == pytest.approx(expected.loss, rel=1e-6)
    assert got.grad_norm == pytest.approx(expected.grad_norm, rel=1e-6)


def test_targets_past_the_end_do_not_count(build: Callable[..., NumpyBackend]) -> None:
    b, tokens = build("classic"), ids(T + 1)
    whole, short = Batch(tokens[:9], np.array([0]), T), Batch(tokens[:9], np.array([0]), 8)
    assert b.loss(whole) == pytest.approx(b.loss(short), rel=1e-6)
    masked, cut = b.loss_and_grads(whole)[1], b.loss_and_grads(short)[1]
    assert max(error(masked[name], cut[name]) for name in cut) < 1e-5


def test_adamw_is_the_published_formula(build: Callable[..., NumpyBackend]) -> None:
    b, lr = build("classic", np.float64, grad_clip=0), 0.01
    train = b.train
    w = {name: value.copy() for name, value in b.params.items()}
    m, v = ({name: np.zeros_like(x) for name, x in w.items()} for _ in range(2))
    for t in (1, 2, 3):
        _, grads = b.loss_and_grads(batch_of(4, seed=t))
        b.train_step([batch_of(4, seed=t)], lr)
        for n, g in grads.items():
            m[n] = train.beta1 * m[n] + (1 - train.beta1) * g
            v[n] = train.beta2 * v[n] + (1 - train.beta2) * g**2
            m_hat, v_hat = m[n] / (1 - train.beta1**t), v[n] / (1 - train.beta2**t)
            w[n] -= lr * (m_hat / (np.sqrt(v_hat) + 1e-8) + 0.1 * w[n])
    assert max(error(b.params[name], w[name]) for name in w) < 1e-14  # measured: 2e-16


@pytest.mark.parametrize("shape", [(32, 32), (128, 32), (32, 128)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(
    shape: tuple[int, int],
) -> None:
    u = rng(0, "check").standard_normal(shape)
    left, values, right = np.linalg.svd(u, full_matrices=False)
    got = left.T @ optimizer.orthogonal(u[None])[0] @ right.T  # diagonal where vectors are kept
    assert abs(got - np.diag(np.diag(got))).max() < 1e-10
    large = values > 0.02 * np.linalg.norm(u)  # five steps do not lift what is smaller
    assert np.diag(got)[large].min() > 0.6  # measured: 0.682
    assert np.diag(got).max() < 1.3  # measured: 1.134


def test_muon_moves_each_matrix_by_its_rate(build: Callable[..., NumpyBackend]) -> None:
    settings = {"grad_clip": 0, "weight_decay": 0.1, "muon_beta2": 0.0}
    b, lr = build("modern", np.float64, **settings), 0.01
    _, grads = b.loss_and_grads(batch_of(4))
    before = b.state().params
    b.train_step([batch_of(4)], lr)
    for name, n_stacked in muon_matrices(b.model).items():
        parts = grads[name].reshape(n_stacked, -1, grads[name].shape[1])
        rows, columns = parts.shape[1:]
        # The first momentum is 0.05 g and Nesterov's 0.05 g + 0.95 · 0.05 g: only its sign counts.
        steps = np.concatenate(optimizer.orthogonal(parts))
        scale = lr * max(1, rows / columns) ** 0.5
        expected = before[name] * (1 - lr * 0.1) - scale * steps
        assert error(b.params[name], expected) < 1e-6, name  # measured: 1e-7, float32 in between


@pytest.mark.parametrize(("shape", "axis"), [((3, 8, 8), 2), ((2, 16, 4), 2), ((2, 4, 16), 1)])
def test_rows_are_divided_by_their_running_size_and_a_matrix_keeps_its_norm(
    shape: tuple[int, ...], axis: int
) -> None:
    first, second = (
        rng(0, "check").standard_normal((2, *shape)) * np.arange(1, 1 + shape[1])[:, None]
    )
    vs = np.zeros_like(first.mean(axis, keepdims=True))
    squares = [(u**2).mean(axis, keepdims=True) for u in (first, second)]
    v = (0.9 * 0.1 * squares[0] + 0.1 * squares[1]) / (1 - 0.9**2)  # with the bias corrected
    expected = second / np.sqrt(v)
    norms = (np.linalg.norm(u, axis=(1, 2), keepdims=True) for u in (second, expected))
    optimizer.balance(first, vs, 0.9)
    optimizer.balance(second, vs, 0.9)
    assert error(second, expected * np.divide(*norms)) < 1e-8  # measured: 1e-9, eps
    sizes = (first**2).mean(axis)
    assert np.ptp(sizes, axis=1).max() < 1e-8 * sizes.min()  # after one step all rows are alike


def test_muon_leaves_embeddings_and_head_to_adamw(build: Callable[..., NumpyBackend]) -> None:
    b, lr = build("modern", np.float64, muon_beta2=0.0), 0.01
    before = b.state()
    b.train_step([batch_of(8)], lr)
    after = b.state()
    assert after.moments["v"].keys() == {"wte.weight", "lm_head.weight"}
    assert after.moments["m"].keys() == before.params.keys()
    moved = abs(after.params["lm_head.weight"] - before.params["lm_head.weight"])
    assert moved.max() == pytest.approx(lr * b.train.adamw_lr_ratio, rel=1e-3)  # AdamW's first


@each_model
def test_the_gradient_is_clipped_to_its_global_norm(
    recipe: str, build: Callable[..., NumpyBackend]
) -> None:
    free, clipped = build(recipe, grad_clip=0), build(recipe, grad_clip=0.1)
    norm = free.train_step([batch_of(4)], 1e-3).grad_norm
    _, grads = build(recipe).loss_and_grads(batch_of(4))
    assert norm == pytest.approx(sum((g**2).sum() for g in grads.values()) ** 0.5, rel=1e-6)
    assert clipped.train_step([batch_of(4)], 1e-3).grad_norm == norm > 0.1
    m, m_free = clipped.state().moments["m"], free.state().moments["m"]
    assert max(error(m[n], m_free[n] * (0.1 / norm)) for n in m) < 1e-5


@pytest.mark.parametrize(("norm", "scale"), [(0.5, 1.0), (2.0, 0.5), (0.0, 1.0)])
def test_clip_scale_only_shrinks(norm: float, scale: float) -> None:
    assert optimizer.clip_scale(norm, 1.0) == pytest.approx(scale, rel=1e-6)
    assert optimizer.clip_scale(norm, 0.0) == 1


def losses_of_steps(b: NumpyBackend) -> list[float]:
    return [b.train_step([batch_of(4), batch_of(4)], 1e-9).loss for _ in range(2)]


def test_dropout_follows_seed_step_and_micro_batch(build: Callable[..., NumpyBackend]) -> None:
    drop = {"dropout": 0.5}
    first = losses_of_steps(build("modern", model=drop))
    assert losses_of_steps(build("modern", model=drop)) == first
    assert first[0] != pytest.approx(first[1], rel=1e-4)  # the same batch, another step
    other = losses_of_steps(build("modern", model=drop, seed=2))
    assert other[0] != pytest.approx(first[0], rel=1e-4)
    one = build("modern", model=drop).train_step([batch_of(4)], 1e-9).loss
    assert one != pytest.approx(first[0], rel=1e-4)  # the second micro-batch dropped others


@each_model
def test_dropout_gradient_equals_finite_differences(
    recipe: str, build: Callable[..., NumpyBackend]
) -> None:
    """Momentum after one step is (1 − β) g, and the loss of a step sees the same masks."""
    model, name, eps = {"dropout": 0.3}, "h.1.mlp.c_fc.weight", 1e-5

    def step(w: Array | None) -> tuple[float, Array]:
        b = build(recipe, np.float64, model, optimizer="adamw", grad_clip=0)
        b.params[name][...] = b.params[name] if w is None else w
        loss = b.train_step([batch_of(3)], 1e-9).loss
        return loss, b.trained._m.views[name] / (1 - b.train.beta1)

    w, (_, g) = build(recipe, np.float64, model).params[name].copy(), step(None)
    toward = g / np.linalg.norm(g)
    slope = (step(w + eps * toward)[0] - step(w - eps * toward)[0]) / (2 * eps)
    assert (g * toward).sum() == pytest.approx(slope, rel=5e-6)


def test_evaluation_never_drops(build: Callable[..., NumpyBackend]) -> None:
    plain, dropping = build("classic"), build("classic", model={"dropout": 0.5})
    assert dropping.loss(batch_of(4)) == plain.loss(batch_of(4))
    np.testing.assert_equal(dropping.loss_and_grads(batch_of(4)), plain.loss_and_grads(batch_of(4)))


def test_a_gradient_that_is_not_finite_changes_nothing(build: Callable[..., NumpyBackend]) -> None:
    with np.errstate(all="ignore"):
        b = build("classic")
        b.params["lm_head.weight"][0, 0] = np.inf
        before, result = b.state(), b.train_step([batch_of(4)], 0.1)
    assert not np.isfinite(result.grad_norm)
    np.testing.assert_equal(b.state().params, before.params)
    np.testing.assert_equal(b.state().moments, before.moments)
    assert b.step == 1


def test_state_is_a_copy_in_float32(build: Callable[..., NumpyBackend]) -> None:
    b = build("modern")
    saved = b.state()
    first = {name: w.copy() for name, w in saved.params.items()}
    b.train_step([batch_of(4)], 0.01)
    np.testing.assert_equal(saved.params, first)
    assert b.state().step == 1
    assert {a.dtype for group in b.state().moments.values() for a in group.values()} == {
        np.dtype(np.float32)
    }
