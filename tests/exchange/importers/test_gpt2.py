"""GPT-2 from its folder: transformers' numbers in both backends, and PyTorch's fine-tuning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from foreign_files import config_of, gpt2, gpt2_folder, hf_tensors, lively, save_torch, tensor

from mlx_randygpt.backends import make_backend
from mlx_randygpt.config import UserError
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.importing import read_foreign
from mlx_randygpt.state import Batch, TrainState

pytest.importorskip("tokenizers")

MODEL = gpt2()
PARAMS = lively(MODEL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return gpt2_folder(tmp_path / "gpt2", MODEL, PARAMS)


def edit(folder: Path, **changes: Any) -> Path:
    """The folder with another config.json."""
    (folder / "config.json").write_text(json.dumps({**config_of(MODEL), **changes}))
    return folder


def write(folder: Path, tensors: dict[str, Any]) -> Path:
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def same(found: dict[str, Any]) -> bool:
    return found.keys() == PARAMS.keys() and all(
        np.array_equal(found[n], w) for n, w in PARAMS.items()
    )


def test_a_folder_is_the_model_it_was(folder: Path) -> None:
    found = read_foreign(folder)
    assert (found.model, found.format, found.step) == (MODEL, "gpt2", 0)
    assert same(found.params)
    assert found.tokenizer.vocab_size == 300  # of which 261 have a text
    assert same(read_foreign(folder / "model.safetensors").params)


def test_the_older_shapes_of_a_folder_are_the_same_model(folder: Path) -> None:
    bare = hf_tensors(PARAMS, prefix="")
    bare |= {f"h.{i}.attn.bias": np.ones((1, 1, 16, 16), "f4") for i in range(2)}
    bare |= {f"h.{i}.attn.masked_bias": np.array(-1e4, "f4") for i in range(2)}
    assert same(read_foreign(write(folder, bare)).params)
    tied = {**hf_tensors(PARAMS), "lm_head.weight": PARAMS["wte.weight"]}
    assert same(read_foreign(write(folder, tied)).params)
    assert same(read_foreign(edit(folder, tie_word_embeddings=False)).params)
    (folder / "model.safetensors").unlink()
    held = {n: tensor(str(i), w) for i, (n, w) in enumerate(tied.items())}
    save_torch(folder / "pytorch_model.bin", held)
    assert same(read_foreign(folder).params)


def test_half_precision_is_widened(folder: Path) -> None:
    halves = {name: w.astype("<f2") for name, w in hf_tensors(PARAMS).items()}
    found = read_foreign(write(folder, halves)).params
    assert all(w.dtype == np.float32 for w in found.values())
    assert np.array_equal(found["wpe.weight"], PARAMS["wpe.weight"].astype("<f2").astype("f4"))


@pytest.mark.parametrize(("theirs", "ours"), [("gelu_new", "gelu_tanh"), ("gelu", "gelu")])
def test_the_gelu_is_that_of_the_config(folder: Path, theirs: str, ours: str) -> None:
    assert read_foreign(edit(folder, activation_function=theirs)).model.activation == ours


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"activation_function": "relu"}, "activation_function='relu'; our GPT-2 has gelu_new"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon=1e-06; our GPT-2 has 1e-05"),
        ({"n_inner": 64}, "n_inner=64; our MLP is 4·n_embd=128 wide"),
        ({"scale_attn_weights": False}, "scale_attn_weights=False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        ({"add_cross_attention": True}, "add_cross_attention=True"),
        ({"tie_word_embeddings": False}, "lacks lm_head.weight"),
        (
            {"model_type": "llama"},
            "model_type='llama'; supported are arcee, gpt2, mlxgpt, randygpt",
        ),
        ({"model_type": ["gpt2"]}, "model_type="),
        ({"n_embd": 64}, "has the shape"),
        ({"n_layer": 1}, "and 11 more, which this model does not have"),
        ({"n_layer": 3}, "lacks the tensor h.2"),
        ({"n_layer": 1000, "n_embd": 65536, "vocab_size": 1 << 24}, "has the shape"),  # 100 TB
        ({"n_layer": 10**9}, "too large"),
        ({"n_positions": 1e3}, "n_positions=1000.0 is not a whole number"),
        ({"n_positions": None}, "n_positions=None is not a whole number"),
        ({"n_head": 5}, "not divisible"),
        ({"vocab_size": 299}, "has the shape"),
    ],
)
def test_a_config_that_is_not_the_models_is_refused(
    folder: Path, changes: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason) as caught:
        read_foreign(edit(folder, **changes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"transformer.wpe.weight": None}, "lacks the tensor wpe.weight"),
        ({"transformer.wpe.weight": np.zeros((16, 31), "f4")}, "has the shape .16, 31., expected"),
        ({"transformer.wpe.weight": np.zeros((16, 32), "i4")}, "has the type 'I32'"),
        ({"transformer.wpe.weight": np.full((16, 32), np.nan, "f4")}, "wpe.weight is not finite"),
        ({"transformer.wpe.weight": np.full((16, 32), 1e300)}, "wpe.weight is not finite"),
        ({"lm_head.weight": PARAMS["wte.weight"] + 1}, "lm_head.weight is not wte.weight"),
        ({"lm_head.weight": np.zeros(3, "f4")}, "lm_head.weight is not wte.weight"),
        ({"score.weight": np.zeros(3, "f4")}, "the tensor 'score.weight', which this model does"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    folder: Path, change: dict[str, Any], reason: str
) -> None:
    tensors = {**hf_tensors(PARAMS), **change}
    with pytest.raises(ExchangeError, match=reason):
        read_foreign(write(folder, {n: w for n, w in tensors.items() if w is not None}))


def test_a_folder_without_weights_or_tokenizer_says_so(folder: Path) -> None:
    (folder / "vocab.json").unlink()
    with pytest.raises(ExchangeError, match="holds no tokenizer"):
        read_foreign(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ExchangeError, match=r"holds no weights; looked for model\.safetensors"):
        read_foreign(folder)


def made_by_transformers(folder: Path, activation: str) -> Any:
    """A random GPT-2 of transformers, saved beside a tokenizer."""
    pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    import torch

    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=300, n_positions=16, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0,
        embd_pdrop=0.0, attn_pdrop=0.0, activation_function=activation, bos_token_id=260,
        eos_token_id=260,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():  # its first biases are zero and its weights small, which hides errors
        for p in model.parameters():
            p += 0.1 * torch.randn_like(p)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.parametrize("activation", ["gelu_new", "gelu"])
def test_logits_are_those_of_transformers_in_both_backends(folder: Path, activation: str) -> None:
    model = made_by_transformers(folder, activation)
    import torch

    found = read_foreign(folder)
    tokens = np.random.default_rng(0).integers(0, 300, (4, 16)).astype(np.int32)
    expected = model(torch.tensor(tokens, dtype=torch.long)).logits.detach().numpy()
    train = found.checkpoint().train
    for backend in ("numpy", "mlx"):
        engine = make_backend(backend, found.model, train, TrainState(0, found.params, {}))
        for n in (1, 7, 16):
            logits = engine.logits(tokens[:, :n], engine.new_cache(4), slice(0, 4))
            # measured: 1e-6 of logits up to 2.3
            assert np.abs(logits - expected[:, n - 1]).max() < 1e-5, (backend, n)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["numpy", "mlx"])
def test_ten_steps_of_fine_tuning_follow_pytorch(folder: Path, backend: str) -> None:
    """AdamW of the same settings: decay on matrices only, clipping, no dropout."""
    model = made_by_transformers(folder, "gelu_new")
    from dataclasses import replace

    import torch

    found = read_foreign(folder)
    train = replace(
        found.checkpoint().train, weight_decay=0.1, grad_clip=1.0, beta2=0.95, threads=1
    )
    engine = make_backend(backend, found.model, train, TrainState(0, found.params, {}))
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(train.beta1, 0.95), eps=1e-8)
    random = np.random.default_rng(1)
    worst = 0.0
    for _ in range(10):
        windows = random.integers(0, 300, (8, 17))
        x, y = (torch.tensor(part, dtype=torch.long) for part in (windows[:, :-1], windows[:, 1:]))
        logits = model(x).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, 300), y.reshape(-1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ours = engine.train_step([Batch.of(windows)], 1e-3)
        worst = max(worst, abs(float(ours.loss) - loss.item()))
    assert worst < 1e-4  # measured: 7e-7 NumPy, 2e-6 MLX, of losses about 5.9
