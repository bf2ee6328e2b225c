"""What several ranks cost on one machine: sums of gradient-sized vectors, and training steps.

    python benchmarks/ranks.py [--parts sums steps] [--ranks 2] [--rows 8 32] [--turns 5]
                               [--json FILE] [--markdown FILE]

Each rank has one core to itself (Linux: pinned to it) and one thread, on the NumPy backend.
Compared, in turns: one rank alone on its rows; as many such processes side by side that know
nothing of each other; and ranks that average, each on as many rows. The second tells what sharing
a machine costs, the third over the second what averaging does. Processor time, all threads of a
rank together, tells that too where others use the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import save

Row = dict[str, Any]
SIZES = {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 67}
MEGABYTES = (4, 40, 160)


class Workers:
    """Processes of this script that compute when they are told to."""

    def __init__(self, n: int, joined: bool, *words: str) -> None:
        place: list[dict[str, str]] = [{} for _ in range(n)]
        if joined:
            with tempfile.NamedTemporaryFile("w", suffix=".json", delete=False) as file:
                json.dump([[f"127.0.0.1:{port}"] for port in free_ports(n)], file)
            place = [{"MLX_RANK": str(r), "MLX_HOSTFILE": file.name} for r in range(n)]
        cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
        self._processes = [
            subprocess.Popen(
                [sys.executable, __file__, "--worker", *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                env={**os.environ, "BENCH_CORE": str(cores[r % len(cores)] if cores else ""), **at},
            )
            for r, at in enumerate(place)
        ]  # fmt: skip
        for process in self._processes:
            assert json.loads(_read(process)) == "ready"

    def run(self, what: str) -> list[Row]:
        """What each of them answers; they begin together."""
        for process in self._processes:
            assert process.stdin
            process.stdin.write(what + "\n")
            process.stdin.flush()
        return [json.loads(_read(process)) for process in self._processes]

    def close(self) -> None:
        for process in self._processes:
            assert process.stdin
            process.stdin.close()
        for process in self._processes:
            process.wait()


def _read(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline()


def free_ports(n: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(n)]
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def work(options: argparse.Namespace) -> None:
    """A worker: pinned first, so that libraries see one core."""
    if core := os.environ.get("BENCH_CORE"):
        os.sched_setaffinity(0, {int(core)})
    import numpy as np

    from mlx_randygpt.backends.ranks.group import is_ranked

    group = None
    if is_ranked():
        from mlx_randygpt.backends.ranks.ring import join

        group = join(lambda seconds: None)
    backend = built(group, options.rows[0]) if options.worker_trains else None
    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        name, _, number = line.strip().partition(" ")
        if name == "sum":
            assert group
            flat = np.ones(int(float(number) * 1e6 / 4), np.float32)
            seconds = [timed(lambda: group.sum(flat)) for _ in range(5)]  # noqa: B023
            print(json.dumps({"seconds": statistics.median(seconds[1:])}), flush=True)
        else:
            assert backend
            print(json.dumps(steps(backend, int(number))), flush=True)


def timed(run: Any) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def built(group: Any, rows: int) -> Any:
    """A backend of 10.7 M parameters on one thread, and the batch of all ranks."""
    import numpy as np

    from mlx_randygpt.backends.numpy.backend import NumpyBackend
    from mlx_randygpt.backends.ranks.group import SINGLE
    from mlx_randygpt.config import ModelConfig, TrainConfig
    from mlx_randygpt.model import initial_state
    from mlx_randygpt.recipes import RECIPES
    from mlx_randygpt.state import Batch

    model = ModelConfig(**SIZES, **RECIPES["modern"]["model"])
    train = TrainConfig(**RECIPES["modern"]["train"], threads=1)
    state = initial_state(model, 1)
    backend = NumpyBackend(model, train, state, group=group or SINGLE)
    n = rows * (group.size if group else 1)
    windows = np.random.default_rng(0).integers(0, model.vocab_size, (n, model.block_size + 1))
    batch = Batch.of(windows)
    summing: list[float] = []
    if group:
        plain = group.sum
        group.sum = lambda flat: summing.append(timed(lambda: plain(flat)))

    def step() -> Row:
        summing.clear()
        before = time.process_time()
        seconds = timed(lambda: backend.train_step([batch], 1e-4))
        return {"seconds": seconds, "cpu": time.process_time() - before, "sum": sum(summing)}

    step()
    step()
    return step


def steps(step: Any, n: int) -> Row:
    found = [step() for _ in range(n)]
    return {name: statistics.median(row[name] for row in found) for name in found[0]}


def sums(options: argparse.Namespace) -> list[Row]:
    """Seconds of a sum over 2, 3 and 4 ranks; more ranks than cores share them."""
    rows = []
    for n in (2, 3, 4):
        workers = Workers(n, True)
        for size in MEGABYTES:
            seconds = max(row["seconds"] for row in workers.run(f"sum {size}"))
            rows.append({"ranks": n, "MB": size, "ms": 1e3 * seconds, "MB/s": size / seconds})
        workers.close()
    return rows


def training(options: argparse.Namespace) -> list[Row]:
    n = options.ranks
    found = []
    for rows in options.rows:
        words = ["--worker-trains", "--rows", str(rows)]
        teams = {
            "alone": Workers(1, False, *words),
            "side by side": Workers(n, False, *words),
            "ranks": Workers(n, True, *words),
        }
        seconds: dict[str, list[float]] = {name: [] for name in teams}
        work: dict[str, list[float]] = {name: [] for name in teams}
        shares = []
        for _ in range(options.turns):
            for name, team in teams.items():
                answers = team.run("step 3")
                seconds[name].append(max(answer["seconds"] for answer in answers))
                work[name].append(max(answer["cpu"] for answer in answers))
                if name == "ranks":
                    shares.append(max(a["sum"] / a["seconds"] for a in answers))
        for team in teams.values():
            team.close()
        ranks = seconds["ranks"]
        found.append(
            {
                "ranks": n, "sequences of each": rows,
                **{f"{k}, ms": 1e3 * statistics.median(v) for k, v in seconds.items()},
                "over alone, %": _more(ranks, seconds["alone"]),
                "over side by side, %": _more(ranks, seconds["side by side"]),
                "processor time over side by side, %": _more(work["ranks"], work["side by side"]),
                "in the sum, with waiting, %": 100 * statistics.median(shares),
            }
        )  # fmt: skip
    return found


def _more(ours: list[float], base: list[float]) -> float:
    """By how many percent ours take longer, turn by turn."""
    return 100 * (statistics.median(a / b for a, b in zip(ours, base, strict=True)) - 1)


def markdown(tables: dict[str, list[Row]]) -> str:
    lines = []
    for name, rows in tables.items():
        lines += [f"### {name}", "", "| " + " | ".join(rows[0]) + " |", "|--:" * len(rows[0]) + "|"]
        for row in rows:
            cells = (f"{v:.1f}" if isinstance(v, float) else str(v) for v in row.values())
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=["sums", "steps"], default=["sums", "steps"])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker-trains", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    measures = {"sums": sums, "steps": training}
    tables = {part: measures[part](options) for part in options.parts}
    text = markdown(tables)
    print(text)
    if options.markdown:
        options.markdown.write_text(text)
    save(options.json, settings=SIZES, **tables)


if __name__ == "__main__":
    main()
