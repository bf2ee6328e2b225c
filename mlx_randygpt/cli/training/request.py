"""One call of `mlxgpt train`, and the command lines and files that repeat or continue it."""

from __future__ import annotations

import contextlib
import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_randygpt import settings
from mlx_randygpt.checkpoint import NEWEST, CheckpointError, peek_step
from mlx_randygpt.cli.training import text
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameter_count, trained_count
from mlx_randygpt.training.loop import Run
from mlx_randygpt.words import format_count

LAUNCH = "MLXGPT_LAUNCH"  # how `mlxgpt launch` was called, for the command that resumes
DEFAULT_OUT = Path("checkpoints")
RECIPE_ONLY = (
    "adamw_lr_ratio",
    "beta1",
    "beta2",
    "adam_eps",
    "momentum",
    "muon_beta2",
)  # without options


@dataclass(frozen=True)
class TrainRequest:
    """The options of one call; `options` holds only those that the user set."""

    options: dict[str, Any]
    data: tuple[str, ...]
    out: Path
    backend: str
    plain: bool
    overwrite: bool
    resume: Path | None
    resume_newest: bool
    init_from: Path | None
    allow_sleep: bool = False  # macOS
    tokenizer: dict[str, Any] | None = None  # rank 0's, for the other ranks of a new run

    @property
    def resuming(self) -> bool:
        """Whether this continues a run, from its newest checkpoint or from a file."""
        return self.resume_newest or self.resume is not None


def config_toml(request: TrainRequest, run: Run) -> str:
    """Return every resolved setting, as `--config` reads it back."""
    shared = ("arch", "n_layer", "n_head", "n_embd", "block_size", "dropout")
    lora = settings.LORA_FIELDS if run.model.lora_rank else ()
    values = {
        "data": run.data["paths"],
        **{name: run.data[name] for name in (*text.READING, "respect_documents", "pack")},
        **text.tokenizer_options(run.tokenizer, request.options),
        "out": str(request.out),
        "backend": request.backend,
        **{name: getattr(run.model, name) for name in (*shared, *lora)},
    }
    other = "iters" if run.train.minutes else "minutes"  # one of them decides the end
    train = {
        name: value
        for name, value in asdict(run.train).items()
        if name not in (*RECIPE_ONLY, other)
    }
    return settings.to_toml(values | train)


def describe_model(model: ModelConfig) -> str:
    """Return the model line of the screen."""
    size = format_count(parameter_count(model))
    if model.lora_rank:
        size = f"{format_count(trained_count(model))} trained of {size}"
    layers = f"{model.n_layer} layer{'s' if model.n_layer > 1 else ''}"
    return (
        f"{'GPT-2, ' if model.is_gpt2 else ''}{size} parameters, "
        f"{layers} × {model.n_head} heads × {model.n_embd}, context {model.block_size}"
    )


def resume_line(request: TrainRequest, run: Run) -> str:
    """Return the command that resumes this run."""
    words = [*shlex.split(os.environ.get(LAUNCH, "mlxgpt")), "train", "--resume"]
    if request.resuming and "iters" in request.options:  # a new run has saved its target
        words += ["--iters", str(run.train.iters)]
    elif request.resuming and "minutes" in request.options:
        words += ["--minutes", f"{run.train.minutes:g}"]
    words += ["--out", str(request.out)] if request.out != DEFAULT_OUT else []
    words += [word for name in request.options.get("log", ()) for word in ("--log", name)]
    words += ["--backend", request.backend] if request.backend != "auto" else []
    words += ["--allow-sleep"] if request.allow_sleep else []
    return shlex.join(words)


def recovery_line(request: TrainRequest, run: Run) -> str:
    """Return which state of a failed run is on the disk, and the command that resumes it."""
    newest = request.out / NEWEST
    saved = ""
    with contextlib.suppress(CheckpointError):  # missing or not readable now
        saved = f"Saved last: {newest} (iter {peek_step(newest)}). "
    return f"{saved}Go on with: {resume_line(request, run)}"


def try_line(request: TrainRequest, run: Run) -> str:
    """Return how to try this run's best checkpoint: let it answer, or let it write."""
    folder = ["--checkpoint", str(request.out)] if request.out != DEFAULT_OUT else []
    if run.data["dialogue"]:
        return f"Talk to it: {shlex.join(['mlxgpt', 'chat', *folder])}"
    return f"Let it write: {shlex.join(['mlxgpt', 'sample', *folder])}"


def describe_interval(save_every: str) -> str:
    """Return `60s` or `1000 steps`."""
    return save_every if not save_every.isdigit() else f"{save_every} steps"
