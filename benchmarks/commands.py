"""Whole commands: what starting costs, and what saving costs a run.

    python benchmarks/commands.py [--turns 15] [--iters 60] [--json FILE]

`--help` beside `python -c "import click"`; training with `--save-every 1s` beside training that
saves at the end only, both on the sample corpus, by their own count of tokens a second.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from turns import save, timed

MLXGPT = [sys.executable, "-m", "mlx_randygpt"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--iters", type=int, default=60)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    starting = help_over_click(options.turns)
    print(f"mlxgpt --help / import click: {starting:.2f} of its time")
    saving = saving_over_not(max(1, options.turns // 5), options.iters)
    print(f"--save-every 1s / no saving: {saving:.3f} of its tokens a second")
    save(options.json, settings=vars(options), help_over_click=starting, saving_over_not=saving)


def help_over_click(n_turns: int) -> float:
    commands = ([*MLXGPT, "--help"], [sys.executable, "-c", "import click"])
    seconds: list[list[float]] = [[], []]
    for _ in range(n_turns + 1):
        for times, command in zip(seconds, commands, strict=True):
            times.append(
                timed(lambda c=command: subprocess.run(c, check=True, capture_output=True))
            )
    ours, click = (times[1:] for times in seconds)  # without what filled the file cache
    return statistics.median(a / b for a, b in zip(ours, click, strict=True))


def saving_over_not(n_turns: int, iters: int) -> float:
    ratios = []
    for _ in range(n_turns):
        with tempfile.TemporaryDirectory() as folder:
            often, never = (rate(Path(folder) / e, e, iters) for e in ("1s", "1h"))
            ratios.append(often / never)
    return statistics.median(ratios)


def rate(folder: Path, save_every: str, iters: int) -> float:
    """Tokens a second of the whole run but its first steps, by the clock on the wall."""
    options = f"--iters {iters} --eval-every {iters} --sample-every {iters} --backend numpy --plain"
    command = [*MLXGPT, "train", *options.split(), "--save-every", save_every, "--out", str(folder)]
    text = Path(__file__).parents[1] / "mlx_randygpt/data/sample.txt"
    subprocess.run([*command, "--data", str(text)], check=True, capture_output=True)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "lr" in line][5:]
    tokens = steps[-1]["tokens"] - steps[0]["tokens"]
    return float(tokens / (steps[-1]["seconds"] - steps[0]["seconds"]))


if __name__ == "__main__":
    main()
