"""`mlxgpt doctor`: examine this machine and suggest what would make it faster."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import json_option
from mlx_randygpt.cli.output import echo, print_json, show_facts
from mlx_randygpt.recipes import DEFAULT_PRESET
from mlx_randygpt.words import format_bytes, format_duration


@click.command("doctor", cls=Command)
@json_option
def command(json: bool) -> None:
    """Examine this machine and suggest what would make it faster."""
    from mlx_randygpt.planning.machine import CHECKS, advice, collect

    echo("Measuring this machine …", err=True)
    facts = collect(CHECKS)
    changes = advice(facts)
    if json:
        print_json({**facts, "advice": changes})
        return
    show_facts(lines(facts))
    echo("\nWhat to change" if changes else "\nNothing to change.")
    show_facts(("-", change) for change in changes)


def lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the facts as names and values."""
    packages = (facts["packages"] or {}).items()
    yield "Python", str(facts["python"])
    yield "Packages", ", ".join(f"{name} {version or 'absent'}" for name, version in packages)
    yield "Platform", str(facts["platform"])
    if facts["macos"]:
        yield "macOS", _macos_line(facts["macos"])
    yield "CPU", f"{facts['cpu']}, {facts['cores']} of {facts['cores_present']} cores usable"
    yield "Memory", format_bytes(facts["memory_bytes"] or 0)
    for library in facts["blas"] or ():
        version, threads = library["version"] or "", library["threads"] or "its own"
        yield "BLAS", f"{library['name']} {version}, threads: {threads}"
    yield "NumPy", f"{_rate(facts['numpy_gflops'])}, {facts['split']}"
    yield "MLX", _mlx_line(facts)
    for line in _kernel_lines(facts["kernels"] or {}):
        yield "Kernels", line
    yield "Compiler", str(facts["compiler"] or "none (mx.compile on a CPU would need one)")
    if choice := facts["backend"]:
        name, reason = choice["name"], choice["reason"] or "it has a GPU"
        yield "Backend", f"auto chooses {'MLX' if name == 'mlx' else 'NumPy'}: {reason}"
    if speed := facts["speed"]:
        time = format_duration(1000 * speed["step_seconds"][DEFAULT_PRESET])
        yield "Training", f"{time} for 1,000 steps of the default preset; see mlxgpt presets"
    for name, problem in facts["problems"].items():
        yield "Failed", f"{name}: {problem}"


def _mlx_line(facts: dict[str, Any]) -> str:
    mlx = facts["mlx"] or {}
    if not mlx.get("device"):
        return str(mlx.get("absent", "unknown"))
    if not mlx["has_gpu"]:
        return f"{mlx['device']}, {_rate(facts['mlx_gflops'])}"
    tf32 = "on (MLX_ENABLE_TF32=0 turns it off)" if mlx["tf32"] else "off"
    memory = f", {format_bytes(mlx['memory_bytes'])}" if mlx["memory_bytes"] else ""
    if most := mlx.get("recommended_bytes"):
        memory += f" of which Metal recommends to use at most {format_bytes(most)}"
    units = {"used": ", tensor units used", "unused": ", tensor units not used"}
    tensor_units = units.get(mlx.get("tensor_units", ""), "")
    return f"{mlx['device']}{memory}{tensor_units}, TF32 if the GPU has it: {tf32}"


def _kernel_lines(kernels: dict[str, Any]) -> Iterator[str]:
    """Yield `attention: on, 1.103 ms instead of 2.031` for each kernel, or why there are none."""
    if absent := kernels.get("absent"):
        yield f"none: {absent}"
    for verdict in kernels.get("tested", ()):
        state = f"off, {verdict['problem']}"
        if not verdict["problem"]:
            ours, plain = 1e3 * verdict["seconds"], 1e3 * verdict["plain_seconds"]
            state = f"on, {ours:.3f} ms instead of {plain:.3f}"
        yield f"{verdict['kernel']}: {state}"


def _macos_line(macos: dict[str, Any]) -> str:
    """Return `15.5, Low Power Mode off, no thermal warning`."""
    warning, limit = macos["thermal_level"], macos["speed_limit"]
    heat = f"thermal warning level {warning}" if warning else "no thermal warning"
    return ", ".join(
        [
            macos["version"],
            f"Low Power Mode {'on' if macos['low_power'] else 'off'}",
            heat + (f", processor limited to {limit} %" if limit and limit < 100 else ""),
            *["Python under Rosetta"] * macos["rosetta"],
        ]
    )


def _rate(gflops: float | None) -> str:
    if gflops is None:
        return "matrix rate unknown"
    return f"{gflops:,.0f} GFLOP/s in float32 matrix products"
