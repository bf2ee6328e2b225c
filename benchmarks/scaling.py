"""How cost grows: with parameters, context and tokens, with ranks, and what recomputing saves.

    python benchmarks/scaling.py size          step time of NumPy over width, depth, context, batch
    python benchmarks/scaling.py activations   peak memory and step time with and without them kept
    python benchmarks/scaling.py collectives   sums over 2 to 4 processes on loopback, by MLX's ring
    python benchmarks/scaling.py ranks         what that makes of a step on 1 to 64 hosts, simulated
    python benchmarks/scaling.py shard         whether nn.fully_shard runs over the ring
    python benchmarks/scaling.py mlx           plan's memory of MLX beside what MLX counted

    [--rounds 3] [--json FILE]

Every size and every setting is a process of its own, and they take turns. What is simulated is
plan's model: a ring of 2(n−1) messages of 1/n of the gradients. `collectives`, `shard` and `mlx`
need MLX.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from turns import save, timed

BASE = {"n_layer": 4, "n_head": 4, "n_embd": 128, "block_size": 64, "batch_size": 32}
SWEEPS: dict[str, list[dict[str, int]]] = {
    "width": [{"n_embd": c} for c in (64, 128, 256, 512)],
    "layers": [{"n_layer": n} for n in (2, 4, 8, 16)],
    "context, same tokens": [{"block_size": t, "batch_size": 2048 // t} for t in (64, 256, 1024)],
    "batch": [{"batch_size": b} for b in (16, 32, 64, 128)],
}
DEEP = {"n_layer": 12, "n_head": 8, "n_embd": 256, "block_size": 256, "batch_size": 16}
SIZES = [1 << 10, 1 << 14, 1 << 18, 1 << 22, 1 << 24]  # float32 numbers
HOSTS = (1, 2, 4, 8, 16, 64)
LOOPBACK = 0.5  # GB/s, as `collectives` found on two cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=sorted(MODES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        CHILDREN[options.what](json.loads(options.child))
        return
    found = MODES[options.what](options.rounds)
    save(options.json, what=options.what, rounds=options.rounds, found=found)


def child(what: str, settings: dict[str, Any], **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, what, "--child", json.dumps(settings)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | environment,
    )  # fmt: skip


def answer(process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate()
    if process.returncode:
        raise SystemExit(err)
    return json.loads(out) if out else None


def in_turn(cases: list[dict[str, Any]], rounds: int, what: str) -> list[dict[str, float]]:
    """The figures of each case, the cases in turn: times and rates are the best of the rounds, for
    other work on the machine only ever adds to them; memory is the median."""
    found: list[dict[str, list[float]]] = [defaultdict(list) for _ in cases]
    for _ in range(rounds):
        for case, figures in zip(cases, found, strict=True):
            for name, value in answer(child(what, case)).items():
                figures[name].append(value)
    best = defaultdict(lambda: statistics.median, step_ms=min, gflops=max)
    return [{name: best[name](v) for name, v in f.items()} for f in found]


# Size, and what recomputing saves


def size(rounds: int) -> Any:
    """A sweep over each number; the exponent is that of step time from the first to the last."""
    cases = {name: [BASE | change for change in sweep] for name, sweep in SWEEPS.items()}
    every = {json.dumps(case): case for sweep in cases.values() for case in sweep}
    found = dict(zip(every, in_turn(list(every.values()), rounds, "size"), strict=True))
    rows = []
    for name, sweep in cases.items():
        steps = []
        for case, change in zip(sweep, SWEEPS[name], strict=True):
            figures = found[json.dumps(case)]
            steps.append(figures["step_ms"])
            rows.append({"sweep": name, **case, **figures})
            words = ", ".join(f"{k} {v}" for k, v in change.items())
            print(
                f"{name:22} {words:32} {figures['parameters']:12,.0f} {figures['step_ms']:9.1f} ms "
                f"{figures['gflops']:7.0f} GFLOP/s {figures['peak_mb']:7.0f} MB"
            )
        first, last = (
            next(iter(change.values())) for change in (SWEEPS[name][0], SWEEPS[name][-1])
        )
        power = math.log(steps[-1] / steps[0]) / math.log(last / first)
        print(f"{name:22} time grows with the power {power:.2f}")
        rows.append({"sweep": name, "power": power})
    return rows


def activations(rounds: int) -> Any:
    """A deep model with activations kept and made again, both recipes."""
    cases = [
        DEEP | {"recipe": recipe, "again": again}
        for recipe in ("classic", "modern")
        for again in (False, True)
    ]
    found = in_turn(cases, rounds, "activations")
    for case, figures in zip(cases, found, strict=True):
        word = "made again" if case["again"] else "kept"
        print(f"{case['recipe']:8} {word:10} {figures['peak_mb']:8.0f} MB "
              f"{figures['step_ms']:9.1f} ms")  # fmt: skip
    return [case | figures for case, figures in zip(cases, found, strict=True)]


def one_size(case: dict[str, Any]) -> None:
    """Time and memory of steps of one model, in this process."""
    import numpy as np

    from mlx_randygpt.backends.base import resident_bytes
    from mlx_randygpt.backends.numpy.backend import NumpyBackend
    from mlx_randygpt.config import ModelConfig, TrainConfig
    from mlx_randygpt.model import flops_per_token, initial_state
    from mlx_randygpt.model import parameter_count as count
    from mlx_randygpt.recipes import RECIPES
    from mlx_randygpt.state import Batch

    recipe, again = case.pop("recipe", "modern"), case.pop("again", False)
    batch_size = case.pop("batch_size")
    model = ModelConfig(vocab_size=67, **case, **RECIPES[recipe]["model"])
    train = TrainConfig(**RECIPES[recipe]["train"], checkpoint_activations=again)
    windows = np.random.default_rng(0).integers(0, 67, (batch_size, model.block_size + 1))
    backend = NumpyBackend(model, train, initial_state(model, 1))
    batch = Batch.of(windows)

    def step() -> None:
        _ = backend.train_step([batch], 1e-3).loss

    step()
    times = [timed(step)]
    while sum(times) < 1.5 and len(times) < 30:
        times.append(timed(step))
    seconds = statistics.median(times)
    flop = flops_per_token(model) * batch_size * model.block_size
    print(json.dumps({
        "step_ms": 1e3 * seconds, "parameters": count(model), "gflops": flop / seconds / 1e9,
        "peak_mb": resident_bytes() / 1e6,
    }))  # fmt: skip


# MLX

MLX_SIZES = [
    {"recipe": recipe, "n_layer": n, "n_embd": 64, "block_size": 64, "batch_size": 16}
    for recipe, n in (("classic", 4), ("classic", 16), ("modern", 4))
]


def mlx(rounds: int) -> Any:
    """Each size as it is, with activations made again, by us and by MLX's own means, and in passes
    of four sequences."""
    again = {"checkpoint_activations": True}
    changes: list[dict[str, Any]] = [{}, again, again | {"by": "nn.utils"}, {"micro_batch": 4}]
    cases = [size | {"change": change} for size in MLX_SIZES for change in changes]
    found = in_turn(cases, rounds, "mlx")
    for case, figures in zip(cases, found, strict=True):
        words = ", ".join(f"{k} {v}" for k, v in case["change"].items()) or "as it is"
        print(f"{case['recipe']:8} {case['n_layer']} × {case['n_embd']:3}  {words:41} plan "
              f"{figures['planned_mb']:7.0f} MB, MLX {figures['peak_mb']:7.0f} MB, "
              f"step {figures['step_ms']:7.0f} ms")  # fmt: skip
    return [case | figures for case, figures in zip(cases, found, strict=True)]


def one_mlx(case: dict[str, Any]) -> None:
    """The peak of two steps, as MLX counts what it has allocated."""
    import mlx.core as mx
    import mlx.nn as nn
    import numpy as np

    mx.set_memory_limit(1)  # nothing is handed out ahead of its turn
    from mlx_randygpt.backends.mlx.backend import MLXBackend
    from mlx_randygpt.config import ModelConfig, TrainConfig
    from mlx_randygpt.model import initial_state
    from mlx_randygpt.planning.footprint import mlx_step
    from mlx_randygpt.recipes import RECIPES
    from mlx_randygpt.state import Batch

    recipe, change, batch_size = (case.pop(name) for name in ("recipe", "change", "batch_size"))
    by = change.pop("by", "us")
    model = ModelConfig(vocab_size=67, n_head=4, **case, **RECIPES[recipe]["model"])
    train = TrainConfig(**RECIPES[recipe]["train"], batch_size=batch_size, **change)
    windows = np.random.default_rng(0).integers(0, 67, (batch_size, model.block_size + 1))
    backend = MLXBackend(model, train, initial_state(model, 1))
    if by == "nn.utils":
        backend._forward.model.wrap = nn.utils.checkpoint
    batch = Batch.of(windows)
    times = [timed(lambda: backend.train_step([batch], 1e-3).loss) for _ in range(2)]
    planned = mlx_step(model, train, train.micro_batch or batch_size, 1)
    print(json.dumps({
        "planned_mb": sum(planned.values()) / 1e6, "peak_mb": mx.get_peak_memory() / 1e6,
        "step_ms": 1e3 * times[-1],
    }))  # fmt: skip


# Ranks


def collectives(rounds: int) -> Any:
    """Seconds of a sum by size and processes, and the latency and rate that fit them."""
    rows = []
    for n in (2, 3, 4):
        seconds = {size: [] for size in SIZES}
        for _ in range(rounds):
            for size, value in team(n, "collectives")[0].items():
                seconds[int(size)].append(value)
        for size, values in seconds.items():
            rows.append({"n": n, "bytes": 4 * size, "seconds": min(values)})
            print(f"{n} processes {4 * size:12,} bytes {1e3 * rows[-1]['seconds']:10.3f} ms")
    latency, rate = ring(rows)
    print(f"ring on loopback: {1e6 * latency:.0f} µs a message, {rate / 1e9:.2f} GB/s each way")
    return {"rows": rows, "latency": latency, "rate": rate}


def ring(rows: list[dict[str, float]]) -> tuple[float, float]:
    """Latency and rate whose ring is nearest to the measured seconds, in proportion."""
    import numpy as np

    messages = np.array([2 * (row["n"] - 1) for row in rows], float)
    moved = np.array([2 * (row["n"] - 1) / row["n"] * row["bytes"] for row in rows], float)
    seconds = np.array([row["seconds"] for row in rows], float)
    table = np.stack([messages / seconds, moved / seconds], axis=1)
    latency, per_byte = np.linalg.lstsq(table, np.ones(len(rows)))[0]
    return float(latency), float(1 / per_byte)


def team(n: int, what: str) -> list[Any]:
    """The answers of n processes that are the ranks of one ring on loopback."""
    sockets = [socket.socket() for _ in range(n)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    hosts = [[f"127.0.0.1:{one.getsockname()[1]}"] for one in sockets]
    for one in sockets:
        one.close()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "hosts.json")
        path.write_text(json.dumps(hosts), encoding="utf-8")
        ranks = [child(what, {}, MLX_RANK=str(r), MLX_HOSTFILE=str(path)) for r in range(n)]
        return [answer(rank) for rank in ranks]


def sums(_: dict[str, Any]) -> None:
    """One rank: sums of float32 arrays of several sizes."""
    import mlx.core as mx

    group = mx.distributed.init(strict=True, backend="ring")
    found = {}
    for size in SIZES:
        x = mx.ones(size)

        def reduce(x: Any = x) -> None:
            mx.eval(mx.distributed.all_sum(x, group=group))

        reduce()
        found[size] = statistics.median(timed(reduce) for _ in range(20 if size < 1 << 20 else 5))
    print(json.dumps(found))


def shard(_: int) -> Any:
    """What a sharded layer says on two ranks."""
    found = team(2, "shard")[0]
    print(f"nn.fully_shard over the ring: {found}")
    return found


def one_shard(_: dict[str, Any]) -> None:
    import mlx.core as mx
    import mlx.nn as nn

    group = mx.distributed.init(strict=True, backend="ring")
    layer = nn.fully_shard(nn.Linear(8, 8, bias=False), group=group)
    gradient = nn.value_and_grad(layer, lambda x: mx.square(layer(x)).sum())
    try:
        mx.eval(gradient(mx.ones((2, 8))))
        print(json.dumps("runs"))
    except RuntimeError as error:
        print(json.dumps(str(error)))


def ranks(_: int) -> Any:
    """Speed on n hosts over that on one, by plan's model: three sizes, two links."""
    from dataclasses import replace

    from mlx_randygpt import settings
    from mlx_randygpt.planning.devices import DEVICES
    from mlx_randygpt.planning.plan import Workload, make_plan

    rows = []
    cases = [
        ("large", 67, 512, "m3-ultra", LOOPBACK), ("large", 67, 512, "m3-ultra", 1.25),
        ("gpt2", 50257, 64, "m3-ultra", 1.25),
        ("gpt2-xl", 50257, 64, "m3-ultra", 1.25), ("gpt2-xl", 50257, 64, "m3-ultra", 8.0),
        ("gpt2-xl", 50257, 64, "h200", 50.0), ("gpt2-xl", 50257, 512, "h200", 50.0),
    ]  # fmt: skip
    for preset, vocab_size, batch, name, link in cases:
        given = {"preset": preset, "batch_size": batch, "dtype": "bfloat16", "micro_batch": 1}
        model, train = settings.resolve_new(given, vocab_size)
        device = replace(DEVICES[name], link=link * 1e9)
        plans = {
            n: make_plan(
                Workload(model=model, train=train, backend="mlx", tokens=1e9, hosts=n), device
            )
            for n in HOSTS
        }
        one = plans[1].tokens_per_second
        print(f"{preset:8} batch {batch:4} {name:9} {link:5.2f} GB/s  ", end="")
        for n, plan in plans.items():
            speed = plan.tokens_per_second
            print(f"{n}: {speed:,.0f} ({speed / one / n:.0%})", end="  ")
            rows.append({"preset": preset, "batch": batch, "device": name, "link": link,
                         "hosts": n, "tokens_per_second": speed, "efficiency": speed / one / n,
                         "memory_bytes": plan.memory_bytes, "fits": plan.fits})  # fmt: skip
        print()
    return rows


MODES: dict[str, Callable[[int], Any]] = {
    "size": size, "activations": activations, "collectives": collectives, "ranks": ranks,
    "shard": shard, "mlx": mlx,
}  # fmt: skip
CHILDREN: dict[str, Callable[[dict[str, Any]], None]] = {
    "size": one_size, "activations": one_size, "collectives": sums, "shard": one_shard,
    "mlx": one_mlx,
}  # fmt: skip


if __name__ == "__main__":
    main()
