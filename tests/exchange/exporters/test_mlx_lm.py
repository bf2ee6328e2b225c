"""Exports in mlx-lm itself: its loader, generate, server, convert and lora, as they are."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exported import greedy, make, streamed, windows

from mlx_randygpt.checkpoint import Checkpoint
from mlx_randygpt.exchange.export import export
from mlx_randygpt.state import Array
from mlx_randygpt.tokenizers import tokenizer_from_json

pytestmark = pytest.mark.filterwarnings("ignore")  # theirs
mlx_lm = pytest.importorskip("mlx_lm", exc_type=ImportError)
pytest.importorskip("tokenizers")
OFFLINE = {**os.environ, "HF_HUB_OFFLINE": "1", "MLX_ENABLE_TF32": "0"}
OFFLINE["MLX_DISABLE_COMPILE"] = "1"  # on a CPU it takes longer than what it compiles
RECIPES = ("classic", "modern", "portable", "gpt2")
CHUNKS = [100, 1, 1, 48, 1, 99]  # of one window


@pytest.fixture(scope="module")
def exported(
    text: str, tiny_model: Any, lively: Any, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[Checkpoint, Path]]:
    """(recipe, tokenizer) -> a checkpoint and the folder it was exported to."""
    made: dict[tuple[str, str], tuple[Checkpoint, Path]] = {}

    def build(recipe: str, kind: str = "char") -> tuple[Checkpoint, Path]:
        if (recipe, kind) not in made:
            saved = make(recipe, kind, text, tiny_model, lively)
            folder = tmp_path_factory.mktemp(recipe) / f"my {kind} model"
            export(saved, "mlx-lm", folder)
            made[recipe, kind] = saved, folder
        return made[recipe, kind]

    return build


def load(folder: Path) -> tuple[Any, Any]:
    from mlx_lm.utils import load

    trusted = {"trust_remote_code": True}
    found: tuple[Any, Any] = load(str(folder), tokenizer_config=trusted, trust_remote_code=True)
    return found


def logits(model: Any, ids: Array, cache: Any = None) -> Array:
    import mlx.core as mx

    return np.array(model(mx.array(ids[None]), cache=cache)[0])


@pytest.mark.parametrize("kind", ["char", "bpe", "table"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_logits_are_ours_on_1000_tokens(exported: Any, recipe: str, kind: str, text: str) -> None:
    saved, folder = exported(recipe, kind)
    model, tokenizer = load(folder)
    ids = tokenizer_from_json(saved.tokenizer).encode(text)[:1000]
    assert tokenizer.encode(text, add_special_tokens=False)[:1000] == ids.tolist()
    ours = streamed(saved, ids)
    whole = np.concatenate([logits(model, part) for part in windows(saved, ids)])
    assert np.abs(whole - ours).max() < 1e-4  # measured: 4.2e-5 of logits up to 40
    cache, at = model_cache(model), 0
    for n in CHUNKS if saved.model.position == "learned" else [*CHUNKS, *CHUNKS, 300, 200]:
        found = logits(model, ids[at : at + n], cache)
        assert np.abs(found - ours[at : at + n]).max() < 1e-4
        at += n


def model_cache(model: Any) -> Any:
    from mlx_lm.models.cache import make_prompt_cache

    return make_prompt_cache(model)


@pytest.mark.parametrize("n_prompt", [30, 150])
@pytest.mark.parametrize("odd", [{}, {"token_shift": True, "n_embd": 57, "n_head": 3}])
def test_learned_positions_begin_again_as_ours_do(
    text: str, tiny_model: Any, lively: Any, tmp_path: Path, odd: dict[str, Any], n_prompt: int
) -> None:
    from mlx_lm.generate import stream_generate

    saved = make("classic", "char", text, tiny_model, lively, block_size=64, **odd)
    export(saved, "hf", tmp_path / "x")
    model, tokenizer = load(tmp_path / "x")
    prompt = tokenizer_from_json(saved.tokenizer).encode(text)[:n_prompt]
    growing = stream_generate(model, tokenizer, prompt.tolist(), max_tokens=200)
    assert [int(one.token) for one in growing][:200] == greedy(saved, prompt, 200)


@pytest.mark.parametrize("recipe", ["modern", "gpt2"])
def test_texts_that_grow_together_are_ours(exported: Any, recipe: str, text: str) -> None:
    saved, folder = exported(recipe)
    model, tokenizer = load(folder)
    ids = tokenizer_from_json(saved.tokenizer).encode(text)
    prompts = [ids[:40], ids[100:110], ids[300:301]]
    n = 200 if recipe == "modern" else 100
    found = mlx_lm.batch_generate(model, tokenizer, [p.tolist() for p in prompts], max_tokens=n)
    for prompt, answer in zip(prompts, found.texts, strict=True):
        assert answer == spelled(saved, greedy(saved, prompt, n))


def spelled(saved: Checkpoint, ids: list[int]) -> str:
    return tokenizer_from_json(saved.tokenizer).decode(ids)


def run(*words: object) -> str:
    command = [sys.executable, "-m", "mlx_lm", *map(str, words)]
    done = subprocess.run(command, capture_output=True, env=OFFLINE, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()  # as it is: a model may write a carriage return


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_generate_writes_what_we_write(exported: Any, recipe: str) -> None:
    saved, folder = exported(recipe)
    prompt = tokenizer_from_json(saved.tokenizer).encode("The old")
    words = ["--model", folder, "--trust-remote-code", "--prompt", "The old", "--temp", 0]
    found = run("generate", *words, "--max-tokens", 200).split("==========\n")[1]
    assert found == spelled(saved, greedy(saved, prompt, 200)) + "\n"


@pytest.mark.slow
def test_a_model_in_4_bits_still_writes(exported: Any, tmp_path: Path) -> None:
    _, folder = exported("modern")
    small = tmp_path / "small"
    run("convert", "--hf-path", folder, "--trust-remote-code", "--mlx-path", small, "-q")
    assert json.loads((small / "config.json").read_text())["quantization"]["bits"] == 4
    sizes = [(f / "model.safetensors").stat().st_size for f in (small, folder)]
    assert sizes[0] < 0.2 * sizes[1]
    words = ["--model", small, "--trust-remote-code", "--prompt", "The", "--max-tokens", 20]
    assert len(run("generate", *words).split("==========\n")[1]) > 5


@pytest.mark.slow
def test_lora_trains_it(exported: Any, tmp_path: Path, text: str) -> None:
    _, folder = exported("modern")
    for name in ("train", "valid"):
        rows = [json.dumps({"text": line}) for line in text.splitlines() if line]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    words = ["--model", folder, "--train", "--data", tmp_path, "--adapter-path", tmp_path / "a"]
    words += ["--iters", 2, "--batch-size", 1, "--val-batches", 1, "--num-layers", 2]
    run("lora", *words, "--trust-remote-code", "--max-seq-length", 64)
    assert (tmp_path / "a" / "adapters.safetensors").exists()


@pytest.fixture
def server(exported: Any) -> Iterator[tuple[Checkpoint, str]]:
    """A checkpoint and the address of an `mlx_lm.server` that serves it."""
    saved, folder = exported("modern")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlx_lm", "server", "--model", str(folder)]
    command += ["--trust-remote-code", "--port", str(port), "--temp", "0"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=OFFLINE)
    try:
        assert process.stderr is not None
        assert any("Starting httpd" in line for line in process.stderr)
        yield saved, f"http://127.0.0.1:{port}/v1/completions"
    finally:
        process.terminate()
        process.communicate(timeout=30)


@pytest.mark.slow
def test_the_server_answers_several_at_once_with_our_text(server: tuple[Checkpoint, str]) -> None:
    saved, url = server
    prompts = ["The old red ship", "Queen", "jumps quick over", "T"]

    def ask(prompt: str) -> str:
        body = json.dumps({"prompt": prompt, "max_tokens": 60}).encode()
        request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=120) as answer:
            return str(json.load(answer)["choices"][0]["text"])

    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(ask, prompts))
    encode = tokenizer_from_json(saved.tokenizer).encode
    assert answers == [spelled(saved, greedy(saved, encode(p), 60)) for p in prompts]
