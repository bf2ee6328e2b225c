"""Whether a long run needs more and more memory: python tests/chaos/memory.py [STEPS]

Trains the smallest preset with everything a run does besides and prints the resident memory of
the process at step 500 and as it goes on. A script and no test, for it takes minutes.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from harness import PROGRAM
from process import Life

import mlx_randygpt

TEXT = Path(mlx_randygpt.__file__).parent / "data" / "sample.txt"
FIRST, EVERY = 500, 500
ALLOWED = 0.02  # of growth


def resident_kilobytes(pid: int) -> int:
    shown = subprocess.run(["ps", "-o", "rss=", "-p", str(pid)], capture_output=True, check=True)
    return int(shown.stdout)


def measure(n_steps: int, folder: Path) -> list[tuple[int, int]]:
    """(step, kilobytes) after each evaluation but the last, when the process is about to end."""
    settings = ["--preset=mini", "--threads=1", f"--iters={n_steps + 1}", "--save-every=1s"]
    settings += [f"--eval-every={EVERY}", "--data", str(TEXT), "--out", str(folder)]
    life = Life([*PROGRAM, *settings], deadline=3600)
    found = []
    for step in range(FIRST, n_steps + 1, EVERY):
        life.until(f"eval {step} |")
        found.append((step, resident_kilobytes(life.process.pid)))
    assert life.finish().code == 0, life.errors
    return found


def main(n_steps: int = 20_000) -> int:
    with TemporaryDirectory() as folder:
        found = measure(n_steps, Path(folder))
    first, last = found[0][1], found[-1][1]
    for step, kilobytes in found:
        sys.stdout.write(f"step {step:6,}  {kilobytes:8,} kB  {kilobytes / first - 1:+.2%}\n")
    return int(last > first * (1 + ALLOWED))


if __name__ == "__main__":
    raise SystemExit(main(*map(int, sys.argv[1:])))
