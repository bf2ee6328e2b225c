"""What the page shows besides texts: the model, its run, the attention of one head, and copies."""

from __future__ import annotations

import shlex
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlx_randygpt.analysis.insight import attention_map
from mlx_randygpt.dialogue import has_dialogue, render
from mlx_randygpt.model import parameter_count
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.serve import ApiError, ServedModel
from mlx_randygpt.serve.models import AttentionBody, CopiesBody
from mlx_randygpt.serve.requests import turns_of
from mlx_randygpt.tokenizers import token_speller

MAX_ATTENTION_TOKENS = 128  # of an attention map
MAX_COPIES_CHARACTERS = 1 << 16  # of a text that is compared with the training text
SHOWN_SETTINGS = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "repetition_penalty",
    "seed",
)


def describe_run(served: ServedModel, defaults: SampleConfig, backend_name: str) -> dict[str, Any]:
    """Return the model, its run, and the server's settings, as the page needs them."""
    model = served.model
    return {
        "name": served.name,
        "step": served.step,
        "curve": served.curve,
        "parameters": parameter_count(model),
        "block_size": model.block_size,
        "n_layer": model.n_layer,
        "n_head": model.n_head,
        "vocab_size": model.vocab_size,
        "backend": backend_name,
        "dialogue": has_dialogue(served.tokenizer),
        "prompt": served.prompt,
        "check": served.find_copies is not None,
        "options": _other_options(served, defaults),
        "defaults": {name: getattr(defaults, name) for name in SHOWN_SETTINGS},
        "plain": {name: getattr(SampleConfig(), name) for name in SHOWN_SETTINGS},
    }


def map_attention(served: ServedModel, body: AttentionBody) -> dict[str, Any]:
    """Return the last tokens of a text and how one head weighs them, a row for each token."""
    model = served.model
    if not served.params:
        raise ApiError(404, "attention maps need the float weights; serve without --quantize")
    for name, n in (("layer", model.n_layer), ("head", model.n_head)):
        if (value := getattr(body, name)) >= n:
            raise ApiError(400, f"{name}={value} does not exist; use 0 to {n - 1}", param=name)
    ids = _ids_of(served, body)[-min(MAX_ATTENTION_TOKENS, model.block_size) :]
    weights = attention_map(served.params, model, ids, body.layer, body.head)
    rows = [[round(float(x), 4) for x in row[: i + 1]] for i, row in enumerate(weights)]
    spell = token_speller(served.tokenizer)
    return {"tokens": [spell(int(i)) for i in ids], "weights": rows}


def _ids_of(served: ServedModel, body: AttentionBody) -> NDArray[np.int32]:
    """Return the tokens of the text or of the messages; ApiError unless there is one of both."""
    if (body.text is None) == (body.messages is None):
        raise ApiError(400, "send either text or messages", param="text")
    if body.messages is None:
        ids = served.tokenizer.encode(body.text or "")
        return ids if ids.size else np.array([served.tokenizer.bos], np.int32)
    if not has_dialogue(served.tokenizer):
        message = "this model continues text; send text instead of messages"
        raise ApiError(400, message, param="messages")
    return render(turns_of(body.messages), served.tokenizer).ids


def report_copies(served: ServedModel, body: CopiesBody) -> dict[str, Any]:
    """Return what a text copies from the training text."""
    if served.find_copies is None:
        raise ApiError(404, "the training text is not loaded; serve with --check")
    if (n := len(body.text)) > MAX_COPIES_CHARACTERS:
        message = f"text has {n:,} characters; at most {MAX_COPIES_CHARACTERS:,} can be compared"
        raise ApiError(400, message, param="text")
    return served.find_copies(body.text)


def _other_options(served: ServedModel, config: SampleConfig) -> str:
    """Return the model and the settings that have no slider as options of the command line."""
    words = list(served.options)
    for name in ("presence_penalty", "frequency_penalty"):
        if value := getattr(config, name):
            words += [f"--{name.replace('_', '-')}", str(value)]
    words += [word for token, x in config.logit_bias for word in ("--logit-bias", f"#{token}={x}")]
    words += [word for stop in config.stop for word in ("--stop", stop)]
    return " " + shlex.join(words) if words else ""
