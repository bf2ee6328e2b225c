"""`mlxgpt train`: settings, text and backend together, then reports to the screen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.config_file import RESUME_NEWEST
from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    backend_option,
    given_options,
    memory_options,
    model_options,
    reading_options,
    tokenizer_options,
)
from mlx_randygpt.config import DTYPES, ON_NAN, OPTIMIZERS, SCHEDULES


@click.command("train", cls=Command)
@click.option(
    "--iters", type=int, help="Steps to reach, a target and not an addition.  [default: 1000]"
)
@click.option(
    "--data",
    multiple=True,
    help="Text, source, .jsonl, .parquet, .gz, .zst, train.bin, a directory or a glob; may be "
    "given several times.  [default: ./train.txt, data/*.txt, tiny Shakespeare, a sample]",
)
@tokenizer_options
@reading_options
@click.option(
    "--respect-documents",
    is_flag=True,
    default=None,
    help="Keep each training window inside one document.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder for checkpoints and metrics.  [default: checkpoints, or that of --resume PATH]",
)
@click.option(
    "--resume",
    is_flag=False,
    flag_value=RESUME_NEWEST,
    metavar="[PATH]",
    help="Go on from the checkpoint of the highest step in --out, or from a file.",
)
@click.option("--overwrite", is_flag=True, help="Start anew in a folder that holds a run.")
@click.option(
    "--init-from",
    type=click.Path(path_type=Path),
    metavar="PATH",
    help="Start from another model's weights at step 0 (fine-tuning).",
)
@click.option("--lora-rank", type=int, help="Train adapters of this rank (with --init-from).")
@click.option("--lora-alpha", type=float, help="Their scale, times the rank.  [default: 16]")
@click.option(
    "--lora-targets",
    metavar="NAMES",
    help="c_attn, c_proj, c_fc with commas between.  [default: all]",
)
@model_options()
@click.option("--batch-size", type=int, help="Sequences per micro-batch.  [default: preset, 64]")
@click.option("--grad-accum", type=int, help="Micro-batches per step.  [default: 1]")
@memory_options
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="[default: recipe]")
@click.option("--lr", type=float, help="Peak learning rate.  [default: recipe]")
@click.option("--min-lr", type=float, help="Where the decay ends.  [default: recipe]")
@click.option("--weight-decay", type=float, help="Decoupled, on matrices.  [default: rule]")
@click.option(
    "--grad-clip", type=float, help="Largest gradient norm, 0 for none.  [default: recipe]"
)
@click.option("--schedule", type=click.Choice(SCHEDULES), help="[default: recipe]")
@click.option("--warmup", type=int, help="Steps of linear warmup.  [default: rule]")
@click.option(
    "--patience",
    type=int,
    help="Evaluations without a new best before plateau halves "
    "the rate (at most 3 times), then early stop.  [default: off]",
)
@click.option("--eval-every", type=int, help="Steps.  [default: 250]")
@click.option("--sample-every", type=int, help="Steps.  [default: 500]")
@click.option("--save-every", help="Steps (1000) or a time (60s, 5m).  [default: 60s]")
@click.option("--log-every", type=int, help="Steps per line of metrics.jsonl.  [default: 1]")
@click.option(
    "--log",
    multiple=True,
    type=click.Choice(["tensorboard", "wandb", "trackio"]),
    help="Log there too; may be given several times.",
)
@click.option(
    "--keep-every",
    type=int,
    help="Also keep checkpoint-<step>.safetensors every N steps.  [default: off]",
)
@click.option(
    "--on-nan",
    type=click.Choice(ON_NAN),
    help="Where loss or gradient are not finite: stop; skip the step; go back to what was saved "
    "last, at half the rate.  [default: stop]",
)
@click.option(
    "--dtype",
    type=click.Choice(DTYPES),
    help="Compute type on a GPU; weights and moments stay float32.  [default: float32]",
)
@click.option("--threads", type=int, help="NumPy backend.  [default: all cores]")
@click.option(
    "--rank-timeout",
    type=float,
    help="Several ranks: seconds of silence after which one is lost.  [default: 20]",
)
@click.option("--seed", type=int, help="Everything random follows from it.  [default: 1337]")
@click.option(
    "--prompt", help="For the samples.  [default: ROMEO: if the text has it, else a newline]"
)
@backend_option
@click.option("--plain", is_flag=True, help="Plain lines instead of the live screen.")
def command(
    data: tuple[str, ...],
    out: Path | None,
    resume: str | None,
    overwrite: bool,
    init_from: Path | None,
    backend: str,
    plain: bool,
    **options: Any,
) -> None:
    """Train a model on your text. Resumes exactly; --iters is a target."""
    from mlx_randygpt.cli.training.request import TrainRequest
    from mlx_randygpt.cli.training.run import train_command

    if resume and (overwrite or init_from):
        raise click.UsageError("--resume goes with neither --overwrite nor --init-from")
    if options["lora_rank"] and not (init_from or resume):
        raise click.UsageError("--lora-rank adapts a trained model: give it with --init-from")
    if (options["lora_alpha"] or options["lora_targets"]) and not (options["lora_rank"] or resume):
        raise click.UsageError("--lora-alpha and --lora-targets go with --lora-rank")
    resumed = None if resume in (None, RESUME_NEWEST) else Path(str(resume))
    raise SystemExit(
        train_command(
            TrainRequest(
                given=given_options(options),
                data=data, backend=backend, plain=plain, overwrite=overwrite,
                out=out or (resumed.parent if resumed else Path("checkpoints")),
                resume=resumed,
                resume_newest=resume == RESUME_NEWEST, init_from=init_from,
            )
        )
    )  # fmt: skip
