"""Failures of a device in the middle of a computation: how MLX words them, and the cures."""

from __future__ import annotations

from dataclasses import dataclass

from mlx_randygpt.config import UserError
from mlx_randygpt.words import one_line

FEWER = "--micro-batch with fewer sequences per pass"
LESS_MEMORY = "--micro-batch auto, --checkpoint-activations, or a smaller --batch-size or model"


class DeviceError(UserError, RuntimeError):
    """The device failed in a training run; the message says what to do and how to resume."""


@dataclass(frozen=True)
class Failure:
    """A kind of failure: phrases that its message contains, what it means, and the cure."""

    phrases: tuple[str, ...]  # in lower case
    meaning: str
    cure: str


OUT_OF_MEMORY = Failure(  # MLX's allocator, a command buffer of Metal, CUDA
    (
        "insufficient memory",
        "unable to allocate",
        "maximum allowed buffer size",
        "out of memory",
    ),
    "out of memory",
    "try a smaller --batch-size, --block-size or model",
)
FAILURES = (
    Failure(
        ("impacting interactivity",),
        "macOS stopped the GPU because it kept the display waiting",
        f"let the display sleep, or use {FEWER}, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 before "
        "the command",
    ),
    Failure(
        ("gpu timeout", "gpu hang"),
        "macOS stopped the GPU because one piece of work took too long",
        f"use {FEWER}, or set AGX_RELAX_CDM_CTXSTORE_TIMEOUT=1 before the command",
    ),
    Failure(
        ("resource limit (",),
        "MLX holds as many arrays as macOS allows it",
        "start again; this does not come from the size of the model",
    ),
    Failure(
        ("victim of gpu error", "excessive gpu errors"),
        "the GPU was reset after an error, perhaps of another program",
        "start again",
    ),
    OUT_OF_MEMORY,
)


def describe_failure(error: BaseException, *, in_training: bool = False) -> str:
    """Return one line with what happened and what to do; "" if it is no failure of a device."""
    text = one_line(error)
    failure = next((f for f in FAILURES if any(p in text.lower() for p in f.phrases)), None)
    if isinstance(error, MemoryError):
        failure = OUT_OF_MEMORY
    if failure is None:
        return ""
    cure = f"try {LESS_MEMORY}" if in_training and failure is OUT_OF_MEMORY else failure.cure
    return f"{failure.meaning} ({text}); {cure}"
