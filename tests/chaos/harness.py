"""Real training in real processes, what can go wrong with one, and what must hold after it.

Owns the run under fault, the seeded plan of faults and the comparison with the undisturbed run.
Knows of the program what a user knows: the command line, the lines it prints, the files it
leaves. Nothing sleeps: a fault comes at a line on the pipe, or at a moment that the plan has
drawn, unless the process ends before it.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random
from time import monotonic
from typing import Any

from process import Life

from mlx_randygpt.checkpoint import (
    BEST,
    NEWEST,
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    peek_step,
)

ITERS = 500
SAVE_SECONDS = 0.2
HANDOVER_SECONDS = 1.0  # at most from the moment a save is due to its file; measured: 0.2
STRIKES = 5  # at most to one run
STEPS_TO_AIM_AT = 60  # a run with fewer of them left is let alone
LATEST = 0.8  # of the steps that are left: a signal takes a moment to arrive
STARTING = 0.3  # share of starting in the life of an undisturbed process
TRIES = 5  # that a fault may come too late
PROGRAM = [sys.executable, "-m", "mlx_randygpt", "train", "--plain", "--backend=numpy"]
SETTINGS = f"""--iters={ITERS} --n-layer=1 --n-head=2 --n-embd=16 --block-size=8 --dropout=0.1
--batch-size=4 --threads=1 --eval-every=20 --sample-every=0 --save-every={SAVE_SECONDS}s""".split()
FIGURES = ("loss", "lr", "grad_norm", "val_loss", "tokens")
PYTHON_HAD_NOT_BEGUN = ["Failed to import the site module", "Could not import runpy module"]
SIGNALS = {
    "SIGKILL": [signal.SIGKILL],
    "SIGINT": [signal.SIGINT],
    "SIGTERM": [signal.SIGTERM],
    "SIGHUP": [signal.SIGHUP],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
}


@dataclass(frozen=True)
class Fault:
    """Signals to one process of a run."""

    kind: str  # of SIGNALS
    starting: bool  # while the process starts, else while it trains
    moment: float  # share of that time: of seconds while it starts, of steps while it trains
    aimed: bool  # at a write of a checkpoint, if one comes soon after
    tries: int = 0  # that came too late


@dataclass(frozen=True)
class Plan:
    """Faults to come, one after the other: all of them follow from the seed."""

    faults: list[Fault]

    @classmethod
    def drawn(cls, seed: int, kinds: list[str]) -> Plan:
        """These kinds in random order: every fourth while a process starts, the others uniform
        over its steps, and every third of all aimed at a write."""
        random = Random(seed)
        order = random.sample(kinds, len(kinds))
        return cls([Fault(k, i % 4 == 3, random.random(), i % 3 == 2) for i, k in enumerate(order)])


def half_killed(n: int) -> list[str]:
    """Kinds of n faults: half of them SIGKILL, the others in equal parts."""
    others = [kind for kind in SIGNALS if kind != "SIGKILL"]
    return ["SIGKILL"] * -(-n // 2) + [others[i % len(others)] for i in range(n // 2)]


class Run:
    """One run through all its processes: fresh at first, a bare --resume once there is a file."""

    def __init__(self, folder: Path, text: Path) -> None:
        self.out, self.text = folder / "out", text
        self.lives: list[Life] = []

    def launch(self, *words: str, under: Iterable[str] = ()) -> Life:
        """Start the next process; a resumed one is told nothing but the folder."""
        fresh = ["--data", str(self.text), *SETTINGS]
        rest = ["--resume"] if self.files() else fresh
        self.lives.append(Life([*under, *PROGRAM, "--out", str(self.out), *rest, *words]))
        return self.lives[-1]

    def complete(self) -> Life:
        """A process that is let alone, and reaches the target."""
        life = self.launch().finish()
        assert (life.code, life.errors) == (0, ""), (life.code, life.errors, life.lines)
        return life

    def close(self) -> None:
        """End what a failed test has left."""
        for life in self.lives:
            if life.process.returncode is None:
                life.process.kill()
                life.finish()

    def files(self) -> list[Path]:
        return sorted(self.out.glob("checkpoint*.safetensors"))

    def unfinished(self) -> list[Path]:
        """What the latest process is writing, or was when it died."""
        return list(self.out.glob(f".*.{self.lives[-1].process.pid}.*.tmp"))

    def newest(self) -> Path:
        """The furthest of the files whose header can be read."""
        steps = {}
        for path in self.files():
            with suppress(CheckpointError):
                steps[path] = peek_step(path)
        return max(steps, key=lambda path: (steps[path], path.name == NEWEST))

    def metrics(self) -> dict[tuple[str, int], dict[str, Any]]:
        """The lines of metrics.jsonl by ("loss" or "val_loss", step), the later one of two; what
        a killed process left of its last line is passed over."""
        found = {}
        with suppress(FileNotFoundError):
            for line in (self.out / "metrics.jsonl").read_bytes().splitlines():
                with suppress(ValueError):
                    values = json.loads(line)
                    found["loss" if "loss" in values else "val_loss", values["step"]] = values
        return found


def readable(run: Run) -> dict[Path, Checkpoint]:
    """All checkpoints of the folder; AssertionError names those that cannot be read."""
    found, broken = {}, []
    for path in run.files():
        try:
            found[path] = load_checkpoint(path)
        except CheckpointError as error:
            broken.append(f"unreadable: {error}")
    assert not broken, broken
    return found


def fingerprint(checkpoint: Checkpoint) -> str:
    """SHA-256 of the bits of step, weights and moments, and of the best loss so far."""
    state, best = checkpoint.state, checkpoint.progress
    digest = hashlib.sha256(f"{state.step} {best.best_loss!r} {best.best_step}".encode())
    for kind, arrays in {"weights": state.params, **state.moments}.items():
        for name, array in sorted(arrays.items()):
            digest.update(f"{kind} {name} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def assert_nothing_lost(run: Run, before: int) -> float:
    """After the death of the latest process: every file is whole, and the newest is no older than
    what this process began with, than any save it told of, and than the interval. Returns the age
    of checkpoint.safetensors when the process was struck, in seconds."""
    life, steps = run.lives[-1], [file.state.step for file in readable(run).values()]
    newest = max(steps, default=-1)
    told = [int(n) for line in life.lines for n in re.findall(r"✓ Saved .*[@ ](\d+)\)$", line)]
    assert newest >= max([before, *told]), f"lost: {newest} is older than {before} or {told}"
    if life.said("Go on with"):
        assert life.said(f"Interrupted at iteration {newest}."), f"lost: {newest} is saved"
    if run.unfinished() or newest == ITERS or not life.said("step "):
        return 0.0  # it died in a write, whose time is the disk's, or had nothing to lose yet
    begun = max((run.out / name).stat().st_mtime for name in (NEWEST, "config.toml"))
    age = life.struck_at - begun
    assert age <= SAVE_SECONDS + HANDOVER_SECONDS, f"lost: the newest is {age:.2f} s old"
    return age


def assert_same_end(run: Run, undisturbed: Run, *, best: bool = True) -> None:
    """Return if every logged figure, the newest checkpoint by its name and the best one are those
    of the other run, bit for bit, and no row is missing."""
    got, expected = run.metrics(), undisturbed.metrics()
    for key, values in got.items():
        same = all(values.get(name) == expected[key].get(name) for name in FIGURES)
        assert same, f"another way: {key} {values} instead of {expected[key]}"
    lost = sorted(expected.keys() - got.keys())
    assert not lost, f"{len(lost)} rows are lost: {lost[:5]} in {run.out}"
    assert run.newest() == run.out / NEWEST, f"stale: {run.newest()} is further than {NEWEST}"
    ends = [fingerprint(load_checkpoint(r.out / NEWEST)) for r in (run, undisturbed)]
    assert ends[0] == ends[1], f"another end: {run.newest()}"
    if best:
        ends = [fingerprint(load_checkpoint(r.out / BEST)) for r in (run, undisturbed)]
        assert ends[0] == ends[1], f"another best: {run.out}"


@dataclass
class Outcome:
    """What a plan has shown."""

    kills: Counter[str] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    after_a_step: int = 0
    in_a_write: int = 0
    before_the_first_checkpoint: int = 0
    runs: int = 0
    oldest: float = 0.0  # age of a newest checkpoint when its process was struck, in seconds
    failures: list[str] = field(default_factory=list)
    seconds: float = 0.0

    def __str__(self) -> str:
        return "\n".join(f"{name}: {value}" for name, value in vars(self).items())


def carry_out(plan: Plan, new_run: Callable[[], Run], undisturbed: Run) -> Outcome:
    """Strike process after process until all faults are spent. A run goes on after each; when
    one reaches its target it is compared, and the next begins."""
    outcome, began, waiting = Outcome(), monotonic(), deque(plan.faults)
    while waiting:
        run, outcome.runs = new_run(), outcome.runs + 1
        try:
            _strike_repeatedly(run, waiting, undisturbed.lives[0].seconds, outcome)
            run.complete()
            assert_same_end(run, undisturbed)
        except (AssertionError, CheckpointError) as error:
            failure = f"run {outcome.runs}, kill {outcome.kills.total()}, {run.out}: {error}"
            outcome.failures.append(failure)
        finally:
            run.close()
    outcome.seconds = monotonic() - began
    return outcome


def _strike_repeatedly(
    run: Run, waiting: deque[Fault], whole_life: float, outcome: Outcome
) -> None:
    for _ in range(STRIKES):
        before = max((peek_step(path) for path in run.files()), default=-1)
        if not waiting or ITERS - before < STEPS_TO_AIM_AT:
            return
        fault = waiting.popleft()
        if not _strike(run, fault, before, whole_life, outcome):
            assert fault.tries < TRIES, f"{fault} came too late {TRIES} times"
            waiting.appendleft(replace(fault, moment=fault.moment / 2, tries=fault.tries + 1))
            return


def _strike(run: Run, fault: Fault, before: int, whole_life: float, outcome: Outcome) -> bool:
    """Launch a process that resumes at step `before` (-1: none) and send it the fault's signals
    when their moment has come; False where it was done before them."""
    life = run.launch()
    if fault.starting:
        struck = life.outlives(fault.moment * STARTING * whole_life)
    else:
        first = max(before, 0) + 1
        struck = life.passes(first + int(fault.moment * LATEST * (ITERS - first)))
    began = monotonic()
    while struck and fault.aimed and not run.unfinished() and monotonic() < began + SAVE_SECONDS:
        struck = life.outlives(0.0002)
    for number in SIGNALS[fault.kind] if struck else ():
        life.send(number)
        life.outlives(fault.moment / 50)  # seconds between two signals
    life.finish()
    if life.code == 0:  # it was done, or past asking
        return False
    outcome.kills[fault.kind] += 1
    outcome.codes[f"{fault.kind}: {life.process.returncode}"] += 1
    outcome.after_a_step += life.said("step ")
    outcome.in_a_write += bool(run.unfinished())
    outcome.before_the_first_checkpoint += not run.files()
    if not any(line in life.errors for line in PYTHON_HAD_NOT_BEGUN):
        expected_code = 128 + SIGNALS[fault.kind][0]
        assert life.code == expected_code, f"code {life.code}: {life.errors}"
    outcome.oldest = max(outcome.oldest, assert_nothing_lost(run, before))
    return True
