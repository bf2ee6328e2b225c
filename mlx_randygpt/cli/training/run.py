"""What `mlxgpt train` does once its options are read: settings, text, backend, loop, exit code."""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from pathlib import Path

import click
import numpy as np

from mlx_randygpt import settings
from mlx_randygpt.backends import choose
from mlx_randygpt.backends.base import Backend, BackendError
from mlx_randygpt.checkpoint import BEST, NEWEST, Checkpoint, CheckpointError
from mlx_randygpt.cli.loading import describe_backend
from mlx_randygpt.cli.options import fit_micro_batch
from mlx_randygpt.cli.training import text
from mlx_randygpt.cli.training.folder import RunFolder, no_checkpoint
from mlx_randygpt.cli.training.loggers import Loggers
from mlx_randygpt.cli.training.request import (
    TrainRequest,
    config_toml,
    describe_model,
    interval,
    kept_line,
    resume_line,
    sample_line,
)
from mlx_randygpt.cli.training.signals import StopSignals
from mlx_randygpt.cli.training.start import changes, same_tokenizer, same_vocabulary, starting_point
from mlx_randygpt.cli.training.team import (
    RANK_TIMEOUT,
    Team,
    agreed_values,
    checkpoint_without_arrays,
    compute,
    start_message,
)
from mlx_randygpt.cli.training.view import GuardedView, choose_console
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data import DataError
from mlx_randygpt.data.corpus import Corpus, check_length
from mlx_randygpt.data.windows import Documents
from mlx_randygpt.model import add_adapters, initial_params
from mlx_randygpt.progress import Progress
from mlx_randygpt.screen.dashboard import make_view
from mlx_randygpt.screen.run_summary import RunInfo
from mlx_randygpt.state import TrainState
from mlx_randygpt.tokenizers import Tokenizer, tokenizer_from_json
from mlx_randygpt.training.loop import Run, TrainingDiverged, train
from mlx_randygpt.training.reports import EndLog, SaveLog


def train_command(job: TrainRequest) -> int:
    """Train as asked; the exit code."""
    overflow_is_checked = np.errstate(over="ignore", invalid="ignore", divide="ignore")
    timeout = job.given.get("rank_timeout", RANK_TIMEOUT)
    with StopSignals() as signals, Team(timeout) as team, overflow_is_checked:
        if team.rank > 0:
            return run_follower(job, team, signals)
        if job.resume_newest and not job.out.is_dir():
            raise CheckpointError(no_checkpoint(job.out))
        with RunFolder(job.out) as folder:
            return run_leader(job, team, folder, signals)


def run_leader(job: TrainRequest, team: Team, folder: RunFolder, signals: StopSignals) -> int:
    """The run as rank 0, or the only one, goes through it: with files and a screen."""
    with team.leading():
        if (found := starting_point(job, folder)) is None:
            team.group.broadcast(None)
            return 0
        saved, skipped = found
        name, why = choose(job.backend)
        run, state, description, notes = prepare(job, saved, name, team)
        team.check(name, run.train)
        start = start_message(saved, run)
    team.group.broadcast(start)
    team.agree(agreed_values(run, name))
    backend = team.backend(name, run.model, run.train, state)
    loggers = Loggers(job.given.get("log", ()), notes.append)
    loggers.begin(job.out, asdict(run.model) | asdict(run.train))
    kept = folder.keep_best(state.step) if job.resume else ""  # nothing can be refused now
    folder.begin(config_toml(job, run), fresh=not job.resuming)
    info = RunInfo(
        model=describe_model(run.model),
        data=description,
        backend=describe_backend(backend, why) + team.described,
        recipe=run.train.recipe,
        saves=f"{job.out / NEWEST}, every {interval(run.train.save_every)}",
        out=str(job.out),
        iters=run.train.iters,
        start_step=state.step,
    )
    del saved, state, found  # the backend has its own copy
    notes[:0] = [*skipped, *([kept] if kept else [])]
    if (device := backend.device).endswith("(Metal)"):
        notes.insert(0, f"✓ Metal GPU enabled on device: {device.removesuffix(' (Metal)')}")
    return show_run(job, run, backend, info, folder, signals, notes, loggers, team)


def run_follower(job: TrainRequest, team: Team, signals: StopSignals) -> int:
    """The run as every other rank goes through it: steps, and nothing else."""
    start = team.group.broadcast(None)
    if not isinstance(start, dict):
        return int(start or 0)  # rank 0 has said why
    saved = checkpoint_without_arrays(start["checkpoint"]) if start["checkpoint"] else None
    data = job.data or tuple(start["paths"])
    name, _ = choose(job.backend)
    job = replace(job, data=data, tokenizer=start["tokenizer"])
    run, state, _, _ = prepare(job, saved, name, team)
    team.agree(agreed_values(run, name))
    backend = team.backend(name, run.model, run.train, state)
    team.group.requested_exit_code = lambda: signals.exit_code
    signals.defer(lambda: None)
    del saved, state  # the backend has its own copy
    return compute(run, backend, team)


def prepare(
    job: TrainRequest, saved: Checkpoint | None, backend_name: str, team: Team
) -> tuple[Run, TrainState, str, list[str]]:
    """The run, its first state, the data line and what the user should be told."""
    tokenizer, corpus = _corpus(job, saved)
    model, config = _settings(job, saved, tokenizer, len(corpus.train))
    config = _resolved(job, config, backend_name, team)
    if not config.prompt:
        config = replace(config, prompt=_default_prompt(corpus, tokenizer))
    config, passes = fit_micro_batch(job.given, model, config, backend_name)
    check_length(corpus, model.block_size)
    lost = text.unknown_line(corpus.unknown), text.unknown_line(tokenizer.unknown(config.prompt))
    notes = [line for line in (*lost, passes) if line]
    state, progress = TrainState(0, {}, {}), Progress()
    if saved and job.resuming:
        state, progress = saved.state, saved.progress
        notes += changes(saved, model, config, corpus, backend_name)
    elif saved:
        state = TrainState(0, add_adapters(model, saved.state.params, config.seed), {})
    else:
        state = TrainState(0, initial_params(model, config.seed), {})
    if not job.resuming and "dropout" not in job.given and model.dropout:
        n_passes = settings.passes(model, config, len(corpus.train))
        notes.append(
            f"Dropout {model.dropout:g}: the text is read {n_passes:.0f} times and short for a "
            "model of this size; --dropout 0 turns it off."
        )
    if saved is None and (advice := text.advice(corpus, model)):
        notes.append(advice)
    remembered = saved.data if saved and job.resuming else {}
    whole = bool(job.given.get("respect_documents", remembered.get("respect_documents", False)))
    n_train, size = len(corpus.train), model.block_size
    documents = Documents.within(corpus.starts, n_train, size) if whole else None
    if documents and documents.n_left_out:
        notes.append(
            f"{documents.n_left_out:,} of {len(documents.first):,} documents are left out: shorter "
            f"than a context of {size} and the token after it."
        )
    data = text.provenance(corpus, text.reading(job.given, remembered), whole)
    run = Run(
        model, config, tokenizer, corpus.train, corpus.val, data, progress, documents
    )  # fmt: skip
    return run, state, text.describe(corpus, tokenizer), notes


def show_run(
    job: TrainRequest, run: Run, backend: Backend, info: RunInfo, folder: RunFolder,
    signals: StopSignals,
    notes: list[str], loggers: Loggers, team: Team,
) -> int:  # fmt: skip
    """Show every report, record it, and say at the end what can be done next."""
    console, plain = choose_console(job.plain)
    saves: dict[str, SaveLog] = {}  # the latest of each file
    end: EndLog | None = None
    with GuardedView(make_view(info, console, plain)) as view, contextlib.closing(loggers):
        loggers.note = view.note
        signals.defer(view.restore, view.take)
        team.begin(
            lambda: signals.exit_code or int(view.lost),
            view.restore,
            lambda: kept_line(replace(job, out=folder.path), run),
        )
        for note in notes:
            view.note(note)
        try:
            for report in train(run, backend, folder, team.group.should_stop):
                while folder.news:
                    view.note(folder.news.pop(0))
                folder.record(report, run.train.log_every)
                loggers.record(report, run.train.log_every)
                if isinstance(report, EndLog):
                    end = report
                    team.part()
                    if end.reason == "stopped":
                        view.note(f"Interrupted at iteration {end.step}. Saving checkpoint...")
                if isinstance(report, SaveLog):
                    saves[Path(report.path).name] = report
                view.show(report)
        except TrainingDiverged as error:
            safe = [f"{s.path} (iter {s.step})" for s in saves.values() if not s.error]
            kept = ", ".join(safe) or "what was on the disk"
            raise TrainingDiverged(f"{error}; kept: {kept}") from error
        folder.flush()
        for line in filter(None, (*folder.news, folder.unwritten())):
            view.note(line)
    job = replace(job, out=folder.path)  # it may have been moved
    for save in sorted(saves.values(), key=lambda save: save.best):
        if save.error:
            name = Path(save.path).name
            what = {NEWEST: "the last state", BEST: "the best state"}.get(name, name)
            raise CheckpointError(f"{what} is not on the disk: {save.error}")
    if view.lost:  # nobody is there to read: a closed pipe or terminal, a full disk
        with contextlib.suppress(OSError):
            why = f"the output cannot be written ({view.why}), so the run has stopped"
            click.echo(f"Error: {why}. {kept_line(job, run)}", err=True)
        return team.exit_code or 1
    if end is not None and end.reason == "stopped":
        click.echo(f"Go on with: {resume_line(job, run)}", file=console.file)
    elif end is not None:
        click.echo(f"Let it write: {sample_line(job)}", file=console.file)
    return team.exit_code


def _corpus(job: TrainRequest, saved: Checkpoint | None) -> tuple[Tokenizer, Corpus]:
    """The text, and the tokenizer: the checkpoint's own, or what the options ask for."""
    remembered = saved.data if saved and job.resuming else {}
    how = text.reading(job.given, remembered)
    if saved is None:
        known = (
            tokenizer_from_json(job.tokenizer)
            if job.tokenizer
            else text.requested_tokenizer(job.given)
        )
        return text.load(text.files_of(job.data), how, known)
    tokenizer = tokenizer_from_json(saved.tokenizer)
    same_tokenizer(tokenizer, job.given)
    if not job.resuming:
        return text.load(text.files_of(job.data), how, tokenizer)
    try:
        files = text.files_of(job.data or saved.data["paths"])
        _, corpus = text.load(files, how, tokenizer)
    except DataError as error:
        if job.data:
            raise
        raise DataError(f"the text of this checkpoint: {error}; give it with --data") from error
    if corpus.sha256 != saved.data.get("sha256"):
        same_vocabulary(tokenizer, files, how)
    return tokenizer, corpus


def _settings(
    job: TrainRequest, saved: Checkpoint | None, tokenizer: Tokenizer, n_tokens: int
) -> tuple[ModelConfig, TrainConfig]:
    if saved is None:
        return settings.resolve_new(job.given, tokenizer.vocab_size, n_tokens)
    if job.resuming:
        return settings.resolve_resume(job.given, saved.model, saved.train)
    decided = (*settings.MODEL_SIZES, "arch", "preset", "recipe")
    sizes = {name: value for name, value in job.given.items() if name in decided}
    model, _ = settings.resolve_resume(sizes, saved.model, saved.train)
    adapters = {name: job.given[name] for name in settings.LORA_FIELDS if name in job.given}
    model = replace(model, **adapters)
    recipe = {"recipe": saved.train.recipe, "preset": saved.train.preset}
    given = settings.fine_tuning_options(recipe | job.given, model)
    _, config = settings.resolve_new(given, tokenizer.vocab_size)
    return settings.apply_rules(given, model, config, n_tokens)


def _resolved(job: TrainRequest, config: TrainConfig, backend_name: str, team: Team) -> TrainConfig:
    """Defaults that depend on machine and text, written down so that a resume keeps them."""
    if backend_name == "numpy":
        if config.dtype != "float32":
            raise BackendError(f"--dtype {config.dtype} needs MLX; the NumPy backend is float32")
        from mlx_randygpt.backends.numpy.backend import available_cores

        cores = available_cores()
        asked = job.given.get("threads", 0) * team.n_beside or min(config.threads, cores)
        config = replace(config, threads=asked or cores)  # of the machine, shared by ranks on it
    return config


def _default_prompt(corpus: Corpus, tokenizer: Tokenizer) -> str:
    """Return ROMEO: if it is near the beginning of the text, else a newline."""
    return "ROMEO:" if "ROMEO:" in tokenizer.decode(corpus.tokens[: 1 << 20]) else "\n"
