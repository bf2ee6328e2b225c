"""Estimate what a run needs: memory by kind, the batch that fits, time and cost.

Time on this machine is fitted to short steps that `measure_rate` takes. On other devices it is a
roofline: products at an assumed share of the peak rate, the passes between them at an assumed share
of the bandwidth, and a ring that sums the gradients. Every plan names its source.

Legend: L layers, T time, C n_embd, P parameters.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from mlx_randygpt.backends import make_backend
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.backends.numpy.backend import available_cores
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import flops_per_token, initial_state, parameter_count
from mlx_randygpt.planning.devices import (
    BANDWIDTH_SHARE,
    FLOPS_SHARE,
    Device,
    all_reduce_seconds,
)
from mlx_randygpt.planning.footprint import (
    adamw_count,
    chunk_rows,
    footprint,
    largest_batch,
    on_device,
)
from mlx_randygpt.state import Batch, rng

TRIAL_FLOP = 1.5e11  # largest trial step of one layer: about a second on two cores
TRIAL_SECONDS = 1.0  # for each size
N_WARMUP = 1  # steps that are not counted
N_PASSES = 4  # over the activations of a layer: written and read in each direction
Make = Callable[[ModelConfig], Backend]


@dataclass(frozen=True)
class Rate:
    """Time of a step as measured here.

    Seconds are a + b·L + (c + d·L)·sequences for a model of `width`, times `scale` for the width
    of the planned model.
    """

    coefficients: tuple[float, float, float, float]
    width: int
    scale: float
    trials: tuple[tuple[int, int, float], ...]  # layers, sequences, seconds of a step

    @classmethod
    def of_step(cls, seconds: float, model: ModelConfig, sequences: int) -> Rate:
        """Return the rate of a model whose steps over so many sequences take so long."""
        return cls((0.0, 0.0, seconds / sequences, 0.0), model.n_embd, 1.0, ())

    def seconds(self, n_layer: int, sequences: int) -> float:
        """Return the time of a step over so many sequences."""
        a, b, c, d = self.coefficients
        return self.scale * (a + b * n_layer + (c + d * n_layer) * sequences)


@dataclass(frozen=True)
class Workload:
    """A run to plan: its settings, how much it trains and on how many hosts."""

    model: ModelConfig
    train: TrainConfig
    backend: str
    tokens: float  # to train on
    hosts: int = 1
    threads: int = 1  # of the NumPy backend
    program_bytes: int = 0  # what the process holds before it allocates anything
    cost_per_hour: float | None = None  # of one host


@dataclass(frozen=True)
class Plan:
    """The estimate; its fields are the keys of `mlxgpt plan --json`."""

    device: str
    backend: str
    hosts: int
    parameters: int
    batch_size: int  # over all hosts
    sequences: int  # per host in one pass
    memory: dict[str, int]  # bytes per host by kind
    memory_bytes: int
    device_bytes: int  # memory that a run can fill
    host_bytes: int  # host memory needed to save from a GPU with its own memory
    fits: bool
    largest_batch: int  # the most that fits on one host in one pass
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


def make_plan(work: Workload, device: Device, rate: Rate | None = None) -> Plan:
    """Plan a run on hosts of this device; `rate` is the measured time of a step, if known."""
    model, train, hosts = work.model, work.train, work.hosts
    share = -(-train.batch_size // hosts)
    in_pass = min(share, train.micro_batch or share)

    def memory(sequences: int, program: int = work.program_bytes) -> dict[str, int]:
        return footprint(work.backend, model, train, sequences, work.threads, program)

    needed = on_device(memory(in_pass), device.unified)
    if rate is None:
        compute = train.grad_accum * roof_seconds(model, train, device, needed, share, in_pass)
    else:
        compute = train.grad_accum * rate.seconds(model.n_layer, share)
    n_bytes = 4 * parameter_count(model)
    network = all_reduce_seconds(n_bytes, hosts, device.link, device.latency) if hosts > 1 else 0.0
    step = compute + network
    per_step = train.sequences_per_step * model.block_size
    hours = work.tokens / per_step * step / 3600
    cost = None if work.cost_per_hour is None else work.cost_per_hour * hosts * hours
    return Plan(
        device=device.title,
        backend=work.backend,
        hosts=hosts,
        parameters=parameter_count(model),
        batch_size=train.batch_size,
        sequences=in_pass,
        memory=needed,
        memory_bytes=sum(needed.values()),
        device_bytes=device.memory,
        host_bytes=0 if device.unified else memory(1, 0)["saving"],
        fits=sum(needed.values()) <= device.memory,
        largest_batch=largest_batch(
            lambda n: sum(on_device(memory(n), device.unified).values()) <= device.memory
        ),
        step_seconds=step,
        compute_seconds=compute,
        network_seconds=network,
        tokens_per_second=per_step / step,
        tokens=work.tokens,
        steps=-int(-work.tokens // per_step),
        hours=hours,
        cost=cost,
        hours_per_million_tokens=hours / work.tokens * 1e6,
        cost_per_million_tokens=None if cost is None else cost / work.tokens * 1e6,
        source=sources(work, rate),
    )


def roof_seconds(
    model: ModelConfig,
    train: TrainConfig,
    device: Device,
    memory: dict[str, int],
    sequences: int,
    in_pass: int,
) -> float:
    """Return the roofline time of a step over `sequences`, `in_pass` at a time.

    It is the sum of the products, the passes between them, and the passes of the optimizer over
    its vectors.
    """
    flops = device.flops if train.dtype == "float32" else device.flops_16
    n_tokens = (4 / 3 if train.checkpoint_activations else 1) * sequences * model.block_size
    stored = footprint("mlx", model, replace(train, checkpoint_activations=False), in_pass, 1)
    between = sum(stored[kind] for kind in ("activations", "attention", "logits"))
    moved = N_PASSES * between * sequences / in_pass
    moved += 3 * (memory["weights"] + memory["gradients"] + memory["moments"])
    products = n_tokens * flops_per_token(model) + muon_flops(model, train)
    return products / (FLOPS_SHARE * flops) + moved / (BANDWIDTH_SHARE * device.bandwidth)


def muon_flops(model: ModelConfig, train: TrainConfig) -> float:
    """Return the FLOP of one update: five steps of three products, with shorter side C."""
    n_muon = parameter_count(model) - adamw_count(model, train)
    return 5 * (2 + 2 * 1 + 2) * n_muon * model.n_embd


def sources(work: Workload, rate: Rate | None) -> dict[str, str]:
    """Return where memory, time and network come from, in words."""
    memory = "counted, array by array" if work.backend == "numpy" else "assumed: what a pass keeps"
    if rate is None:
        time_from = f"assumed: {FLOPS_SHARE:.0%} of peak FLOP/s, {BANDWIDTH_SHARE:.0%} of bandwidth"
    elif rate.scale == 1:
        time_from = "measured here: short steps at this width"
    else:
        time_from = f"measured here at width {rate.width}, scaled by FLOP to {work.model.n_embd}"
    network = "none" if work.hosts == 1 else "assumed: ring at the link's rate, not overlapped"
    return {"memory": memory, "time": time_from, "network": network}


def fit(trials: Sequence[tuple[int, int, float]]) -> tuple[float, float, float, float]:
    """Fit the coefficients of a `Rate`, none below zero, to (layers, sequences, seconds).

    If all trials have the same number of sequences, time is proportional to it.
    """
    layers, sequences, seconds = (np.array(c, np.float64) for c in zip(*trials, strict=True))
    fixed = float(len(set(sequences)) > 1)  # 0: nothing but what grows with sequences
    columns = [fixed * sequences**0, fixed * layers, sequences, layers * sequences]
    table = np.stack(columns, axis=1)  # (trials, 4)
    active = [i for i in range(4) if table[:, i].any()]
    coefficients = np.zeros(4)
    while active:
        solved = np.linalg.lstsq(table[:, active] / seconds[:, None], np.ones(len(seconds)))[0]
        if (solved >= 0).all():
            coefficients[active] = solved
            break
        active.pop(int(np.argmin(solved)))
    a, b, c, d = (float(x) for x in coefficients)
    return a, b, c, d


def usual_threads(backend: str) -> int:
    """Return how many threads a backend uses here unless --threads says otherwise."""
    return available_cores() if backend == "numpy" else 1


def measure_rate(
    model: ModelConfig, train: TrainConfig, backend: str, hosts: int, threads: int
) -> Rate:
    """Measure short steps of a backend on this machine."""
    settings = replace(train, threads=threads, grad_accum=1)

    def make(shallow: ModelConfig) -> Backend:
        state = initial_state(shallow, train.seed)
        return make_backend(backend, shallow, settings, state)

    sequences = -(-train.batch_size // hosts)
    few = threads * chunk_rows(model, sequences, threads)
    return fit_rate(model, settings, make, sequences, few)


def fit_rate(
    model: ModelConfig,
    train: TrainConfig,
    make: Make,
    sequences: int,
    few: int,
    clock: Callable[[], float] = time.perf_counter,
) -> Rate:
    """Fit a `Rate` to steps of one and of three layers, over `few` and twice as many sequences.

    If the model is too wide for short steps, the trials have fewer heads.
    """
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
    backend: Backend,
    model: ModelConfig,
    train: TrainConfig,
    sequences: int,
    clock: Callable[[], float],
    seconds: float = TRIAL_SECONDS,
) -> float:
    """Return the median time of a few steps, each up to reading its loss; they take `seconds`."""
    tokens = rng(0, "check").integers(model.vocab_size, size=1 << 16, dtype=np.int32)
    starts = np.arange(sequences, dtype=np.int64) * 7 % (len(tokens) - model.block_size - 1)
    batch = Batch(tokens, starts, model.block_size)
    times: list[float] = []
    while len(times) < N_WARMUP + 2 or (sum(times[N_WARMUP:]) < seconds and len(times) < 40):
        start = clock()
        _ = backend.train_step([batch] * train.grad_accum, train.lr).loss
        times.append(clock() - start)
    return statistics.median(times[N_WARMUP:]) / train.grad_accum
