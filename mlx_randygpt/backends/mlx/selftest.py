"""The choice of Metal kernels: one that is wrong, fails or is slow on this machine is not used.

When a model first computes a loss, each of its kernels is compared, with its gradient, with the MLX
operations that they replace: on random arrays of the model's sizes and few tokens.

Legend: B batch, T time, C n_embd, H heads, D = C/H.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import compress
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_randygpt.backends.mlx import kernels
from mlx_randygpt.backends.mlx.model import Operations
from mlx_randygpt.backends.mlx.ops import MLX_STEPS, TRAINING, Steps, attention, branch
from mlx_randygpt.config import ModelConfig
from mlx_randygpt.state import rng

VARIABLE = "MLXGPT_KERNELS"  # 0 switches all of them off
BOUND = 1e-4  # of ‖ours − MLX's‖ / ‖MLX's‖
N_TOKENS = 2048  # of the arrays
N_ROUNDS = 5  # of which the fastest counts
N_CALLS = 10  # of a round, since waiting for the device takes longer than one call
MAX_T = 1024  # of the arrays, since MLX's attention needs T × T
FIELDS = {  # of Steps, by kernel
    "norm + token shift": ("norm_shift", "norm_shift_gradient"),
    "QK-norm + rotation": ("norm_rotate", "norm_rotate_gradient"),
    "attention": ("attend", "attend_gradient"),
}

Function = Callable[..., Sequence[mx.array]]


@dataclass(frozen=True)
class Sizes:
    """What decides which kernels a model can use."""

    block_size: int
    n_head: int
    head_size: int
    token_shift: bool
    qk_norm: bool
    rope_base: float | None  # None: learned positions


@dataclass(frozen=True)
class Verdict:
    """The result of comparing a kernel; the kernel is used if there is no problem."""

    kernel: str
    problem: str = ""
    seconds: float | None = None  # forward and backward
    plain_seconds: float | None = None  # of the operations that it replaces


def unavailable() -> str:
    """Return the reason why no kernel can run here, or "" if kernels can."""
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0 is set"
    is_metal = mx.default_device().type == mx.DeviceType.gpu and mx.metal.is_available()
    return "" if is_metal else "MLX has no Metal GPU here"


def operations(model: ModelConfig) -> Operations:
    """Return the operations of a training step, with kernels where they are right and faster."""
    if unavailable():
        return TRAINING

    def steps(x: mx.array) -> Steps:
        fits = x.dtype == mx.float32 and x.shape[1] % kernels.TILE == 0
        return chosen(sizes_of(model)) if fits else MLX_STEPS

    def attend(qkv: mx.array, n_head: int, **switches: bool) -> mx.array:
        return attention(qkv, n_head, steps=steps(qkv), **switches)

    return replace(TRAINING, branch=lambda x: branch(x, steps(x)), attention=attend)


@cache
def chosen(sizes: Sizes) -> Steps:
    """Return the steps of a model of these sizes: kernels where they passed."""
    ours = kernel_steps(sizes.qk_norm)
    used = [verdict.kernel for verdict in verdicts(sizes) if not verdict.problem]
    return replace(MLX_STEPS, **{f: getattr(ours, f) for kernel in used for f in FIELDS[kernel]})


def notes(model: ModelConfig) -> tuple[str, ...]:
    """Return one line for each kernel that this model could use and that did not pass."""
    if unavailable():
        return ()
    return tuple(
        f"Metal kernel for {verdict.kernel} is off: {verdict.problem}"
        for verdict in verdicts(sizes_of(model))
        if verdict.problem
    )


def sizes_of(model: ModelConfig) -> Sizes:
    """Return a model's sizes."""
    rope_base = model.rope_base if model.position == "rope" else None
    shape = model.block_size, model.n_head, model.head_size
    return Sizes(*shape, model.token_shift, model.qk_norm, rope_base)


@cache
def verdicts(sizes: Sizes) -> tuple[Verdict, ...]:
    """Compare all kernels that a model of these sizes can use, once in a process."""
    names, found = suitable(sizes), []
    if names:
        ours, calls = kernel_steps(sizes.qk_norm), trials(sizes)
        for kernel in names:
            call, inputs = calls[kernel]
            found.append(compare(kernel, call(ours), call(MLX_STEPS), inputs))
        mx.clear_cache()
    return tuple(found)


def kernel_steps(qk_norm: bool) -> Steps:
    """Return the steps as kernels."""
    return Steps(
        norm_shift=kernels.norm_shift,
        norm_shift_gradient=kernels.norm_shift_gradient,
        norm_rotate=lambda qkv, n_head, _, base: kernels.norm_rotate(qkv, n_head, base),
        norm_rotate_gradient=lambda qkv, dqk, dv, *switches: kernels.norm_rotate_gradient(
            qkv, dqk, dv, switches[-1]
        ),
        attend=partial(kernels.attend, qk_norm=qk_norm),
        attend_gradient=kernels.attend_gradient,
    )


def suitable(sizes: Sizes) -> tuple[str, ...]:
    """Return the kernels that a model of these sizes can use."""
    if sizes.block_size % kernels.TILE or sizes.head_size % kernels.TILE:
        return ()
    suits = sizes.token_shift, sizes.qk_norm and sizes.rope_base is not None, True
    return tuple(compress(FIELDS, suits))


def trials(sizes: Sizes) -> dict[str, tuple[Callable[[Steps], Function], list[mx.array]]]:
    """Return for each kernel a call of its steps, and the arguments."""
    t, h, d = min(sizes.block_size, MAX_T), sizes.n_head, sizes.head_size
    b, switches = N_TOKENS // t, (h, sizes.qk_norm, sizes.rope_base)
    x, dy, past = (_normal(seed, b, t, h * d) for seed in range(3))
    qkv, dqk, dv = _normal(3, b, t, 3 * h * d), _normal(4, b, 2 * h, t, d), _normal(5, b, h, t, d)
    qk = MLX_STEPS.norm_rotate(qkv, *switches)
    calls = (
        (lambda s: partial(_norm_shift, s), [x, dy, past]),
        (lambda s: partial(_norm_rotate, s, switches), [qkv, dqk, dv]),
        (lambda s: partial(_attend, s), [qk, qkv, dy]),
    )
    return dict(zip(FIELDS, calls, strict=True))


def _norm_shift(s: Steps, x: mx.array, dy: mx.array, past: mx.array) -> list[mx.array]:
    return [s.norm_shift(x), s.norm_shift_gradient(x, dy, past)]


def _norm_rotate(
    s: Steps, switches: tuple[Any, ...], qkv: mx.array, dqk: mx.array, dv: mx.array
) -> list[mx.array]:
    return [s.norm_rotate(qkv, *switches), s.norm_rotate_gradient(qkv, dqk, dv, *switches)]


def _attend(s: Steps, qk: mx.array, qkv: mx.array, dy: mx.array) -> list[mx.array]:
    y, kept = s.attend(qk, qkv)
    return [y, *s.attend_gradient(qk, qkv, y, kept, dy)]


def compare(
    kernel: str,
    ours: Function,
    plain: Function,
    inputs: Sequence[mx.array],
    *,
    clock: Callable[[], float] = time.perf_counter,
    compile: Callable[[Function], Function] = mx.compile,
) -> Verdict:
    """Judge a kernel by its values and its time, against those of the plain operations.

    Their values are computed on the CPU, since the products of an M5's GPU are rounded to TF32.
    """
    try:
        with mx.stream(mx.cpu):
            mx.eval(expected := plain(*inputs))
        ours, plain = compile(ours), compile(plain)
        error = _distance(ours(*inputs), expected)
        if not error <= BOUND:  # a nan is not
            return Verdict(kernel, f"its error is {error:.1e}, more than {BOUND:.0e}")
        rounds = [
            [_seconds(function, inputs, clock) for function in (ours, plain)]
            for _ in range(N_ROUNDS)
        ]
    except Exception as problem:  # whatever a compiler or a driver says
        first, *_ = [*str(problem).splitlines(), ""]
        return Verdict(kernel, f"{type(problem).__name__}: {first}")
    seconds, plain_seconds = map(min, zip(*rounds, strict=True))
    if seconds <= plain_seconds:
        return Verdict(kernel, "", seconds, plain_seconds)
    times = f"{1e3 * seconds:.3f} ms instead of {1e3 * plain_seconds:.3f}"
    return Verdict(kernel, f"it is slower, {times}", seconds, plain_seconds)


def _distance(ours: Sequence[mx.array], expected: Sequence[mx.array]) -> float:
    """Return the largest relative distance of two arrays."""
    pairs = [(np.array(a), np.array(b)) for a, b in zip(ours, expected, strict=True)]
    with np.errstate(all="ignore"):
        return float(np.max([np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs]))


def _seconds(function: Function, inputs: Sequence[mx.array], clock: Callable[[], float]) -> float:
    """Return the mean seconds of a call, over several calls in a row."""
    start = clock()
    mx.eval([function(*inputs) for _ in range(N_CALLS)])
    return (clock() - start) / N_CALLS


def _normal(seed: int, *shape: int) -> mx.array:
    return mx.array(rng(seed, "check").standard_normal(shape, dtype=np.float32))
