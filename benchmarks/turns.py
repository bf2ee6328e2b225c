"""Taking turns: what is compared runs in one process, a few times in a row, one after the other."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Runners = dict[str, Callable[[], object]]


def interleave(runners: Runners, n_turns: int, in_a_row: int) -> dict[str, list[float]]:
    """Seconds of one run, the median of each turn. A turn is some runs in a row, so that a slow
    spell hits all alike; its first is not counted, for the threads of the one before may still be
    spinning and the caches hold its arrays."""
    for run in runners.values():
        for _ in range(3):
            run()
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(n_turns):
        for name, run in runners.items():
            run()
            seconds[name].append(statistics.median(timed(run) for _ in range(in_a_row)))
    return seconds


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def rows(seconds: dict[str, list[float]], tokens: dict[str, int]) -> dict[str, dict[str, float]]:
    """Medians, and how many times the tokens/s of each the first has, turn by turn."""
    first, *_ = seconds
    return {
        name: {
            "ms": round(1e3 * statistics.median(times), 3),
            "tokens_per_second": round(tokens[name] / statistics.median(times)),
            "first_is_times_as_fast": round(
                statistics.median(
                    (tokens[first] / a) / (tokens[name] / b)
                    for a, b in zip(seconds[first], times, strict=True)
                ),
                3,
            ),
        }
        for name, times in seconds.items()
    }


def show(title: str, found: dict[str, dict[str, float]]) -> None:
    print(title)
    first, *_ = found
    for name, row in found.items():
        ratio = f"{first} is {row['first_is_times_as_fast']:.2f} × as fast" * (name != first)
        print(f"{name:22} {row['ms']:9.2f} ms {row['tokens_per_second']:9,} tokens/s  {ratio}")


def save(path: Path | None, **facts: Any) -> None:
    """The figures with the machine and the versions they belong to."""
    if path is None:
        return
    machine = {
        "machine": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    path.write_text(json.dumps({**machine, **facts}, indent=1, default=str) + "\n")
