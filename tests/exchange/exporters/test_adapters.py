"""Adapters apart from their model: as PEFT reads them, and under our own names."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from click.testing import CliRunner
from exported import make, windows

from mlx_randygpt.backends import make_backend
from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.cli.loading import without_adapters
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.export import build_files
from mlx_randygpt.model import adapter_shapes, base_config
from mlx_randygpt.state import TrainState, rng


@pytest.fixture
def model(text: str, tiny_model: Any, lively: Any) -> Callable[..., Checkpoint]:
    """(recipe, **changes) -> a checkpoint with adapters of rank 3."""

    def build(recipe: str, **changes: Any) -> Checkpoint:
        given = {"lora_rank": 3, "lora_alpha": 6.0, **changes}
        return make(recipe, "char", text, tiny_model, lively, **given)

    return build


def loaded(files: dict[str, bytes], name: str) -> dict[str, Any]:
    return safetensors.numpy.load(files[name])


def test_ours_keep_their_names_and_are_all_there_is(model: Callable[..., Checkpoint]) -> None:
    saved = model("modern", lora_targets="c_fc")
    files = build_files(saved, "adapters", "x")
    found = loaded(files, "adapters.safetensors")
    assert sorted(found) == [f"h.{i}.mlp.c_fc.lora_{x}" for i in (0, 1) for x in "ab"]
    assert all(np.array_equal(found[name], saved.state.params[name]) for name in found)
    assert b'"lora_alpha":"6.0"' in files["adapters.safetensors"][:500]
    assert "lora_b · lora_a" in files["README.md"].decode()


def test_peft_s_change_of_the_weights_is_ours(model: Callable[..., Checkpoint]) -> None:
    saved = model("gpt2", lora_targets="c_attn,c_proj")
    files = build_files(saved, "adapters", "x")
    config = json.loads(files["adapter_config.json"])
    assert config["target_modules"] == ["c_attn", "c_proj"]
    assert (config["r"], config["lora_alpha"], config["fan_in_fan_out"]) == (3, 6.0, True)
    found = loaded(files, "adapter_model.safetensors")
    assert len(found) == 2 * 3 * 2
    place = "base_model.model.transformer.h.1.mlp.c_proj"
    a, b = found[f"{place}.lora_A.weight"], found[f"{place}.lora_B.weight"]
    change = config["lora_alpha"] / config["r"] * (b @ a)  # (out, in), as PEFT computes it
    whole = without_adapters(saved).state.params["h.1.mlp.c_proj.weight"]
    assert np.allclose(saved.state.params["h.1.mlp.c_proj.weight"] + change, whole, atol=1e-6)


def test_a_model_without_adapters_has_none_to_keep_apart(model: Callable[..., Checkpoint]) -> None:
    with pytest.raises(ExchangeError, match="was trained with --lora-rank"):
        build_files(model("modern", lora_rank=0), "adapters", "x")


def test_other_formats_hold_the_merged_model(
    model: Callable[..., Checkpoint], tmp_path: Path
) -> None:
    saved = model("gpt2")
    save_checkpoint(tmp_path / "a.safetensors", saved)

    def export(kind: str) -> dict[str, Any]:
        out = tmp_path / kind
        words = ["export", str(tmp_path / "a.safetensors"), "--format", kind, "-o", str(out)]
        result = CliRunner().invoke(group, words)
        assert result.exit_code == 0, result.output
        return safetensors.numpy.load_file(next(out.glob("*model.safetensors")))

    whole = without_adapters(saved).state.params["h.0.mlp.c_fc.weight"]
    assert np.array_equal(export("hf")["h.0.mlp.c_fc.weight"].T, whole)
    assert len(export("adapters")) == len(adapter_shapes(saved.model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # theirs
def test_peft_gives_our_logits(model: Callable[..., Checkpoint], tmp_path: Path) -> None:
    torch, peft = pytest.importorskip("torch"), pytest.importorskip("peft")
    transformers = pytest.importorskip("transformers")
    saved = model("gpt2")
    base = base_config(saved.model)
    frozen = {n: w for n, w in saved.state.params.items() if "lora" not in n}
    alone = Checkpoint(
        base, saved.train, saved.progress, saved.tokenizer, saved.data, "numpy",
        TrainState(0, frozen, {}),
    )  # fmt: skip
    for kind, what in (("hf", alone), ("adapters", saved)):
        (tmp_path / kind).mkdir()
        for name, content in build_files(what, kind, "x").items():
            (tmp_path / kind / name).write_bytes(content)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "hf")
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "adapters").eval()
    ids = windows(saved, rng(1, "check").integers(0, base.vocab_size, 100))[0]
    with torch.no_grad():
        logits = theirs(torch.tensor(ids[None])).logits[0, -1].numpy()
    ours = make_backend("numpy", base, saved.train, without_adapters(saved).state)
    found = ours.logits(ids[None].astype(np.int32), ours.new_cache(1))[0]
    assert np.abs(logits - found).max() < 1e-4  # measured: 2.4e-6
