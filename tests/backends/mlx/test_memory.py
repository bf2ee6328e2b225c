"""What MLX holds on a GPU, with a Metal allocator that is pretended: numbers of bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlx.core", exc_type=ImportError)

import mlx.core as mx

from mlx_randygpt import backends
from mlx_randygpt.backends.base import resident_bytes
from mlx_randygpt.backends.mlx.backend import Device
from mlx_randygpt.backends.mlx.memory import HeldMemory

GB = 10**9


@pytest.fixture
def metal(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the state of a Mac's allocator: what is in use and kept, and the limits it was set."""
    state: dict[str, Any] = {"active": 0, "cache": 0, "peak": 0}
    for name in state:
        monkeypatch.setattr(mx, f"get_{name}_memory", lambda name=name: state[name])
    monkeypatch.setattr(mx, "set_memory_limit", lambda n: state.update(limit=n))
    monkeypatch.setattr(mx, "set_wired_limit", lambda n: state.update(wired=n))
    monkeypatch.setattr(mx, "clear_cache", lambda: state.update(cache=0))
    device = Device(True, "Apple M4 (Metal)", 16 * GB, 11 * GB, "applegpu_g16g")
    monkeypatch.setattr(backends, "mlx_device", lambda: (device, ""))
    return state


def test_what_is_held_is_in_use_or_kept_and_counts_once(metal: dict[str, Any]) -> None:
    """6/6/384: a peak of 5.255 GB in use; with what is kept 6.533 are held, never 11.7."""
    memory = HeldMemory(on_gpu=True)
    metal.update(active=2 * GB, cache=4_533_000_000, peak=5_255_000_000)
    assert memory.read() == 6_533_000_000
    metal.update(cache=0)
    assert memory.read() == 6_533_000_000  # the most so far
    metal.update(active=0, peak=7 * GB)
    assert memory.read() == 7 * GB  # between two readings


def test_on_a_cpu_it_is_that_of_the_process(metal: dict[str, Any]) -> None:
    metal.update(active=10**15)
    assert 0 < HeldMemory(on_gpu=False).read() <= resident_bytes()


@pytest.mark.parametrize(("planned", "limit"), [(4 * GB, 4 * GB), (40 * GB, 11 * GB), (0, None)])
def test_a_mac_gets_the_planned_limit_and_nine_tenths_stay_in_memory(
    metal: dict[str, Any], planned: int, limit: int | None
) -> None:
    backends.limit_memory(SimpleNamespace(name="mlx"), planned)  # type: ignore[arg-type]
    assert metal.get("limit") == limit
    assert metal["wired"] == 9.9 * GB


def test_other_backends_and_devices_have_no_limit(
    metal: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    backends.limit_memory(SimpleNamespace(name="numpy"), GB)  # type: ignore[arg-type]
    for device in (Device(True, "NVIDIA H200 (CUDA)", 141 * GB), Device(False, "CPU"), None):
        monkeypatch.setattr(backends, "mlx_device", lambda device=device: (device, ""))
        backends.limit_memory(SimpleNamespace(name="mlx"), GB)  # type: ignore[arg-type]
    assert metal.keys() == {"active", "cache", "peak"}


def test_an_idle_backend_gives_back_what_it_keeps(metal: dict[str, Any]) -> None:
    metal.update(cache=GB)
    backends.release_memory(SimpleNamespace(name="numpy"))  # type: ignore[arg-type]
    assert metal["cache"] == GB
    backends.release_memory(SimpleNamespace(name="mlx"))  # type: ignore[arg-type]
    assert metal["cache"] == 0
