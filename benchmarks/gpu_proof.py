"""Correctness on the device MLX finds: gradients beside NumPy's, and resuming bit for bit."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt import check, settings
from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.backends.mlx import embedding
from mlx_randygpt.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import initial_state
from mlx_randygpt.progress import Progress
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Array, TrainState, rng
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.loop import step_batches, step_rate

Found = Iterator[tuple[str, dict[str, Any]]]

# On ‖a − b‖ / ‖b‖ of the worst tensor. In float32 a GPU adds up in other orders than a CPU, whose
# own bound is check.GRADIENT_BOUND. A factor in TF32 is off by 2^-11 at most, in bfloat16 by 2^-9.
# Measured in bfloat16 on a CPU: 0.052 classic, whose scores grow with its weights, 0.045 gpt2,
# 0.018 modern.
BOUNDS = {"float32": 1e-4, "TF32": 0.02, "bfloat16": 0.08}
NO_DATA = {"paths": [], "characters": 0, "sha256": ""}


def gradients(options: argparse.Namespace) -> Found:
    """Every model as `mlxgpt check` takes it, with the optimizers' trajectories (left out where
    sizes are tiny: they take longest); then at a second size, then in bfloat16."""
    for recipe in check.SUBJECTS if not options.small else ():
        for name, found in grouped(check.check_recipe(recipe, "mlx")).items():
            bound = found[0].bound if "differences" in name else BOUNDS["float32"]
            yield "gradients", row(recipe, check.check_model(recipe), name, found, bound)
    yield from in_type("float32", "float32", fused)
    yield from in_type("bfloat16", "bfloat16", check.check_model, fused)


def gradients_tf32(options: argparse.Namespace) -> Found:
    """Every model in float32 where MLX may multiply in TF32."""
    yield from in_type("float32", "TF32", check.check_model, fused)


def in_type(dtype: str, bound: str, *sizes: Callable[[str], ModelConfig]) -> Found:
    """The gradients of every model at these sizes, computed in `dtype`."""
    for recipe in check.SUBJECTS:
        for model in (size(recipe) for size in sizes):
            params = check.scaled_up(model, 1337)
            found = check.cross_check(model, params, 1337, "mlx", dtype=dtype, bound=BOUNDS[bound])
            for name, group in grouped(found).items():
                yield "gradients", row(recipe, model, f"{name}, {bound}", group, BOUNDS[bound])


def fused(recipe: str) -> ModelConfig:
    """The check's model at a size for which GPUs have kernels of their own: 128 positions or a
    multiple of them, heads of 64."""
    return replace(check.check_model(recipe), block_size=128, n_head=2, n_embd=128)


def grouped(findings: Iterator[check.Finding]) -> dict[str, list[check.Finding]]:
    groups: dict[str, list[check.Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.check, []).append(finding)
    return groups


def row(
    recipe: str, model: ModelConfig, name: str, found: list[check.Finding], bound: float
) -> dict[str, Any]:
    """The worst of these; a nan is the worst of all."""
    worst = max(found, key=lambda f: (f.error != f.error, f.error))
    size = f"{model.n_embd} × {model.block_size}"
    return {
        "recipe": recipe, "width_and_context": size, "check": name, "tensors": len(found),
        "worst": worst.tensor, "error": worst.error, "bound": bound,
        "holds": bool(worst.error <= bound),
    }  # fmt: skip


def resume(options: argparse.Namespace) -> Found:
    """Per recipe and type, and with the gradient of a wide vocabulary's embedding, which is summed
    in another way: see `resumed`."""
    given = {"preset": "mini" if options.small else "m", "dropout": 0.1, "grad_accum": 2}
    given |= {"batch_size": 4 if options.small else 16, "iters": 6 if options.small else 20}
    for max_rows in (embedding.MAX_ONE_HOT_ROWS, 0):
        embedding.MAX_ONE_HOT_ROWS = max_rows
        for recipe, dtype in product(RECIPES, ("float32", "bfloat16")):
            about = {"recipe": recipe, "dtype": dtype}
            table = {"embedding": "narrow" if max_rows else "wide"}
            yield "resume", about | table | resumed(given | about)


def resumed(given: dict[str, Any]) -> dict[str, Any]:
    """A run, the same again, and one that stopped in the middle and went through a file. Where the
    second differs from the first, the device adds up in no fixed order, and a difference of the
    third is no fault of resuming."""
    tokenizer = CharTokenizer.train("abcdefghijklmnopqrstuvwxyz")
    tokens = rng(1, "check").integers(0, 26, 10_000, dtype=np.int32)  # (n,)
    model, train = settings.resolve_new(given, tokenizer.vocab_size)
    start = initial_state(model, 1)
    straight, again, begun = (make_backend("mlx", model, train, start) for _ in range(3))
    for backend in (straight, again):
        go_on(backend, train, tokens, model.block_size, train.iters)
    go_on(begun, train, tokens, model.block_size, train.iters // 2)
    run = Checkpoint(model, train, Progress(), tokenizer.to_json(), NO_DATA, "mlx", begun.state())
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder) / "half.safetensors", run)
        saved = load_checkpoint(Path(folder) / "half.safetensors")
    ended = make_backend("mlx", saved.model, saved.train, saved.state)
    go_on(ended, saved.train, tokens, model.block_size, train.iters)
    expected = straight.state()
    differing = differences(ended.state(), expected)
    return {
        "steps": train.iters,
        "tensors": len(expected.params) + sum(map(len, expected.moments.values())),
        "differ_when_run_again": len(differences(again.state(), expected)),
        "differ_when_resumed": len(differing),
        "first": next(iter(differing), ""),
        "largest_difference": max(differing.values(), default=0.0),
        "holds": not differing,
    }


def go_on(backend: Backend, train: Any, tokens: Array, block_size: int, target: int) -> None:
    """Take steps until `target`, as the loop does."""
    while backend.step < target:
        batches = step_batches(train, tokens, block_size, backend.step)
        backend.train_step(batches, step_rate(train, backend.step))


def differences(got: TrainState, expected: TrainState) -> dict[str, float]:
    """Names of weights and moments that are not the same bits, and how far they are apart."""
    pairs = [("", got.params, expected.params)]
    pairs += [(f"{kind} of ", got.moments[kind], expected.moments[kind]) for kind in got.moments]
    return {
        prefix + name: float(abs(a[name] - b[name]).max())
        for prefix, a, b in pairs
        for name in b
        if a[name].tobytes() != b[name].tobytes()
    }
