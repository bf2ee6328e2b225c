"""What a model has learned: attention and losses against the naive model, and the page."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from naive_model import branch_input, naive_logits, rms, rotate

from mlx_randygpt.analysis import insight
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.progress import Progress
from mlx_randygpt.state import Params
from mlx_randygpt.training.evaluation import evaluate
from mlx_randygpt.training.loop import Run

Config, Weights = Callable[..., ModelConfig], Callable[..., Params]
Make = Callable[..., tuple[Run, Backend]]
each_model = pytest.mark.parametrize("recipe", ["classic", "modern", "gpt2"])


@each_model
@pytest.mark.parametrize("head", [8, 4])
def test_logits_are_those_of_the_naive_model(
    recipe: str, head: int, tiny_model: Config, lively: Weights
) -> None:
    config = tiny_model(recipe, n_embd=4 * head)
    w, tokens = lively(config), np.random.default_rng(0).integers(0, 29, (2, 16))
    logits, _ = insight.forward(w, config, tokens)
    for actual, ids in zip(logits, tokens, strict=True):
        expected = naive_logits(w, config, ids)
        error = np.abs(actual - expected).max() / np.abs(expected).max()
        assert error < 1e-5  # measured: 6.4e-7


@each_model
def test_attention_is_that_of_queries_and_keys_one_by_one(
    recipe: str, tiny_model: Config, lively: Weights
) -> None:
    config = tiny_model(recipe)
    w, ids = lively(config), np.random.default_rng(0).integers(0, 29, 16)
    maps = insight.forward(w, config, ids[None])[1][0][0]  # of the first layer, (H, T, T)
    x = w["wte.weight"][ids] + (w["wpe.weight"][:16] if config.position == "learned" else 0)
    w = {name.removesuffix(".weight"): array for name, array in w.items()}
    bias = w.get("h.0.attn.c_attn.bias", 0)
    qkv = branch_input(w, "h.0.ln_1", config, x) @ w["h.0.attn.c_attn"].T + bias
    qkv = qkv.reshape(16, 3, 4, 8)
    for head, t in np.ndindex(4, 16):
        q, ks = qkv[t, 0, head], qkv[: t + 1, 1, head]
        if recipe == "modern":
            base = config.rope_base
            q = rotate(rms(q), t, base)
            ks = np.array([rotate(rms(k), i, base) for i, k in enumerate(ks)])
        e = np.exp(ks @ q / 8**0.5)
        np.testing.assert_allclose(maps[head, t], [*(e / e.sum()), *[0] * (15 - t)], atol=1e-6)


@each_model
@pytest.mark.parametrize(
    "width", [32, 20]
)  # in heads of an odd width the last value is not rotated
def test_the_mean_of_the_losses_is_that_of_eval(recipe: str, width: int, make_run: Make) -> None:
    run, backend = make_run(recipe, model={"n_embd": width, "zero_init": False})
    score = evaluate(backend, run.val_tokens, 16, 8, run.tokenizer.token_bytes())
    w = backend.state().params
    scored = insight.losses(w, run.model, run.val_tokens, 1 << 40)
    assert score is not None
    assert np.isfinite(scored.nats).sum() == score.tokens
    assert np.nanmean(scored.nats) == pytest.approx(score.loss, rel=1e-5)
    by_class = insight.by_class(scored, insight.token_texts(run.tokenizer))
    assert sum(c["count"] for c in by_class) == score.tokens
    mean = sum(c["count"] * c["loss"] for c in by_class) / score.tokens
    assert mean == pytest.approx(score.loss, rel=1e-5)


def test_positions_and_passages_are_read_off_the_losses() -> None:
    nats = np.arange(32.0).reshape(4, 8)
    nats[3, 5:] = np.nan
    scored = insight.Losses(np.arange(36).reshape(4, 9), nats)
    labels = [f"<{i}>" for i in range(36)]
    assert insight.by_position(scored)[0] == (0 + 8 + 16 + 24) / 4
    passages = insight.passages(scored, labels)
    assert passages["hardest"][0]["tokens"] == [f"<{i}>" for i in range(21, 27)]
    assert passages["easiest"][0]["nats"] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("a", "lower-case letter"),
        (" The", "upper-case letter"),
        ("7", "digit"),
        (" ", "space"),
        ("\n", "line break"),
        (";", "punctuation"),
        ("—", "other"),
        ("", "other"),
    ],
)
def test_kinds_of_characters(text: str, name: str) -> None:
    assert insight.character_class(text) == name


def test_the_nearest_is_the_one_that_points_the_same_way() -> None:
    wte = np.array([[1.0, 0], [5, 0.1], [0, 2], [-1, 0]])
    assert insight.neighbours(wte, [0, 1, 2, 3])[0][0] == (1, pytest.approx(1.0, abs=1e-3))
    assert insight.neighbours(wte, [0, 3])[0] == [(1, -1.0)]


@pytest.fixture
def saved(make_run: Make, text: str, tmp_path: Path) -> Path:
    run, backend = make_run("modern")
    (tmp_path / "text.txt").write_text(text)
    data: dict[str, Any] = {**run.data, "paths": [str(tmp_path / "text.txt")]}
    tokenizer = run.tokenizer.to_json()
    save_checkpoint(
        tmp_path / "c.safetensors",
        Checkpoint(run.model, run.train, Progress(), tokenizer, data, "numpy", backend.state()),
    )
    return tmp_path / "c.safetensors"


def inspect(*words: str) -> Any:
    return CliRunner().invoke(group, ["inspect", *words])


def test_the_page_holds_all_numbers_and_loads_nothing(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.html"
    done = inspect(str(saved), "-o", str(out), "--text", "a </script> b")
    assert done.exit_code == 0, done.stderr
    page = out.read_text()
    data = json.loads(re.search(r"^const D = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    n = len(data["text"])
    assert n == len("a </script> b")
    assert (data["layers"], data["heads"], len(data["maps"])) == (2, 4, 8)
    assert len(base64.b64decode(data["maps"][0])) == n * n
    assert sum(p for _, p in data["next"][0]) <= 1.0
    assert len(data["positions"]) == 16
    assert len(data["near"]) == len(data["labels"]) == len(data["plane"])
    assert page.count("</script>") == 1
    assert not re.search(r"(src|href)=|url\(|import|fetch", page)
    assert page.replace("http://www.w3.org/2000/svg", "").count("http") == 0


def test_the_page_shows_the_first_the_last_and_some_samples_between(
    saved: Path, tmp_path: Path
) -> None:
    rows = [{"step": n, "prompt": "The", "text": f" {n} <\ud800>"} for n in range(1, 101)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "p.html"
    assert inspect(str(saved), "-o", str(out)).exit_code == 0
    data = json.loads(re.search(r"^const D = (.*);$", out.read_text(), re.MULTILINE)[1])  # type: ignore[index]
    steps = [row["step"] for row in data["samples"]]
    assert (steps[0], steps[-1], steps) == (1, 100, sorted(steps))
    assert len(set(steps)) == len(steps) <= 12
    assert data["samples"][-1]["text"] == " 100 <?>"


def test_invalid_requests_are_refused(saved: Path, tmp_path: Path) -> None:
    assert inspect(str(saved), "--text", "").exit_code == 1
    assert inspect(str(tmp_path / "none")).exit_code == 1
    done = inspect(str(saved), "-o", str(tmp_path / "no" / "p.html"))
    assert (done.exit_code, "cannot be written" in done.stderr) == (1, True)
