"""The format `gguf`: one file for llama.cpp, for models of an architecture that it supports.

That is `gpt2` with byte-level BPE and GPT-2's own rule for splitting words. Other models are
refused with the reason. Tensors stay float32; llama-quantize reduces their precision.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.config import missing
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.gpt2 import with_biases
from mlx_randygpt.exchange.exporters.tokenizer import token_names
from mlx_randygpt.model import GPT2_NORM_EPS
from mlx_randygpt.tokenizers import tokenizer_from_json

GGUF = "model.gguf"
OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
LAYER = {  # our name -> that of llama.cpp
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
ALL_FLOAT32 = 0  # general.file_type
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens


def gguf_files(saved: Checkpoint, name: str) -> dict[str, bytes]:
    """Return the file; raise ExchangeError if llama.cpp cannot compute this model."""
    refuse_misfit(saved)
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise missing("--format gguf", "gguf", "gguf") from error
    with TemporaryDirectory() as folder:
        path = Path(folder, GGUF)
        writer = GGUFWriter(path, "gpt2")
        add_settings(writer, saved, name)
        add_tokenizer(writer, saved)
        names = tensor_names(saved.model.n_layer)
        for weight, array in with_biases(saved).items():
            writer.add_tensor(names[weight], array)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {GGUF: path.read_bytes()}


def refuse_misfit(saved: Checkpoint) -> None:
    """Raise ExchangeError with the reason if llama.cpp's `gpt2` is a different model."""
    model, content = saved.model, saved.tokenizer.get("tokenizer", {})
    if not model.is_gpt2:
        raise ExchangeError(
            "--format gguf: llama.cpp has no architecture with this model's norms without gains "
            "and squared ReLU; only arch gpt2 fits; use --format hf for this one"
        )
    if model.activation != "gelu_tanh":
        raise ExchangeError(
            f"--format gguf: llama.cpp's gpt2 has the tanh GELU, this model has "
            f"activation {model.activation!r}; use --format hf"
        )
    if saved.tokenizer["type"] in ("char", "table"):
        raise ExchangeError(
            "--format gguf: llama.cpp's gpt2 reads byte-level BPE, this model reads characters; "
            "train with --tokenizer bpe, or use --format hf"
        )
    pre, kind = content.get("pre_tokenizer") or {}, content["model"].get("type")
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space")
    if not (plain and pre.get("use_regex", True) and kind == "BPE" and not content["normalizer"]):
        raise ExchangeError(
            "--format gguf: llama.cpp's gpt2 reads byte-level BPE as GPT-2 splits it, this model "
            f"has {kind or saved.tokenizer['type']} after {pre.get('type')}; use --format hf"
        )


def add_settings(writer: Any, saved: Checkpoint, name: str) -> None:
    """Add the settings from which llama.cpp builds the model."""
    model = saved.model
    writer.add_name(name)
    writer.add_file_type(ALL_FLOAT32)
    writer.add_context_length(model.block_size)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(4 * model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_head_count(model.n_head)
    writer.add_layer_norm_eps(GPT2_NORM_EPS)


def add_tokenizer(writer: Any, saved: Checkpoint) -> None:
    """Add the vocabulary sorted by id, its merges and the special tokens."""
    content, tokenizer = saved.tokenizer["tokenizer"], tokenizer_from_json(saved.tokenizer)
    names = token_names(content)
    kind_of = dict.fromkeys(names, NORMAL)
    for token in content["added_tokens"]:
        kind_of[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    ids = range(tokenizer.vocab_size)
    kinds = [kind_of.get(i, UNUSED) for i in ids]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([names.get(i, f"[unused{i}]") for i in ids])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_add_bos_token(False)


def tensor_names(n_layer: int) -> dict[str, str]:
    """Return our names of tensors -> those of llama.cpp, such as `blk.0.attn_qkv.weight`."""
    stems = dict(OUTSIDE)
    for i in range(n_layer):
        stems |= {f"h.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in LAYER.items()}
    kinds = ("weight", "bias")
    return {f"{ours}.{k}": f"{theirs}.{k}" for ours, theirs in stems.items() for k in kinds}
