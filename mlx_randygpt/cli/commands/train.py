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
from mlx_randygpt.config import ON_NAN, ORDERS, SCHEDULES

BEGINNERS = (  # options that open the help, in this order
    "data",
    "preset",
    "iters",
    "minutes",
    "hours",
    "out",
    "prompt",
    "resume",
    "overwrite",
    "plain",
    "backend",
)


@click.command("train", cls=Command, first=BEGINNERS)
@click.option(
    "--iters",
    type=int,
    help="Train up to this step; --resume counts on from the step it finds.  [default: 1000; "
    "fewer for a short text]",
)
@time_options
@click.option(
    "--data",
    type=data_path,
    multiple=True,
    help="Train on this: text, source code, .jsonl, .parquet, .gz, .zst, train.bin, a folder, a "
    "glob, or - for stdin; repeatable.  [default: train.txt, else data/*.txt, else tiny "
    "Shakespeare, else a bundled sample]",
)
@click.option(
    "--out",
    type=FilePath(path_type=Path),
    help="Write checkpoints and metrics to this folder.  [default: checkpoints, or that of "
    "--resume PATH]",
)
@click.option(
    "--resume",
    type=FilePath(readable=False),
    is_flag=False,
    flag_value=RESUME_NEWEST,
    metavar="[PATH]",
    help="Continue from the newest checkpoint in --out, or from this file or folder.",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Start a new run in a folder that holds one, which is deleted.",
)
@backend_option
@click.option("--plain", is_flag=True, help="Print plain lines instead of the live screen.")
@options(
    tokenizer_options,
    reading_options,
    click.option(
        "--respect-documents",
        is_flag=True,
        default=None,
        help="Keep each training window inside one document.",
    ),
    click.option(
        "--pack",
        is_flag=True,
        default=None,
        help="Let a training window hold several short conversations.",
    ),
    section="Text",
)
@model_options(by_text=True)
@options(
    click.option(
        "--init-from",
        type=FilePath(path_type=Path),
        metavar="PATH",
        help="Start at step 0 with the weights of this model: a checkpoint or a run's folder.",
    ),
    click.option(
        "--lora-rank",
        type=int,
        help="Train only LoRA adapters of this rank (with --init-from).  [default: all weights]",
    ),
    click.option("--lora-alpha", type=float, help="Scale the adapters by X / rank.  [default: 16]"),
    click.option(
        "--lora-targets",
        metavar="NAMES",
        help="Give adapters to these matrices: c_attn, c_proj, c_fc, separated by commas.  "
        "[default: all]",
    ),
    section="Fine-tuning",
)
@options(
    click.option(
        "--batch-size",
        type=int,
        help="Draw this many sequences per batch.  [default: 64; 8 for gpt2 presets]",
    ),
    grad_accum_option,
    click.option(
        "--order",
        type=click.Choice(ORDERS),
        help="Read the text in passes, each window once, or draw windows at random.  "
        "[default: recipe]",
    ),
    click.option(
        "--seed",
        type=int,
        help="Draw weights, batches and samples by this random seed.  [default: 1337]",
    ),
    optimizer_option,
    click.option(
        "--lr",
        type=float,
        help="Set the highest learning rate.  [default: recipe, scaled by model and batch]",
    ),
    click.option(
        "--min-lr", type=float, help="Let the learning rate decay to this.  [default: recipe]"
    ),
    click.option(
        "--schedule",
        type=click.Choice(SCHEDULES),
        help="Choose how the learning rate changes.  [default: recipe]",
    ),
    click.option(
        "--warmup",
        type=int,
        help="Raise the learning rate over the first N steps.  [default: recipe; fewer for a short "
        "run]",
    ),
    click.option(
        "--weight-decay",
        type=float,
        help="Let the matrices decay by this times the learning rate.  [default: by the length of "
        "the text]",
    ),
    click.option(
        "--grad-clip",
        type=float,
        help="Scale a gradient down to this norm; 0 is off.  [default: 1]",
    ),
    click.option(
        "--patience",
        type=int,
        help="Stop after N evaluations without a new best; with --schedule plateau, halve the "
        "learning rate first, at most 3 times.  [default: off; 5 for plateau]",
    ),
    click.option(
        "--on-nan",
        type=click.Choice(ON_NAN),
        help="If loss or gradient is not finite, stop, skip the step, or roll back to the last "
        "save and halve the learning rate.  [default: stop]",
    ),
    section="Optimization",
)
@options(
    click.option("--eval-every", type=int, help="Evaluate every N steps.  [default: 250]"),
    click.option("--sample-every", type=int, help="Write a sample every N steps.  [default: 500]"),
    click.option(
        "--prompt",
        help="Begin the samples with this text.  [default: ROMEO: if the text has it, else a "
        "newline]",
    ),
    click.option(
        "--save-every",
        metavar="N|TIME",
        help="Save every N steps (1000), or after this time (60s, 5m).  [default: 60s]",
    ),
    click.option(
        "--keep-every",
        type=int,
        help="Also keep checkpoint-<step>.safetensors every N steps.  [default: off]",
    ),
    click.option(
        "--log-every", type=int, help="Write a line of metrics.jsonl every N steps.  [default: 1]"
    ),
    click.option(
        "--log",
        multiple=True,
        type=click.Choice(["tensorboard", "wandb", "trackio"]),
        help="Also log to this library; repeatable.",
    ),
    section="Evaluation, samples and saving",
)
@options(
    memory_options,
    threads_option,
    dtype_option,
    click.option(
        "--rank-timeout",
        type=float,
        help="With several ranks, give up on one after X seconds of silence.  [default: 20]",
    ),
    click.option("--allow-sleep", is_flag=True, help="Let a Mac sleep during the run."),
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
    allow_sleep: bool,
    **values: Any,
) -> None:
    """Train a model on your text. Ctrl-C saves and stops; --resume continues exactly.

    Without options it trains a small model on a text that it finds or downloads, for a few minutes.
    """
    from mlx_randygpt.checkpoint import NEWEST, is_run_folder
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
    if resume_path and is_run_folder(resume_path):
        if out in (None, resume_path):
            out, resume, resume_path = resume_path, RESUME_NEWEST, None
        else:
            resume_path /= NEWEST
    request = TrainRequest(
        options=given_options(values),
        data=data,
        out=out or (resume_path.parent if resume_path else DEFAULT_OUT),
        backend=backend,
        plain=plain,
        allow_sleep=allow_sleep,
        overwrite=overwrite,
        resume=resume_path,
        resume_newest=resume == RESUME_NEWEST,
        init_from=init_from,
    )
    raise SystemExit(train_command(request))
