"""What decides how fast a Mac trains (power, heat, macOS, the GPU), and advice about it."""

from __future__ import annotations

import platform
import re
import subprocess
from collections.abc import Iterator, Mapping
from typing import Any

TENSOR_UNITS_MACOS = (26, 2)  # the first version on which MLX uses the tensor units of an M5
TENSOR_UNITS_GENERATION = 17  # of the GPU; a telephone's GPU of that generation has none for MLX


def facts() -> dict[str, Any] | None:
    """Return what macOS reports about this Mac; None elsewhere.

    `low_power` is Low Power Mode, `thermal_level` is above 0 if the Mac is too warm, and
    `speed_limit` is the share of its speed in percent that the processor may use then.
    """
    if platform.system() != "Darwin":
        return None
    power, heat = _pmset(), _pmset("therm")
    levels = [int(n) for n in re.findall(r"Warning Level\s*=\s*(\d+)", heat)]
    limit = re.search(r"CPU_Speed_Limit\s*=\s*(\d+)", heat)
    return {
        "version": platform.mac_ver()[0],
        "low_power": bool(re.search(r"^\s*(lowpowermode|powermode)\s+1\b", power, re.MULTILINE)),
        "thermal_level": max(levels, default=0),
        "speed_limit": int(limit[1]) if limit else None,
        "rosetta": platform.machine() == "x86_64" and "Apple" in brand(),
    }


def brand() -> str:
    """Return the name of the processor: `Apple M3 Max`; `VirtualApple …` under Rosetta."""
    return _output("sysctl", "-n", "machdep.cpu.brand_string")


def tensor_units(architecture: str, version: str) -> str:
    """Return whether macOS uses this GPU's tensor units: "used", "unused", or "none".

    `architecture` is Metal's name of the GPU, such as applegpu_g17s.
    """
    match = re.search(r"_g(\d+)(\w?)", architecture)
    least = TENSOR_UNITS_GENERATION + (match is not None and match[2] == "p")
    if match is None or int(match[1]) < least:
        return "none"
    macos = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    return "used" if macos >= TENSOR_UNITS_MACOS else "unused"


def advice(mac: Mapping[str, Any], mlx: Mapping[str, Any]) -> Iterator[str]:
    """Yield advice for a Mac with these facts, one line each."""
    if mac.get("rosetta"):
        yield (
            "This Python is for Intel and runs under Rosetta, where MLX cannot be installed: "
            "`uv python install 3.12` brings one for Apple silicon."
        )
    if mac.get("low_power"):
        yield "Low Power Mode is on and slows training: turn it off in System Settings › Battery."
    limit = mac.get("speed_limit")
    if mac.get("thermal_level") or (limit or 100) < 100:
        share = f", and runs at {limit} % of its speed" if limit else ""
        yield f"This Mac is too warm{share}: give it air, or let it cool before a long run."
    if mlx.get("tensor_units") == "unused":
        yield (
            "The tensor units of this GPU are not used: MLX needs macOS "
            f"{'.'.join(map(str, TENSOR_UNITS_MACOS))} for them, and this is {mac.get('version')}."
        )


def _pmset(*topic: str) -> str:
    return _output("pmset", "-g", *topic)


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
