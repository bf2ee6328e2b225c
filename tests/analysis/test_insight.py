"""What a model has learned: the forward pass against the naive one, and what follows from it."""

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
from naive_model import naive_logits, normed, rms, turn

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
    for found, ids in zip(logits, tokens, strict=True):
        expected = naive_logits(w, config, ids)
        error = np.abs(found - expected).max() / np.abs(expected).max()
        assert error < 1e-5  # measured: 6.4e-7


@each_model
def test_attention_is_that_of_queries_and_keys_one_by_one(
    recipe: str, tiny_model: Config, lively: Weights
) -> None:
    config = tiny_model(recipe)
    w, ids = lively(config), np.random.default_rng(0).integers(0, 29, 16)
    found = insight.forward(w, config, ids[None])[1][0][0]  # of the first layer, (H, T, T)
    x = w["wte.weight"][ids] + (w["wpe.weight"][:16] if config.position == "learned" else 0)
    w = {name.removesuffix(".weight"): array for name, array in w.items()}
    bias = w.get("h.0.attn.c_attn.bias", 0)
    qkv = normed(w, "h.0.ln_1", config, x) @ w["h.0.attn.c_attn"].T + bias
    qkv = qkv.reshape(16, 3, 4, 8)
    for head, t in np.ndindex(4, 16):
        q, ks = qkv[t, 0, head], qkv[: t + 1, 1, head]
        if recipe == "modern":
            q, ks = turn(rms(q), t), np.array([turn(rms(k), i) for i, k in enumerate(ks)])
        e = np.exp(ks @ q / 8**0.5)
        np.testing.assert_allclose(found[head, t], [*(e / e.sum()), *[0] * (15 - t)], atol=1e-6)


@each_model
@pytest.mark.parametrize("width", [32, 20])  # heads of an odd width turn all but their last value
def test_the_mean_of_the_losses_is_that_of_eval(recipe: str, width: int, make_run: Make) -> None:
    run, backend = make_run(recipe, model={"n_embd": width, "zero_init": False})
    score = evaluate(backend, run.val_tokens, 16, 8, run.tokenizer.token_bytes())
    w = backend.state().params
    found = insight.losses(w, run.model, run.val_tokens, 1 << 40)
    assert score is not None
    assert np.isfinite(found.nats).sum() == score.tokens
    assert np.nanmean(found.nats) == pytest.approx(score.loss, rel=1e-5)
    by_class = insight.by_class(found, insight.token_texts(run.tokenizer))
    assert sum(c["count"] for c in by_class) == score.tokens
    mean = sum(c["count"] * c["loss"] for c in by_class) / score.tokens
    assert mean == pytest.approx(score.loss, rel=1e-5)


def test_positions_and_passages_are_read_off_the_losses() -> None:
    nats = np.arange(32.0).reshape(4, 8)
    nats[3, 5:] = np.nan
    found = insight.Losses(np.arange(36).reshape(4, 9), nats)
    labels = [f"<{i}>" for i in range(36)]
    assert insight.by_position(found)[0] == (0 + 8 + 16 + 24) / 4
    told = insight.passages(found, labels)
    assert told["hardest"][0]["tokens"] == [f"<{i}>" for i in range(21, 27)]
    assert told["easiest"][0]["nats"] == [2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("text", "name"),
    [("a", "lower-case letter"), (" The", "upper-case letter"), ("7", "digit"), (" ", "space"),
     ("\n", "line break"), (";", "punctuation"), ("—", "other"), ("", "other")],
)  # fmt: skip
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


def test_the_page_holds_what_it_promises_and_asks_for_nothing(saved: Path, tmp_path: Path) -> None:
    out = tmp_path / "p.html"
    done = inspect(str(saved), "-o", str(out), "--text", "a </script> b")
    assert done.exit_code == 0, done.stderr
    page = out.read_text()
    found = json.loads(re.search(r"^const D = (.*);$", page, re.MULTILINE)[1])  # type: ignore[index]
    n = len(found["text"])
    assert n == len("a </script> b")
    assert (found["layers"], found["heads"], len(found["maps"])) == (2, 4, 8)
    assert len(base64.b64decode(found["maps"][0])) == n * n
    assert sum(p for _, p in found["next"][0]) <= 1.0
    assert len(found["positions"]) == 16
    assert len(found["near"]) == len(found["labels"]) == len(found["plane"])
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
    found = json.loads(re.search(r"^const D = (.*);$", out.read_text(), re.MULTILINE)[1])  # type: ignore[index]
    steps = [row["step"] for row in found["samples"]]
    assert (steps[0], steps[-1], steps) == (1, 100, sorted(steps))
    assert len(set(steps)) == len(steps) <= 12
    assert found["samples"][-1]["text"] == " 100 <?>"


def test_what_cannot_be_inspected_is_refused(saved: Path, tmp_path: Path) -> None:
    assert inspect(str(saved), "--text", "").exit_code == 1
    assert inspect(str(tmp_path / "none")).exit_code == 1
    done = inspect(str(saved), "-o", str(tmp_path / "no" / "p.html"))
    assert (done.exit_code, "cannot be written" in done.stderr) == (1, True)
