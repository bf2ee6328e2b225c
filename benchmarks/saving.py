"""What a checkpoint costs the run that writes it: memory at the peak, and time.

    python benchmarks/saving.py [--n-layer 6] [--n-embd 384] [--vocab-size 67] [--block-size 256]
                                [--saves 7] [--json FILE]

A NumPy backend after one step, with both moments of AdamW. Memory is the most that is resident
while files are written (or one is read, in a process of its own), less what was resident before,
over the bytes of the tensors. Times are medians: what the loop waits for its copy, the longest
that another thread stands still until the file is safe, and until then in all. Linux only.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
from memory import peak_mb
from turns import save, timed

from mlx_randygpt.backends.numpy.backend import NumpyBackend
from mlx_randygpt.checkpoint import NEWEST, Checkpoint
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.model import initial_state
from mlx_randygpt.progress import Progress
from mlx_randygpt.recipes import RECIPES
from mlx_randygpt.state import Batch
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.saving import Saver

SIZES = {"n_layer": 6, "n_embd": 384, "vocab_size": 67, "block_size": 256, "saves": 7}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in SIZES.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=value)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = measure(options, Path(folder))
    for name, value in found.items():
        print(f"{name:30} {value:10.2f}")
    save(options.json, settings=vars(options), rows=found)


class Standstill:
    """The longest time that a thread which asks every half millisecond was kept from running."""

    def __enter__(self) -> Standstill:
        self.longest, self._over = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._ask)
        self._thread.start()
        return self

    def _ask(self) -> None:
        while not self._over.is_set():
            self.longest = max(self.longest, timed(lambda: time.sleep(0.0005)))

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()


def measure(options: argparse.Namespace, folder: Path) -> dict[str, float]:
    sizes = {name: getattr(options, name) for name in SIZES if name != "saves"}
    model = ModelConfig(n_head=2, **sizes, **RECIPES["classic"]["model"])
    train = TrainConfig(recipe="classic", **RECIPES["classic"]["train"])
    backend = NumpyBackend(model, train, initial_state(model, 1))
    windows = np.random.default_rng(0).integers(0, model.vocab_size, (2, 33))
    backend.train_step([Batch.of(windows)], 1e-3)
    vocabulary = CharTokenizer("".join(chr(256 + i) for i in range(model.vocab_size - 3))).to_json()

    data = {"paths": [], "characters": 0, "sha256": ""}

    def snapshot() -> Checkpoint:
        state = backend.state()
        return Checkpoint(model, train, Progress(), vocabulary, data, "numpy", state)

    before = resident_mb()
    waits, standstills, seconds = [], [], []
    saver = Saver(train, folder, time.monotonic)
    for _ in range(options.saves):
        start = time.perf_counter()
        waits.append(timed(lambda: saver.save(NEWEST, snapshot)))
        with Standstill() as still:
            while not (logs := saver.finished()):
                time.sleep(0.0005)
        assert not logs[0].error, logs[0].error
        seconds.append(time.perf_counter() - start)
        standstills.append(still.longest)
    saver.close()
    tensors = (folder / NEWEST).stat().st_size / 1e6
    command = [sys.executable, "-c", READ, str(folder / NEWEST)]
    read = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return {
        "tensors, MB": tensors,
        "peak over before / tensors": (peak_mb() - before) / tensors,
        "the loop waits, ms": 1e3 * statistics.median(waits),
        "another thread waits, ms": 1e3 * statistics.median(standstills),
        "until it is safe, ms": 1e3 * statistics.median(seconds),
        "reading: peak / tensors": read["peak"] / tensors,
        "reading, ms": read["ms"],
    }


READ = """
import json, sys, time
from pathlib import Path
from mlx_randygpt.checkpoint import load_checkpoint
def peak_mb():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e3
before, start = peak_mb(), time.perf_counter()
load_checkpoint(Path(sys.argv[1]))
ms = 1e3 * (time.perf_counter() - start)
print(json.dumps({"peak": peak_mb() - before, "ms": ms}))
"""


def resident_mb() -> float:
    """What this process holds now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


if __name__ == "__main__":
    main()
