"""The format `adapters`: the LoRA weights without the model that they adapt.

For a GPT-2 these are PEFT's files, for our own architecture one safetensors file with our names.
"""

from __future__ import annotations

import json
from typing import Any

import safetensors.numpy

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.config import LORA_TARGETS
from mlx_randygpt.exchange import ExchangeError
from mlx_randygpt.exchange.exporters.card import facts, licences
from mlx_randygpt.exchange.exporters.tokenizer import as_json
from mlx_randygpt.model import adapter_shapes, trained_count
from mlx_randygpt.state import Params

PREFIX = "base_model.model.transformer."  # of every name in a file of PEFT for a GPT-2
PEFT = """```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("BASE")  # the model of --init-from
model = PeftModel.from_pretrained(base, {name})
```
"""
NATIVE = """A matrix W of the base becomes W + (lora_alpha / lora_rank) · lora_b · lora_a; both
numbers are in the metadata of `adapters.safetensors`. A and B have the name of their matrix.
"""


def adapter_files(saved: Checkpoint, name: str) -> dict[str, bytes]:
    """Return the files of a folder called `name`; raise ExchangeError without adapters."""
    model, params = saved.model, saved.state.params
    if not model.lora_rank:
        raise ExchangeError(
            "--format adapters is for a model that was trained with --lora-rank; use --format hf "
            "or safetensors for this one"
        )
    adapters = {weight: params[weight] for weight in adapter_shapes(model)}
    if not model.is_gpt2:
        metadata = {n: str(getattr(model, n)) for n in ("lora_rank", "lora_alpha", "lora_targets")}
        files = {"adapters.safetensors": safetensors.numpy.save(adapters, metadata)}
    else:
        files = {
            "adapter_config.json": as_json(peft_config(saved)),
            "adapter_model.safetensors": safetensors.numpy.save(
                peft_names(adapters), {"format": "pt"}
            ),
        }
    return {**files, "README.md": _card(saved, name).encode()}


def peft_config(saved: Checkpoint) -> dict[str, Any]:
    """Return adapter_config.json, with fan_in_fan_out: transformers stores GPT-2 as (in, out)."""
    model = saved.model
    targets = model.lora_targets.split(",")
    layers = [layer for layer in LORA_TARGETS if layer != "all" and {layer, "all"} & {*targets}]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,  # not recorded in a checkpoint
        "r": model.lora_rank,
        "lora_alpha": model.lora_alpha,
        "lora_dropout": 0.0,
        "target_modules": layers,
        "fan_in_fan_out": True,
        "bias": "none",
        "inference_mode": True,
    }


def peft_names(adapters: Params) -> Params:
    """Rename h.0.attn.c_attn.lora_a to PREFIX + h.0.attn.c_attn.lora_A.weight, and so on."""
    return {
        f"{PREFIX}{name.replace('lora_a', 'lora_A').replace('lora_b', 'lora_B')}.weight": array
        for name, array in adapters.items()
    }


def _card(saved: Checkpoint, name: str) -> str:
    model = saved.model
    rows = "\n".join(f"| {label} | {value} |" for label, value in facts(saved))
    licence = "\n".join(f"- {line}" for line in licences(saved.data))
    how = PEFT.format(name=json.dumps(name)) if model.is_gpt2 else NATIVE
    return f"""---
library_name: {"peft" if model.is_gpt2 else "mlx-randygpt"}
pipeline_tag: text-generation
tags: [lora, mlx-randygpt, gpt]
---

# Adapters

LoRA adapters of rank {model.lora_rank}: {trained_count(model):,} numbers that change the model they
were trained on.

| | |
|---|---|
{rows}

## Licence

Of the training data:

{licence}

## How to use them

{how}"""
