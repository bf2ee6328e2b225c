"""A save as the operating system sees it: the order that a power cut cannot break.

The system calls of a real run are recorded; skipped where there is no strace to do it.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from harness import PROGRAM

from mlx_randygpt.checkpoint import BEST, NEWEST

CALLS = "trace=write,pwrite64,writev,fsync,fdatasync,rename,renameat,renameat2,ftruncate"
SIZES = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=8", "--batch-size=4"]


def can_trace() -> bool:
    strace = shutil.which("strace")
    return (
        bool(strace) and subprocess.run([strace, "-c", "true"], capture_output=True).returncode == 0
    )


@pytest.fixture(scope="module")
def calls(text: str, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """One line a finished system call, in order, with the paths behind the descriptors."""
    if not can_trace():
        pytest.skip("strace cannot trace here")
    folder = tmp_path_factory.mktemp("order")
    (folder / "text.txt").write_text(text)
    words = ["--data", str(folder / "text.txt"), "--out", str(folder / "out"), *SIZES]
    # far enough apart that a busy machine does not let two saves of a file become one
    settings = ["--iters=600", "--save-every=200", "--eval-every=200", "--sample-every=0"]
    strace = ["strace", "-f", "-y", "-s", "300", "-e", CALLS, "-o", str(folder / "trace")]
    done = subprocess.run([*strace, *PROGRAM, *words, *settings], capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return finished((folder / "trace").read_text().splitlines())


def finished(lines: list[str]) -> list[str]:
    """Calls that another thread interrupted in the record put together, at the time they ended."""
    begun: dict[str, str] = {}
    whole = []
    for line in lines:
        thread, _, call = line.partition(" ")
        call = call.strip()
        if call.endswith("<unfinished ...>"):
            begun[thread] = call.removesuffix("<unfinished ...>")
        elif resumed := re.match(r"<\.\.\. \w+ resumed>(.*)", call):
            whole.append(begun.pop(thread) + resumed[1])
        else:
            whole.append(call)
    return whole


def test_what_is_renamed_is_on_the_disk_and_what_is_told_of_is_renamed(calls: list[str]) -> None:
    renames = [
        (at, *match.groups())
        for at, call in enumerate(calls)
        if (match := re.match(r'rename\w*\(.*?"([^"]*\.tmp)".*?"([^"]*safetensors)"', call))
    ]
    saves = [entry for entry in renames if Path(entry[2]).name in (NEWEST, BEST)]
    assert len(saves) >= 6  # two files, at the start, on the way and at the end
    for at, temporary, path in saves:
        folder = str(Path(path).parent)
        before = [call for call in calls[:at] if f"<{temporary}>" in call]
        last_write = max(i for i, call in enumerate(before) if "write" in call.split("(")[0])
        flushes = [i for i, call in enumerate(before) if re.match(r"f(data)?sync\(", call)]
        assert max(flushes) > last_write, f"{path} was renamed before its bytes were flushed"
        after = calls[at:]
        told = next(i for i, call in enumerate(after) if "Saved" in call and path in call)
        synced = next(i for i, c in enumerate(after) if re.match(rf"fsync\(\d+<{folder}>", c))
        assert synced < told, f"{path} was told of before its folder was flushed"
