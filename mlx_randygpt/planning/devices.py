"""Memory, rates and links of the devices that a run can be planned for.

Rates are peak rates of matrix products with float32 sums. Apple publishes memory and bandwidth but
no rates; those are cores × 128 lanes × 2 × clock. The share of a peak that a run reaches is an
assumption, and plans name it as one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from mlx_randygpt.backends import mlx_device
from mlx_randygpt.config import ConfigError

GIB = 1 << 30
FLOPS_SHARE = 0.4  # of the peak rate, reached by the products of a step: an assumption
BANDWIDTH_SHARE = 0.7  # of the bandwidth, reached by the passes between them: an assumption
APPLE_SHARE = 0.75  # of unified memory: the most that Metal recommends
CPU_SHARE = 0.9  # of a machine's memory: the most that one program should use
CUDA_SHARE = 0.95  # of a GPU's memory
ETHERNET, INFINIBAND = 1.25e9, 50e9  # 10 and 400 Gbit/s


@dataclass(frozen=True)
class Device:
    """A device, in bytes, bytes per second and FLOP per second."""

    title: str
    memory: int  # that a run can fill
    flops: float  # float32 as MLX computes it: TF32 where the device has it
    flops_16: float  # bfloat16
    bandwidth: float
    link: float  # to another host, each way
    latency: float  # seconds per message
    unified: bool = True  # program and snapshots are in the same memory


def _apple(title: str, gigabytes: int, cores: int, ghz: float, bandwidth: float) -> Device:
    flops = cores * 128 * 2 * ghz * 1e9  # bfloat16 is no faster there
    memory = int(APPLE_SHARE * gigabytes * GIB)
    return Device(title, memory, flops, flops, bandwidth * 1e9, ETHERNET, 50e-6)


def _nvidia(title: str, gigabytes: float, tf32: float, bf16: float, bandwidth: float) -> Device:
    memory = int(CUDA_SHARE * gigabytes * 1e9)
    rates = (tf32 * 1e12, bf16 * 1e12, bandwidth * 1e9)
    return Device(title, memory, *rates, INFINIBAND, 10e-6, unified=False)


DEVICES = {
    "m2-ultra": _apple("Apple M2 Ultra, 76 GPU cores, 192 GB", 192, 76, 1.40, 800),
    "m3-max": _apple("Apple M3 Max, 40 GPU cores, 128 GB", 128, 40, 1.38, 400),
    "m3-ultra": _apple("Apple M3 Ultra, 80 GPU cores, 512 GB", 512, 80, 1.38, 819),
    "m4-max": _apple("Apple M4 Max, 40 GPU cores, 128 GB", 128, 40, 1.58, 546),
    "a100": _nvidia("NVIDIA A100 SXM, 80 GB", 80, 156, 312, 2039),
    "h100": _nvidia("NVIDIA H100 SXM, 80 GB", 80, 494, 989, 3350),
    "h200": _nvidia("NVIDIA H200 SXM, 141 GB", 141, 494, 989, 4800),
}


def find_device(name: str, backend: str) -> Device:
    """Return the device of this name; `this` is this machine."""
    if name == "this":
        return here(backend)
    if name not in DEVICES:
        raise ConfigError(f"device={name!r} is unknown; it is one of this, {', '.join(DEVICES)}")
    return DEVICES[name]


def here(backend: str) -> Device:
    """Return this machine with its memory: what Metal recommends, a GPU's, or most of the host's.

    Its rates are 0 because they are measured.
    """
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    memory, unified = int(CPU_SHARE * total), True
    gpu = mlx_device()[0] if backend == "mlx" else None
    if gpu is not None:
        unified = not gpu.description.endswith("(CUDA)")
        memory = int(gpu.recommended or CUDA_SHARE * gpu.memory or memory)
    return Device("this machine", memory, 0, 0, 0, ETHERNET, 50e-6, unified)


def all_reduce_seconds(n_bytes: int, hosts: int, link: float, latency: float) -> float:
    """Return the time of a ring all-reduce over n hosts (Patarasuk & Yuan 2009).

    Each host sends 2(n−1) pieces of 1/n of the array, one after the other.
    """
    return 2 * (hosts - 1) * (n_bytes / hosts / link + latency)
