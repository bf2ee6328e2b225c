"""The format `gguf`: one file for llama.cpp, Ollama and LM Studio, and a Modelfile beside it.

Two architectures of llama.cpp are also ours: `arcee`, which the recipe `portable` trains, and
`gpt2`. Their tokens are characters, or byte-level BPE with GPT-2's own rule for splitting words.
Other models are refused with the reason.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.config import missing
from mlx_randygpt.dialogue import CHAT_TEMPLATE, has_dialogue
from mlx_randygpt.exchange import ExchangeError, arcee
from mlx_randygpt.exchange.exporters.arcee import weights as arcee_weights
from mlx_randygpt.exchange.exporters.gpt2 import with_biases
from mlx_randygpt.exchange.exporters.tokenizer import token_names, tokenizer_json
from mlx_randygpt.model import GPT2_NORM_EPS
from mlx_randygpt.state import Array, Params
from mlx_randygpt.tokenizers import END_OF_TURN, Tokenizer, stops, tokenizer_from_json
from mlx_randygpt.tokenizers.chars import UNK, CharTokenizer

GGUF, MODELFILE = "model.gguf", "Modelfile"
OUTSIDE = {"wte": "token_embd", "wpe": "position_embd", "ln_f": "output_norm"}
LAYER = {  # our name -> that of llama.cpp's gpt2
    "ln_1": "attn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
OLLAMA_TEMPLATE = (  # CHAT_TEMPLATE in the language of Go
    "{{ range .Messages }}<|{{ .Role }}|>{{ .Content }}<|end|>{{ end }}<|assistant|>"
)
OUTTYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # type of the matrices -> general.file_type
Q8_0_BLOCK = 32  # values that share a scale
NO_MERGE = "þ ÿ"  # llama.cpp needs a merge; this one is of two bytes that UTF-8 does not have
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED = 1, 2, 3, 4, 5  # kinds of tokens


def gguf_files(saved: Checkpoint, name: str, outtype: str = "f32") -> dict[str, bytes]:
    """Return the model's file and a Modelfile; `outtype` is a key of OUTTYPES.

    Raises ExchangeError if llama.cpp cannot compute this model.
    """
    refuse_misfit(saved)
    try:
        from gguf import GGUFWriter
    except ImportError as error:
        raise missing("--format gguf", "gguf", "gguf") from error
    tensors = gpt2_weights(saved) if saved.model.is_gpt2 else arcee_weights(saved, arcee.GGUF)
    with TemporaryDirectory() as folder:
        path = Path(folder, GGUF)
        writer = GGUFWriter(path, "gpt2" if saved.model.is_gpt2 else arcee.MODEL_TYPE)
        writer.add_name(name)
        writer.add_file_type(OUTTYPES[outtype])
        add_settings(writer, saved)
        add_tokenizer(writer, saved)
        for weight, array in tensors.items():
            add_tensor(writer, weight, array, outtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return {GGUF: path.read_bytes(), MODELFILE: modelfile(saved).encode()}


def refuse_misfit(saved: Checkpoint) -> None:
    """Raise ExchangeError with the reason if llama.cpp cannot run the model."""
    model, content = saved.model, saved.tokenizer.get("tokenizer", {})
    if model.is_gpt2 and model.activation != "gelu_tanh":
        raise ExchangeError(
            f"--format gguf: llama.cpp's gpt2 has the tanh GELU, this model has "
            f"activation {model.activation!r}; use --format hf"
        )
    if not model.is_gpt2 and (misfit := arcee.find_misfit(model)):
        raise ExchangeError(
            f"--format gguf: llama.cpp has no architecture with this model's {misfit}; a model "
            "trained with --recipe portable fits, and --format hf works for this one"
        )
    if saved.tokenizer["type"] == "table":
        raise ExchangeError(
            "--format gguf: llama.cpp needs a token that ends a text, and this model's table of "
            "characters has none; use --format hf"
        )
    if saved.tokenizer["type"] == "char":
        return
    pre, kind = content.get("pre_tokenizer") or {}, content["model"].get("type")
    plain = pre.get("type") == "ByteLevel" and not pre.get("add_prefix_space")
    if not (plain and pre.get("use_regex", True) and kind == "BPE" and not content["normalizer"]):
        raise ExchangeError(
            "--format gguf: llama.cpp reads byte-level BPE as GPT-2 splits it, this model "
            f"has {kind or saved.tokenizer['type']} after {pre.get('type')}; use --format hf"
        )


def add_settings(writer: Any, saved: Checkpoint) -> None:
    """Add the settings from which llama.cpp builds the model."""
    model = saved.model
    writer.add_context_length(model.block_size)
    writer.add_embedding_length(model.n_embd)
    writer.add_feed_forward_length(4 * model.n_embd)
    writer.add_block_count(model.n_layer)
    writer.add_head_count(model.n_head)
    if model.is_gpt2:
        writer.add_layer_norm_eps(GPT2_NORM_EPS)
        return
    writer.add_head_count_kv(model.n_head)
    writer.add_layer_norm_rms_eps(arcee.NORM_EPS)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_rope_dimension_count(model.head_size)
    writer.add_vocab_size(model.vocab_size)


def add_tokenizer(writer: Any, saved: Checkpoint) -> None:
    """Add the vocabulary sorted by id, its merges and the special tokens."""
    tokenizer = tokenizer_from_json(saved.tokenizer)
    if isinstance(tokenizer, CharTokenizer):
        names, kinds, merges = characters_as_bpe(tokenizer)
    else:
        names, kinds, merges = byte_level_bpe(saved.tokenizer["tokenizer"], tokenizer)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges or [NO_MERGE])
    writer.add_bos_token_id(tokenizer.bos)
    writer.add_eos_token_id(tokenizer.eos)
    writer.add_add_bos_token(False)
    if has_dialogue(tokenizer):
        writer.add_eot_token_id(tokenizer.special(END_OF_TURN))
        writer.add_chat_template(CHAT_TEMPLATE)


def byte_level_bpe(
    content: dict[str, Any], tokenizer: Tokenizer
) -> tuple[list[str], list[int], list[str]]:
    """Return the names and kinds of the tokens of a tokenizer.json by id, and its merges."""
    names = token_names(content)
    kind_of = dict.fromkeys(names, NORMAL)
    for token in content["added_tokens"]:
        kind_of[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    ids = range(tokenizer.vocab_size)
    kinds = [kind_of.get(i, UNUSED) for i in ids]
    merges = [m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]]
    return [names.get(i, f"[unused{i}]") for i in ids], kinds, merges


def characters_as_bpe(tokenizer: CharTokenizer) -> tuple[list[str], list[int], list[str]]:
    """Return a character vocabulary as byte-level BPE: names, kinds and merges.

    The only merges assemble the bytes of one character. UTF-8 is free of prefixes, so no merge
    crosses the border of two characters. Unknown characters have no tokens and are left out.
    """
    from mlx_randygpt.tokenizers.subword import byte_characters

    char_of = byte_characters()
    spelled = ["".join(char_of[byte] for byte in char.encode()) for char in tokenizer.chars]
    merges = dict.fromkeys(f"{s[:n]} {s[n]}" for s in spelled for n in range(1, len(s)))
    kinds = [UNKNOWN if name == UNK else CONTROL for name in tokenizer.specials]
    return [*spelled, *tokenizer.specials], [NORMAL] * len(spelled) + kinds, [*merges]


def add_tensor(writer: Any, name: str, array: Array, outtype: str) -> None:
    """Add a weight. Vectors and positions stay float32, and rows that no block divides float16."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    if outtype == "f32" or array.ndim == 1 or name == "position_embd.weight":
        writer.add_tensor(name, array)
        return
    fits = outtype == "q8_0" and array.shape[-1] % Q8_0_BLOCK == 0
    kind = GGMLQuantizationType.Q8_0 if fits else GGMLQuantizationType.F16
    writer.add_tensor(name, quantize(array, kind), raw_dtype=kind)


def gpt2_weights(saved: Checkpoint) -> Params:
    """Return the weights of a GPT-2 by their names in llama.cpp."""
    names = gpt2_names(saved.model.n_layer)
    return {names[name]: array for name, array in with_biases(saved).items()}


def gpt2_names(n_layer: int) -> dict[str, str]:
    """Return our names of tensors -> those of llama.cpp, such as `blk.0.attn_qkv.weight`."""
    stems = dict(OUTSIDE)
    for i in range(n_layer):
        stems |= {f"h.{i}.{ours}": f"blk.{i}.{theirs}" for ours, theirs in LAYER.items()}
    kinds = ("weight", "bias")
    return {f"{ours}.{k}": f"{theirs}.{k}" for ours, theirs in stems.items() for k in kinds}


def modelfile(saved: Checkpoint) -> str:
    """Return the Modelfile from which `ollama create` makes a model that answers or continues."""
    tokenizer = tokenizer_from_json(saved.tokenizer)
    names = token_names(tokenizer_json(tokenizer))
    template = OLLAMA_TEMPLATE if has_dialogue(tokenizer) else "{{ .Prompt }}"
    stop = "".join(f'PARAMETER stop "{names[end]}"\n' for end in stops(tokenizer))
    return (
        f'FROM ./{GGUF}\nTEMPLATE "{template}"\n{stop}PARAMETER num_ctx {saved.model.block_size}\n'
    )
