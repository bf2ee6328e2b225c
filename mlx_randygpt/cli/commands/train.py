"""`mlxgpt train`: the options of a training run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.config_file import RESUME_NEWEST
from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    backend_option,
    data_path,
    dtype_option,
    given_options,
    grad_accum_option,
    memory_options,
    model_options,
    optimizer_option,
    options,
    reading_options,
    threads_option,
    tokenizer_options,
)
from mlx_randygpt.cli.time_budget import take_minutes, time_options
from mlx_randygpt.cli.values import FilePath
from mlx_randygpt.config import ON_NAN, SCHEDULES


@click.command("train", cls=Command)
@click.option(
    "--iters", type=int, help="Step to train to; on resume, the total.  [default: 1000, or rule]"
)
@time_options
@click.option(
    "--data",
    type=data_path,
    multiple=True,
    help="Text, source code, .jsonl, .parquet, .gz, .zst, train.bin, a folder, a glob, or - for "
    "stdin; repeatable.  [default: ./train.txt, data/*.txt, tiny Shakespeare, a bundled sample]",
)
@click.option(
    "--out",
    type=FilePath(path_type=Path),
    help="Folder for checkpoints and metrics.  [default: checkpoints, or that of --resume PATH]",
)
@click.option(
    "--resume",
    type=FilePath(readable=False),
    is_flag=False,
    flag_value=RESUME_NEWEST,
    metavar="[PATH]",
    help="Resume from the newest checkpoint in --out, or from a file.",
)
@click.option("--overwrite", is_flag=True, help="Start a new run in a folder that holds one.")
@click.option("--seed", type=int, help="Random seed.  [default: 1337]")
@backend_option
@threads_option
@click.option("--plain", is_flag=True, help="Plain lines instead of the live screen.")
@options(
    tokenizer_options,
    reading_options,
    click.option(
        "--respect-documents",
        is_flag=True,
        default=None,
        help="Keep each training window inside one document.",
    ),
    section="Text",
)
@model_options()
@options(
    click.option(
        "--init-from",
        type=FilePath(path_type=Path),
        metavar="PATH",
        help="Fine-tuning: start at step 0 from the weights of this checkpoint.",
    ),
    click.option(
        "--lora-rank",
        type=int,
        help="Fine-tune with LoRA adapters of this rank (with --init-from).",
    ),
    click.option(
        "--lora-alpha", type=float, help="Scale of the adapters, times the rank.  [default: 16]"
    ),
    click.option(
        "--lora-targets",
        metavar="NAMES",
        help="Matrices with adapters: c_attn, c_proj, c_fc, separated by commas.  [default: all]",
    ),
    section="Fine-tuning",
)
@options(
    click.option(
        "--batch-size", type=int, help="Sequences per micro-batch.  [default: preset, 64]"
    ),
    grad_accum_option,
    optimizer_option,
    click.option("--lr", type=float, help="Peak learning rate.  [default: recipe, or rule]"),
    click.option(
        "--min-lr", type=float, help="Learning rate at the end of the decay.  [default: recipe]"
    ),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help="Learning rate schedule.  [default: recipe]",
    ),
    click.option("--warmup", type=int, help="Steps of linear warmup.  [default: rule]"),
    click.option(
        "--weight-decay", type=float, help="Decoupled weight decay, on matrices.  [default: rule]"
    ),
    click.option("--grad-clip", type=float, help="Maximum gradient norm; 0 is off.  [default: 1]"),
    click.option(
        "--patience",
        type=int,
        help="Evaluations without a new best before early stopping; with --schedule plateau, "
        "before the learning rate is halved (at most 3 times).  [default: off]",
    ),
    click.option(
        "--on-nan",
        type=click.Choice(ON_NAN),
        help="If loss or gradient is not finite: stop; skip the step; or roll back to the last "
        "save, at half the learning rate.  [default: stop]",
    ),
    section="Optimization",
)
@options(
    click.option("--eval-every", type=int, help="Steps between evaluations.  [default: 250]"),
    click.option("--sample-every", type=int, help="Steps between samples.  [default: 500]"),
    click.option(
        "--prompt",
        help="Prompt of the samples.  [default: ROMEO: if the text has it, else a newline]",
    ),
    click.option(
        "--save-every", help="Steps (1000) or time (60s, 5m) between saves.  [default: 60s]"
    ),
    click.option(
        "--keep-every",
        type=int,
        help="Also keep checkpoint-<step>.safetensors every N steps.  [default: off]",
    ),
    click.option(
        "--log-every", type=int, help="Steps between lines of metrics.jsonl.  [default: 1]"
    ),
    click.option(
        "--log",
        multiple=True,
        type=click.Choice(["tensorboard", "wandb", "trackio"]),
        help="Also log to this library; repeatable.",
    ),
    section="Evaluation and output",
)
@options(
    memory_options,
    dtype_option,
    click.option(
        "--rank-timeout",
        type=float,
        help="With several ranks: seconds of silence after which a rank is lost.  [default: 20]",
    ),
    section="Memory and machines",
)
def command(
    data: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    init_from: Path | None,
    backend: str,
    plain: bool,
    **values: Any,
) -> None:
    """Train a model on your text. Ctrl-C saves and stops; --resume continues exactly."""
    from mlx_randygpt.cli.training.request import DEFAULT_OUT, TrainRequest
    from mlx_randygpt.cli.training.run import train_command

    if resume and (overwrite or init_from):
        raise click.UsageError("--resume cannot be combined with --overwrite or --init-from")
    if values["lora_rank"] and not (init_from or resume):
        raise click.UsageError("--lora-rank needs a trained model: give it with --init-from")
    if (values["lora_alpha"] or values["lora_targets"]) and not (values["lora_rank"] or resume):
        raise click.UsageError("--lora-alpha and --lora-targets need --lora-rank")
    values = take_minutes(values)
    if resume and values["minutes"] and values["iters"]:
        raise click.UsageError("a resumed run ends by --iters or by --minutes; omit one of them")
    resume_path = None if resume in (None, RESUME_NEWEST) else Path(str(resume))
    request = TrainRequest(
        options=given_options(values),
        data=data,
        out=out or (resume_path.parent if resume_path else DEFAULT_OUT),
        backend=backend,
        plain=plain,
        overwrite=overwrite,
        resume=resume_path,
        resume_newest=resume == RESUME_NEWEST,
        init_from=init_from,
    )
    raise SystemExit(train_command(request))
