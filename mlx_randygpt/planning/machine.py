"""Facts about this machine, and advice on what would make it faster.

Each check is independent: one that fails leaves its error in `problems`, and the others run.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

from mlx_randygpt.planning import mac

Facts = dict[str, Any]

PACKAGES = ("numpy", "mlx", "safetensors", "rich", "click", "threadpoolctl", "numba")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
FAST_BLAS = ("openblas", "mkl", "blis", "flexiblas", "accelerate")
SLOW_SHARE = 1 / 3  # of NumPy's rate; MLX with the reference BLAS reaches 1/30


def collect(checks: dict[str, Callable[[], Any]]) -> Facts:
    """Return the value of every check by name, None if it failed, and the errors as `problems`."""
    facts: Facts = {}
    problems: dict[str, str] = {}
    for name, check in checks.items():
        try:
            facts[name] = check()
        except Exception as error:  # a report on a broken machine must not break
            facts[name] = None
            problems[name] = f"{type(error).__name__}: {error}"
    return facts | {"problems": problems}


def advice(facts: Facts) -> list[str]:
    """Return what to change on such a machine, one line each."""
    on_mac = mac.advice(facts["macos"] or {}, facts["mlx"] or {})
    return [*on_mac, *_mlx_advice(facts), *_cpu_advice(facts)]


def _mlx_advice(facts: Facts) -> Iterator[str]:
    mlx, rate, numpy_rate = facts["mlx"] or {}, facts["mlx_gflops"], facts["numpy_gflops"]
    installed = (facts["packages"] or {}).get("mlx")
    if installed and mlx.get("absent"):
        yield f"{mlx['absent']}."
    elif not mlx.get("device") and (facts["system"], facts["machine"]) == ("Darwin", "arm64"):
        yield f"{mlx.get('absent')}: `pip install mlx` lets training run on the GPU."
    if facts["nvidia_smi"] and not mlx.get("has_gpu"):
        yield (
            "MLX does not use the NVIDIA GPU of this machine: `pip uninstall mlx-cpu`, then "
            "`pip install 'mlx[cuda13]'`."
        )
    if facts["system"] == "Linux" and rate and numpy_rate and rate < SLOW_SHARE * numpy_rate:
        yield (
            f"MLX multiplies at {rate:.0f} GFLOP/s here, NumPy at {numpy_rate:.0f}: the CPU wheel "
            "of MLX uses the reference BLAS. `--backend numpy` is faster; to speed up MLX itself, "
            "put `LD_PRELOAD=libopenblas.so.0` before the command (Debian: libopenblas0)."
        )


def _cpu_advice(facts: Facts) -> Iterator[str]:
    blas, allowed, present = facts["blas"], facts["cores"], facts["cores_present"]
    if blas is not None and not any(f in b["name"].lower() for b in blas for f in FAST_BLAS):
        yield (
            "NumPy has no optimised BLAS: `pip install --force-reinstall numpy` installs a wheel "
            "with OpenBLAS (conda: `conda install 'libblas=*=*openblas'`)."
        )
    has_gpu = (facts["mlx"] or {}).get("has_gpu")
    if not has_gpu and (facts["packages"] or {}).get("numba", "") is None:
        yield "`pip install numba` compiles NumPy's decoding and makes it four times as fast."
    for name, value in (facts["environment"] or {}).items():
        yield (
            f"{name}={value} is set. It does not affect the NumPy backend, which has `--threads`; "
            "unset it if MLX runs on the CPU."
        )
    if allowed and present and allowed < present:
        yield (
            f"This process can use {allowed} of {present} cores: a container, a scheduler or "
            "taskset withholds the others."
        )


def _packages() -> dict[str, str | None]:
    from importlib.metadata import PackageNotFoundError, version

    from mlx_randygpt import __version__

    versions: dict[str, str | None] = {"mlx_randygpt": __version__}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    return versions


def _cpu() -> str:
    if platform.system() == "Darwin":
        return mac.brand()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return next(models, platform.machine())  # not listed on ARM


def _cores() -> int:
    from mlx_randygpt.backends.numpy.backend import available_cores

    return available_cores()


def _blas() -> list[Facts]:
    """Return the loaded BLAS; else the one NumPy was built with, as Accelerate is not listed."""
    import numpy as np
    from threadpoolctl import threadpool_info

    loaded = [library for library in threadpool_info() if library["user_api"] == "blas"]
    keys = {"name": "internal_api", "version": "version", "threads": "num_threads"}
    if loaded:
        return [{name: library[key] for name, key in keys.items()} for library in loaded]
    built: Any = np.show_config(mode="dicts")
    name = str(built["Build Dependencies"]["blas"]["name"])
    return [{"name": name, "version": None, "threads": None}]


def _split() -> str:
    from mlx_randygpt.backends.numpy.backend import CHUNK_TOKENS, available_cores

    return f"{available_cores()} threads, each {CHUNK_TOKENS:,} tokens at a time"


def _gflops(backend: str) -> float:
    from mlx_randygpt import settings
    from mlx_randygpt.backends import make_backend
    from mlx_randygpt.model import initial_state

    model, train = settings.resolve_new({"preset": "mini"}, 67)
    state = initial_state(model, train.seed)
    return make_backend(backend, model, train, state).matmul_flops() / 1e9


def _mlx() -> Facts:
    from mlx_randygpt.backends import mlx_device

    device, reason = mlx_device()
    if device is None:
        return {"device": None, "absent": reason}
    facts: Facts = {"device": device.description, "has_gpu": device.has_gpu}
    if device.has_gpu:
        facts["memory_bytes"] = device.memory or None
        facts["tf32"] = os.environ.get("MLX_ENABLE_TF32") != "0"
    if device.recommended:
        facts["recommended_bytes"] = device.recommended
        facts["tensor_units"] = mac.tensor_units(device.architecture, platform.mac_ver()[0])
    return facts


def _mlx_gflops() -> float | None:
    mlx = _mlx()
    return _gflops("mlx") if mlx["device"] and not mlx["has_gpu"] else None


def _kernels() -> Facts:
    """Return what the self-test of the Metal kernels says, at the sizes of the default model."""
    from mlx_randygpt import settings
    from mlx_randygpt.backends import mlx_device

    device, reason = mlx_device()
    if device is None:
        return {"absent": reason}
    from mlx_randygpt.backends.mlx import selftest

    if reason := selftest.unavailable():
        return {"absent": reason}
    model, _ = settings.resolve_new({}, 67)
    return {"tested": [asdict(verdict) for verdict in selftest.verdicts(selftest.sizes_of(model))]}


def _backend() -> dict[str, str]:
    from mlx_randygpt.backends import choose

    name, reason = choose("auto")
    return {"name": name, "reason": reason}


def _speed() -> Facts:
    """Measure the steps of the presets and keep them for `mlxgpt presets`."""
    from mlx_randygpt.planning import speed

    measured = speed.measure(_backend()["name"])
    speed.save(measured)
    return asdict(measured)


CHECKS: dict[str, Callable[[], Any]] = {
    "python": platform.python_version,
    "packages": _packages,
    "platform": platform.platform,
    "system": platform.system,
    "machine": platform.machine,
    "macos": mac.facts,
    "cpu": _cpu,
    "cores": _cores,
    "cores_present": os.cpu_count,
    "memory_bytes": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    "blas": _blas,  # before a NumPy backend limits its threads to 1
    "numpy_gflops": lambda: _gflops("numpy"),
    "split": _split,
    "mlx": _mlx,
    "mlx_gflops": _mlx_gflops,
    "kernels": _kernels,
    "nvidia_smi": lambda: shutil.which("nvidia-smi"),
    "compiler": lambda: shutil.which("xcrun" if platform.system() == "Darwin" else "g++"),
    "backend": _backend,
    "speed": _speed,
    "environment": lambda: {n: os.environ[n] for n in THREAD_VARIABLES if n in os.environ},
}
