"""The model card: a description of the model, its data and training, and how to run it.

Every figure comes from the checkpoint; the card marks what the checkpoint does not record.
"""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mlx_randygpt import __version__
from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.data.corpora import LIBRARY
from mlx_randygpt.data.files import sample_corpus_path
from mlx_randygpt.dialogue import has_dialogue
from mlx_randygpt.exchange.arcee import find_misfit
from mlx_randygpt.model import parameter_count
from mlx_randygpt.tokenizers import tokenizer_from_json
from mlx_randygpt.training.reports import perplexity

UNKNOWN = "unknown: add it"
N_NAMES = 20  # file names that are listed
TESTED = {"mlx-lm": "0.32.2", "transformers": "5.0.0 and 5.24.0"}  # versions
RUN = {
    "mlx-lm": """With mlx-lm (tested with {mlx_lm}), from the folder above:

```sh
mlx_lm.generate --model {name}{flag} --prompt "{prompt}" --temp 0.8 --top-p 0.9
mlx_lm.convert --hf-path {name}{flag} --mlx-path {small} -q
```
""",
    "transformers": """With transformers (tested with {transformers}) and PyTorch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({string}{argument})
model = AutoModelForCausalLM.from_pretrained({string}{argument})
inputs = tokenizer("{prompt}", return_tensors="pt")
text = model.generate(**inputs, max_new_tokens={most}, do_sample=True, temperature=0.8, top_p=0.9)
print(tokenizer.decode(text[0], skip_special_tokens=True))
```
""",
    "vllm": """With vLLM:

```sh
vllm serve {name}
```
""",
    "safetensors": """```sh
mlxgpt sample --checkpoint {file}
```

The file is a checkpoint of mlxgpt without the optimizer's moments, and an ordinary safetensors
file for other programs.
""",
    "gguf": """With llama.cpp, from the folder above:

```sh
llama-completion -m {file} -no-cnv -p "{prompt}"
```

With Ollama:

```sh
ollama create {name} -f {name}/Modelfile
ollama run {name} "{prompt}"
```

LM Studio lists it after `lms import {file}`.
""",
}
ANSWER = {  # how a model of dialogue runs, if not in the same way
    "transformers": """With transformers (tested with {transformers}) and PyTorch:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({string}{argument})
model = AutoModelForCausalLM.from_pretrained({string}{argument})
messages = [{{"role": "user", "content": "{prompt}"}}]
inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
)
ids = model.generate(**inputs, max_new_tokens={most}, do_sample=False)
print(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
```
""",
    "safetensors": """```sh
mlxgpt chat --checkpoint {file}
```

The file is a checkpoint of mlxgpt without the optimizer's moments, and an ordinary safetensors
file for other programs.
""",
    "gguf": """With llama.cpp, from the folder above (--jinja is the default since the end of 2025):

```sh
llama-cli -m {file} --jinja
llama-server -m {file} --jinja
```

With Ollama:

```sh
ollama create {name} -f {name}/Modelfile
ollama run {name} "{prompt}"
```

LM Studio lists it after `lms import {file}`.
""",
}
OWN_CODE = """
Both run the Python files of this folder, so read them or trust their source.
"""
CONTEXT = """
Prompt and new text together have at most {size} tokens.
"""
LIBRARIES = {"hf": "transformers", "mlx-lm": "mlx", "gguf": "gguf", "safetensors": "mlx-randygpt"}


def card(saved: Checkpoint, kind: str, name: str) -> str:
    """Return the README.md of a folder called `name`."""
    rows = "\n".join(f"| {label} | {value} |" for label, value in facts(saved))
    licence = "\n".join(f"- {line}" for line in licences(saved.data))
    return f"""---
library_name: {LIBRARIES[kind]}
pipeline_tag: text-generation
tags: [mlx, mlx-randygpt, gpt]
---

# {_cell(name)}

{origin(saved)}
{purpose(saved)}

| | |
|---|---|
{rows}

## Licence

Of the data:

{licence}

Of this model: {UNKNOWN}.

## How to run it

{run_lines(saved, kind, name)}"""


def origin(saved: Checkpoint) -> str:
    """Describe the origin of the model as far as the checkpoint records it."""
    imported = saved.data.get("imported")
    if not isinstance(imported, dict):
        return f"A GPT trained with mlx-randygpt {__version__}."
    source = _cell(Path(str(imported.get("source"))).name)
    kind = _cell(str(imported.get("format")))
    return f"A GPT from another program ({kind}, {source}), exported by mlx-randygpt {__version__}."


def purpose(saved: Checkpoint) -> str:
    """Describe what the model does."""
    if has_dialogue(tokenizer_from_json(saved.tokenizer)):
        return "It answers in dialogues like those of its training; it was not trained to be safe."
    return "It continues text; it was not trained to answer questions or to be safe."


def run_lines(saved: Checkpoint, kind: str, name: str) -> str:
    """Return commands that run the model in a folder called `name`."""
    size, prompt, is_folder = saved.model.block_size, prompt_of(saved), kind in ("hf", "mlx-lm")
    is_arcee = kind == "hf" and not find_misfit(saved.model)
    own = is_folder and not (saved.model.is_gpt2 or is_arcee)  # our code is in it
    parts = ("transformers", "vllm") if is_arcee else ("mlx-lm", "transformers")
    run = RUN | ANSWER if has_dialogue(tokenizer_from_json(saved.tokenizer)) else RUN
    lines = "\n".join(run[part] for part in (parts if is_folder else (kind,)))
    ends_there = kind == "gguf" or (is_folder and not own)  # at the end of the context
    text = lines.format(
        name=shlex.quote(name),
        small=shlex.quote(f"{name}-4bit"),
        file=shlex.quote(f"{name}/model.{kind}"),
        string=json.dumps(name),
        prompt=prompt,
        flag=" --trust-remote-code" if own else "",
        argument=", trust_remote_code=True" if own else "",
        mlx_lm=TESTED["mlx-lm"],
        transformers=TESTED["transformers"],
        most=max(1, size - len(prompt)) if ends_there else 200,
    )
    return text + (OWN_CODE if own else CONTEXT.format(size=size) if ends_there else "")


def facts(saved: Checkpoint) -> Iterator[tuple[str, str]]:
    """Yield the figures of the run as label and value."""
    model, train, progress, data = saved.model, saved.train, saved.progress, saved.data
    yield "parameters", f"{parameter_count(model):,}"
    yield (
        "sizes",
        f"{model.n_layer} layers, {model.n_head} heads, width {model.n_embd}, "
        f"context {model.block_size} tokens",
    )
    yield "architecture", architecture(saved)
    yield "tokenizer", f"{saved.tokenizer['type']}, vocabulary {model.vocab_size:,}"
    yield "validation loss", loss_line(progress.val_loss, progress.bits_per_byte)
    yield "best validation loss", f"{_number(progress.best_loss)} at step {progress.best_step:,}"
    if "imported" in data:
        return  # its training is not recorded
    yield "steps", f"{saved.state.step:,} of {train.iters:,}"
    yield "tokens trained on", f"{progress.tokens:,}"
    yield "recipe", f"{train.recipe}, preset {train.preset}, seed {train.seed}"
    yield (
        "optimizer",
        f"{train.optimizer}, rate {train.lr:g} ({train.schedule}), weight decay "
        f"{train.weight_decay:g}, {train.sequences_per_step} sequences a step",
    )
    names = [_cell(Path(path).name) for path in data["paths"]]
    more = f" and {len(names) - N_NAMES} more" if len(names) > N_NAMES else ""
    yield "data", (", ".join(names[:N_NAMES]) or "unknown") + more
    yield "characters of data", f"{data['characters']:,}"
    yield "SHA-256 of data", data["sha256"] or "unknown"
    yield "trained with", f"the {saved.backend} backend"


def architecture(saved: Checkpoint) -> str:
    """Describe the components of the model in words."""
    model = saved.model
    if model.is_gpt2:
        biases = "biases" if model.bias else "no biases"
        return f"GPT-2: learned positions, LayerNorm, {model.activation}, {biases}, tied head"
    parts = ["rotary positions" if model.position == "rope" else "learned positions"]
    parts += ["QK-norm"] if model.qk_norm else []
    parts += ["token shift"] if model.token_shift else []
    parts += ["pre-norm RMSNorm without gains", "squared ReLU", "separate head"]
    return ", ".join(parts)


def loss_line(loss: float, bits: float) -> str:
    """Format a loss: `1.4602 nats per token (perplexity 4.31, 2.107 bits per byte)`."""
    if not math.isfinite(loss):
        return "not evaluated"
    measures = f"perplexity {perplexity(loss):.2f}"
    if math.isfinite(bits):
        measures += f", {bits:.3f} bits per byte"
    return f"{loss:.4f} nats per token ({measures})"


def licences(data: dict[str, Any]) -> list[str]:
    """Return the licence of each text, if it is a corpus of the library, by checksum or name."""
    lines = {}
    for path in map(Path, data["paths"]):
        lines[_cell(path.name)] = _licence(path, data["sha256"])
    return [f"{name}: {line}" for name, line in list(lines.items())[:N_NAMES]] or [UNKNOWN]


def _licence(path: Path, sha256: str) -> str:
    if path == sample_corpus_path():
        return "MIT, part of mlx-randygpt"
    for corpus in LIBRARY.values():
        if corpus.remote and sha256 and corpus.remote.sha256 == sha256:
            return corpus.licence
    for corpus in LIBRARY.values():
        if corpus.target in (path.name, path.parent.name):
            return f"{corpus.licence}, if it is the corpus `{corpus.name}`"
    return UNKNOWN


def prompt_of(saved: Checkpoint) -> str:
    """Return the run's prompt if it needs no quoting in a shell or Python, else "The"."""
    prompt = saved.train.prompt
    plain = prompt.isascii() and prompt.isprintable() and not set(prompt) & set('"\\$`!{}')
    return prompt if plain and prompt else "The"


def _number(value: float) -> str:
    return f"{value:.4f}" if math.isfinite(value) else "not evaluated"


def _cell(text: str) -> str:
    """Replace markup and line ends in a file name, for a cell of a table."""
    return "".join(c if c.isprintable() and c not in "|`<>[]*_" else "?" for c in text)
