"""What a run will need before it begins: memory by kind, the batch that fits, time and cost.

Pure but for `trial`, which measures short steps of a backend. Time on this machine is fitted to
such steps; elsewhere it is a roof: products at an assumed share of the peak, the passes between
them at an assumed share of the bandwidth, and a ring that sums the gradients. Which of the two it
was stands in every plan.

Legend: L layers, T time, C n_embd, P parameters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from mlx_randygpt.backends.base import Backend
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import flops_per_token, parameter_count
from mlx_randygpt.planning.devices import CONTINUED, REACHED, Device, all_reduce_seconds
from mlx_randygpt.planning.footprint import adamw_count, footprint, largest_batch, on_device
from mlx_randygpt.state import Batch, rng

TRIAL_FLOP = 1.5e11  # of a trial step of one layer: about a second on two cores
TRIAL_SECONDS = 1.0  # of one size
WARM = 1  # steps that are not counted
PASSES = 4  # over what a layer keeps: written and read in each direction
Make = Callable[[ModelConfig], Backend]


@dataclass(frozen=True)
class Rate:
    """Seconds of a step as measured here: a + b·L + (c + d·L)·sequences, of a model as wide as
    `width`, times `scale` for the width that is planned."""

    coefficients: tuple[float, float, float, float]
    width: int
    scale: float
    trials: tuple[tuple[int, int, float], ...]  # layers, sequences, seconds of a step

    def seconds(self, n_layer: int, sequences: int) -> float:
        a, b, c, d = self.coefficients
        return self.scale * (a + b * n_layer + (c + d * n_layer) * sequences)


@dataclass(frozen=True)
class Plan:
    """One answer; the fields are the keys of `mlxgpt plan --json`."""

    device: str
    backend: str
    hosts: int
    parameters: int
    batch_size: int  # over all hosts
    sequences: int  # of each host in one pass
    memory: dict[str, int]  # bytes of each host by kind
    memory_bytes: int
    device_bytes: int  # that a run may fill
    host_bytes: int  # of the machine's own memory, to save from a GPU that has its own
    fits: bool
    largest_batch: int  # of each host in one pass; that which fits
    step_seconds: float
    compute_seconds: float
    network_seconds: float
    tokens_per_second: float
    tokens: float
    steps: int
    hours: float
    cost: float | None
    hours_per_million_tokens: float
    cost_per_million_tokens: float | None
    source: dict[str, str]  # of memory, time and network: "measured …", "counted …", "assumed …"


def make_plan(
    model: ModelConfig, train: TrainConfig, backend: str, device: Device, *,
    hosts: int, tokens: float, cost_per_hour: float | None, threads: int,
    program: int = 0, rate: Rate | None = None,
) -> Plan:  # fmt: skip
    """The plan; with `rate` its time is that of this machine."""
    share = -(-train.batch_size // hosts)
    in_pass = min(share, train.micro_batch or share)

    def memory(sequences: int) -> dict[str, int]:
        found = footprint(backend, model, train, sequences, threads, program)
        return on_device(found, device.unified)

    needed, saving = memory(in_pass), footprint(backend, model, train, 1, threads)["saving"]
    if rate is None:
        compute = train.grad_accum * roof_seconds(model, train, device, needed, share, in_pass)
    else:
        compute = train.grad_accum * rate.seconds(model.n_layer, share)
    n_bytes = 4 * parameter_count(model)
    network = all_reduce_seconds(n_bytes, hosts, device.link, device.latency) if hosts > 1 else 0.0
    step = compute + network
    per_step = train.sequences_per_step * model.block_size
    hours = tokens / per_step * step / 3600
    money = None if cost_per_hour is None else cost_per_hour * hosts
    total = sum(needed.values())
    return Plan(
        device=device.title,
        backend=backend,
        hosts=hosts,
        parameters=parameter_count(model),
        batch_size=train.batch_size,
        sequences=in_pass,
        memory=needed,
        memory_bytes=total,
        device_bytes=device.memory,
        host_bytes=0 if device.unified else saving,
        fits=total <= device.memory,
        largest_batch=largest_batch(lambda n: sum(memory(n).values()) <= device.memory),
        step_seconds=step,
        compute_seconds=compute,
        network_seconds=network,
        tokens_per_second=per_step / step,
        tokens=tokens,
        steps=-int(-tokens // per_step),
        hours=hours,
        cost=None if money is None else money * hours,
        hours_per_million_tokens=hours / tokens * 1e6,
        cost_per_million_tokens=None if money is None else money * hours / tokens * 1e6,
        source=sources(backend, rate, model, hosts),
    )


def roof_seconds(
    model: ModelConfig, train: TrainConfig, device: Device, memory: dict[str, int],
    sequences: int, in_pass: int,
) -> float:  # fmt: skip
    """Seconds of a step's passes over `sequences`, `in_pass` at a time, on a device that was not
    measured: products, then the passes between them, then the optimizer's over its vectors."""
    flops = device.flops_16 if train.dtype == "bfloat16" else device.flops
    again = (4 / 3 if train.checkpoint_activations else 1) * sequences * model.block_size
    kept = footprint("mlx", model, replace(train, checkpoint_activations=False), in_pass, 1)
    between = sum(kept[kind] for kind in ("activations", "attention", "logits"))
    moved = PASSES * between * sequences / in_pass
    moved += 3 * (memory["weights"] + memory["gradients"] + memory["moments"])
    products = again * flops_per_token(model) + muon_flops(model, train)
    return products / (REACHED * flops) + moved / (CONTINUED * device.bandwidth)


def muon_flops(model: ModelConfig, train: TrainConfig) -> float:
    """FLOP of one update: five steps of three products, of matrices whose shorter side is C."""
    turned = parameter_count(model) - adamw_count(model, train)
    return 5 * (2 + 2 * 1 + 2) * turned * model.n_embd


def sources(backend: str, rate: Rate | None, model: ModelConfig, hosts: int) -> dict[str, str]:
    """Where each number comes from, in words."""
    memory = "counted, array by array" if backend == "numpy" else "assumed: what a pass keeps"
    if rate is None:
        time_from = f"assumed: {REACHED:.0%} of peak FLOP/s, {CONTINUED:.0%} of bandwidth"
    elif rate.scale == 1:
        time_from = "measured here: short steps at this width"
    else:
        time_from = f"measured here at width {rate.width}, scaled by FLOP to {model.n_embd}"
    network = "none" if hosts == 1 else "assumed: ring at the link's rate, not overlapped"
    return {"memory": memory, "time": time_from, "network": network}


def fit(trials: Sequence[tuple[int, int, float]]) -> tuple[float, float, float, float]:
    """The coefficients of `Rate` that fit (layers, sequences, seconds) best, none of them below
    zero; with one number of sequences, time is in proportion to them."""
    layers, sequences, seconds = (np.array(c, np.float64) for c in zip(*trials, strict=True))
    one = len(set(sequences)) == 1
    columns = [sequences * 0 if one else sequences**0, 0 * layers if one else layers,
               sequences, layers * sequences]  # fmt: skip
    table = np.stack(columns, axis=1)  # (trials, 4)
    active = [i for i in range(4) if table[:, i].any()]
    found = np.zeros(4)
    while active:
        solved = np.linalg.lstsq(table[:, active] / seconds[:, None], np.ones(len(seconds)))[0]
        if (solved >= 0).all():
            found[active] = solved
            break
        active.pop(int(np.argmin(solved)))
    a, b, c, d = (float(x) for x in found)
    return a, b, c, d


def trial(
    model: ModelConfig, train: TrainConfig, make: Make, sequences: int, few: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:  # fmt: skip
    """Fit a `Rate` to steps of one and of three layers, over `few` sequences and twice as many. Of
    a width too large for short steps half the heads are left out, until they are."""
    small, at_once = model, min(sequences, few) * model.block_size
    while small.n_head > 1 and at_once * flops_per_token(replace(small, n_layer=1)) > TRIAL_FLOP:
        heads = small.n_head // 2
        small = replace(small, n_head=heads, n_embd=heads * small.head_size)
    scale = flops_per_token(model) / flops_per_token(replace(small, n_layer=model.n_layer))
    layers, counts = {1, min(3, model.n_layer)}, {min(sequences, n * few) for n in (1, 2)}
    trials = []
    for n_layer, n in product(sorted(layers), sorted(counts)):
        shallow = replace(small, n_layer=n_layer)
        trials.append((n_layer, n, step_seconds(make(shallow), shallow, train, n, clock)))
    return Rate(fit(trials), small.n_embd, scale, tuple(trials))


def step_seconds(
    backend: Backend, model: ModelConfig, train: TrainConfig, sequences: int,
    clock: Callable[[], float],
) -> float:  # fmt: skip
    """The median of a few steps, the loss of each waited for."""
    tokens = rng(0, "check").integers(model.vocab_size, size=1 << 16, dtype=np.int32)
    starts = np.arange(sequences, dtype=np.int64) * 7 % (len(tokens) - model.block_size - 1)
    batch = Batch(tokens, starts, model.block_size)
    times: list[float] = []
    while len(times) < WARM + 2 or (sum(times[WARM:]) < TRIAL_SECONDS and len(times) < 40):
        start = clock()
        _ = backend.train_step([batch] * train.grad_accum, train.lr).loss
        times.append(clock() - start)
    return statistics.median(times[WARM:]) / train.grad_accum
