"""What `mlxgpt plan` says of this machine, beside what is measured: peak memory and step time.

    python benchmarks/plan.py [--rounds 3] [--json FILE]

For each size: `mlxgpt plan`, `mlxgpt bench` for the time of a step, and four steps of `mlxgpt
train` with its evaluations and saves, whose resident memory at its peak is what the operating
system counted for the process. Every one is a process of its own and the sizes take turns. Times
are medians of steps, and of the rounds the best, for other work on the machine only ever adds to
them; memory is that of the first round. NumPy on all cores.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path
from random import Random
from typing import Any

from turns import save

SIZES = {  # name -> options
    "tiny": ["--preset", "tiny"],
    "small4, classic": ["--preset", "small4", "--recipe", "classic"],
    "small": ["--preset", "small"],
    "medium, classic": ["--preset", "medium", "--recipe", "classic", "--batch-size", "16"],
    "s": ["--preset", "s", "--batch-size", "16"],
    "large, 9 layers": ["--preset", "large", "--n-layer", "9", "--batch-size", "8"],
}
TRAIN = ["--iters", "4", "--lr", "1e-4", "--eval-every", "0", "--sample-every", "0", "--plain"]
WORDS = "the old red ship under a quick moon and five boxes jump over it".split()  # noqa: SIM905


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    planned, measured, peaks = defaultdict(list), defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text(sentences(4000), encoding="utf-8")
        for turn in range(options.rounds):
            for name, size in SIZES.items():
                planned[name].append(asked("plan", *size, "--vocab-size", str(vocabulary(text))))
                measured[name].append(asked("bench", "train", *size, "--iters", "5"))
                if turn == 0:
                    peaks[name].append(peak_of_training(size, text, Path(folder, "out")))
                print(report(row(name, planned[name], measured[name], peaks[name])), flush=True)
    rows = [row(n, planned[n], measured[n], peaks[n]) for n in SIZES]
    print(f"\n{'size':18} {'parameters':>12}  {'memory, MB':>22}  {'step, ms':>22}")
    print("\n".join(map(report, rows)))
    save(options.json, settings={"rounds": options.rounds}, rows=rows)


def report(line: dict[str, Any]) -> str:
    """Planned, measured, and how far apart."""
    memory = f"{line['planned_mb']:7,.0f} {line['peak_mb']:7,.0f} {line['memory_error']:+6.1%}"
    time = f"{line['planned_ms']:7,.1f} {line['step_ms']:7,.1f} {line['time_error']:+6.1%}"
    return f"{line['size']:18} {line['parameters']:12,}  {memory}  {time}"


def row(name: str, plans: list[Any], benches: list[Any], peaks: list[int]) -> dict[str, Any]:
    planned_mb = statistics.median(plan["memory_bytes"] for plan in plans) / 1e6
    planned_ms = 1e3 * min(plan["step_seconds"] for plan in plans)
    step_ms = min(bench["step_ms"] for bench in benches)
    peak_mb = statistics.median(peaks) / 1e6
    return {
        "size": name,
        "parameters": plans[0]["parameters"],
        "planned_mb": planned_mb,
        "peak_mb": peak_mb,
        "memory_error": planned_mb / peak_mb - 1,
        "planned_ms": planned_ms,
        "step_ms": step_ms,
        "time_error": planned_ms / step_ms - 1,
    }


def asked(*words: str) -> Any:
    """What a command answers with --json."""
    command = [sys.executable, "-m", "mlx_randygpt", *words, "--backend", "numpy", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True).stdout)


def peak_of_training(size: list[str], text: Path, out: Path) -> int:
    """Bytes of resident memory at the peak of a short run."""
    words = ["train", *size, *TRAIN, "--data", str(text), "--out", str(out), "--overwrite"]
    command = [sys.executable, "-m", "mlx_randygpt", *words, "--backend", "numpy"]
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    assert child.returncode == 0, command
    return usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def sentences(n: int) -> str:
    random = Random(1)
    return "".join(f"{' '.join(random.choices(WORDS, k=7)).capitalize()}.\n" for _ in range(n))


def vocabulary(text: Path) -> int:
    """Characters of the text, and three special tokens."""
    return len(set(text.read_text(encoding="utf-8"))) + 3


if __name__ == "__main__":
    main()
