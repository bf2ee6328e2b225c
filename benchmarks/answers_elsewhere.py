"""Ask a model of dialogue and its exports the same questions, and compare the greedy answers.

    python benchmarks/answers_elsewhere.py checkpoints/checkpoint_best.safetensors --data q.jsonl

Rows of the file are `{"messages": […]}`; the last assistant message is the expected answer. Every
program that is installed is asked: `mlxgpt chat` through a pipe, `mlxgpt serve` through the client
of OpenAI, transformers, mlx-lm, and llama.cpp through xllamacpp.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlx_randygpt import load
from mlx_randygpt.checkpoint import load_checkpoint
from mlx_randygpt.dialogue import Turn, render_prompt
from mlx_randygpt.exchange.arcee import find_misfit
from mlx_randygpt.exchange.export import export
from mlx_randygpt.sampling.filters import SampleConfig
from mlx_randygpt.sampling.generate import generate

os.environ.setdefault("HF_HUB_OFFLINE", "1")
MLXGPT = (sys.executable, "-m", "mlx_randygpt")
Messages = list[dict[str, str]]


def read_questions(path: Path, limit: int) -> tuple[list[Messages], list[str]]:
    """Return the messages before each last answer, and these answers."""
    with open(path, encoding="utf-8") as lines:
        rows = [json.loads(line)["messages"] for line in lines]
    return [row[:-1] for row in rows[:limit]], [row[-1]["content"] for row in rows[:limit]]


def answers_of_model(checkpoint: Path, questions: list[Messages], n: int) -> list[str]:
    """Return the answers of the NumPy backend in this process."""
    model, found = load(checkpoint, backend="numpy"), []
    config = SampleConfig(max_tokens=n, temperature=0.0)
    for question in questions:
        turns = [Turn(message["role"], message["content"]) for message in question]
        ids = render_prompt(turns, model.tokenizer).tolist()
        *_, [sample] = generate(model.backend, model.config, model.tokenizer, ids, config)
        found.append(sample.text)
    return found


def answers_of_chat(checkpoint: Path, questions: list[Messages], n: int) -> list[str]:
    """Return what `mlxgpt chat` writes; questions and answers are lines, one turn each."""
    lines = []
    for *before, question in questions:
        system = before[0]["content"] if before else ""
        assert len(before) == bool(system), "chat makes the answers between by itself"
        lines += ["/reset", f"/system {system}", question["content"]]
    words = ["chat", "--checkpoint", checkpoint, "--backend", "numpy", "--temperature", "0"]
    command = [*MLXGPT, *map(str, words), "--max-tokens", str(n)]
    typed = "".join(f"{line}\n" for line in lines)
    done = subprocess.run(command, input=typed, capture_output=True, text=True, check=True)
    return done.stdout.removesuffix("\n").split("\n")


def answers_of_openai(checkpoint: Path, questions: list[Messages], n: int) -> list[str]:
    """Return what the client of OpenAI gets from `mlxgpt serve`."""
    from openai import OpenAI

    words = ["serve", "--checkpoint", str(checkpoint), "--backend", "numpy", "--port", "0"]
    server = subprocess.Popen([*MLXGPT, *words], stderr=subprocess.PIPE, text=True)
    try:
        assert server.stderr is not None
        line = next(line for line in server.stderr if line.startswith("Serving on "))
        client, found = OpenAI(base_url=line.split()[2] + "/v1", api_key="none"), []
        name = client.models.list().data[0].id
        for question in questions:
            answer = client.chat.completions.create(
                model=name,
                messages=question,  # type: ignore[arg-type]
                max_tokens=n,
                temperature=0,
            )
            found.append(answer.choices[0].message.content or "")
        return found
    finally:
        server.terminate()
        server.communicate()


def answers_of_transformers(folder: Path, questions: list[Messages], n: int) -> list[str]:
    """Return the answers of transformers through the exported template."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trust = {"trust_remote_code": (folder / "modeling_mlxgpt.py").exists()}
    model = AutoModelForCausalLM.from_pretrained(folder, **trust).eval()
    tokenizer, found = AutoTokenizer.from_pretrained(folder, **trust), []
    for question in questions:
        inputs = tokenizer.apply_chat_template(
            question, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        ids = model.generate(**inputs, max_new_tokens=n, do_sample=False)
        new = ids[0, inputs["input_ids"].shape[1] :]
        found.append(str(tokenizer.decode(new, skip_special_tokens=True)))
    return found


def answers_of_mlx_lm(folder: Path, questions: list[Messages], n: int) -> list[str]:
    """Return the answers of mlx-lm through the exported template."""
    from mlx_lm import generate as write
    from mlx_lm.utils import load as load_mlx_lm

    trust = {"trust_remote_code": True}
    model, tokenizer = load_mlx_lm(str(folder), tokenizer_config=trust, **trust)
    prompts = [tokenizer.apply_chat_template(q, add_generation_prompt=True) for q in questions]
    return [str(write(model, tokenizer, prompt, max_tokens=n)) for prompt in prompts]


def answers_of_llama_cpp(folder: Path, questions: list[Messages], n: int) -> list[str]:
    """Return the answers of llama.cpp through its own chat API, with a cache in float32 as ours."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(folder / "model.gguf")
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    params.warmup = False
    server, found = xllamacpp.Server(params), []
    for question in questions:
        body = {"messages": question, "max_tokens": n, "temperature": 0.0}
        answer = server.handle_chat_completions(body)
        found.append(str(answer["choices"][0]["message"]["content"]))
    return found


# name -> the modules that it needs, the format of export that it reads, a function
PROGRAMS: dict[str, tuple[tuple[str, ...], str, Callable[..., list[str]]]] = {
    "chat": (("rich",), "", answers_of_chat),
    "openai": (("openai", "uvicorn"), "", answers_of_openai),
    "transformers": (("torch", "transformers"), "hf", answers_of_transformers),
    "mlx-lm": (("mlx_lm",), "mlx-lm", answers_of_mlx_lm),
    "xllamacpp": (("xllamacpp", "gguf"), "gguf", answers_of_llama_cpp),
}


def main() -> None:
    """Print one line per program."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=1000, help="questions")
    parser.add_argument("--tokens", type=int, default=100, help="of an answer, at most")
    parser.add_argument("--only", choices=tuple(PROGRAMS), help="ask only this program")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    saved = load_checkpoint(args.checkpoint, weights_only=True)
    questions, expected = read_questions(args.data, args.limit)
    ours = answers_of_model(args.checkpoint, questions, args.tokens)
    rows: dict[str, Any] = {}

    def report(name: str, answers: list[str]) -> None:
        right = sum(a == b for a, b in zip(answers, expected, strict=True))
        other = [i for i, (a, b) in enumerate(zip(answers, ours, strict=True)) if a != b]
        print(f"{name}: {right} of {len(ours)} right, {len(other)} not as the first", flush=True)
        for i in other[:3]:
            print(f"  {questions[i][-1]['content']!r}: {answers[i]!r}, not {ours[i]!r}")
        rows[name] = {"right": right, "other": len(other), "answers": answers}

    report("mlxgpt, in Python", ours)
    for name, (modules, kind, ask) in PROGRAMS.items():
        if args.only not in (None, name):
            continue
        if any(importlib.util.find_spec(m) is None for m in modules):
            print(f"{name}: not installed")
            continue
        if kind == "gguf" and not saved.model.is_gpt2 and find_misfit(saved.model):
            print(f"{name}: has no such architecture")
            continue
        with tempfile.TemporaryDirectory() as work:
            subject = Path(work, "x") if kind else args.checkpoint
            if kind:
                export(saved, kind, subject)
            answers = ask(subject, questions, args.tokens)
        version = "" if name == "chat" else f" {importlib.metadata.version(name)}"
        report(f"{name}{version}", answers)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=2, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main()
