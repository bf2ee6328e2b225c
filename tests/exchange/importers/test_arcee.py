"""Arcee folders: ours come back bit for bit, gains are folded, other models are refused."""

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
from mlx_randygpt.config import UserError
from mlx_randygpt.exchange import arcee
from mlx_randygpt.exchange.export import build_files, export
from mlx_randygpt.exchange.importing import read_foreign

Make = Callable[..., tuple[Checkpoint, Path]]


@pytest.fixture
def exported(text: str, tiny_model: Any, lively: Any, tmp_path: Path) -> Make:
    """(kind, **changes) -> a checkpoint of the recipe portable and the folder of its export."""

    def build(kind: str = "char", **changes: Any) -> tuple[Checkpoint, Path]:
        saved = make("portable", kind, text, tiny_model, lively, **changes)
        export(saved, "hf", tmp_path / "folder")
        return saved, tmp_path / "folder"

    return build


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_weights(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "model.safetensors"
    weights = safetensors.numpy.load(path.read_bytes())
    change(weights)
    path.write_bytes(safetensors.numpy.save(weights))


def test_the_order_of_rotated_rows_is_that_of_transformers() -> None:
    rows = np.arange(8.0)[:, None]  # two heads of four rows
    there = arcee.pairs_to_halves(rows, 2)
    assert there[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert (arcee.halves_to_pairs(there, 2) == rows).all()


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_what_goes_out_comes_in_again(exported: Make, kind: str, text: str) -> None:
    saved, folder = exported(kind)
    assert not list(folder.glob("*.py"))
    found = read_foreign(folder)
    assert (found.format, found.model) == ("arcee", saved.model)
    assert all(np.array_equal(found.params[n], w) for n, w in saved.state.params.items())
    assert found.checkpoint().train.recipe == "portable"
    assert found.tokenizer.decode(found.tokenizer.encode(text)) == text


def test_gains_are_folded_into_the_matrices_that_read_them(exported: Make) -> None:
    saved, folder = exported()
    gain = np.linspace(0.5, 2, saved.model.n_embd, dtype=np.float32)

    def scale(weights: dict[str, Any]) -> None:
        for name in weights:
            if "norm" in name:
                weights[name] = gain
        for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.up_proj"):
            for i in range(saved.model.n_layer):
                weights[f"model.layers.{i}.{name}.weight"] /= gain
        weights["lm_head.weight"] /= gain

    change_weights(folder, scale)
    found = read_foreign(folder).checkpoint()
    ids = np.arange(40, dtype=np.int32)
    np.testing.assert_allclose(streamed(found, ids), streamed(saved, ids), rtol=1e-4, atol=1e-5)


def test_a_tied_head_is_the_embedding(exported: Make) -> None:
    saved, folder = exported()
    change_weights(folder, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(UserError, match=r"lacks the tensor lm_head\.weight"):
        read_foreign(folder)
    change_config(folder, tie_word_embeddings=True)
    params = read_foreign(folder).params
    assert np.array_equal(params["lm_head.weight"], saved.state.params["wte.weight"])
    assert not np.shares_memory(params["lm_head.weight"], params["wte.weight"])


@pytest.mark.parametrize(
    ("changes", "base"),
    [
        ({"rope_parameters": {"rope_theta": 5e5}}, 5e5),
        ({"rope_parameters": None, "rope_theta": 500}, 500.0),
        ({"rope_parameters": None, "rope_theta": None}, 10000.0),
    ],
)
def test_any_rope_base_is_kept(exported: Make, changes: dict[str, Any], base: float) -> None:
    _, folder = exported()
    change_config(folder, **changes)
    assert read_foreign(folder).model.rope_base == base


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "silu"}, "has hidden_act='silu'; supported is relu2"),
        ({"rms_norm_eps": 1e-6}, "has rms_norm_eps=1e-06; supported is 1e-05"),
        ({"attention_bias": True}, "has attention_bias=True"),
        ({"mlp_bias": True}, "has mlp_bias=True"),
        ({"num_key_value_heads": 2}, "has num_key_value_heads=2; supported is 4"),
        ({"head_dim": 32}, "has head_dim=32; supported is 16"),
        ({"intermediate_size": 128}, "has intermediate_size=128; supported is 256"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "has rope_scaling="),
        ({"rope_parameters": {"rope_theta": 0.5}}, "rope_base=0.5"),
        ({"rope_parameters": {"rope_theta": "many"}}, "rope base 'many'; it is a number"),
        ({"rope_scaling": {"type": "linear"}}, "has rope_scaling="),
        ({"num_hidden_layers": "2"}, "is not a whole number"),
        ({"num_hidden_layers": 3}, r"lacks the tensor model\.layers\.2"),
        ({"num_hidden_layers": 1}, "and 7 more, which this model does not have"),
        ({"vocab_size": 1 << 24, "hidden_size": 65536}, "supported is"),
    ],
)
def test_another_model_is_refused(exported: Make, changes: dict[str, Any], reason: str) -> None:
    _, folder = exported()
    change_config(folder, **changes)
    with pytest.raises(UserError, match=reason) as caught:
        read_foreign(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["hf", "gguf"])
def test_the_card_says_how_to_run_it_without_code(exported: Make, kind: str) -> None:
    if kind == "gguf":
        pytest.importorskip("gguf")
    card = build_files(exported()[0], kind, "tales")["README.md"].decode()
    assert "trust_remote_code" not in card
    assert (
        "vllm serve tales" if kind == "hf" else "ollama create tales -f tales/Modelfile"
    ) in card
    assert "have at most 250 tokens" in card
