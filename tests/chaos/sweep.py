"""Every system call of a saving run made to fail in turn: python tests/chaos/sweep.py FOLDER

Each run is forked from one process that has imported everything, with shim.c preloaded: it strikes
the n-th call of one kind below the run's folder. The runs are those of SCENARIOS: a new one, one
that resumes, one that keeps checkpoints, one that goes back to one, a fine-tuning. Prints one JSON
object. The cases come in a random order that is always the same: MLXGPT_SWEEP=N takes every N-th
(1: all), MLXGPT_SWEEP_SHARD=I/K a part of them, MLXGPT_SWEEP_SECONDS=S those that S seconds allow,
MLXGPT_SWEEP_ONLY="kept: read" those whose names begin so. Linux with a C compiler only.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlx_randygpt.checkpoint import Checkpoint

SHIM = "MLXGPT_SWEEP_SHIM"
KINDS = ("open", "write", "fsync", "rename", "link", "unlink", "stat", "read")
ERROR, SHORT, KILL_BEFORE, KILL_AFTER = range(4)
ERRORS = ("EIO", "ENOSPC", "EACCES", "EMFILE", "EINTR", "ESTALE", "EROFS")
FAULTS = {name: (ERROR, getattr(errno, name)) for name in ERRORS}
FAULTS |= {"killed before": (KILL_BEFORE, 0), "killed after": (KILL_AFTER, 0)}
LASTING = ("EIO", "ENOSPC")  # also: this call and all later ones of its kind
ITERS, SECONDS = 6, 60
ARGUMENTS = f"""train --plain --backend=numpy --threads=1 --iters={ITERS}
--batch-size=2 --save-every=2 --eval-every=3 --sample-every=4 --dropout=0.1""".split()
SIZES = ["--n-layer=1", "--n-head=1", "--n-embd=8", "--block-size=8"]


@dataclass(frozen=True)
class Scenario:
    """A run that is struck."""

    name: str
    words: tuple[str, ...] = ()
    resumes: int = 0  # from the newest checkpoint at this step
    goes_back: int = 0  # to the checkpoint that was kept at this step
    tunes: bool = False  # the weights of an older run


SCENARIOS = (
    Scenario("new"),
    Scenario("resumed", resumes=4),
    Scenario("kept", ("--keep-every=2",)),
    Scenario("kept, resumed", ("--keep-every=2",), resumes=2),
    Scenario("went back", ("--keep-every=2",), resumes=4, goes_back=2),
    Scenario("fine-tuning", ("--lora-rank=2",), tunes=True),
)


@dataclass(frozen=True)
class Case:
    """One fault: which call of which run is struck, and how."""

    scenario: Scenario
    kind: int
    n: int
    fault: str
    lasting: bool = False

    def __str__(self) -> str:
        call = f"{KINDS[self.kind]} {self.n}{'+' if self.lasting else ''}"
        return f"{self.scenario.name}: {call}: {self.fault}"


def preload_shim(folder: Path) -> None:
    """Compile the shim and start this script again with it."""
    if SHIM in os.environ:
        return
    shim = folder / "shim.so"
    source = Path(__file__).with_name("shim.c")
    compiler = (sysconfig.get_config_var("CC") or "cc").split()[0]
    compiler = compiler if shutil.which(compiler) else "cc"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", str(shim), str(source), "-ldl"]
    subprocess.run(command, check=True)
    os.environ |= {SHIM: str(shim), "LD_PRELOAD": str(shim)}
    os.execv(sys.executable, [sys.executable, *sys.argv])


def write_in_turn() -> None:
    """Make the training wait until the writer takes each snapshot, so that it writes them all.

    On a slow disk it would leave out those that a newer one has replaced, and with them the step
    that a scenario is to resume from.
    """
    from mlx_randygpt.training.saving import CheckpointWriter

    submit = CheckpointWriter.submit

    def submit_and_wait(writer: CheckpointWriter, path: Path, checkpoint: Checkpoint) -> None:
        submit(writer, path, checkpoint)
        while writer._waiting:
            time.sleep(0.001)

    CheckpointWriter.submit = submit_and_wait  # type: ignore[method-assign]


class Sweep:
    """The runs, and what they have shown."""

    def __init__(self, folder: Path) -> None:
        from harness import fingerprint

        self.fingerprint = fingerprint
        self.shim = ctypes.CDLL(os.environ[SHIM])
        self.folder, self.text = folder, folder / "text"
        self.text.write_text("to be or not to be, that is the question\n" * 100)
        self.out, self.base = folder / "run" / "out", folder / "base"
        self.counts: dict[str, dict[str, int]] = {}
        self.expected: dict[Scenario, dict[str, object]] = {}
        self.outcome: Counter[str] = Counter()
        self.failures: list[str] = []

    def start(
        self, *words: str, case: Case | None = None, counting: bool = False, in_turn: bool = False
    ) -> int:
        """Run the command in a forked process; return its exit code, negative for a signal."""
        if pid := os.fork():
            return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        code = 99
        try:
            signal.alarm(SECONDS)
            said = os.open(self.folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            os.dup2(said, 1)
            os.dup2(said, 2)
            sys.argv = ["mlxgpt", *ARGUMENTS, "--out", str(self.out), *words]
            if case is not None:
                how, error = FAULTS.get(case.fault, (SHORT, 0))
                last = 1 << 30 if case.lasting else case.n
                self._arm(case.kind, case.n, last, how, error)
            elif counting:
                self._arm(-1, 0, 0, 0, 0)
            from mlx_randygpt.cli import main

            if in_turn:
                write_in_turn()
            main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        finally:
            with contextlib.suppress(BaseException):
                sys.stdout.flush()
                sys.stderr.flush()
            if counting:
                counts = [self.shim.shim_count(kind) for kind in range(len(KINDS))]
                (self.folder / "counts").write_text(json.dumps(counts))
            elif case is not None:
                (self.folder / "fired").write_text(str(self.shim.shim_fired()))
            os._exit(code)

    def _arm(self, kind: int, first: int, last: int, how: int, error: int) -> None:
        self.shim.shim_arm(os.fsencode(self.out.parent), kind, first, last, how, error)

    def said(self) -> str:
        return (self.folder / "said").read_text(errors="replace")

    def rows(self) -> dict[tuple[str, int], object]:
        """Return the figures of every row of metrics.jsonl."""
        names = ("loss", "lr", "grad_norm", "val_loss", "tokens")
        rows = {}
        for line in (self.out / "metrics.jsonl").read_text().splitlines():
            row = json.loads(line)
            key = "loss" if "loss" in row else "val_loss", row["step"]
            rows[key] = [row.get(name) for name in names]
        return rows

    def state(self) -> dict[str, object]:
        """Return what the end of a run is compared by: its checkpoints by name, and its rows.

        A best one that was set aside does not count: it depends on when the run was struck.
        """
        from mlx_randygpt.checkpoint import PREVIOUS, load_checkpoint

        left_out = {PREVIOUS, *(path.name for path in self.out.glob("checkpoint_best-*"))}
        files = (path for path in self.out.glob("checkpoint*") if path.name not in left_out)
        ends = {path.name: self.fingerprint(load_checkpoint(path)) for path in files}
        return {**ends, "rows": self.rows()}

    def words(self, scenario: Scenario, *, first: bool = True) -> list[str]:
        """Return what the next process is given: it resumes if there is anything to resume."""
        if first and scenario.goes_back:
            from mlx_randygpt.checkpoint import kept_name

            return ["--resume", str(self.out / kept_name(scenario.goes_back)), *scenario.words]
        if [*self.out.glob("checkpoint*.safetensors")]:
            return ["--resume", *scenario.words[: 0 if scenario.tunes else None]]
        start = ["--init-from", str(self.folder / "older")] if scenario.tunes else SIZES
        return [*start, *scenario.words, "--data", str(self.text)]

    def prepare(self) -> list[Case]:
        """Run once in this process for what it imports, each scenario undisturbed; return cases."""
        from mlx_randygpt.checkpoint import NEWEST
        from mlx_randygpt.cli import main

        sys.argv = ["mlxgpt", *ARGUMENTS, *self.words(SCENARIOS[0]), "--out", str(self.out)]
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            main()
        shutil.copyfile(self.out / NEWEST, self.folder / "older")
        return [case for scenario in SCENARIOS for case in self._cases(scenario)]

    def _cases(self, scenario: Scenario) -> list[Case]:
        if scenario.resumes:
            self._make_base(scenario)
        self._lay_out(scenario)
        assert self.start(*self.words(scenario), counting=True) == 0, self.said()
        self.expected[scenario] = self.state()
        counts = json.loads((self.folder / "counts").read_text())
        self.counts[scenario.name] = dict(zip(KINDS, counts, strict=True))
        faults = [(fault, False) for fault in FAULTS] + [(fault, True) for fault in LASTING]
        cases = [
            Case(scenario, kind, n, fault, lasting)
            for kind, total in enumerate(counts)
            for n, (fault, lasting) in itertools.product(range(1, total + 1), faults)
        ]
        short = [(kind, KINDS.index(kind)) for kind in ("write", "read")]
        return cases + [
            Case(scenario, number, n, f"short {kind}")
            for kind, number in short
            for n in range(1, counts[number] + 1)
        ]

    def _make_base(self, scenario: Scenario) -> None:
        """Keep the folder of a run that was killed with its newest checkpoint at that step."""
        from mlx_randygpt.checkpoint import NEWEST, peek_step

        fresh = Scenario(scenario.name, scenario.words)
        for n in itertools.count(1):
            self._lay_out(fresh)
            kill = Case(fresh, KINDS.index("rename"), n, "killed after")
            code = self.start(*self.words(fresh), case=kill, in_turn=True)
            assert code == -signal.SIGKILL, self.said()
            newest = self.out / NEWEST
            if newest.exists() and peek_step(newest) == scenario.resumes:
                break
        for left in self.out.glob(".*.tmp"):
            left.unlink()
        shutil.copytree(self.out, self.base / scenario.name)

    def _lay_out(self, scenario: Scenario) -> None:
        """Begin with an empty folder, or that of the run to resume."""
        shutil.rmtree(self.out.parent, ignore_errors=True)
        self.out.parent.mkdir()
        if scenario.resumes:
            shutil.copytree(self.base / scenario.name, self.out)

    def try_case(self, case: Case) -> None:
        """Strike one run and check what it leaves, then let it reach its target and compare."""
        self._lay_out(case.scenario)
        (self.folder / "fired").write_text("1")
        code = self.start(*self.words(case.scenario), case=case)
        self.outcome["runs"] += 1
        self.outcome[f"runs: {case.scenario.name}"] += 1
        self.outcome["not struck"] += (self.folder / "fired").read_text() == "0"
        self.outcome[f"code {code}"] += 1
        try:
            self._check_death(case, code)
            self._check_end(case)
        except Exception as failure:
            self.failures.append(f"{case}: code {code}: {type(failure).__name__} {failure}")
            sys.stderr.write(f"{self.failures[-1]}\n")

    def _check_death(self, case: Case, code: int) -> None:
        from mlx_randygpt.checkpoint import NEWEST, load_checkpoint, peek_step

        said = self.said()
        killed = case.fault.startswith("killed")
        assert code in ((-signal.SIGKILL, 0, 1) if killed else (0, 1)), said
        assert "Traceback" not in said, said
        assert "unexpected" not in said, said
        files = [*self.out.glob("checkpoint*.safetensors")]
        for path in files:
            load_checkpoint(path)  # raises if it is not whole
        steps = {path.name: peek_step(path) for path in files}
        for name, step in re.findall(r"✓ Saved \S*/(checkpoint\S*) .*?[@ ](\d+)\)", said):
            assert steps.get(name, -1) >= int(step), f"false Saved: {name} {step}, {steps}"
        furthest = max(steps.values(), default=-1)
        if furthest >= 0 and not case.lasting:
            rows = {step for kind, step in self.rows_so_far() if kind == "loss"}
            lost = set(range(1, furthest + 1)) - rows
            assert not lost or "are lost" in said, f"rows {lost} are lost before {furthest}"
        if code == 0 and not case.lasting:
            assert steps.get(NEWEST) == ITERS, f"code 0 with {steps}: {said}"
            assert not list(self.out.glob(".*.tmp")), [*self.out.iterdir()]

    def rows_so_far(self) -> dict[tuple[str, int], object]:
        """Return the whole rows, without a torn last one."""
        with contextlib.suppress(FileNotFoundError):
            path = self.out / "metrics.jsonl"
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
            return self.rows()
        return {}

    def _check_end(self, case: Case) -> None:
        before, expected = self.said(), self.expected[case.scenario]
        code = self.start(*self.words(case.scenario, first=False))
        assert code == 0, f"cannot go on: {self.said()}"
        got = self.state()
        rows, all_rows = got.pop("rows"), expected["rows"]
        assert isinstance(rows, dict)
        assert isinstance(all_rows, dict)
        wrong = [name for name in got if got[name] != expected.get(name)]
        assert not wrong, f"another end of {wrong}: {before} {self.said()}"
        for name in expected.keys() - got.keys() - {"rows"}:
            reported = case.lasting and f"Could not save {self.out / name}" in before
            assert reported, f"no {name}: {before} {self.said()}"
        wrong = [key for key in rows if rows[key] != all_rows[key]]
        assert not wrong, f"other rows: {wrong}"
        lost = all_rows.keys() - rows.keys()
        assert not lost or "are lost" in before, f"lost rows: {sorted(lost)}: {before}"
        self.outcome["ends compared"] += 1
        self.outcome["losses reported"] += bool(lost)
        assert not list(self.out.glob(".*.tmp")), [*self.out.iterdir()]


def main() -> None:
    """Try the cases that the environment asks for."""
    folder = Path(sys.argv[1]).resolve()
    preload_shim(folder)
    sweep = Sweep(folder)
    began = time.monotonic()
    cases = sweep.prepare()
    only = os.environ.get("MLXGPT_SWEEP_ONLY", "")
    cases = [case for case in cases if str(case).startswith(only)]
    random.Random(1).shuffle(cases)
    limit = float(os.environ.get("MLXGPT_SWEEP_SECONDS", "inf"))
    every = int(os.environ.get("MLXGPT_SWEEP", "1"))
    shard, shards = map(int, os.environ.get("MLXGPT_SWEEP_SHARD", "0/1").split("/"))
    for case in cases[::every][shard::shards]:
        if time.monotonic() - began > limit:
            break
        sweep.try_case(case)
    print(  # noqa: T201
        json.dumps(
            {
                "calls": sweep.counts,
                "cases": len(cases),
                **sweep.outcome,
                "seconds": round(time.monotonic() - began, 1),
                "failures": sweep.failures,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
