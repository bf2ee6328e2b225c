"""What was exported comes back as it was, also from transformers; what is not ours is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from exported import make, streamed

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.export import export
from mlx_randygpt.exchange.importing import read_foreign

Make = Callable[..., tuple[Checkpoint, Path]]


@pytest.fixture
def exported(text: str, tiny_model: Any, lively: Any, tmp_path: Path) -> Make:
    """(recipe, kind, **changes) -> a checkpoint and the folder that `export` made of it."""

    def build(
        recipe: str = "modern", kind: str = "char", **changes: Any
    ) -> tuple[Checkpoint, Path]:
        saved = make(recipe, kind, text, tiny_model, lively, **changes)
        export(saved, "hf", tmp_path / "folder")
        return saved, tmp_path / "folder"

    return build


@pytest.mark.parametrize("recipe", ["classic", "modern", "gpt2"])
@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_what_goes_out_comes_in_again(recipe: str, kind: str, exported: Make, text: str) -> None:
    if kind == "bpe" or recipe == "gpt2":
        pytest.importorskip("tokenizers")
    saved, folder = exported(recipe, kind)
    found = read_foreign(folder)
    assert found.format == ("gpt2" if recipe == "gpt2" else "mlxgpt")
    assert found.model == saved.model
    assert found.params.keys() == saved.state.params.keys()
    assert all(np.array_equal(found.params[n], w) for n, w in saved.state.params.items())
    again = found.checkpoint()
    assert (again.train.recipe, again.state.step) == (saved.train.recipe, 0)
    assert kind == "bpe" or recipe == "gpt2" or again.tokenizer == saved.tokenizer
    assert found.tokenizer.decode(found.tokenizer.encode(text)) == text


def test_what_transformers_has_trained_comes_in(exported: Make, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    _, folder = exported(block_size=32)
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    ids = torch.arange(20)[None]
    optimizer = torch.optim.SGD(peer.parameters(), 0.1)
    peer(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    peer.save_pretrained(tmp_path / "tuned")
    (tmp_path / "tuned" / "tokenizer.json").write_bytes((folder / "tokenizer.json").read_bytes())
    saved = read_foreign(tmp_path / "tuned").checkpoint()
    expected = peer(input_ids=ids).logits[0].detach().numpy()
    assert np.abs(streamed(saved, ids[0].numpy()) - expected).max() < 1e-4  # measured: 2e-6


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"n_embd": None}, "n_embd=None is not int"),
        ({"n_embd": "64"}, "n_embd='64' is not int"),
        ({"n_embd": 32}, "has the shape"),
        ({"n_layer": 3}, "lacks the tensor h.2.attn.c_attn.weight"),
        ({"n_layer": 1}, "h.1.attn.c_attn.weight"),
        ({"n_layer": 10**9}, "is too large"),
        ({"position": "alibi"}, "it is rope or learned"),
        ({"qk_norm": 1}, "qk_norm=1 is not bool"),
        ({"model_type": "llama"}, "model_type='llama'"),
    ],
)
def test_settings_that_lie_are_refused(changes: dict[str, Any], why: str, exported: Make) -> None:
    path = exported()[1] / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ExchangeError, match=why) as caught:
        read_foreign(path.parent)
    assert "\n" not in str(caught.value)


def test_a_size_that_is_not_there_is_named(exported: Make) -> None:
    path = exported()[1] / "config.json"
    config = json.loads(path.read_text())
    del config["n_head"]
    path.write_text(json.dumps(config))
    with pytest.raises(ExchangeError, match=r"config\.json lacks n_head"):
        read_foreign(path.parent)


def test_weights_in_fewer_bits_are_refused(exported: Make) -> None:
    saved, folder = exported()
    more = {"h.0.attn.c_attn.scales": np.ones((4, 1), np.float32)}
    path = folder / "model.safetensors"
    path.write_bytes(safetensors.numpy.save({**saved.state.params, **more}, {"format": "pt"}))
    with pytest.raises(ExchangeError, match=r"c_attn\.scales"):
        read_foreign(folder)


@pytest.mark.parametrize("vocab", [{"a": "0"}, [], None])
def test_a_vocabulary_that_is_none_is_refused(vocab: Any, exported: Make) -> None:
    pytest.importorskip("tokenizers")
    path = exported()[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["vocab"] = vocab
    path.write_text(json.dumps(content))
    with pytest.raises(ExchangeError, match=r"tokenizer\.json"):
        read_foreign(path.parent)


def test_characters_in_another_order_keep_their_ids(exported: Make) -> None:
    pytest.importorskip("tokenizers")
    path = exported()[1] / "tokenizer.json"
    content = json.loads(path.read_text())
    vocab = content["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    path.write_text(json.dumps(content))
    assert read_foreign(path.parent).tokenizer.encode("ab").tolist() == [vocab["a"], vocab["b"]]
