"""The MLX backend against plain NumPy loops, finite differences and itself, on tiny models.

Errors named "measured" are those of the CPU in float32; the bounds leave room for other devices.

Legend: B batch, T time, C n_embd, H heads, D = C/H, V vocab.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_randygpt.backends import choose, mlx_device
from mlx_randygpt.backends.base import BackendError
from mlx_randygpt.backends.mlx import embedding
from mlx_randygpt.backends.mlx.backend import MLXBackend, Pass
from mlx_randygpt.backends.mlx.forward import Forward
from mlx_randygpt.backends.mlx.optimizer import newton_schulz
from mlx_randygpt.check import recipe_of
from mlx_randygpt.config import ARCHS, ModelConfig, TrainConfig
from mlx_randygpt.data.token_file import OpenFile, TokenFile
from mlx_randygpt.data.windows import sample_batch
from mlx_randygpt.model import initial_params
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import IGNORED, Batch, Params, TrainState, rng

V, T = 29, 16
both_recipes = pytest.mark.parametrize("recipe", ["classic", "modern"])
each_model = pytest.mark.parametrize("recipe", ["classic", "modern", "gpt2"])


def model_config(recipe: str, **changes: Any) -> ModelConfig:
    sizes = {"vocab_size": V, "block_size": T, "n_layer": 2, "n_head": 4, "n_embd": 32}
    switches = RECIPES[recipe_of(recipe)]["model"] | ARCHS.get(recipe, {})
    return ModelConfig(**{**sizes, **switches, **changes})


def train_config(recipe: str, **changes: Any) -> TrainConfig:
    recipe = recipe_of(recipe)
    return TrainConfig(recipe=recipe, **{**RECIPES[recipe]["train"], **changes})


def lively(config: ModelConfig) -> Params:
    """Return weights at which every part of the model matters: no zeros, logits of order 1."""
    scaled = replace(config, zero_init=False, init_scale=0.2 * config.n_embd**0.5)
    return initial_params(scaled, seed=1)


def backend(recipe: str, train: TrainConfig | None = None, **changes: Any) -> MLXBackend:
    config = model_config(recipe, **changes)
    state = TrainState(0, lively(config), {})
    return MLXBackend(config, train or train_config(recipe), state)


def tokens(*shape: int, seed: int = 0) -> Any:
    return rng(seed, "check").integers(0, V, shape)


def plain_loss(config: ModelConfig, params: Params, batch: Batch) -> float:
    """Return the loss of base.Backend in float64, token by token and head by head."""

    def rms(x: Any) -> Any:
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)

    def shifted(x: Any) -> Any:
        half = config.n_embd // 2
        before = np.concatenate([np.zeros_like(x[:1]), x[:-1]])
        return np.where(np.arange(2 * half) < half, before, x) if config.token_shift else x

    def rotated(x: Any, position: int) -> Any:
        pairs = x[0::2] + 1j * x[1::2]  # (D/2,)
        pairs = pairs * np.exp(
            1j * position * config.rope_base ** (-np.arange(len(pairs)) / len(pairs))
        )
        return np.stack([pairs.real, pairs.imag], -1).reshape(-1)

    def attention(x: Any, c_attn: Any) -> Any:
        qkv = (x @ c_attn.T).reshape(len(x), 3, config.n_head, -1)  # (T, 3, H, D)
        y = np.zeros((len(x), config.n_head, config.head_size))
        for h in range(config.n_head):
            q, k, v = qkv[:, 0, h], qkv[:, 1, h], qkv[:, 2, h]  # (T, D)
            q, k = (rms(q), rms(k)) if config.qk_norm else (q, k)
            if config.position == "rope":
                q, k = (np.array([rotated(row, t) for t, row in enumerate(z)]) for z in (q, k))
            for t in range(len(x)):
                att = np.exp(k[: t + 1] @ q[t] / np.sqrt(config.head_size))  # (t+1,)
                y[t, h] = att @ v[: t + 1] / att.sum()
        return y.reshape(len(x), -1)  # (T, C)

    w = {name.removesuffix(".weight"): value.astype(np.float64) for name, value in params.items()}
    losses = []
    for x_ids, y_ids in zip(batch.x(), batch.y(), strict=True):
        x = w["wte"][x_ids] + (w["wpe"][: len(x_ids)] if config.position == "learned" else 0)
        for i in range(config.n_layer):
            inputs = shifted(rms(x))
            x = x + attention(inputs, w[f"h.{i}.attn.c_attn"]) @ w[f"h.{i}.attn.c_proj"].T
            inputs = shifted(rms(x))
            x = x + np.maximum(inputs @ w[f"h.{i}.mlp.c_fc"].T, 0) ** 2 @ w[f"h.{i}.mlp.c_proj"].T
        logits = (rms(x) if config.final_norm else x) @ w["lm_head"].T  # (T, V)
        counted = np.flatnonzero(y_ids != IGNORED)
        losses += list(np.log(np.exp(logits).sum(-1))[counted] - logits[counted, y_ids[counted]])
    return float(np.mean(losses))


@each_model
def test_the_model_has_the_published_names_and_shapes(recipe: str) -> None:
    shapes = {name: w.shape for name, w in lively(model_config(recipe)).items()}
    model = backend(recipe)._forward.model
    assert {name: w.shape for name, w in tree_flatten(model.parameters())} == shapes


@both_recipes
def test_loss_equals_plain_loops(recipe: str) -> None:
    batch = Batch(tokens(40), np.array([0, 11, 31]), T)  # the last one runs past the end
    expected = plain_loss(model_config(recipe), lively(model_config(recipe)), batch)
    assert backend(recipe).loss(batch) == pytest.approx(expected, rel=1e-6)  # measured: 4e-8


@both_recipes
def test_gradient_equals_finite_differences_along_a_direction(recipe: str) -> None:
    config, batch, eps = model_config(recipe), Batch.of(tokens(3, T + 1)), 1e-6
    _, grads = backend(recipe).loss_and_grads(batch)
    params = {name: w.astype(np.float64) for name, w in lively(config).items()}
    toward = {name: rng(2, "check").standard_normal(w.shape) for name, w in params.items()}
    there, back = ({n: w + e * toward[n] for n, w in params.items()} for e in (eps, -eps))
    difference = plain_loss(config, there, batch) - plain_loss(config, back, batch)
    slope = sum(float((grads[name] * toward[name]).sum()) for name in grads)
    size = sum(float((g**2).sum()) for g in grads.values()) ** 0.5  # of a typical slope
    assert slope == pytest.approx(difference / (2 * eps), abs=5e-6 * size)  # measured: 7e-7


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int64])
def test_windows_are_the_batch_and_the_shares_of_its_targets(dtype: Any) -> None:
    batch = Batch(tokens(50).astype(dtype), np.array([0, 7, 34, 40, 49]), T)
    x, y, shares = backend("modern")._forward.windows(batch, total=200, n_rows=7)
    assert x.dtype == y.dtype == mx.int32
    assert np.array_equal(x[:5], batch.x())
    counts = batch.y() != IGNORED
    assert np.array_equal(np.array(y)[:5][counts], batch.y()[counts])
    assert np.array_equal(shares[:5], counts / np.float32(200))
    assert not np.array(shares)[5:].any()


def test_a_token_file_is_the_array_it_holds(tmp_path: Any) -> None:
    tokens(90).astype(np.uint16).tofile(tmp_path / "tokens")
    file = TokenFile(OpenFile(tmp_path / "tokens"), np.dtype(np.uint16), 90)[:80]
    for step in range(3):
        one, other = (sample_batch(split, 4, T, 1, step) for split in (file, tokens(90)[:80]))
        assert backend("modern").loss(one) == backend("modern").loss(other)


def test_targets_past_the_end_do_not_count() -> None:
    b, data = backend("modern"), tokens(T + 1)
    whole, short = Batch(data[:9], np.array([0]), T), Batch(data[:9], np.array([0]), 8)
    assert b.loss(whole) == pytest.approx(b.loss(short), rel=1e-6)


@each_model
def test_cached_decoding_equals_the_full_forward(recipe: str) -> None:
    b, ids = backend(recipe), tokens(2, T)
    b._forward.bind(b._named)
    full = np.array(b._forward.model(mx.array(ids)))  # (B, T, V)
    cache = b.new_cache(2)
    for start, end in [(0, 5), (5, 6), (6, 13), (13, 14)]:
        logits = b.logits(ids[:, start:end], cache)
        np.testing.assert_allclose(logits, full[:, end - 1], atol=1e-5)  # measured: 0
    assert cache.lengths.tolist() == [14, 14]


@pytest.mark.parametrize("chunks", [[16, 16, 8], [9, 1, 16, 14], [1] * 17 + [7, 15, 1]])
def test_the_ring_past_block_size_equals_feeding_one_by_one(chunks: list[int]) -> None:
    b, ids = backend("modern"), tokens(2, 40)
    one_by_one, chunked = b.new_cache(2), b.new_cache(2)
    expected = [b.logits(ids[:, t : t + 1], one_by_one) for t in range(40)]
    for end, t in zip(np.cumsum(chunks), chunks, strict=True):
        got = b.logits(ids[:, end - t : end], chunked)
        np.testing.assert_allclose(got, expected[end - 1], atol=1e-5)  # measured: 1.4e-6


def test_one_layer_forgets_what_left_the_window() -> None:
    b, ids = backend("modern", n_layer=1, token_shift=False), tokens(1, 30)
    cache, window = b.new_cache(1), b.new_cache(1)
    for t in range(30):
        slid = b.logits(ids[:, t : t + 1], cache)
    fresh = b.logits(ids[:, 30 - T :], window)  # rotary scores depend on distances only
    np.testing.assert_allclose(slid, fresh, atol=1e-5)  # measured: 5e-7


@each_model
def test_select_reorders_and_repeats_streams(recipe: str) -> None:
    b, ids = backend(recipe), tokens(3, 8)
    cache, chosen = b.new_cache(3), b.new_cache(2)
    b.logits(ids[:, :7], cache)
    cache.select([2, 0])
    b.logits(ids[[2, 0], :7], chosen)
    assert np.array_equal(b.logits(ids[[2, 0], 7:], cache), b.logits(ids[[2, 0], 7:], chosen))


@pytest.mark.slow
def test_a_compiled_token_is_traced_once_and_gives_the_same_logits() -> None:
    """As on a GPU; the window slides and the rows differ in length. Measured: 2e-7, relative."""
    plain, ids = backend("modern", n_layer=1), tokens(2, T + 6)
    compiled, traced = backend("modern", n_layer=1), []

    def advance(*inputs: Any) -> Any:
        traced.append(inputs)
        return Forward.advance(compiled._forward, *inputs)

    compiled._forward._advance_token = mx.compile(advance)
    for b in (plain, compiled):
        b.train_step([Batch.of(tokens(2, T + 1))], 1e-3)  # new weights are no new trace
    caches = plain.new_cache(2), compiled.new_cache(2)
    for b, cache in zip((plain, compiled), caches, strict=True):
        b.logits(ids[:1, :5], cache, slice(0, 1))
        b.logits(ids[1:, :3], cache, slice(1, 2))
    for i in range(5, T + 6):
        expected, got = (
            b.logits(ids[:, i : i + 1], cache)
            for b, cache in zip((plain, compiled), caches, strict=True)
        )
        np.testing.assert_allclose(got, expected, atol=2e-6 * abs(expected).max())
        compiled.step += 1  # which causes no trace either
    assert len(traced) == 1


@pytest.mark.slow
def test_each_number_of_rows_is_traced_once() -> None:
    b, traced = backend("modern", n_layer=1), []

    def advance(*inputs: Any) -> Any:
        traced.append(inputs)
        return Forward.advance(b._forward, *inputs)

    b._forward._advance_token = mx.compile(advance)
    for n_rows in (1, 3, 1, 3):
        cache = b.new_cache(n_rows)
        b.logits(tokens(n_rows, 5), cache)
        for _ in range(4):
            b.logits(tokens(n_rows, 1), cache)
    assert len(traced) == 2


def test_ids_and_positions_are_checked_at_the_border() -> None:
    b = backend("classic")
    cache = b.new_cache(1)
    for bad in (-1, V):
        with pytest.raises(ValueError, match=f"token id {bad}"):
            b.logits(np.array([[bad]]), cache)
    for bad in (V, ~V):  # the second is that id, only to be read
        with pytest.raises(ValueError, match=f"token id {V}"):
            b.loss(Batch.of(np.full((1, T + 1), bad)))
    with pytest.raises(ValueError, match="17 tokens at once"):
        b.logits(tokens(1, T + 1), cache)
    b.logits(tokens(1, T), cache)
    with pytest.raises(ValueError, match="16 \\+ 1 positions"):
        b.logits(tokens(1, 1), cache)


@each_model
def test_two_half_batches_make_the_step_of_one_whole(recipe: str) -> None:
    windows = tokens(8, T + 1)
    whole, halves = backend(recipe), backend(recipe)
    one = whole.train_step([Batch.of(windows)], lr=1e-3)
    two = halves.train_step([Batch.of(windows[:4]), Batch.of(windows[4:])], lr=1e-3)
    assert two.loss == pytest.approx(one.loss, rel=1e-6)  # measured: 7e-8
    assert two.grad_norm == pytest.approx(one.grad_norm, rel=1e-6)  # measured: 7e-8
    got = halves.state().moments["m"]
    for name, m in whole.state().moments["m"].items():
        np.testing.assert_allclose(got[name], m, atol=5e-6 * abs(m).max())  # measured: 6e-7


@pytest.mark.parametrize("max_rows", [embedding.MAX_ONE_HOT_ROWS, 0])
def test_bfloat16_adds_up_the_gradient_of_the_embedding_in_float32(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_ONE_HOT_ROWS", max_rows)
    batch = Batch.of(tokens(1024, T + 1) % 3)  # 5,000 positions of each id that occurs
    half = backend("modern", train_config("modern", dtype="bfloat16"), n_layer=1)
    full = backend("modern", n_layer=1)
    got, expected = (b.loss_and_grads(batch)[1]["wte.weight"] for b in (half, full))
    error = np.linalg.norm(got - expected) / np.linalg.norm(expected)
    assert error < 0.1  # measured: 0.012; added up in bfloat16, 0.62


@pytest.mark.parametrize("max_rows", [embedding.MAX_ONE_HOT_ROWS, 0])
def test_the_embedding_gives_its_rows_to_the_bit(
    max_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding, "MAX_ONE_HOT_ROWS", max_rows)
    table, ids = mx.random.normal((V, 8)), mx.array(tokens(3, T))
    assert np.array_equal(embedding.embed(table, ids), np.array(table)[np.array(ids)])


@pytest.fixture
def on_the_cpu() -> Iterator[None]:
    """Compute on the CPU, which sums in one order; benchmarks/gpu.py measures a GPU."""
    device = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(device)


@each_model
@pytest.mark.usefixtures("on_the_cpu")
def test_resume_is_bit_exact(recipe: str) -> None:
    config, train = model_config(recipe, dropout=0.2), train_config(recipe)
    batches = [[Batch.of(tokens(4, T + 1, seed=s)), Batch.of(tokens(4, T + 1))] for s in range(6)]
    start = TrainState(0, initial_params(config, 1), {})
    straight, first = MLXBackend(config, train, start), MLXBackend(config, train, start)
    for step in batches:
        straight.train_step(step, train.lr)
    for step in batches[:3]:
        first.train_step(step, train.lr)
    second = MLXBackend(config, train, first.state())
    for step in batches[3:]:
        second.train_step(step, train.lr)
    got, expected = second.state(), straight.state()
    assert got.step == expected.step == 6
    np.testing.assert_equal(got.params, expected.params)
    np.testing.assert_equal(got.moments, expected.moments)


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"dtype": "bfloat16", "checkpoint_activations": True}])
@pytest.mark.parametrize("n_batches", [1, 2])
def test_a_compiled_step_is_the_plain_one(options: dict[str, Any], n_batches: int) -> None:
    """As on a GPU; dropout, rates and batches change. Measured: the same bits."""
    train = train_config("modern", **options)
    plain, compiled = (backend("modern", train, n_layer=1, dropout=0.1) for _ in range(2))
    compile_all(compiled)
    for i in range(3):
        batches = [Batch.of(tokens(4, T + 1, seed=seed)) for seed in (i, 10 + i)[:n_batches]]
        results = [b.train_step(batches, 1e-2 / (i + 1)) for b in (compiled, plain)]
        assert results[0].loss == pytest.approx(results[1].loss, rel=1e-6)
    for name, w in plain.state().params.items():
        np.testing.assert_allclose(compiled.state().params[name], w, atol=1e-6, err_msg=name)


def compile_all(b: MLXBackend) -> dict[str, int]:
    """Compile a backend's functions, as on a GPU; return how often each is traced."""
    n_traces = dict.fromkeys(("step", "grads", "update", "loss"), 0)

    def counted(name: str, function: Any) -> Any:
        def traced(*arrays: Any) -> Any:
            n_traces[name] += 1
            return function(*arrays)

        return mx.compile(traced)

    b._compiled_step = counted("step", b._whole_step)
    b._compiled_grads = counted("grads", b._float32_grads)
    b._compiled_update = counted("update", b._update)
    b._compiled_loss = counted("loss", b._loss)
    return n_traces


@pytest.mark.parametrize("n_batches", [1, 2])
def test_there_is_one_trace_for_training_and_one_for_evaluation(
    n_batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is computed: steps, rates, batches and their last, smaller one change."""
    monkeypatch.setattr(mx, "async_eval", lambda *arrays: None)
    b = backend("modern", dropout=0.1)
    n_traces = compile_all(b)
    b._forward.on_gpu = True
    evaluated = b._compiled_loss
    b._compiled_loss = lambda *arrays: (evaluated(*arrays), 0.0)[1]
    for i in range(3):
        batches = [Batch.of(tokens(4, T + 1, seed=seed)) for seed in (i, 10 + i)[:n_batches]]
        b.train_step(batches, 1e-2 / (i + 1))
        for n_rows in (8, 8, 3):
            b.loss(Batch.of(tokens(n_rows, T + 1)))
    training = {"step": 1} if n_batches == 1 else {"grads": 1, "update": 1}
    assert {name: n for name, n in n_traces.items() if n} == {**training, "loss": 1}


def test_dropout_differs_by_step_and_micro_batch_and_spares_evaluation() -> None:
    b = backend("modern", dropout=0.5)
    batch = Batch.of(tokens(4, T + 1))

    def loss(index: int) -> float:
        return float(b._loss(b._named, *b._inputs(Pass(batch, index, batch.n_targets()))))

    losses = [loss(index) for index in (0, 1, 0)]
    b.step += 1
    assert len({*losses, loss(0)}) == 3
    assert b.loss(batch) == backend("modern").loss(batch)


def test_adamw_step_is_the_published_formula() -> None:
    train = train_config("classic", grad_clip=0.1)
    b, batch = backend("classic", train), Batch.of(tokens(4, T + 1))
    _, grads = b.loss_and_grads(batch)
    norm = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    assert b.train_step([batch], lr=0.01).grad_norm == pytest.approx(norm, rel=1e-6)  # 3e-8
    for name, w in lively(model_config("classic")).items():
        g = grads[name] * 0.1 / norm  # after one step m and v, corrected, are g and g²
        expected = w - 0.01 * (g / (abs(g) + train.adam_eps) + train.weight_decay * w)
        np.testing.assert_allclose(b.state().params[name], expected, atol=1e-6)  # measured: 3e-8


def test_muon_steps_along_nearly_orthogonal_matrices() -> None:
    train = train_config("modern", weight_decay=0.1, grad_clip=0.0, muon_beta2=0.0)
    b, batch = backend("modern", train), Batch.of(tokens(4, T + 1))
    before = b.state().params
    b.train_step([batch], lr=0.01)
    state = b.state()
    for name, parts, scale in [("attn.c_attn", 3, 1.0), ("mlp.c_fc", 1, 2.0)]:
        name = f"h.0.{name}.weight"
        moved = before[name] - state.params[name] - 0.001 * before[name]
        values = np.linalg.svd(moved.reshape(parts, -1, 32) / (0.01 * scale), compute_uv=False)
        assert 0.3 < np.median(values) < 1.3
        assert values.max() < 1.3
    assert state.moments["v"].keys() == {"wte.weight", "lm_head.weight"}
    assert state.moments["m"].keys() == state.params.keys()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_newton_schulz_keeps_singular_vectors(dtype: str) -> None:
    x = rng(0, "check").standard_normal((3, 8, 32)).astype(np.float32)
    u, s, vt = np.linalg.svd(x / np.linalg.norm(x, axis=(1, 2), keepdims=True))
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    expected = (u * s[:, None]) @ vt[:, :8]
    got = newton_schulz(mx.array(x), getattr(mx, dtype))
    assert got.dtype == getattr(mx, dtype)
    atol = {"float32": 1e-5, "bfloat16": 0.1, "float16": 0.02}[dtype]  # measured: 1e-6, 0.04, 0.006
    np.testing.assert_allclose(got.astype(mx.float32), expected, atol=atol)


@each_model
@pytest.mark.parametrize(("dtype", "bound"), [("bfloat16", 0.05), ("float16", 0.006)])
@pytest.mark.parametrize("n_batches", [1, 2])
def test_half_types_move_float32_weights_and_stay_near_float32(
    recipe: str, dtype: str, bound: float, n_batches: int
) -> None:
    half = backend(recipe, train_config(recipe, dtype=dtype))
    full, batches = backend(recipe), [Batch.of(tokens(8, T + 1, seed=s)) for s in range(n_batches)]
    before = half.state().params
    got, expected = half.train_step(batches, 1e-3), full.train_step(batches, 1e-3)
    assert got.loss == pytest.approx(expected.loss, rel=1e-3)  # measured: 1e-4, 2e-5
    for name, w in half.state().params.items():
        assert w.dtype == np.float32
        assert not np.array_equal(w, before[name])
        m, m32 = half.state().moments["m"][name], full.state().moments["m"][name]
        assert np.linalg.norm(m - m32) < bound * np.linalg.norm(m32)  # measured: 0.019, 0.0025


def test_a_gradient_too_large_for_float16_changes_nothing() -> None:
    """LOSS_SCALE for the only target, times a row of 200, is more than 65,504."""
    b = backend("classic", train_config("classic", dtype="float16"))
    start = b.state()
    start.params["lm_head.weight"][:] *= 200 / abs(start.params["lm_head.weight"]).max()
    b.restore(start)
    result = b.train_step([Batch(tokens(2), np.array([0]), T)], 1e-3)
    assert np.isfinite(result.loss)
    assert not np.isfinite(result.grad_norm)
    np.testing.assert_equal(b.state().params, start.params)
    assert not any(m.any() for kind in b.state().moments.values() for m in kind.values())


def test_a_build_for_a_gpu_that_finds_none_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA without a device, or a Mac without Metal: MLX still reports a GPU."""
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "is_available", lambda device: False)
    assert choose("auto") == ("numpy", mlx_device()[1])
    with pytest.raises(BackendError, match=r"needs a GPU and finds none.*--backend numpy can"):
        choose("mlx")
