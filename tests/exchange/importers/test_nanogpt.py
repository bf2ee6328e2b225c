"""nanoGPT's ckpt.pt: the weights, the ids and the loss that nanoGPT has."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from foreign_files import gpt2, lively, nanogpt, save_torch, tensor

from mlx_randygpt.backends import make_backend
from mlx_randygpt.data.corpus import encode_corpus
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.export import export
from mlx_randygpt.exchange.importing import read_foreign
from mlx_randygpt.state import TrainState
from mlx_randygpt.training.evaluation import evaluate

MODEL = gpt2(activation="gelu", vocab_size=24)
NANOGPT = os.environ.get("MLXGPT_NANOGPT")  # a checkout of it, which the last test runs


@pytest.mark.parametrize("bias", [True, False])
def test_a_checkpoint_is_the_model_it_was(tmp_path: Path, bias: bool) -> None:
    model = gpt2(activation="gelu", vocab_size=24, bias=bias)
    params = lively(model)
    found = read_foreign(nanogpt(tmp_path / "ckpt.pt", model, params))
    assert (found.model, found.format, found.step) == (model, "nanogpt", 0)
    assert found.params.keys() == params.keys()
    assert all(np.array_equal(found.params[name], w) for name, w in params.items())
    assert read_foreign(tmp_path).model == model  # the folder of the file


def test_its_characters_keep_their_ids(tmp_path: Path) -> None:
    found = read_foreign(nanogpt(tmp_path / "ckpt.pt", MODEL, lively(MODEL)))
    assert found.tokenizer.encode("cab\n").tolist() == [2, 1, 0]  # there is no "a"
    assert found.tokenizer.decode([0, 1, 2, 23]) == "\nbcx"
    corpus = encode_corpus({"text": "bcb\nx"}, found.tokenizer)
    assert corpus.tokens.tolist() == [1, 2, 1, 0, 23]  # and nothing around them


def test_its_characters_survive_an_export(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers")
    first = read_foreign(nanogpt(tmp_path / "ckpt.pt", MODEL, lively(MODEL)))
    export(first.checkpoint(), "hf", tmp_path / "hf")
    again = read_foreign(tmp_path / "hf")
    assert (again.tokenizer, again.model) == (first.tokenizer, first.model)
    assert all(np.array_equal(again.params[name], w) for name, w in first.params.items())


def test_what_the_file_does_not_say_is_told(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "ckpt.pt", MODEL, lively(MODEL))
    notes = read_foreign(path).notes
    assert "does not record its GELU; the exact one is assumed" in notes[0]
    assert notes[1].startswith("It was trained for 40 steps, best validation loss 2.5000")
    assert notes[2] == f"Vocabulary: {tmp_path / 'meta.pkl'}"
    older = read_foreign(path, activation="gelu_tanh")
    assert older.model.activation == "gelu_tanh"
    assert not any("GELU" in note for note in older.notes)


def test_the_table_of_its_data_set_is_found(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "data" / "made_up").mkdir(parents=True)
    path = nanogpt(tmp_path / "out" / "ckpt.pt", MODEL, lively(MODEL))
    (tmp_path / "out" / "meta.pkl").rename(tmp_path / "data" / "made_up" / "meta.pkl")
    assert read_foreign(path).tokenizer.vocab_size == 24


@pytest.mark.parametrize(
    ("size", "wanted"),
    [(24, "the meta.pkl of its data set"), (50304, "GPT-2's tokenizer: --vocab")],
)
def test_a_missing_vocabulary_is_asked_for(tmp_path: Path, size: int, wanted: str) -> None:
    model = gpt2(activation="gelu", vocab_size=size, n_embd=4, n_head=1, n_layer=1)
    path = nanogpt(tmp_path / "ckpt.pt", model, lively(model), config={"dataset": "../.."})
    (tmp_path / "meta.pkl").unlink()
    with pytest.raises(ExchangeError, match=f"has {size} tokens and needs {wanted}"):
        read_foreign(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "it has no model and model_args"),
        ({"model_args": [1]}, "it has no model and model_args"),
        ({"model": 5}, "does not hold tensors by name"),
        ({"model": {"a": 5}}, "has 'a' among its weights, which is not a tensor"),
        ({"model": {}}, "lacks the tensor wte.weight"),
        ({"model_args": {"n_layer": 2}}, "vocab_size=None is not a whole number"),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path: Path, changes: Any, reason: str) -> None:
    path = nanogpt(tmp_path / "ckpt.pt", MODEL, lively(MODEL), **changes)
    with pytest.raises(ExchangeError, match=reason):
        read_foreign(path)


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("n_layer", 1, "and 11 more, which this model"),
        ("n_layer", 10**6, "too large"),
        ("n_embd", 64, "has the shape"),
        ("vocab_size", 1 << 24, "has the shape"),
        ("bias", False, "which this model does not have"),
        ("bias", 1, "bias=1 is not True or False"),
        ("n_head", 4.0, "n_head=4.0 is not a whole number"),
        ("block_size", tensor("x", np.zeros(1, "<f4")), "is not a whole number"),
    ],
)
def test_sizes_that_are_not_the_weights_are_refused(
    tmp_path: Path, name: str, value: Any, reason: str
) -> None:
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size")
    arguments = {**{n: getattr(MODEL, n) for n in names}, name: value}
    path = nanogpt(tmp_path / "ckpt.pt", MODEL, lively(MODEL), model_args=arguments)
    with pytest.raises(ValueError, match=reason) as caught:
        read_foreign(path)
    assert "\n" not in str(caught.value)


def test_a_meta_with_code_is_refused(tmp_path: Path) -> None:
    path = nanogpt(tmp_path / "ckpt.pt", MODEL, lively(MODEL))
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps({"itos": print}))
    with pytest.raises(ExchangeError, match=r"meta\.pkl: "):
        read_foreign(path)


def test_a_file_of_weights_alone_is_no_checkpoint(tmp_path: Path) -> None:
    save_torch(tmp_path / "w.pt", {"w": tensor("0", np.zeros(3, "<f4"))})
    with pytest.raises(ExchangeError, match="not a checkpoint of nanoGPT"):
        read_foreign(tmp_path / "w.pt")


JUDGE = """
import sys, numpy as np, torch
from model import GPT, GPTConfig
held = torch.load("out/ckpt.pt", map_location="cpu", weights_only=False)
model = GPT(GPTConfig(**held["model_args"]))
model.load_state_dict(held["model"])
model.eval()
ids = torch.tensor(np.fromfile("data/words/val.bin", np.uint16).astype(np.int64))
size, nats = held["model_args"]["block_size"], 0.0
with torch.no_grad():
    for i in range(0, len(ids) - 1, size):
        y = ids[i + 1 : i + 1 + size][None]
        nats += model(ids[i : i + y.shape[1]][None], y)[1].item() * y.numel()
sys.stderr.write(f"LOSS {nats / (len(ids) - 1)!r}")
"""


@pytest.mark.slow
@pytest.mark.skipif(NANOGPT is None, reason="MLXGPT_NANOGPT names no checkout of nanoGPT")
@pytest.mark.parametrize("bias", [True, False])
def test_its_loss_is_nanogpts_after_nanogpts_own_training(
    tmp_path: Path, text: str, bias: bool
) -> None:
    """Its train.py trains, its model.py judges windows of the validation text; ours does too."""
    pytest.importorskip("torch")
    data = tmp_path / "data" / "words"
    data.mkdir(parents=True)
    chars = sorted(set(text))
    ids = np.array([chars.index(char) for char in text], np.uint16)
    cut = int(0.9 * len(ids))
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    table = {"itos": dict(enumerate(chars)), "stoi": {c: i for i, c in enumerate(chars)}}
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(chars), **table}))
    for name in ("model.py", "train.py", "configurator.py"):
        (tmp_path / name).write_text((Path(str(NANOGPT)) / name).read_text())
    settings = {
        "dataset": "words", "device": "cpu", "compile": False, "eval_iters": 2, "out_dir": "out",
        "eval_interval": 10, "max_iters": 30, "block_size": 32, "batch_size": 8, "n_layer": 2,
        "n_head": 4, "n_embd": 32, "bias": bias, "dtype": "float32", "learning_rate": 1e-2,
        "gradient_accumulation_steps": 1, "warmup_iters": 5,
    }  # fmt: skip
    options = [f"--{name}={value}" for name, value in settings.items()]
    python = [sys.executable, "-W", "ignore"]
    subprocess.run([*python, "train.py", *options], cwd=tmp_path, check=True, capture_output=True)
    judged = subprocess.run(
        [*python, "-c", JUDGE], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    theirs = float(judged.stderr.rpartition("LOSS ")[2])
    found = read_foreign(tmp_path / "out")
    corpus = encode_corpus({"text": text}, found.tokenizer)
    state, train = TrainState(0, found.params, {}), found.checkpoint().train
    for backend in ("numpy", "mlx"):
        engine = make_backend(backend, found.model, train, state)
        score = evaluate(engine, corpus.val, 32, 16, found.tokenizer.token_bytes())
        assert score is not None
        assert score.tokens == len(ids) - cut - 1
        assert abs(score.loss - theirs) < 1e-5, backend  # measured: 3e-7
