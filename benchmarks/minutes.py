"""Compare the preset that `mlxgpt train --minutes` chooses with others trained for the same time.

    python benchmarks/minutes.py --data text.txt [--minutes 1 3] [--presets tiny small4 small]
        [--threads 0] [--json FILE]

For each time, `train --minutes M` runs once without a preset and once with each of the presets. It
prints the seconds that the whole process took, the expected loss, and the loss on the whole
validation text.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from turns import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--presets", nargs="*", default=["tiny", "small4", "small"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for minutes in options.minutes:
        for preset in [None, *options.presets]:
            given = ["--data", options.data, "--threads", str(options.threads)]
            given += ["--minutes", str(minutes)] + (["--preset", preset] if preset else [])
            rows.append({"minutes": minutes, "asked": preset or "choice", **train(given)})
            print(json.dumps(rows[-1]), flush=True)
            save(options.json, settings=vars(options), rows=rows)


def train(given: list[str]) -> dict[str, Any]:
    """Run `mlxgpt train` with these options and return what it chose and reached."""
    with tempfile.TemporaryDirectory() as out:
        command = [sys.executable, "-m", "mlx_randygpt", "train", *given, "--out", out]
        started = time.perf_counter()
        done = subprocess.run([*command, "--plain"], capture_output=True, text=True, check=True)
        seconds = time.perf_counter() - started
        checkpoint = f"{out}/checkpoint.safetensors"
        score, info = query("eval", "--checkpoint", checkpoint), query("info", checkpoint)
    expected = re.search(r"expected validation loss (\d+\.\d+)", done.stderr + done.stdout)
    return {
        "seconds": round(seconds, 1), "preset": info["train"]["preset"], "steps": info["step"],
        "expected": float(expected[1]) if expected else None, "loss": round(score["loss"], 4),
    }  # fmt: skip


def query(*words: str) -> Any:
    """Run an `mlxgpt` command with --json and return its parsed output."""
    command = [sys.executable, "-m", "mlx_randygpt", *words, "--json"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


if __name__ == "__main__":
    main()
