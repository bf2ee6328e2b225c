"""`mlxgpt info`: show what a checkpoint holds and verify its checksum."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.loading import default_checkpoint
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json, show_facts
from mlx_randygpt.cli.values import FilePath
from mlx_randygpt.words import format_bytes, format_clock

if TYPE_CHECKING:
    from mlx_randygpt.checkpoint import Checkpoint

N_CHARACTERS = 32  # of the vocabulary to show
N_PATHS = 3  # of the text to show


@click.command("info", cls=Command)
@click.argument("path", required=False, type=FilePath(path_type=Path))
@json_option
def command(path: Path | None, json: bool) -> None:
    """Show what a checkpoint holds and verify its checksum.

    PATH is a checkpoint or the folder of a run, whose best checkpoint counts; without it, the
    folder is checkpoints.
    """
    from mlx_randygpt.checkpoint import load_checkpoint

    path = default_checkpoint(path)
    saved = load_checkpoint(path, weights_only=True)  # raises if the checksum fails
    n_bytes = path.stat().st_size
    if json:
        print_json(describe(path, saved, n_bytes))
    else:
        show_facts(facts(path, saved, n_bytes))


def describe(path: Path, saved: Checkpoint, n_bytes: int) -> dict[str, Any]:
    """Return the contents as JSON keys and values; losses are in nats, nan or inf if unknown."""
    from dataclasses import asdict

    from mlx_randygpt.model import parameter_count, trained_count
    from mlx_randygpt.training.reports import perplexity

    progress = saved.progress
    return {
        "path": str(path),
        "step": saved.state.step,
        "parameters": parameter_count(saved.model),
        "trained_parameters": trained_count(saved.model),
        "val_loss": progress.val_loss,
        "val_step": progress.eval_step if progress.eval_step >= 0 else None,
        "perplexity": perplexity(progress.val_loss),
        "bits_per_byte": progress.bits_per_byte,
        "best_loss": progress.best_loss,
        "best_step": progress.best_step,
        "vocab_size": saved.model.vocab_size,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "model": asdict(saved.model),
        "train": asdict(saved.train),
        "tokenizer": saved.tokenizer,
        "dialogue": _dialogue(saved),
        "data": saved.data,
        "backend": saved.backend,
        "file_bytes": n_bytes,
        "checksum_ok": True,  # or load_checkpoint would have raised
    }


def facts(path: Path, saved: Checkpoint, n_bytes: int) -> Iterator[tuple[str, str]]:
    """Yield the contents as names and values."""
    from mlx_randygpt.model import parameter_count, trained_count

    model, train, progress = saved.model, saved.train, saved.progress
    yield "File", f"{path}, {format_bytes(n_bytes)}, checksum verified"
    kind = "GPT-2, " if model.is_gpt2 else ""
    yield "Model", f"{kind}{parameter_count(model):,} parameters, dropout {model.dropout:g}"
    if model.lora_rank:
        yield (
            "Adapters",
            f"rank {model.lora_rank}, alpha {model.lora_alpha:g}, on {model.lora_targets}: "
            f"{trained_count(model):,} trained parameters",
        )
    sizes = ("n_layer", "n_head", "n_embd", "block_size")
    yield "Sizes", ", ".join(f"{name} {getattr(model, name)}" for name in sizes)
    yield "Step", f"{saved.state.step:,} of {train.iters:,}"
    bits = progress.bits_per_byte / progress.val_loss  # per nat; the same in every evaluation
    yield "Validation", _loss(progress.val_loss, progress.eval_step, bits)
    yield "Best", _loss(progress.best_loss, progress.best_step, bits)
    yield "Trained on", f"{progress.tokens:,} tokens in {format_clock(progress.seconds)}"
    yield "Tokenizer", _tokenizer(saved)
    yield "Recipe", f"{train.recipe}, preset {train.preset}, seed {train.seed}"
    yield (
        "Optimizer",
        f"{train.optimizer}, lr {train.lr:g}, weight decay {train.weight_decay:g}, "
        f"clipping {train.grad_clip:g}, {train.sequences_per_step} sequences per step",
    )
    yield "Windows", "in passes over the text" if train.order == "passes" else "drawn at random"
    yield "Schedule", f"{train.schedule} to {train.min_lr:g}, warmup {train.warmup}"
    yield "Data", _data(saved.data)
    if _dialogue(saved):
        yield "Dialogue", "it answers; losses count the answers of conversations only"
    if saved.data.get("paths"):
        yield "Validation text", str(saved.data.get("validation") or "the last tenth of the tokens")
    origin = saved.data.get("imported")
    if isinstance(origin, dict):
        yield "Imported from", f"{origin.get('format')}, {origin.get('source')}"
    else:
        yield "Written by", f"the {saved.backend} backend"


def _dialogue(saved: Checkpoint) -> bool:
    """Return whether a model was trained on dialogue; an imported one if it has the tokens."""
    from mlx_randygpt.dialogue import has_dialogue
    from mlx_randygpt.tokenizers import tokenizer_from_json

    has_tokens = has_dialogue(tokenizer_from_json(saved.tokenizer))
    return bool(saved.data.get("dialogue", has_tokens))


def _loss(loss: float, step: int, bits: float) -> str:
    from mlx_randygpt.training.reports import perplexity

    if not math.isfinite(loss):
        return "not evaluated yet"
    measures = f"perplexity {perplexity(loss):.2f}"
    if math.isfinite(bits):  # older files lack it
        measures += f", {loss * bits:.3f} bits/byte"
    return f"{loss:.4f} ({measures}) at step {step:,}"


def _tokenizer(saved: Checkpoint) -> str:
    from mlx_randygpt.tokenizers import tokenizer_from_json

    tokenizer = tokenizer_from_json(saved.tokenizer)
    first = tokenizer.decode(range(min(N_CHARACTERS, tokenizer.vocab_size)))
    return f"{saved.tokenizer['type']}, vocabulary {tokenizer.vocab_size}: {first!r} …"


def _data(data: dict[str, Any]) -> str:
    paths = [str(path) for path in data.get("paths", ())]
    shown = ", ".join(paths[:N_PATHS]) or "unknown"
    more = f" and {len(paths) - N_PATHS} more files" if len(paths) > N_PATHS else ""
    characters, sha256 = data.get("characters", 0), str(data.get("sha256", ""))
    return f"{shown}{more}: {characters:,} characters, sha256 {sha256[:12] or 'unknown'}"
