"""Counts, gauges and durations, written as Prometheus reads them (text format 0.0.4)."""

from __future__ import annotations

import threading
from bisect import bisect_left

PREFIX = "mlxgpt_"
KINDS = {  # name -> (type, what it is)
    "requests_total": ("counter", "HTTP requests by path and status"),
    "request_seconds": ("histogram", "time from the request to the end of the answer, by path"),
    "prompt_tokens_total": ("counter", "tokens of prompts that were read"),
    "generated_tokens_total": ("counter", "tokens that were written"),
    "first_token_seconds": ("histogram", "time from a request to its first token"),
    "cancelled_total": ("counter", "texts that nobody waited for any more"),
    "refused_total": ("counter", "texts that found too many waiting"),
    "streams": ("gauge", "texts that are decoded together now"),
    "waiting": ("gauge", "texts that wait for a place"),
    "memory_bytes": ("gauge", "resident memory of the process at its peak"),
}
BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
Labels = tuple[tuple[str, str], ...]


class Metrics:
    """What the server counts; may be used from any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._values: dict[str, dict[Labels, float]] = {
            name: {} if name == "requests_total" else {(): 0.0}
            for name, (kind, _) in KINDS.items()
            if kind != "histogram"
        }
        self._spans: dict[str, dict[Labels, list[float]]] = {
            name: {} for name, (kind, _) in KINDS.items() if kind == "histogram"
        }

    def add(self, name: str, n: float = 1, **labels: str) -> None:
        """Count n more."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            self._values[name][key] = self._values[name].get(key, 0) + n

    def set(self, name: str, value: float) -> None:
        """The value of a gauge now."""
        with self._lock:
            self._values[name][()] = value

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """One duration more: counts of the buckets, then the sum."""
        key = tuple(sorted(labels.items()))
        with self._lock:
            row = self._spans[name].setdefault(key, [0.0] * (len(BUCKETS) + 2))
            row[bisect_left(BUCKETS, seconds)] += 1
            row[-1] += seconds

    def value(self, name: str, **labels: str) -> float:
        """A count or a gauge."""
        with self._lock:
            return self._values[name].get(tuple(sorted(labels.items())), 0.0)

    def render(self) -> str:
        """Everything, one line a number."""
        with self._lock:
            lines = []
            for name, (kind, what) in KINDS.items():
                lines += [f"# HELP {PREFIX}{name} {what}", f"# TYPE {PREFIX}{name} {kind}"]
                for labels, value in self._values.get(name, {}).items():
                    lines.append(f"{PREFIX}{name}{_braces(labels)} {value:.17g}")
                for labels, row in self._spans.get(name, {}).items():
                    lines += _histogram(PREFIX + name, labels, row)
        return "\n".join(lines) + "\n"


def _histogram(name: str, labels: Labels, row: list[float]) -> list[str]:
    lines, total = [], 0.0
    for edge, count in zip((*map(str, BUCKETS), "+Inf"), row, strict=False):
        total += count
        lines.append(f"{name}_bucket{_braces((*labels, ('le', edge)))} {total:.17g}")
    ends = _braces(labels)
    return [*lines, f"{name}_sum{ends} {row[-1]:.17g}", f"{name}_count{ends} {total:.17g}"]


def _braces(labels: Labels) -> str:
    if not labels:
        return ""
    quoted = (f'{k}="{v}"' for k, v in labels)  # values are paths and numbers of ours
    return "{" + ",".join(quoted) + "}"
