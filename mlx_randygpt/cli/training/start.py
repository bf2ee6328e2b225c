"""What resuming asks: from where, is it the same run still, and what makes it another one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.checkpoint import NEWEST, Checkpoint, CheckpointError, kept_name, load_checkpoint
from mlx_randygpt.cli.loading import without_adapters
from mlx_randygpt.cli.training import text
from mlx_randygpt.cli.training.folder import RunFolder
from mlx_randygpt.cli.training.request import TrainRequest
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import Vocabulary, choose_tokenizer
from mlx_randygpt.settings import ResumeError, resolve_resume
from mlx_randygpt.tokenizers import Tokenizer
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.schedule import decay_start


def starting_point(
    job: TrainRequest, folder: RunFolder
) -> tuple[Checkpoint | None, list[str]] | None:
    """The checkpoint to start from, if there is one, and lines about those passed over; None where
    nothing is left to train, which is said."""
    if not job.resuming and not job.overwrite:
        folder.refuse_if_used()
    source = job.resume or job.init_from
    if source is not None and source.is_dir():
        raise CheckpointError(f"{source} is a folder; name the file, such as {source / NEWEST}")
    saved = load_checkpoint(source) if source else None
    saved = without_adapters(saved) if saved and job.init_from else saved
    if job.resume and job.resume.resolve().parent != job.out.resolve():
        folder.refuse_if_used(f"to go on with {job.resume}, give --out another folder")
    saved, skipped = folder.newest() if job.resume_newest else (saved, [])
    if saved is None or not job.resuming:
        return saved, skipped
    _, config = resolve_resume(job.given, saved.model, saved.train)
    done = saved.progress.eval_step >= config.iters  # else a stop has cut it off
    if saved.state.step > config.iters or (saved.state.step == config.iters and done):
        for line in skipped:
            click.echo(line)
        click.echo(
            f"Already at iteration {saved.state.step} (target {config.iters}). Nothing to train."
        )
        return None
    if saved.progress.plateau.exhausted(config.patience):
        click.echo(
            f"Stopped early at iteration {saved.state.step}: {config.patience} evaluations "
            f"without a new best. --patience 0, or a larger one, goes on."
        )
        return None
    return (before_decay(saved, config.iters, job.out) if job.resume_newest else saved), skipped


def same_tokenizer(tokenizer: Tokenizer, given: Mapping[str, Any]) -> None:
    """ResumeError where the options ask for another tokenizer than the checkpoint's."""
    kind = tokenizer.to_json()["type"]
    name, size = given.get("tokenizer"), given.get("vocab_size")
    if isinstance(tokenizer, CharTokenizer):
        size = size if size is not None and size < len(tokenizer.chars) else None  # a limit
    if name is not None and name != kind and choose_tokenizer(name, 0) != tokenizer:
        raise ResumeError(
            f"Checkpoint tokenizer {kind} != tokenizer {name}; its weights go with its own "
            "tokenizer: leave the option out"
        )
    if size is not None and size != tokenizer.vocab_size:
        raise ResumeError(
            f"Checkpoint vocab_size {tokenizer.vocab_size} != vocab_size {size}; its weights go "
            "with its own tokenizer: leave the option out"
        )


def same_vocabulary(tokenizer: Tokenizer, files: Sequence[Path], how: Reading) -> None:
    """CheckpointError where the text's characters are not the checkpoint's; subwords spell any
    text."""
    if not isinstance(tokenizer, CharTokenizer):
        return
    with text.ProgressBar() as bar:
        own = text.loader(how, bar).learn(files, Vocabulary())
    if own == tokenizer:
        return
    hint = "give the --data it was trained on, or --init-from to start a new run from its weights"
    if tokenizer.vocab_size != own.vocab_size:
        raise CheckpointError(
            f"Checkpoint vocab_size {tokenizer.vocab_size} != model vocab_size {own.vocab_size}: "
            f"this text has other characters; {hint}"
        )
    raise CheckpointError(f"the checkpoint's characters are not those of this text; {hint}")


def changes(
    saved: Checkpoint, model: ModelConfig, config: TrainConfig, corpus: Corpus, backend_name: str
) -> list[str]:
    """What makes the resumed run another one than the undisturbed would have been."""
    lines = []
    if corpus.sha256 != saved.data.get("sha256"):
        lines.append("The text has changed since the checkpoint was written; going on with it.")
    if backend_name != saved.backend:
        lines.append(
            f"Written by {saved.backend}, resumed on {backend_name}: equal up to rounding"
            f"{' and what dropout draws' if model.dropout else ''}."
        )
    elif backend_name == "numpy" and config.threads != saved.train.threads:
        lines.append(
            f"{config.threads} threads instead of {saved.train.threads}: equal up to rounding."
        )
    if config.iters != saved.train.iters:
        lines += _moved_target(saved, config)
    return lines


def before_decay(saved: Checkpoint, iters: int, folder: Path) -> Checkpoint:
    """Of a run whose trapezoid has begun to decay and is to go further: the latest kept
    checkpoint from before the decay, if there is one; else `saved`."""
    old = saved.train
    start = decay_start(old.iters, old.warmup)
    if old.schedule != "trapezoid" or iters <= old.iters or saved.state.step <= start:
        return saved
    kept = [path for step in range(start, 0, -1) if (path := folder / kept_name(step)).exists()]
    return load_checkpoint(kept[0]) if kept else saved


def _moved_target(saved: Checkpoint, config: TrainConfig) -> list[str]:
    step, old = saved.state.step, saved.train
    moved = f"The target moved from {old.iters} to {config.iters}"
    if config.schedule in ("constant", "plateau"):
        return []
    if config.schedule != "trapezoid":
        return [f"{moved}: the {config.schedule} decay now ends there."]
    if step <= decay_start(old.iters, old.warmup):
        return [f"{moved}: going on from step {step}, where the decay had not begun."]
    return [
        f"{moved}, but no checkpoint from before the decay was kept: the rate goes back up at "
        f"step {step}."
    ]
