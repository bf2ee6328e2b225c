"""GGUF files: ours come back, in fewer bits nearly so; what is not ours is refused in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import make

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.config import UserError
from mlx_randygpt.exchange.export import export
from mlx_randygpt.exchange.importing import read_foreign
from mlx_randygpt.tokenizers import tokenizer_from_json

gguf = pytest.importorskip("gguf")

Make = Callable[..., tuple[Checkpoint, Path]]
ROUNDING = {
    "f32": 0.0,
    "f16": 6e-4,
    "q8_0": 5e-3,
}  # of a matrix' largest value; measured 5e-4, 4e-3


@pytest.fixture
def exported(text: str, tiny_model: Any, lively: Any, tmp_path: Path) -> Make:
    """(recipe, kind, outtype, **changes) -> a checkpoint and the folder of its GGUF."""

    def build(
        recipe: str = "portable", kind: str = "char", outtype: str = "f32", **changes: Any
    ) -> tuple[Checkpoint, Path]:
        saved = make(recipe, kind, text, tiny_model, lively, **changes)
        export(saved, "gguf", tmp_path / "folder", outtype=outtype, overwrite=True)
        return saved, tmp_path / "folder"

    return build


@pytest.mark.parametrize("outtype", ROUNDING)
@pytest.mark.parametrize("kind", ["char", "bpe"])
@pytest.mark.parametrize("recipe", ["portable", "gpt2"])
def test_what_goes_out_comes_in_again(
    exported: Make, recipe: str, kind: str, outtype: str, text: str
) -> None:
    saved, folder = exported(recipe, kind, outtype)
    found = read_foreign(folder)
    assert (found.format, found.model) == ("gguf", saved.model)
    for name, weight in saved.state.params.items():
        error = np.abs(found.params[name] - weight).max()
        assert error <= ROUNDING[outtype] * np.abs(weight).max()
    assert found.tokenizer.decode(found.tokenizer.encode(text)) == text
    ours = saved.tokenizer
    assert kind == "bpe" or found.tokenizer.to_json() == ours
    n_bytes = (folder / "model.gguf").stat().st_size
    assert outtype == "f32" or n_bytes < 0.8 * exported(recipe, kind)[1].stat().st_size + 1e6


@pytest.mark.parametrize("kind", ["char", "bpe"])
def test_a_vocabulary_without_merges_comes_in_again(
    exported: Make, kind: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exported.ODD", "")  # ASCII only
    monkeypatch.setattr("exported.BPE_SIZE", 258)  # the bytes and two special tokens
    saved, folder = exported("portable", kind)
    reader = gguf.GGUFReader(folder / "model.gguf")
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["þ ÿ"]
    again, ours = read_foreign(folder).tokenizer, tokenizer_from_json(saved.tokenizer)
    assert again.encode(text).tolist() == ours.encode(text).tolist()


def test_the_modelfile_names_the_file_the_stop_and_the_context(exported: Make) -> None:
    _, folder = exported()
    lines = (folder / "Modelfile").read_text().splitlines()
    assert lines[0] == "FROM ./model.gguf"
    assert {'PARAMETER stop "<eos>"', "PARAMETER num_ctx 250"} < set(lines)


@pytest.mark.parametrize("width", [64, 60])
def test_rows_that_no_block_divides_are_stored_in_float16(exported: Make, width: int) -> None:
    _, folder = exported(outtype="q8_0", n_embd=width, n_head=2)
    kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(folder / "model.gguf").tensors}
    assert kinds["blk.0.attn_q.weight"] == ("Q8_0" if width == 64 else "F16")
    assert kinds["blk.0.attn_norm.weight"] == "F32"


def rewrite(folder: Path, changes: dict[str, Any]) -> None:
    """Write the file again with other settings; None leaves one out."""
    path = folder / "model.gguf"
    reader = gguf.GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    settings = {n: v for n, v in settings.items() if not n.startswith("GGUF.")} | changes
    arch = settings.pop("general.architecture")
    writer = gguf.GGUFWriter(folder / "new.gguf", arch)
    for name, value in settings.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif value is not None:
            writer.add_float32(name, value)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (folder / "new.gguf").replace(path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, None),
        ({"general.architecture": "llama"}, "architecture 'llama'; supported are gpt2, arcee"),
        ({"arcee.feed_forward_length": 300}, "feed_forward_length=300; supported is 256"),
        ({"arcee.attention.head_count_kv": 2}, "head_count_kv=2; supported is 4"),
        ({"arcee.rope.freq_base": 0.5}, "rope_base=0.5"),
        ({"arcee.rope.freq_base": "many"}, "rope base 'many'; it is a number"),
        ({"arcee.rope.scaling.type": "yarn"}, "scales its rotary positions"),
        ({"arcee.attention.layer_norm_rms_epsilon": 1e-6}, "supported is 1e-05"),
        ({"arcee.block_count": 3}, r"lacks the tensor blk\.2\."),
        ({"arcee.block_count": None}, "block_count=None is not a whole number"),
        ({"arcee.attention.head_count": 5}, "head_count_kv=4; supported is 5"),
        ({"tokenizer.ggml.model": "llama"}, "has the tokenizer 'llama'"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "has 2 tokens of"),
        ({"tokenizer.ggml.merges": None}, "has no list tokenizer.ggml.merges"),
    ],
)
def test_another_model_is_refused(
    exported: Make, changes: dict[str, Any], reason: str | None
) -> None:
    _, folder = exported()
    if changes.get("general.architecture"):
        changes = {"general.name": "x"} | changes
    rewrite(folder, changes)
    if reason is None:
        read_foreign(folder)
        return
    with pytest.raises(UserError, match=reason) as caught:
        read_foreign(folder / "model.gguf")
    assert "\n" not in str(caught.value)


def test_a_truncated_file_is_refused(exported: Make) -> None:
    _, folder = exported()
    path = folder / "model.gguf"
    content = path.read_bytes()
    for n in (3, 30, 300, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:n])
        with pytest.raises(UserError):
            read_foreign(path)
