"""Counters, gauges and histograms for Prometheus, in a registry of their own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)  # seconds
Seconds = partial(Histogram, buckets=BUCKETS)
KINDS: dict[str, tuple[Callable[..., Any], str, tuple[str, ...]]] = {  # kind, help, labels
    "requests_total": (Counter, "HTTP requests by path and status", ("path", "status")),
    "request_seconds": (Seconds, "time from a request to the end of its response", ("path",)),
    "prompt_tokens_total": (Counter, "prompt tokens processed", ()),
    "generated_tokens_total": (Counter, "tokens generated", ()),
    "first_token_seconds": (Seconds, "time from a request to its first token", ()),
    "cancelled_total": (Counter, "texts cancelled because the client disconnected", ()),
    "refused_total": (Counter, "texts refused because the queue was full", ()),
    "streams": (Gauge, "texts being generated", ()),
    "waiting": (Gauge, "texts in the queue", ()),
    "memory_bytes": (Gauge, "peak resident memory of the process", ()),
}


class Metrics:
    """The metrics of one server; safe to use from any thread."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._metrics = {
            name: kind(f"mlxgpt_{name}", text, labels, registry=self._registry)
            for name, (kind, text, labels) in KINDS.items()
        }

    def _child(self, name: str, labels: dict[str, str]) -> Any:
        metric = self._metrics[name]
        return metric.labels(**labels) if labels else metric

    def add(self, name: str, n: float = 1, **labels: str) -> None:
        """Add `n` to a counter."""
        self._child(name, labels).inc(n)

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._child(name, {}).set(value)

    def observe(self, name: str, seconds: float, **labels: str) -> None:
        """Add one duration to a histogram."""
        self._child(name, labels).observe(seconds)

    def value(self, name: str, **labels: str) -> float:
        """Return a counter or a gauge."""
        return self._registry.get_sample_value(f"mlxgpt_{name}", labels) or 0.0

    def render(self) -> bytes:
        """Return all metrics in the text format 0.0.4, without `_created` samples."""
        return generate_latest(self._registry)
