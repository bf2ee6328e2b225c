"""`mlxgpt doctor`: what this machine has, how fast it multiplies, and what would make it faster.

Each check stands alone: one that fails leaves its error in `problems` and the others go on.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import print_json, readable_bytes, show_facts

Facts = dict[str, Any]

PACKAGES = ("numpy", "mlx", "safetensors", "rich", "click", "threadpoolctl", "numba")
THREAD_VARIABLES = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS")
FAST_BLAS = ("openblas", "mkl", "blis", "flexiblas", "accelerate")
SLOW = 1 / 3  # of NumPy's rate: MLX with the reference BLAS reaches 1/30


@click.command("doctor", cls=Command)
@json_option
def command(json: bool) -> None:
    """Look at this machine and say what would make it faster."""
    found = collect(CHECKS)
    changes = advice(found)
    if json:
        print_json({**found, "advice": changes})
        return
    show_facts(lines(found))
    click.echo("\nWhat to change" if changes else "\nNothing to change.")
    show_facts(("-", change) for change in changes)


def collect(checks: dict[str, Callable[[], Any]]) -> Facts:
    """Every check's value by name, None where it failed; why is in `problems`."""
    found: Facts = {}
    problems: dict[str, str] = {}
    for name, check in checks.items():
        try:
            found[name] = check()
        except Exception as error:  # a report on a broken machine must not break
            found[name] = None
            problems[name] = f"{type(error).__name__}: {error}"
    return found | {"problems": problems}


def advice(found: Facts) -> list[str]:
    """What to change on such a machine, a line each; nothing where nothing applies."""
    return [line for line in (*_mlx_advice(found), *_cpu_advice(found)) if line]


def _mlx_advice(found: Facts) -> Iterator[str]:
    mlx, rate, numpy_rate = found["mlx"] or {}, found["mlx_gflops"], found["numpy_gflops"]
    if not mlx.get("device") and (found["system"], found["machine"]) == ("Darwin", "arm64"):
        yield f"{mlx.get('absent')}: `pip install mlx` lets training run on the GPU."
    elif (found["packages"] or {}).get("mlx") and mlx.get("absent"):
        yield f"{mlx['absent']}, as in `pip install 'mlx[cpu]'`."
    if found["nvidia_smi"] and not mlx.get("has_gpu"):
        yield (
            "There is an NVIDIA driver that MLX does not use: `pip uninstall mlx-cpu`, then "
            "`pip install 'mlx[cuda13]'`."
        )
    slow = rate and numpy_rate and rate < SLOW * numpy_rate
    if found["system"] == "Linux" and slow:
        yield (
            f"MLX multiplies at {rate:.0f} GFLOP/s here, NumPy at {numpy_rate:.0f}: its CPU wheel "
            "uses the reference BLAS. `--backend numpy` is faster; for MLX itself, "
            "`LD_PRELOAD=libopenblas.so.0` before the command helps (Debian: libopenblas0)."
        )


def _cpu_advice(found: Facts) -> Iterator[str]:
    blas, allowed, present = found["blas"], found["cores"], found["cores_present"]
    if blas is not None and not any(f in b["name"].lower() for b in blas for f in FAST_BLAS):
        yield (
            "NumPy has no optimised BLAS: `pip install --force-reinstall numpy` brings a wheel "
            "with OpenBLAS (conda: `conda install 'libblas=*=*openblas'`)."
        )
    has_gpu = (found["mlx"] or {}).get("has_gpu")
    if not has_gpu and (found["packages"] or {}).get("numba", "") is None:
        yield "`pip install numba` compiles NumPy's decoding: long texts come three times as fast."
    for name, value in (found["environment"] or {}).items():
        yield (
            f"{name}={value} is set: it does not change the NumPy backend, `--threads` does; "
            "unset it where MLX runs on the CPU."
        )
    if allowed and present and allowed < present:
        yield (
            f"{allowed} of {present} cores may be used by this process: a container, a scheduler "
            "or taskset holds the others back."
        )


def lines(found: Facts) -> Iterator[tuple[str, str]]:
    """The facts for people."""
    packages = (found["packages"] or {}).items()
    yield "Python", str(found["python"])
    yield "Packages", ", ".join(f"{name} {version or 'absent'}" for name, version in packages)
    yield "Platform", str(found["platform"])
    yield "CPU", f"{found['cpu']}, {found['cores']} of {found['cores_present']} cores usable"
    yield "Memory", readable_bytes(found["memory_bytes"] or 0)
    for library in found["blas"] or ():
        version, threads = library["version"] or "", library["threads"] or "its own"
        yield "BLAS", f"{library['name']} {version}, threads: {threads}"
    yield "NumPy", f"{_rate(found['numpy_gflops'])}, {found['split']}"
    yield "MLX", _mlx_line(found)
    yield "Compiler", str(found["compiler"] or "none (mx.compile on a CPU would need one)")
    if choice := found["backend"]:
        name, why = choice["name"], choice["reason"] or "it has a GPU"
        yield "Backend", f"auto takes {'MLX' if name == 'mlx' else 'NumPy'}: {why}"
    for name, problem in found["problems"].items():
        yield "Failed", f"{name}: {problem}"


def _mlx_line(found: Facts) -> str:
    mlx = found["mlx"] or {}
    if not mlx.get("device"):
        return str(mlx.get("absent", "unknown"))
    if not mlx["has_gpu"]:
        return f"{mlx['device']}, {_rate(found['mlx_gflops'])}"
    tf32 = "on (MLX_ENABLE_TF32=0 turns it off)" if mlx["tf32"] else "off"
    memory = f", {readable_bytes(mlx['memory_bytes'])}" if mlx["memory_bytes"] else ""
    return f"{mlx['device']}{memory}, TF32 where it has it: {tf32}"


def _rate(gflops: float | None) -> str:
    if gflops is None:
        return "matrix rate unknown"
    return f"{gflops:,.0f} GFLOP/s in float32 matrix products"


# The checks


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
        call = ["sysctl", "-n", "machdep.cpu.brand_string"]
        return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()
    with open("/proc/cpuinfo", encoding="utf-8") as file:
        models = (line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return next(models, platform.machine())  # ARM's has no such line


def _cores() -> int:
    from mlx_randygpt.backends.numpy.backend import available_cores

    return available_cores()


def _blas() -> list[Facts]:
    """What is loaded; else what NumPy was built with, for Accelerate cannot be seen loaded."""
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
    from mlx_randygpt.model import initial_params
    from mlx_randygpt.state import TrainState

    model, train = settings.resolve_new({"preset": "mini"}, 67)
    state = TrainState(0, initial_params(model, train.seed), {})
    return make_backend(backend, model, train, state).matmul_flops() / 1e9


def _mlx() -> Facts:
    from mlx_randygpt.backends import mlx_device

    device, reason = mlx_device()
    if device is None:
        return {"device": None, "absent": reason}
    found = {"device": device.description, "has_gpu": device.has_gpu}
    if device.has_gpu:
        found["memory_bytes"] = device.memory or None
        found["tf32"] = os.environ.get("MLX_ENABLE_TF32") != "0"
    return found


def _mlx_gflops() -> float | None:
    mlx = _mlx()
    return _gflops("mlx") if mlx["device"] and not mlx["has_gpu"] else None


def _backend() -> dict[str, str]:
    from mlx_randygpt.backends import choose

    name, reason = choose("auto")
    return {"name": name, "reason": reason}


CHECKS: dict[str, Callable[[], Any]] = {
    "python": platform.python_version,
    "packages": _packages,
    "platform": platform.platform,
    "system": platform.system,
    "machine": platform.machine,
    "cpu": _cpu,
    "cores": _cores,
    "cores_present": os.cpu_count,
    "memory_bytes": lambda: os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
    "blas": _blas,  # before a NumPy backend sets its threads to 1
    "numpy_gflops": lambda: _gflops("numpy"),
    "split": _split,
    "mlx": _mlx,
    "mlx_gflops": _mlx_gflops,
    "nvidia_smi": lambda: shutil.which("nvidia-smi"),
    "compiler": lambda: shutil.which("xcrun" if platform.system() == "Darwin" else "g++"),
    "backend": _backend,
    "environment": lambda: {n: os.environ[n] for n in THREAD_VARIABLES if n in os.environ},
}
