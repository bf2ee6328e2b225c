"""Two writers of one process number share a token cache: python tests/chaos/twins.py FOLDER

Each attempt runs `mlxgpt data prepare` twice on one text, each in a pid namespace of its own, where
it is process 1. The second starts at the same moment in the first attempt, later in each that
follows, and in the last when the first is about to end. Prints one JSON object; `--attempts N` sets
their number. Linux, with unshare.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from mlx_randygpt.data import cache

UNSHARE = ["unshare", "--fork", "--pid", "--kill-child"]
CODE = """
import os, sys
assert os.getpid() == 1
from mlx_randygpt.cli import main
sys.argv = ["mlxgpt", "data", "prepare", "--json", "--data", sys.argv[1]]
main()
"""
LINES = 500_000  # of the text, 18 MB: long enough to be cached


def why_not() -> str:
    """Return why this machine cannot try it, or ""."""
    if not shutil.which("unshare"):
        return "there is no unshare"
    done = subprocess.run([*UNSHARE, "true"], capture_output=True, check=False)
    return "" if done.returncode == 0 else "this user cannot make a pid namespace"


def start(text: Path, folder: Path) -> subprocess.Popen[str]:
    """Start a writer that caches in this folder."""
    path = os.pathsep.join(filter(None, sys.path))
    environ = os.environ | {cache.FOLDER_VARIABLE: str(folder), "PYTHONPATH": path}
    command = [*UNSHARE, sys.executable, "-c", CODE, str(text)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=environ)


def try_once(text: Path, folder: Path, serial: Path, delay: float) -> Counter[str]:
    """Run two writers, the second after `delay` seconds; count what differs from the serial one."""
    first = start(text, folder)
    with suppress(subprocess.TimeoutExpired):
        first.wait(delay)
    overlapping = first.poll() is None
    second = start(text, folder)
    outputs = [process.communicate(timeout=600) for process in (first, second)]
    counts = Counter(attempts=1, overlapping=overlapping)
    counts["failed processes"] = sum(bool(p.returncode) for p in (first, second))
    counts["other output"] = outputs[0][0] != outputs[1][0]
    names = {path.name for path in folder.iterdir()}
    counts["other names"] = names != {path.name for path in serial.iterdir()}
    for path in serial.glob("*.tokens"):
        mapped, expected = cache.read(folder / path.name), cache.read(path)
        assert expected is not None
        counts["tokens"] += len(expected.tokens)
        if mapped is None:
            counts["wrong tokens"] += len(expected.tokens)
        else:
            counts["wrong tokens"] += int((np.asarray(mapped.tokens) != expected.tokens).sum())
        counts["other bytes"] += (folder / path.name).read_bytes() != path.read_bytes()
    return counts


def attempt(place: Path, n: int) -> dict[str, Any]:
    """Return the counts of n attempts."""
    text, serial = place / "text", place / "serial"
    text.write_text("".join(f"{i} to be or not to be, that is it\n" for i in range(LINES)))
    began = time.monotonic()
    alone = start(text, serial)
    assert alone.wait() == 0, alone.communicate()
    seconds = time.monotonic() - began
    alone.communicate()
    counts = Counter[str]()
    for i in range(n):
        counts += try_once(text, place / "shared", serial, seconds * i / n)
        shutil.rmtree(place / "shared")
    names = ("failed processes", "other output", "other names", "wrong tokens", "other bytes")
    clean = {name: counts[name] for name in names}
    return {**counts, **clean, "seconds of one writer": round(seconds, 2)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--attempts", type=int, default=100)
    words = parser.parse_args()
    print(json.dumps(attempt(words.folder.resolve(), words.attempts), indent=1))  # noqa: T201
