"""What resuming asks: is it the same run still, and what makes it another one."""

from __future__ import annotations

from pathlib import Path

from mlx_randygpt.checkpoint import Checkpoint, CheckpointError, kept_name, load_checkpoint
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data.corpus import Corpus
from mlx_randygpt.schedule import decay_start
from mlx_randygpt.tokenizer import Tokenizer


def same_vocabulary(saved: Checkpoint, tokenizer: Tokenizer, own: Tokenizer) -> None:
    """CheckpointError where the text's characters are not the checkpoint's."""
    if tokenizer == own:
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
