"""What one call of `mlxgpt train` asks for, and in which words it is told and repeated."""

from __future__ import annotations

import os
import shlex
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_randygpt import settings
from mlx_randygpt.checkpoint import BEST, NEWEST, peek_step
from mlx_randygpt.cli.training import text
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.model import parameter_count, trained_count
from mlx_randygpt.training.loop import Run

LAUNCH = "MLXGPT_LAUNCH"  # how `mlxgpt launch` was called, to say how to go on


@dataclass(frozen=True)
class TrainRequest:
    """The options of one call; `given` holds only what the user set."""

    given: dict[str, Any]
    data: tuple[str, ...]
    out: Path
    backend: str
    plain: bool
    overwrite: bool
    resume: Path | None
    resume_newest: bool
    init_from: Path | None
    tokenizer: dict[str, Any] | None = None  # that of rank 0, where this is another

    @property
    def resuming(self) -> bool:
        return self.resume_newest or self.resume is not None


def config_toml(job: TrainRequest, run: Run) -> str:
    """Every resolved setting, as `--config` reads it back."""
    shared = ("arch", "n_layer", "n_head", "n_embd", "block_size", "dropout")
    values = {
        "data": run.data["paths"],
        **{name: run.data[name] for name in (*text.READING, "respect_documents")},
        **text.tokenizer_options(run.tokenizer, job.given),
        "out": str(job.out),
        "backend": job.backend,
        **{name: getattr(run.model, name) for name in shared},
        **{name: getattr(run.model, name) for name in settings.LORA_FIELDS if run.model.lora_rank},
    }
    options = asdict(run.train)
    for name in ("adamw_lr_ratio", "beta1", "beta2", "adam_eps", "momentum"):  # recipe, no options
        del options[name]
    return settings.to_toml(values | options)


def describe_model(model: ModelConfig) -> str:
    """The model line of the screen."""
    size = _count(parameter_count(model))
    if model.lora_rank:
        size = f"{_count(trained_count(model))} trained of {size}"
    layers = f"{model.n_layer} layer{'s' if model.n_layer > 1 else ''}"
    return (
        f"{'GPT-2, ' if model.is_gpt2 else ''}{size} parameters, "
        f"{layers} × {model.n_head} heads × {model.n_embd}, context {model.block_size}"
    )


def _count(n: int) -> str:
    return f"{n:,}" if n < 1e6 else f"{n / 1e6:.2f} M" if n < 10e6 else f"{n / 1e6:.1f} M"


def resume_line(job: TrainRequest, run: Run) -> str:
    """The command that goes on with this run."""
    words = [
        *shlex.split(os.environ.get(LAUNCH, "mlxgpt")),
        "train",
        "--iters",
        str(run.train.iters),
        "--resume",
    ]
    words += ["--out", str(job.out)] if str(job.out) != "checkpoints" else []
    words += [word for name in job.given.get("log", ()) for word in ("--log", name)]
    words += ["--backend", job.backend] if job.backend != "auto" else []
    return shlex.join(words)


def kept_line(job: TrainRequest, run: Run) -> str:
    """What the disk holds of a run that could not go on, and the command that does."""
    newest = job.out / NEWEST
    kept = f"Saved last: {newest} (iter {peek_step(newest)}). " if newest.exists() else ""
    return f"{kept}Go on with: {resume_line(job, run)}"


def sample_line(job: TrainRequest) -> str:
    """The command that samples from this run's best checkpoint."""
    words = ["mlxgpt", "sample", "--temperature", "0.8", "--top-p", "0.9"]
    if str(job.out) != "checkpoints":
        best = job.out / BEST
        words += ["--checkpoint", str(best if best.exists() else job.out / NEWEST)]
    return shlex.join(words)


def interval(save_every: str) -> str:
    """`60s`, `1000 steps`."""
    return save_every if not save_every.isdigit() else f"{save_every} steps"
