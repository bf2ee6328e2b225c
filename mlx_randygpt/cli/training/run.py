"""`mlxgpt train` once its options are read: start the run, show it, and return the exit code."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console

from mlx_randygpt.analysis.copies import find_copies
from mlx_randygpt.backends import choose, choose_for_text, limit_memory
from mlx_randygpt.backends.base import Backend
from mlx_randygpt.checkpoint import BEST, NEWEST, CheckpointError, Position, is_run_folder
from mlx_randygpt.cli.audit import check_start
from mlx_randygpt.cli.copies import copies_line
from mlx_randygpt.cli.device_errors import DeviceError, describe_failure
from mlx_randygpt.cli.loading import BACKEND_TITLES, describe_backend
from mlx_randygpt.cli.output import echo, ring_bell
from mlx_randygpt.cli.signals import StopSignals
from mlx_randygpt.cli.training import text
from mlx_randygpt.cli.training.agreement import (
    agreed_values,
    checkpoint_without_arrays,
    start_message,
)
from mlx_randygpt.cli.training.awake import KeepAwake
from mlx_randygpt.cli.training.folder import (
    RunFolder,
    generation_of,
    no_checkpoint,
    restore_best,
)
from mlx_randygpt.cli.training.loggers import Loggers
from mlx_randygpt.cli.training.request import (
    TrainRequest,
    config_toml,
    describe_interval,
    describe_model,
    recovery_line,
    resume_line,
    try_line,
)
from mlx_randygpt.cli.training.start import (
    Machine,
    documents_notes,
    load_source,
    make_run,
    start_run,
)
from mlx_randygpt.cli.training.team import RANK_TIMEOUT, Team
from mlx_randygpt.cli.training.view import GuardedView, choose_console
from mlx_randygpt.config import ConfigError, UserError
from mlx_randygpt.data.decoding import decoded
from mlx_randygpt.planning.footprint import device_bytes
from mlx_randygpt.screen.dashboard import Dashboard, make_view
from mlx_randygpt.screen.history import History, read_history
from mlx_randygpt.screen.run_summary import RunInfo
from mlx_randygpt.state import TrainState
from mlx_randygpt.training.early import early_kinds
from mlx_randygpt.training.loop import Run, TrainingDiverged, train
from mlx_randygpt.training.reports import EndLog, SampleLog, SaveLog

BELL_SECONDS = 300  # a run that takes longer rings the bell when it ends by itself
MAX_SEARCHED_TOKENS = 1 << 24  # at the end of a run, so that it takes a few seconds at most


@dataclass(frozen=True)
class Session:
    """A run that is about to train, and everything that shows, records or stops it."""

    request: TrainRequest
    run: Run
    backend: Backend
    folder: RunFolder
    console: Console
    view: GuardedView
    loggers: Loggers
    signals: StopSignals
    team: Team
    notes: tuple[str, ...] = ()
    early: frozenset[str] = frozenset()  # kinds of early looks

    @property
    def located_request(self) -> TrainRequest:
        """The request with the folder where it is now."""
        return replace(self.request, out=self.folder.path)


def train_command(request: TrainRequest, clock: Callable[[], float] = time.monotonic) -> int:
    """Train as requested, ring the bell after a long run, and return the exit code."""
    started = clock()
    try:
        return _train(request)
    finally:
        if clock() - started > BELL_SECONDS:
            ring_bell()


def _train(request: TrainRequest) -> int:
    overflow_is_checked = np.errstate(over="ignore", invalid="ignore", divide="ignore")
    timeout = request.options.get("rank_timeout", RANK_TIMEOUT)
    awake = KeepAwake(request.allow_sleep)
    with StopSignals() as signals, Team(timeout) as team, overflow_is_checked, awake:
        if team.rank > 0:
            return run_follower(request, team, signals)
        if request.resume_newest and not is_run_folder(request.out):
            raise CheckpointError(no_checkpoint(request.out))
        with RunFolder(request.out) as folder:
            return run_leader(request, team, folder, signals, awake.note)


def run_leader(
    request: TrainRequest, team: Team, folder: RunFolder, signals: StopSignals, note: str = ""
) -> int:
    """Run as rank 0, or as the only rank: write the files and show the screen, `note` on it."""
    with team.leading():
        if "minutes" in request.options and team.group.size > 1:
            raise ConfigError("--minutes needs a run on one rank; give several ranks --iters")
        source = load_source(request, folder)
        if source.finished:
            for line in (*source.skipped, source.finished):
                echo(line)
            team.group.broadcast(None)
            return 0
        saved, skipped = source.checkpoint, source.skipped
        backend_name, reason = choose(request.backend)
        start = start_run(request, saved, Machine(backend_name, team.n_beside))
        run = make_run(request, start)
        team.check(backend_name, run.train)
        message = start_message(saved, run)
    team.group.broadcast(message)
    team.agree(agreed_values(run, backend_name))
    backend = make_limited(backend_name, run, start.state, team)
    checked = check_start(start.corpus, text.reading(request.options, start.data))
    run, samples_note = place_samples(request, run, backend_name)
    notes = [*filter(None, [checked, *start.notes, *documents_notes(run), samples_note])]
    history = History()
    if request.resuming:
        past = request.resume.parent if request.resume else folder.path
        history = read_history(past, backend.step, run.progress)
        run = replace(run, recent_loss=history.recent_loss)
    alone = team.group.size == 1  # ranks would have to agree on the time
    early = early_kinds(run.train, request.options) if alone else frozenset[str]()
    info = RunInfo(
        model=describe_model(run.model),
        data=text.describe(start.corpus, run.tokenizer),
        backend=describe_backend(backend, reason) + team.suffix,
        recipe=run.train.recipe,
        saves=f"{request.out / NEWEST}, every {describe_interval(run.train.save_every)}",
        out=str(request.out),
        iters=run.train.iters,
        start_step=backend.step,
        history=history,
        eval_every=run.train.eval_every,
        sample_every=run.train.sample_every,
        early=early,
    )
    loggers = Loggers(request.options.get("log", ()), notes.append)
    loggers.begin(request.out, asdict(run.model) | asdict(run.train))
    # From here on nothing is refused, so files of the folder can change.
    position = Position(run.progress.generation, backend.step if request.resuming else -1)
    generation = generation_of(folder.path, position)
    run = replace(run, progress=replace(run.progress, generation=generation))
    moved = restore_best(folder.path, saved) if saved and request.resuming else ""
    heard = start.heard
    del source, saved, start  # the backend has its own copy of the state
    folder.begin(config_toml(request, run), fresh=not request.resuming)
    notes[:0] = [*getattr(backend, "notes", ()), *skipped, *filter(None, [moved, note])]
    if (device := backend.device).endswith("(Metal)"):
        notes.insert(0, f"✓ Metal GPU enabled on device: {device.removesuffix(' (Metal)')}")
    console, plain = choose_console(request.plain)
    view = make_view(info, console, plain)
    if isinstance(view, Dashboard):
        notes += heard  # newest first, so they are at the top
    return show_run(
        Session(
            request=request,
            run=run,
            backend=backend,
            folder=folder,
            console=console,
            view=GuardedView(view),
            loggers=loggers,
            signals=signals,
            team=team,
            notes=tuple(notes),
            early=early,
        )
    )


def place_samples(request: TrainRequest, run: Run, backend: str) -> tuple[Run, str]:
    """Return the run with the backend that writes its samples, and a line if it is another one."""
    name, reason = choose_for_text(request.backend, run.model, 1)
    line = f"Samples: {BACKEND_TITLES[name]}, {reason}." if name != backend else ""
    return replace(run, text_backend=name), line


def run_follower(request: TrainRequest, team: Team, signals: StopSignals) -> int:
    """Run as another rank: compute only."""
    message = team.group.broadcast(None)
    if not isinstance(message, dict):
        return int(message or 0)  # rank 0 has printed the reason
    saved = checkpoint_without_arrays(message["checkpoint"]) if message["checkpoint"] else None
    data = request.data or tuple(message["paths"])
    request = replace(request, data=data, tokenizer=message["tokenizer"])
    backend_name, _ = choose(request.backend)
    start = start_run(request, saved, Machine(backend_name, team.n_beside))
    run = make_run(request, start)
    team.agree(agreed_values(run, backend_name))
    backend = make_limited(backend_name, run, start.state, team)
    del saved, start  # the backend has its own copy of the state
    team.start_watch(lambda: signals.exit_code)
    signals.defer()
    try:
        for report in train(run, backend, None, team.group.should_stop):
            if isinstance(report, EndLog):
                break
    except TrainingDiverged:
        return 1  # on every rank alike; rank 0 prints the reason
    team.finish()
    return team.exit_code


def make_limited(name: str, run: Run, state: TrainState, team: Team) -> Backend:
    """Return the backend of a run, which keeps to the memory that `mlxgpt plan` expects."""
    backend = team.make_backend(name, run.model, run.train, state)
    n_tokens = len(run.train_tokens) + len(run.val_tokens)
    limit_memory(backend, device_bytes(run.model, run.train, team.group.size, n_tokens))
    return backend


def show_run(session: Session) -> int:
    """Train, show and record every report, and print how to continue; return the exit code."""
    saves: dict[str, SaveLog] = {}  # the latest report of each file
    with session.view as view, contextlib.closing(session.loggers):
        session.loggers.note = view.note
        session.signals.defer(view.release_terminal, view.reclaim_terminal)
        session.team.start_watch(
            lambda: session.signals.exit_code or int(view.lost),
            view.release_terminal,
            lambda: recovery_line(session.located_request, session.run),
        )
        for note in session.notes:
            view.note(note)
        try:
            end, sample = _show_reports(session, saves)
        except TrainingDiverged as error:
            safe = [f"{s.path} (iter {s.step})" for s in saves.values() if not s.error]
            kept = ", ".join(safe) or "what was on the disk"
            raise TrainingDiverged(f"{error}; kept: {kept}") from error
        except UserError:
            raise
        except (RuntimeError, MemoryError) as error:
            if problem := describe_failure(error, in_training=True):
                recovery = recovery_line(session.located_request, session.run)
                raise DeviceError(f"{problem}. {recovery}") from error
            raise
        logs = session.folder.logs
        logs.flush()
        for line in filter(None, (*session.folder.news, logs.unwritten())):
            view.note(line)
    return _conclude(session, end, saves, sample)


def _show_reports(
    session: Session, saves: dict[str, SaveLog]
) -> tuple[EndLog | None, SampleLog | None]:
    """Train and pass on every report; return the end and the last sample, collect `saves`."""
    run, view, folder, team = session.run, session.view, session.folder, session.team
    end: EndLog | None = None
    sample: SampleLog | None = None
    stop, sync = team.group.should_stop, folder.logs.sync
    for report in train(
        run, session.backend, folder.locate, stop, sync_logs=sync, early=session.early
    ):
        while folder.news:
            view.note(folder.news.pop(0))
        folder.logs.record(report, run.train.log_every)
        session.loggers.record(report, run.train.log_every)
        if isinstance(report, EndLog):
            end = report
            team.finish()
            if end.reason == "stopped":
                view.note(f"Interrupted at iteration {end.step}. Saving checkpoint...")
        if isinstance(report, SaveLog):
            saves[Path(report.path).name] = report
        if isinstance(report, SampleLog):
            sample = report
        view.show(report)
    return end, sample


def _conclude(
    session: Session, end: EndLog | None, saves: dict[str, SaveLog], sample: SampleLog | None
) -> int:
    """Print how to continue, or raise CheckpointError if the last state is not on the disk."""
    request, view, team = session.located_request, session.view, session.team
    for save in sorted(saves.values(), key=lambda save: save.best):
        if save.error:
            name = Path(save.path).name
            label = {NEWEST: "the last state", BEST: "the best state"}.get(name, name)
            raise CheckpointError(f"{label} is not on the disk: {save.error}")
    if view.lost:  # a closed pipe or terminal, or a full disk
        with contextlib.suppress(OSError):
            reason = f"the output cannot be written ({view.reason}), so the run has stopped"
            echo(f"Error: {reason}. {recovery_line(request, session.run)}", err=True)
        return team.exit_code or 1
    if end is not None and end.reason == "stopped":
        echo(f"Go on with: {resume_line(request, session.run)}", err=session.console.stderr)
    elif end is not None and sample is not None:
        note = _copies_note(sample.text, session.run)
        echo(note, err=session.console.stderr, wrapped=True)
    if end is not None:
        echo(try_line(request, session.run), err=session.console.stderr)
    return team.exit_code


def _copies_note(sample: str, run: Run) -> str:
    """Return the line about what the last sample has copied from the training text."""
    if len(run.train_tokens) > MAX_SEARCHED_TOKENS:
        return (
            "Copied by the sample: not searched in a long text; mlxgpt sample --check searches it"
        )
    (copies,) = find_copies([sample], decoded(np.asarray(run.train_tokens), run.tokenizer))
    return f"Copied by the sample: {copies_line(sample, copies)}"
