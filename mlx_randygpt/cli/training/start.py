"""How a run starts: `new`, `resume` or `fine_tune`, each of which returns one `Start`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mlx_randygpt import files, settings
from mlx_randygpt.backends.base import BackendError
from mlx_randygpt.checkpoint import (
    Checkpoint,
    CheckpointError,
    kept_name,
    load_checkpoint,
)
from mlx_randygpt.cli import time_budget
from mlx_randygpt.cli.loading import without_adapters
from mlx_randygpt.cli.options import fit_micro_batch
from mlx_randygpt.cli.training import text
from mlx_randygpt.cli.training.folder import (
    RunFolder,
    make_best,
    make_newest,
    newest_checkpoint,
    refuse_checkpoints,
)
from mlx_randygpt.cli.training.request import TrainRequest
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.data import DataError
from mlx_randygpt.data.corpus import Corpus, check_length, default_prompt
from mlx_randygpt.data.files import TextSource
from mlx_randygpt.data.mixture import Drawing, training_windows, validation_windows
from mlx_randygpt.data.reading import Reading
from mlx_randygpt.data.vocabulary import AUTO, Vocabulary, choose_tokenizer
from mlx_randygpt.data.windows import Conversations, Documents, Mixture
from mlx_randygpt.model import add_adapters, add_tokens, initial_state
from mlx_randygpt.planning.expected_loss import text_facts
from mlx_randygpt.planning.time_budget import describe
from mlx_randygpt.progress import Progress
from mlx_randygpt.settings import ResumeError
from mlx_randygpt.state import TrainState
from mlx_randygpt.tokenizers import Tokenizer, tokenizer_from_json
from mlx_randygpt.tokenizers.chars import CharTokenizer
from mlx_randygpt.training.loop import Run
from mlx_randygpt.training.schedule import decay_start
from mlx_randygpt.words import unify_newlines, unknown_line

MEASURED_SECONDS = 1.0  # of the steps of a model that is trained further for a time


@dataclass(frozen=True)
class Machine:
    """What decides the defaults that depend on the machine."""

    backend: str
    n_ranks: int = 1  # that share its cores


@dataclass(frozen=True)
class Start:
    """Everything a run starts from, and notes for the user."""

    tokenizer: Tokenizer
    corpus: Corpus
    model: ModelConfig
    train: TrainConfig
    state: TrainState
    progress: Progress = field(default_factory=Progress)
    data: dict[str, Any] = field(default_factory=dict)  # of the resumed checkpoint: how it read
    sources: tuple[TextSource, ...] = ()  # the files of the corpus
    notes: tuple[str, ...] = ()
    heard: tuple[str, ...] = ()  # lines that are on stderr already


@dataclass(frozen=True)
class Source:
    """The checkpoint that a run starts from."""

    checkpoint: Checkpoint | None  # None: a new run
    skipped: tuple[str, ...] = ()  # a line for each damaged file
    finished: str = ""  # why nothing is left to train


def load_source(request: TrainRequest, folder: RunFolder) -> Source:
    """Load the checkpoint that the request names; raise if another run would be overwritten."""
    if request.resume_newest:
        saved, skipped = newest_checkpoint(folder.path)
        _, train = resolve_resume(request, saved)
        if finished := finished_line(saved, train):
            make_newest(folder.path, saved)
            make_best(folder.path, saved)
            return Source(saved, tuple(skipped), finished)
        return Source(checkpoint_before_decay(saved, train.iters, folder.path), tuple(skipped))
    if request.resume:
        saved = load_checkpoint(request.resume)
        is_own = files.resolve(request.resume).parent == files.resolve(request.out)
        if not is_own:
            advice = f"to continue from {request.resume}, give --out another folder"
            refuse_checkpoints(folder.path, advice)
        _, train = resolve_resume(request, saved)
        finished = finished_line(saved, train)
        if finished and is_own:
            make_newest(folder.path, saved)
            make_best(folder.path, saved)
        return Source(saved, finished=finished)
    if not request.overwrite:
        refuse_checkpoints(folder.path)
    if request.init_from:
        return Source(without_adapters(load_checkpoint(request.init_from)))
    return Source(None)


def resolve_resume(request: TrainRequest, saved: Checkpoint) -> settings.Configs:
    """Return the configurations of a resumed run; a new --minutes moves the target."""
    options, step, seconds = request.options, saved.state.step, saved.progress.seconds
    if "minutes" in options and step and seconds:
        n_left = int((60 * options["minutes"] - seconds) * step / seconds)
        options = options | {"iters": step + max(0, n_left)}
    return settings.resolve_resume(options, saved.model, saved.train)


def start_run(request: TrainRequest, saved: Checkpoint | None, machine: Machine) -> Start:
    """Start the run that the request asks for, from its checkpoint if there is one."""
    if saved is None:
        return new(request, machine)
    return (resume if request.resuming else fine_tune)(request, saved, machine)


def new(request: TrainRequest, machine: Machine) -> Start:
    """Start a run with initial weights and, unless the request has one, a new tokenizer."""
    options, began = request.options, time.monotonic()
    tokenizer = tokenizer_from_json(request.tokenizer) if request.tokenizer else None
    heard: list[str] = []
    sources = text.sources_of(request.data, heard)
    tokenizer, corpus = text.load(
        [source.file for source in sources],
        text.reading(options),
        tokenizer or text.requested_tokenizer(options),
    )
    options, timed = fit_time(options, tokenizer, corpus, machine)
    model, train = settings.resolve_new(options, tokenizer.vocab_size, len(corpus.train))
    train, notes = complete(request, (model, train), machine, tokenizer, corpus)
    notes += [
        timed,
        settings.choices_note(options, train, len(corpus.train)),
        dropout_note(options, model, train, corpus),
        text.advice(corpus, model),
    ]
    return Start(
        tokenizer=tokenizer,
        corpus=corpus,
        model=model,
        train=train,
        state=initial_state(model, train.seed),
        progress=Progress(seconds=time.monotonic() - began if train.minutes else 0.0),
        sources=tuple(sources),
        notes=tuple(filter(None, notes)),
        heard=tuple(heard),
    )


def fit_time(
    options: settings.Options, tokenizer: Tokenizer, corpus: Corpus, machine: Machine
) -> tuple[settings.Options, str]:
    """Return the options, with the preset and steps that fit their time, and a line about them."""
    if "minutes" not in options:
        return options, ""
    facts = text_facts(corpus, tokenizer)
    threads = count_threads(options, TrainConfig(), machine)
    measure = time_budget.measure_here(machine.backend, threads)
    chosen = time_budget.choose(options, tokenizer.vocab_size, facts, measure)
    line = describe(chosen, 60 * options["minutes"], knows_loss=not corpus.n_conversations)
    return time_budget.settle(options, chosen), line


def fine_tune(request: TrainRequest, saved: Checkpoint, machine: Machine) -> Start:
    """Start a run at step 0 with the weights and the tokenizer of a checkpoint."""
    options, began = request.options, time.monotonic()
    tokenizer = tokenizer_from_json(saved.tokenizer)
    check_tokenizer(tokenizer, options)
    heard: list[str] = []
    sources, how = text.sources_of(request.data, heard), text.reading(options)
    tokenizer, corpus = text.load([source.file for source in sources], how, tokenizer)
    n_tokens, seed = len(corpus.train), options.get("seed", saved.train.seed)
    params, model = add_tokens(saved.state.params, saved.model, tokenizer.vocab_size, seed)
    before = model, saved.train
    model, train = settings.resolve_fine_tuning(options, *before, n_tokens)
    if train.minutes and "iters" not in options:
        measure = time_budget.measure_here(machine.backend, count_threads(options, train, machine))
        step = train.grad_accum * measure(model, train, MEASURED_SECONDS)
        options = options | {"iters": max(1, int(60 * train.minutes / step))}
        model, train = settings.resolve_fine_tuning(options, *before, n_tokens)
    train, notes = complete(request, (model, train), machine, tokenizer, corpus)
    notes.append(dropout_note(options, model, train, corpus))
    notes.append(new_tokens_note(model, saved.model))
    return Start(
        tokenizer=tokenizer,
        corpus=corpus,
        model=model,
        train=train,
        state=TrainState(0, add_adapters(model, params, train.seed), {}),
        progress=Progress(seconds=time.monotonic() - began if train.minutes else 0.0),
        sources=tuple(sources),
        notes=tuple(filter(None, notes)),
        heard=tuple(heard),
    )


def resume(request: TrainRequest, saved: Checkpoint, machine: Machine) -> Start:
    """Start where a checkpoint ended; with the same text, the run is the undisturbed one."""
    tokenizer = tokenizer_from_json(saved.tokenizer)
    check_tokenizer(tokenizer, request.options)
    how = text.reading(request.options, saved.data)
    try:
        sources = text.sources_of(request.data or saved.data["paths"])
        files = [source.file for source in sources]
        _, corpus = text.load(files, how, tokenizer, saved.data)
    except DataError as error:
        if request.data:
            raise
        raise DataError(
            f"the text of this checkpoint cannot be read ({error}); give it with --data"
        ) from error
    if corpus.sha256 != saved.data.get("sha256"):
        check_vocabulary(tokenizer, files, how)
    model, train = resolve_resume(request, saved)
    train, notes = complete(request, (model, train), machine, tokenizer, corpus)
    notes += describe_changes(saved, model, train, corpus, machine.backend)
    return Start(
        tokenizer=tokenizer,
        corpus=corpus,
        model=model,
        train=train,
        state=saved.state,
        progress=saved.progress,
        data=saved.data,
        sources=tuple(sources),
        notes=tuple(filter(None, notes)),
    )


def make_run(request: TrainRequest, start: Start) -> Run:
    """Return the run of a start, as the loop takes it."""
    corpus, tokenizer = start.corpus, start.tokenizer
    options = start.data | request.options
    drawing = Drawing(
        start.model.block_size,
        respect_documents=bool(options.get("respect_documents", False)),
        pack=bool(options.get("pack", False)),
    )
    return Run(
        model=start.model,
        train=start.train,
        tokenizer=tokenizer,
        train_tokens=corpus.train,
        val_tokens=corpus.val,
        data=corpus.provenance(
            text.reading(request.options, start.data),
            paths=text.recorded_paths(start.sources),
            respect_documents=drawing.respect_documents,
            pack=drawing.pack,
        ),
        progress=start.progress,
        windows=training_windows(corpus, tokenizer, start.sources, drawing),
        val_windows=validation_windows(corpus, tokenizer, drawing),
    )


def complete(
    request: TrainRequest,
    configs: settings.Configs,
    machine: Machine,
    tokenizer: Tokenizer,
    corpus: Corpus,
) -> tuple[TrainConfig, list[str]]:
    """Return the training settings with the defaults that depend on machine and text, and notes.

    They are stored in the checkpoint, so that a resumed run keeps them.
    """
    model, train = configs
    if machine.backend == "numpy":
        train = _choose_threads(request.options, train, machine)
    prompt = unify_newlines(train.prompt) or default_prompt(corpus, tokenizer)
    train = replace(train, prompt=prompt)
    train, micro_batch_note = fit_micro_batch(request.options, model, train, machine.backend)
    check_length(corpus, model.block_size)
    dropped = unknown_line(tokenizer.unknown(train.prompt))
    lines = [*text.tokenizer_lines(corpus, tokenizer), *text.split_lines(corpus)]
    return train, [*lines, dropped, micro_batch_note]


def _choose_threads(
    options: Mapping[str, Any], train: TrainConfig, machine: Machine
) -> TrainConfig:
    """Return the settings with the threads of this machine, which its ranks share."""
    if train.dtype != "float32":
        raise BackendError(f"--dtype {train.dtype} needs MLX; the NumPy backend is float32")
    return replace(train, threads=count_threads(options, train, machine))


def count_threads(options: Mapping[str, Any], train: TrainConfig, machine: Machine) -> int:
    """Return the number of threads of all ranks of this machine together."""
    from mlx_randygpt.backends.numpy.backend import available_cores

    cores = available_cores()
    return options.get("threads", 0) * machine.n_ranks or min(train.threads, cores) or cores


def dropout_note(
    options: Mapping[str, Any], model: ModelConfig, train: TrainConfig, corpus: Corpus
) -> str:
    """Return a line if the rule has turned dropout on, else ""."""
    if "dropout" in options or not model.dropout:
        return ""
    n_passes = settings.count_passes(model, train, len(corpus.train))
    return (
        f"Dropout {model.dropout:g}: the text is read {n_passes:.0f} times and is short for a "
        "model of this size; --dropout 0 turns it off."
    )


def new_tokens_note(model: ModelConfig, before: ModelConfig) -> str:
    """Return a line about tokens of dialogue that a trained model did not have, or ""."""
    if model.vocab_size == before.vocab_size:
        return ""
    line = "The vocabulary gets the tokens of dialogue; their rows begin at random values"
    if model.lora_rank:
        return (
            f"{line}, which adapters do not change: train once without --lora-rank first, and give "
            "that model with --init-from."
        )
    return f"{line}."


def documents_notes(run: Run) -> list[str]:
    """Return notes on documents too short for any window, and on conversations that are cut."""
    windows, size, notes = run.windows, run.model.block_size, list[str]()
    parts = windows.parts if isinstance(windows, Mixture) else [windows]
    texts = [part for part in parts if isinstance(part, Documents)]
    if n_left_out := sum(part.n_left_out for part in texts):
        n = sum(len(part.first) for part in texts)
        notes.append(
            f"{n_left_out:,} of {n:,} documents are left out: "
            f"shorter than a context of {size} and the token after it."
        )
    talks = [part for part in parts if isinstance(part, Conversations)]
    if n_long := sum(part.n_long for part in talks):
        n = sum(part.n_conversations for part in talks)
        notes.append(
            f"{n_long:,} of {n:,} conversations are longer than a context of {size} tokens and are "
            "cut ahead of a question where possible; a larger --block-size keeps them whole."
        )
    return notes


# What a resumed run is compared with


def finished_line(saved: Checkpoint, train: TrainConfig) -> str:
    """Return why nothing is left to train, or ""."""
    step = saved.state.step
    is_evaluated = saved.progress.eval_step >= train.iters  # else a signal cut it off
    if step > train.iters or (step == train.iters and is_evaluated):
        return f"Already at iteration {step} (target {train.iters}). Nothing to train."
    if saved.progress.plateau.exhausted(train.patience):
        return (
            f"Stopped early at iteration {step}: {train.patience} evaluations "
            "without a new best. A larger --patience, or --patience 0, continues."
        )
    return ""


def checkpoint_before_decay(saved: Checkpoint, iters: int, folder: Path) -> Checkpoint:
    """Return the checkpoint from which a trapezoid with a later target has to continue.

    If the learning rate of `saved` has begun to decay, that is the latest kept checkpoint from
    before the decay, if there is one; otherwise it is `saved`.
    """
    old = saved.train
    start = decay_start(old.iters, old.warmup)
    if old.schedule != "trapezoid" or iters <= old.iters or saved.state.step <= start:
        return saved
    paths = (folder / kept_name(step) for step in range(start, 0, -1))
    path = next((path for path in paths if files.exists(path)), None)
    return load_checkpoint(path) if path else saved


def check_tokenizer(tokenizer: Tokenizer, options: Mapping[str, Any]) -> None:
    """Raise ResumeError if the options ask for another tokenizer than the checkpoint's."""
    kind = tokenizer.to_json()["type"]
    name, size = options.get("tokenizer"), options.get("vocab_size")
    if isinstance(tokenizer, CharTokenizer):
        size = size if size is not None and size < len(tokenizer.chars) else None  # a limit
    if name not in (None, AUTO, kind) and choose_tokenizer(name, 0) != tokenizer:
        raise ResumeError(
            f"Checkpoint tokenizer {kind} != tokenizer {name}; its weights need its own "
            "tokenizer: omit the option"
        )
    if size is not None and size != tokenizer.vocab_size:
        raise ResumeError(
            f"Checkpoint vocab_size {tokenizer.vocab_size} != vocab_size {size}; its weights need "
            "its own tokenizer: omit the option"
        )


def check_vocabulary(tokenizer: Tokenizer, files: Sequence[Path], how: Reading) -> None:
    """Raise CheckpointError if the text has other characters than the checkpoint's vocabulary.

    Subword tokenizers encode any text.
    """
    if not isinstance(tokenizer, CharTokenizer):
        return
    with text.ProgressBar() as bar:
        own, _ = text.loader(how, bar).learn(files, Vocabulary())
    if own == tokenizer:
        return
    hint = "give the --data it was trained on, or --init-from to start a new run from its weights"
    if tokenizer.vocab_size != own.vocab_size:
        raise CheckpointError(
            f"Checkpoint vocab_size {tokenizer.vocab_size} != model vocab_size {own.vocab_size}: "
            f"this text has other characters; {hint}"
        )
    raise CheckpointError(f"the checkpoint's characters are not those of this text; {hint}")


def describe_changes(
    saved: Checkpoint, model: ModelConfig, train: TrainConfig, corpus: Corpus, backend: str
) -> list[str]:
    """Return lines about what makes the resumed run differ from the undisturbed one."""
    lines = []
    if corpus.sha256 != saved.data.get("sha256"):
        lines.append("The text has changed since the checkpoint was written; the run uses the new.")
    if backend != saved.backend:
        lines.append(
            f"Written by {saved.backend}, resumed on {backend}: equal up to rounding"
            f"{', except what dropout draws' if model.dropout else ''}."
        )
    elif backend == "numpy" and train.threads != saved.train.threads:
        lines.append(
            f"{train.threads} threads instead of {saved.train.threads}: equal up to rounding."
        )
    if train.iters != saved.train.iters:
        lines += _describe_target(saved, train)
    return lines


def _describe_target(saved: Checkpoint, train: TrainConfig) -> list[str]:
    step, old = saved.state.step, saved.train
    moved = f"The target moved from {old.iters} to {train.iters}"
    if train.schedule in ("constant", "plateau"):
        return []
    if train.schedule != "trapezoid":
        return [f"{moved}: the {train.schedule} decay now ends there."]
    if step <= decay_start(old.iters, old.warmup):
        return [f"{moved}: going on from step {step}, where the decay had not begun."]
    return [
        f"{moved}, but no checkpoint from before the decay was kept: the rate goes back up at "
        f"step {step}."
    ]
