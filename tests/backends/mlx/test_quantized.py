"""Weights in 8 and 4 bits, compared with the float weights and with NumPy on rounded weights."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx
from click.testing import CliRunner, Result
from mlx.utils import tree_flatten

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.base import BackendError
from mlx_randygpt.backends.mlx.quantized import QuantizedScorer
from mlx_randygpt.check import distance
from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.progress import Progress
from mlx_randygpt.state import Array, Batch, Params, TrainState, rng

TRAIN = TrainConfig(threads=1)
each_width = pytest.mark.parametrize("bits", [8, 4])
Model = Callable[..., ModelConfig]
Lively = Callable[[ModelConfig], Params]


@pytest.fixture(params=["modern", "classic", "gpt2"])
def model(request: pytest.FixtureRequest, tiny_model: Model) -> ModelConfig:
    """Width 64 and MLPs of 256, so that rows have several groups."""
    return tiny_model(request.param, n_embd=64)


def quantized(model: ModelConfig, params: Params, bits: int) -> QuantizedScorer:
    return QuantizedScorer(model, params, bits)


def dequantized(scorer: QuantizedScorer) -> Params:
    """Return the weights that it computes with, in float32."""
    model = scorer._forward.model
    weights = dict(tree_flatten(model.parameters()))
    for path, layer in model.named_modules():
        if "scales" in layer:
            scales, biases = weights.pop(f"{path}.scales"), weights.pop(f"{path}.biases")
            packed = weights[f"{path}.weight"]
            weights[f"{path}.weight"] = mx.dequantize(
                packed, scales, biases, layer.group_size, layer.bits
            )
    return {name: np.array(weight) for name, weight in weights.items()}


def tokens(model: ModelConfig, *shape: int) -> Array:
    return rng(3, "check").integers(0, model.vocab_size, shape)


def rounded(name: str, weight: Array) -> bool:
    """Return whether it is a matrix of a block or the head."""
    return weight.ndim == 2 and not name.startswith("w")


@each_width
def test_a_weight_is_off_by_at_most_a_step_of_its_group(
    model: ModelConfig, lively: Lively, bits: int
) -> None:
    params = lively(model)
    weights = dequantized(quantized(model, params, bits))
    assert weights.keys() == params.keys()
    for name, weight in params.items():
        if not rounded(name, weight):
            assert np.array_equal(weights[name], weight)
            continue
        groups = weight.reshape(-1, 64)
        step = (groups.max(axis=1) - groups.min(axis=1)) / (2**bits - 1)
        error = np.abs(weights[name].reshape(-1, 64) - groups).max(axis=1)
        assert (error > 0).all()
        assert (error <= step).all()  # measured: 0.94 and 0.994, at the end of a range


@each_width
def test_numpy_agrees_on_the_rounded_weights(model: ModelConfig, lively: Lively, bits: int) -> None:
    ours = quantized(model, lively(model), bits)
    numpy = make_backend("numpy", model, TRAIN, TrainState(0, dequantized(ours), {}))
    ids, batch = tokens(model, 2, 9), Batch.of(tokens(model, 3, model.block_size + 1))
    cached = [(backend, backend.new_cache(2)) for backend in (ours, numpy)]
    for part in (ids, ids[:, :1], ids[:, 3:4]):
        a, b = (backend.logits(part, cache) for backend, cache in cached)
        assert distance(a, b) < 3e-6  # measured 5e-7 to 9e-7
    assert ours.loss(batch) == pytest.approx(numpy.loss(batch), rel=1e-6)


def test_the_loss_costs_little_at_8_bits_and_more_at_4(model: ModelConfig, lively: Lively) -> None:
    params = lively(model)
    batch = Batch.of(tokens(model, 16, model.block_size + 1))
    full = make_backend("numpy", model, TRAIN, TrainState(0, params, {})).loss(batch)
    off = {bits: abs(quantized(model, params, bits).loss(batch) / full - 1) for bits in (8, 4)}
    assert off[8] < 3e-3 < off[4] < 0.02  # measured: 1e-4 and 9e-4; 7e-3 and 8e-3


@each_width
def test_the_weights_take_what_their_bits_and_groups_do(
    model: ModelConfig, lively: Lively, bits: int
) -> None:
    params = lively(model)
    size = sum(w.size * (bits + 1) // 8 for n, w in params.items() if rounded(n, w))
    size += sum(w.nbytes for n, w in params.items() if not rounded(n, w))
    assert quantized(model, params, bits).weight_bytes() == size  # 64 bits more for 64 numbers


def test_the_float_weights_are_freed(model: ModelConfig, lively: Lively) -> None:
    gc.collect()
    before = mx.get_active_memory()
    backend = quantized(model, lively(model), 4)
    held = mx.get_active_memory() - before
    assert held < 1.1 * backend.weight_bytes()  # measured: 1.00 to 1.03, what is allocated


@pytest.mark.parametrize("arch", ["modern", "gpt2"])  # of GPT-2 it is the head, too
def test_an_embedding_of_many_tokens_is_quantised(
    arch: str, tiny_model: Model, lively: Lively
) -> None:
    model = tiny_model(arch, vocab_size=1025)
    params = lively(model)
    backend = quantized(model, params, 8)
    rounded_params = dequantized(backend)
    assert 0 < distance(rounded_params["wte.weight"], params["wte.weight"]) < 0.01
    numpy = make_backend("numpy", model, TRAIN, TrainState(0, rounded_params, {}))
    ids = tokens(model, 1, 5)
    caches = backend.new_cache(1), numpy.new_cache(1)
    assert distance(backend.logits(ids, caches[0]), numpy.logits(ids, caches[1])) < 3e-6


@pytest.mark.parametrize("method", ["train_step", "loss_and_grads", "state", "restore"])
def test_rounded_weights_are_not_trained(method: str) -> None:
    assert not hasattr(QuantizedScorer, method)


def test_a_width_without_groups_is_refused(tiny_model: Model, lively: Lively) -> None:
    model = tiny_model("modern", n_embd=20)
    with pytest.raises(
        BackendError, match="has rows of 20; it needs a model whose n_embd is divisible by 32"
    ):
        quantized(model, lively(model), 8)


# the commands


@pytest.fixture
def checkpoint(make_run: Callable[..., Any], lively: Lively, text: str, tmp_path: Path) -> Path:
    """Save a lively model and its text."""
    run, _ = make_run("modern")
    path, source = tmp_path / "checkpoint.safetensors", tmp_path / "text.txt"
    source.write_text(text[:1500])
    data = {"paths": [str(source)], "characters": 1500, "sha256": ""}
    state = TrainState(3, lively(run.model), {})
    facts = (run.tokenizer.to_json(), data, "numpy", state)
    train = replace(run.train, dtype="bfloat16")  # of the run; what is compared is float32
    save_checkpoint(path, Checkpoint(run.model, train, Progress(), *facts))
    return path


def call(command: str, checkpoint: Path, *words: str) -> Result:
    return CliRunner().invoke(group, [command, "--checkpoint", str(checkpoint), *words])


def test_eval_prints_what_the_bits_cost(checkpoint: Path) -> None:
    words = ("--quantize", "4", "--backend", "mlx")
    result = call("eval", checkpoint, *words, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    full = json.loads(call("eval", checkpoint, "--backend", "numpy", "--json").stdout)
    assert report["bits"] == 4
    assert report["loss_float"] == pytest.approx(full["loss"], rel=1e-6)
    assert report["loss"] - report["loss_float"] == pytest.approx(report["loss_cost"])
    assert report["loss_cost"] != 0
    lines = call("eval", checkpoint, *words).stdout.splitlines()
    assert lines[1] == (
        f"4 bits cost {report['loss_cost']:+.4f}: the float32 weights have {full['loss']:.4f}"
    )


def test_sample_says_what_the_bits_save_and_keeps_no_float_weights(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlx_randygpt.cli.commands import sample

    kept, load = [], sample.load
    monkeypatch.setattr(sample, "load", lambda *words: kept.append(load(*words)) or kept[0])
    words = ("--quantize", "8", "--backend", "mlx", "--max-tokens", "9", "--prompt", "The")
    result = call("sample", checkpoint, *words)
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[1] == "Weights in 8 bits: 37.9 kB instead of 111 kB"
    assert len(result.stdout) == len("The") + 9 + 1
    assert kept[0].saved.state.params == {}


@pytest.mark.parametrize("command", ["sample", "eval", "chat"])
def test_another_backend_is_refused(command: str, checkpoint: Path) -> None:
    result = call(command, checkpoint, "--quantize", "8", "--backend", "numpy")
    assert result.exit_code == 1
    assert result.stderr == "Error: --quantize needs MLX, not --backend numpy; add --backend mlx\n"


def test_other_bits_are_refused(checkpoint: Path) -> None:
    result = call("sample", checkpoint, "--quantize", "5")
    assert result.exit_code == 2
    assert "5 bits; it must be 8 or 4" in result.stderr
