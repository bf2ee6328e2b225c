"""What `doctor` reports about a Mac: `pmset` and `sysctl` on PATH answer as macOS does."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mlx_randygpt import backends
from mlx_randygpt.cli.commands.doctor import lines
from mlx_randygpt.planning import mac, machine

BATTERY = """Battery Power:
 lowpowermode         {low}
AC Power:
 lowpowermode         0
System-wide power settings:
Currently in use:
 standby              1
 powernap             1
 sleep                1 (sleep prevented by powerd, caffeinate)
 displaysleep         10
 {name}         {low}
"""
COOL = """Note: No thermal warning level has been recorded
Note: No performance warning level has been recorded
Note: No CPU power status has been recorded
"""
WARM = """2026-01-05 10:11:12 +0100 CPU Power notify
Thermal Warning Level = 2
Note: No performance warning level has been recorded
\tCPU_Scheduler_Limit \t= 100
\tCPU_Available_CPUs \t= 10
\tCPU_Speed_Limit \t= 62
"""
Mac = Callable[..., None]


@pytest.fixture
def on_a_mac(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Mac:
    """Return a function that makes this machine seem a Mac with these answers."""

    def pretend(
        low: int = 0, name: str = "lowpowermode", heat: str = COOL, cpu: str = "arm64"
    ) -> None:
        (tmp_path / "power").write_text(BATTERY.format(low=low, name=name))
        (tmp_path / "heat").write_text(heat)
        brand = "Apple M4" if cpu == "arm64" else "VirtualApple @ 2.50GHz"
        programs = {
            "pmset": f'[ "$*" = "-g therm" ] && cat {tmp_path}/heat || cat {tmp_path}/power',
            "sysctl": f'[ "$*" = "-n machdep.cpu.brand_string" ] && echo "{brand}"',
        }
        for program, script in programs.items():
            (tmp_path / program).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / program).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        monkeypatch.setattr("platform.system", lambda: "Darwin")
        monkeypatch.setattr("platform.machine", lambda: cpu)
        monkeypatch.setattr("platform.mac_ver", lambda: ("15.5", ("", "", ""), cpu))

    return pretend


def advised(**changes: Any) -> list[str]:
    """Return the advice for this machine as it seems, with a working MLX on a GPU."""
    facts = dict.fromkeys(machine.CHECKS)
    mlx = {"device": "Apple M4 (Metal)", "has_gpu": True} | changes
    return machine.advice({**facts, "macos": mac.facts(), "mlx": mlx})


def test_a_mac_in_order_needs_no_advice(on_a_mac: Mac) -> None:
    on_a_mac()
    assert mac.facts() == {
        "version": "15.5",
        "low_power": False,
        "thermal_level": 0,
        "speed_limit": None,
        "rosetta": False,
    }
    assert advised() == []


@pytest.mark.parametrize("name", ["lowpowermode", "powermode"])
def test_low_power_mode_is_reported(on_a_mac: Mac, name: str) -> None:
    on_a_mac(low=1, name=name)
    assert advised() == [
        "Low Power Mode is on and slows training: turn it off in System Settings › Battery."
    ]


def test_a_warm_mac_is_reported(on_a_mac: Mac) -> None:
    on_a_mac(heat=WARM)
    assert advised() == [
        "This Mac is too warm, and runs at 62 % of its speed: give it air, or let it cool before "
        "a long run."
    ]


def test_rosetta_is_reported(on_a_mac: Mac) -> None:
    on_a_mac(cpu="x86_64")
    (line,) = advised()
    assert line.startswith("This Python is for Intel and runs under Rosetta")
    assert "uv python install" in line


@pytest.mark.parametrize(
    ("architecture", "version", "expected"),
    [
        ("applegpu_g17s", "26.2", "used"),
        ("applegpu_g17g", "26.10.1", "used"),
        ("applegpu_g17s", "26.1", "unused"),
        ("applegpu_g17s", "15.5", "unused"),
        ("applegpu_g16s", "26.4", "none"),  # an M4
        ("applegpu_g17p", "26.4", "none"),  # a telephone
        ("applegpu_g18p", "26.4", "used"),
        ("", "26.4", "none"),
    ],
)
def test_the_tensor_units_need_an_m5_and_macos_26_2(
    architecture: str, version: str, expected: str
) -> None:
    assert mac.tensor_units(architecture, version) == expected


def test_an_m5_on_an_older_macos_is_advised_to_update(on_a_mac: Mac) -> None:
    on_a_mac()
    (line,) = advised(tensor_units="unused")
    assert line.endswith("MLX needs macOS 26.2 for them, and this is 15.5.")
    assert advised(tensor_units="used") == advised(tensor_units="none") == []


def test_doctor_shows_it(on_a_mac: Mac) -> None:
    on_a_mac(low=1, heat=WARM, cpu="x86_64")
    mlx = {"device": "Apple M5 (Metal)", "has_gpu": True, "memory_bytes": 32 * 10**9, "tf32": True}
    mlx |= {"recommended_bytes": 22 * 10**9, "tensor_units": "used"}
    facts = dict.fromkeys(machine.CHECKS) | {"mlx": mlx, "macos": mac.facts(), "problems": {}}
    shown = dict(lines(facts))
    assert shown["macOS"] == (
        "15.5, Low Power Mode on, thermal warning level 2, processor limited to 62 %, "
        "Python under Rosetta"
    )
    assert shown["MLX"].startswith(
        "Apple M5 (Metal), 32 GB of which Metal recommends to use at most 22 GB, tensor units "
        "used, TF32"
    )


@pytest.mark.parametrize("cpu", ["arm64", "x86_64"])
def test_no_mac_is_told_of_an_extra_for_linux(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: cpu)

    def fail(error: Exception) -> str:
        def probe(name: str) -> Any:
            raise error

        monkeypatch.setattr(backends, "import_module", probe)
        return backends.mlx_device()[1]

    for reason in (
        fail(RuntimeError("this build of MLX needs a GPU and finds none")),
        fail(ImportError("libmlx.dylib")),
        backends.install_mlx(),
    ):
        assert "[cpu]" not in reason
        assert "cuda" not in reason
    hidden = fail(RuntimeError("this build of MLX needs a GPU and finds none"))
    assert hidden.endswith("finds none; a sandbox or a virtual machine may hide it")
