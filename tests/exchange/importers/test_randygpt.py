"""randyGPT's files: the model computes what randyGPT computes, and its training goes on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from foreign_files import LAYER, randy_arrays, randy_bin, randy_model

from mlx_randygpt.backends import make_backend
from mlx_randygpt.checkpoint import load_checkpoint, save_checkpoint
from mlx_randygpt.config import TrainConfig
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.export import export
from mlx_randygpt.exchange.importing import read_foreign
from mlx_randygpt.state import Batch, TrainState

MODEL = randy_model()
ARRAYS = randy_arrays(MODEL)
MOMENTS = [randy_arrays(MODEL, 4), {n: a**2 for n, a in randy_arrays(MODEL, 5).items()}]


def forward(arrays: Mapping[str, Any], tokens: Any, n_layer: int, n_head: int) -> Any:
    """randyGPT's forward pass in float64, one position after another: logits (T, V)."""
    w = {name: array.astype(np.float64) for name, array in arrays.items()}

    def norm(x: Any) -> Any:
        return x / np.sqrt((x**2).mean() + 1e-5)

    cache: list[list[tuple[Any, Any]]] = [[] for _ in range(n_layer)]
    logits = []
    for position, token in enumerate(tokens):
        x = w["wte"][token] + w["wpe"][position]
        for i in range(n_layer):
            q, k, v = (w[f"{i}.{name}"] @ norm(x) for name in ("wq", "wk", "wv"))
            cache[i].append((k, v))
            heads = []
            for part in np.split(np.arange(len(x)), n_head):
                scores = np.array([k[part] @ q[part] for k, _ in cache[i]]) / len(part) ** 0.5
                p = np.exp(scores - scores.max())
                heads.append(
                    sum(
                        share * v[part] for share, (_, v) in zip(p / p.sum(), cache[i], strict=True)
                    )
                )
            x = x + w[f"{i}.wo"] @ np.concatenate(heads)
            x = x + w[f"{i}.fc2"] @ np.maximum(w[f"{i}.fc1"] @ norm(x), 0) ** 2
        logits.append(w["lm_head"] @ x)
    return np.array(logits)


@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_the_logits_are_randygpts(tmp_path: Path, backend: str) -> None:
    if backend == "mlx":
        pytest.importorskip("mlx.core")
    found = read_foreign(randy_bin(tmp_path / "checkpoint.bin", 3, ARRAYS, MOMENTS))
    tokens = np.random.default_rng(0).integers(0, 12, 32)
    expected = forward(ARRAYS, tokens, 2, 4)
    engine = make_backend(
        backend, found.model, TrainConfig(threads=1), TrainState(0, found.params, {})
    )
    for n in (1, 7, 32):
        logits = engine.logits(tokens[None, :n].astype(np.int32), engine.new_cache(1), slice(0, 1))
        # measured: 1.3e-5, of logits up to 21
        assert np.abs(logits[0] - expected[n - 1]).max() < 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("version", "held"), [(1, 3), (2, 1), (2, 3), (3, 3)])
def test_every_version_gives_the_same_weights(tmp_path: Path, version: int, held: int) -> None:
    path = randy_bin(tmp_path / "c.bin", version, ARRAYS, MOMENTS[: held - 1])
    found = read_foreign(path)
    assert found.model == randy_model(dropout=0.1)
    stacked = np.concatenate([ARRAYS[f"1.{name}"] for name in ("wq", "wk", "wv")])
    assert np.array_equal(found.params["h.1.attn.c_attn.weight"], stacked)
    assert np.array_equal(found.params["h.0.mlp.c_proj.weight"], ARRAYS["0.fc2"])
    assert np.array_equal(found.params["wpe.weight"], ARRAYS["wpe"])
    assert (found.step, set(found.moments)) == ((70, {"m", "v"}) if held == 3 else (0, set()))
    if held == 3:
        stacked = np.concatenate([MOMENTS[1][f"1.{name}"] for name in ("wq", "wk", "wv")])
        assert np.array_equal(found.moments["v"]["h.1.attn.c_attn.weight"], stacked)
        assert np.array_equal(found.moments["m"]["lm_head.weight"], MOMENTS[0]["lm_head"])
    assert any("preset tiny" in note for note in found.notes)
    assert found.best_loss == 2.25


def test_its_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """The next step by AdamW's formula, from its weights, moments and step."""
    found = read_foreign(randy_bin(tmp_path / "c.bin", 3, ARRAYS, MOMENTS))
    save_checkpoint(tmp_path / "ours.safetensors", found.checkpoint())
    saved = load_checkpoint(tmp_path / "ours.safetensors")
    assert (saved.state.step, saved.train.beta2, saved.progress.best_step) == (70, 0.999, 70)
    model, train = randy_model(), saved.train
    engine = make_backend("numpy", model, train, saved.state)
    batch = Batch.of(np.random.default_rng(1).integers(0, 12, (4, 33)))
    _, grads = engine.loss_and_grads(batch)
    size = np.sqrt(sum(float((g.astype(np.float64) ** 2).sum()) for g in grads.values()))
    clip = min(1.0, train.grad_clip / size)
    engine.train_step([batch], 1e-3)
    for name, w in engine.state().params.items():
        g = grads[name].astype(np.float64) * clip
        m = 0.9 * saved.state.moments["m"][name] + 0.1 * g
        v = 0.999 * saved.state.moments["v"][name] + 0.001 * g**2
        update = m / (1 - 0.9**71) / (np.sqrt(v / (1 - 0.999**71)) + 1e-8)
        expected = saved.state.params[name] * (1 - 1e-3 * 0.1) - 1e-3 * update
        error = np.abs(w - expected).max() / np.abs(expected).max()
        assert error < 1e-6, name  # measured: 1.5e-7, which is one rounding of the largest weight


def test_sizes_that_no_preset_has_are_asked_for(tmp_path: Path) -> None:
    model = randy_model(n_embd=48, block_size=20)
    path = randy_bin(tmp_path / "c.bin", 1, randy_arrays(model))
    with pytest.raises(ExchangeError, match="known sizes that fit: none; give --n-layer"):
        read_foreign(path)
    sizes = {"n_layer": 2, "n_head": 6, "n_embd": 48, "block_size": 20}
    found = read_foreign(path, sizes=sizes)
    assert found.model == randy_model(n_embd=48, block_size=20, n_head=6, dropout=0.1)
    with pytest.raises(ExchangeError, match="known sizes that fit: none"):
        read_foreign(path, sizes={**sizes, "n_layer": 3})


def test_heads_that_are_given_win_over_the_preset(tmp_path: Path) -> None:
    path = randy_bin(tmp_path / "c.bin", 3, ARRAYS, MOMENTS)
    assert read_foreign(path, sizes={"n_head": 8}).model.n_head == 8


def folder_of(folder: Path, **changes: Any) -> Path:
    """The Hugging Face folder that randyGPT exports."""
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "randygpt", "vocab_size": 12, "n_embd": 64, "n_head": 4, "n_layer": 2,
        "block_size": 32, "best_val_loss": 2.25, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    kinds = dict.fromkeys(LAYER[:4], "attn") | dict.fromkeys(LAYER[4:], "mlp")
    tensors = {}
    for name, array in ARRAYS.items():
        i, _, part = name.partition(".")
        tensors[f"layers.{i}.{kinds[part]}.{part}.weight" if part else f"{name}.weight"] = array
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    vocab = {"vocab": ["<|bos|>", "<|eos|>", "\n", " ", *"abcdefgh"], "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(vocab))
    return folder


def test_its_hugging_face_folder_holds_the_same_model(tmp_path: Path) -> None:
    folder = read_foreign(folder_of(tmp_path / "hf"))
    binary = read_foreign(randy_bin(tmp_path / "c.bin", 3, ARRAYS, MOMENTS))
    assert (folder.model, folder.tokenizer) == (binary.model, binary.tokenizer)
    assert all(np.array_equal(folder.params[n], w) for n, w in binary.params.items())
    assert (folder.step, folder.format, folder.best_loss) == (0, "randygpt-hf", 2.25)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n_layer": 1}, "has the tensor 'layers.1.fc1' and 5 more"),
        ({"n_layer": 3}, "lacks the tensor layers"),
        ({"n_embd": 32}, "has the shape"),
        ({"n_embd": 1 << 40}, "too large"),
        ({"n_head": 5}, "not divisible"),
        ({"vocab_size": 13}, "has the shape"),
        ({"block_size": "32"}, "block_size='32' is not a whole number"),
        ({"block_size": True}, "block_size=True is not a whole number"),
        ({"n_layer": 0}, "n_layer=0 is not"),
    ],
)
def test_a_folder_whose_config_lies_is_refused(
    tmp_path: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ValueError, match=reason):
        read_foreign(folder_of(tmp_path / "hf", **changes))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda c: c[:-4], "numbers for 12 tokens"),
        (lambda c: c[:-1], "3 bytes are left over"),
        (lambda c: c + bytes(4), "numbers for 12 tokens"),
        (lambda c: c[:20], "is not a .bin file"),
        (lambda c: b"RGPT0004" + c[8:], "mixture of experts"),
        (lambda c: b"RGPT0009" + c[8:], "is not a .bin file"),
        (lambda c: c[:8] + bytes(4) + c[12:], "vocab_size 0"),
        (lambda c: c[:8] + b"\xff\xff\xff\xff" + c[12:], "numbers for 4294967295 tokens"),
        (lambda c: c[:24] + b"\0\0\xc0\x7f" + c[28:], "wte.weight is not finite"),
        (lambda c: c[:-4] + b"\0\0\x80\xbf", "second moment is negative"),
    ],
)
def test_a_file_that_is_damaged_is_refused(tmp_path: Path, change: Any, reason: str) -> None:
    path = randy_bin(tmp_path / "c.bin", 3, ARRAYS, MOMENTS)
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(ExchangeError, match=reason) as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)


def test_a_model_without_its_vocabulary_asks_for_it(tmp_path: Path) -> None:
    path = randy_bin(tmp_path / "c.bin", 3, ARRAYS, MOMENTS)
    path.with_name("vocab.json").unlink()
    with pytest.raises(ExchangeError, match=r"--vocab vocab\.json or, for a character model"):
        read_foreign(path)
    (tmp_path / "train.txt").write_text("a b c d e f g h\n")
    found = read_foreign(path, vocab=tmp_path / "train.txt")
    assert found.tokenizer.encode("\n ab").tolist() == [2, 3, 4, 5]


def test_its_characters_and_where_they_begin_survive_an_export(tmp_path: Path) -> None:
    path = randy_bin(tmp_path / "c.bin", 3, ARRAYS, MOMENTS)
    (tmp_path / "train.txt").write_text("a b c d e f g h\n")
    first = read_foreign(path, vocab=tmp_path / "train.txt")
    assert first.tokenizer.bos == 0  # "<", not the newline
    export(first.checkpoint(), "hf", tmp_path / "hf")
    assert read_foreign(tmp_path / "hf").tokenizer == first.tokenizer
    config = tmp_path / "hf" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "mlxgpt_begin": 99}))
    with pytest.raises(ExchangeError, match=r"mlxgpt_begin=99; it is an id from 0 to"):
        read_foreign(tmp_path / "hf")
