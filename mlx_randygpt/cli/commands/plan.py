"""`mlxgpt plan`: estimate what a run needs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    AUTO,
    backend_option,
    data_option,
    dtype_option,
    given_options,
    grad_accum_option,
    json_option,
    memory_options,
    model_options,
    optimizer_option,
    threads_option,
)
from mlx_randygpt.cli.output import echo, print_json, show, show_facts
from mlx_randygpt.cli.time_budget import choose, measure_here, take_minutes, time_options
from mlx_randygpt.cli.values import Number
from mlx_randygpt.config import LIMITS, ConfigError, ModelConfig, TrainConfig
from mlx_randygpt.words import format_bytes, format_duration

if TYPE_CHECKING:
    from mlx_randygpt.data.corpus import Corpus
    from mlx_randygpt.planning.devices import Device
    from mlx_randygpt.planning.expected_loss import TextFacts
    from mlx_randygpt.planning.plan import Plan
    from mlx_randygpt.planning.time_budget import TimedRun

VOCAB_SIZE, GPT2_VOCAB_SIZE = 67, 50257  # tiny Shakespeare's characters; GPT-2's subwords
LONG_TEXT = 10**12  # tokens of a text that no run reads twice
BAR_WIDTH = 24  # columns
TEXT_BYTES = 8_000_000  # memory that reading a short text leaves behind


@click.command("plan", cls=Command)
@model_options()
@click.option(
    "--vocab-size",
    type=click.IntRange(1),
    help="Plan for this many tokens in the vocabulary.  [default: 67; 50,257 for gpt2 presets]",
)
@click.option("--tokens", type=float, help="Train on this many tokens.  [default: 1000 steps]")
@click.option(
    "--batch-size",
    type=int,
    help="Draw this many sequences per batch, over all hosts.  [default: 64; 8 for gpt2 presets]",
)
@time_options
@data_option
@grad_accum_option
@memory_options
@optimizer_option
@dtype_option
@click.option(
    "--device",
    default="this",
    show_default=True,
    metavar="NAME",
    help="Plan for this machine, or for a device named above.",
)
@click.option(
    "--hosts",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Share each batch between this many devices.",
)
@click.option(
    "--link",
    type=Number(0, min_open=True),
    help="Send X GB/s between hosts, each way.  [default: that of the device]",
)
@click.option(
    "--cost-per-hour", type=Number(0), help="Pay this for one host per hour, in any currency."
)
@threads_option
@backend_option
@json_option
def command(
    device: str,
    hosts: int,
    tokens: float | None,
    cost_per_hour: float | None,
    vocab_size: int | None,
    link: float | None,
    backend: str,
    json: bool,
    data: tuple[str, ...],
    **options: Any,
) -> None:
    """Estimate what a run needs: memory, the largest batch that fits, time and cost.

    With --minutes or --hours, show what `mlxgpt train` would choose for that time and the text of
    --data. This machine is measured for a few seconds. Estimates for other devices follow from
    published rates and stated assumptions: m2-ultra, m3-max, m3-ultra, m4-max, a100, h100, h200.
    """
    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose as choose_backend
    from mlx_randygpt.data.corpus import check_length
    from mlx_randygpt.planning.devices import find_device
    from mlx_randygpt.planning.footprint import micro_batch
    from mlx_randygpt.planning.plan import Rate, Workload, make_plan, measure_rate, usual_threads
    from mlx_randygpt.planning.time_budget import describe

    given = given_options(take_minutes(options))
    if "minutes" in given and tokens is not None:
        raise click.UsageError("--tokens and --minutes both say how much to train; omit one")
    is_gpt2 = str(given.get("preset", "")).startswith("gpt2")
    vocab_size = vocab_size or (GPT2_VOCAB_SIZE if is_gpt2 else VOCAB_SIZE)
    facts, corpus = None, None
    if data:
        vocab_size, facts, corpus = read_text(data)
    model, train = settings.resolve_new(given, vocab_size, facts.n_tokens if facts else 0)
    name = (
        choose_backend(backend)[0] if device == "this" else "mlx" if backend == "auto" else backend
    )
    target = find_device(device, name)
    if link is not None:
        target = replace(target, link=link * 1e9)
    threads = train.threads or usual_threads(name)
    chosen = None
    if "minutes" in given:
        if hosts > 1:
            raise ConfigError(f"--hosts {hosts} with --minutes: a time is planned for one host")
        chosen = plan_time(given, vocab_size, facts, name, None if device == "this" else target)
        model, train = chosen.model, chosen.train
        tokens = train.iters * train.sequences_per_step * model.block_size
    if corpus is not None:
        check_length(corpus, model.block_size)
    if given.get(AUTO):
        size = micro_batch(name, model, train, target.memory, target.unified)
        train = replace(train, micro_batch=size)
    n_tokens = 1000 * train.sequences_per_step * model.block_size if tokens is None else tokens
    if not 1 <= n_tokens < 1e18:
        raise ConfigError(f"tokens={n_tokens:g} is out of range; it must be 1 to 1e18")
    rate = None
    if device == "this" and chosen is not None:
        micro = chosen.step_seconds / train.grad_accum
        rate = Rate.of_step(micro, model, train.batch_size)
    elif device == "this":
        echo("Measuring short steps on this machine …", err=True)
        rate = measure_rate(model, train, name, hosts, threads)
    work = Workload(
        model=model,
        train=train,
        backend=name,
        tokens=n_tokens,
        hosts=hosts,
        threads=threads,
        program_bytes=measure_program(name) + TEXT_BYTES,
        cost_per_hour=cost_per_hour,
    )
    plan = make_plan(work, target, rate)
    knows_loss = corpus is None or not corpus.n_conversations
    if json:
        print_json(asdict(plan) | choice_json(chosen, knows_loss))
        return
    draw(plan, model, train)
    if chosen is not None:
        echo()
        echo(describe(chosen, 60 * given["minutes"], knows_loss=knows_loss), wrapped=True)


def read_text(data: Sequence[str]) -> tuple[int, TextFacts, Corpus]:
    """Return the vocabulary size that a run would learn, the facts of the text, and the corpus."""
    from mlx_randygpt.cli.training import text
    from mlx_randygpt.data.reading import Reading
    from mlx_randygpt.planning.expected_loss import text_facts

    tokenizer, corpus = text.load(text.files_of(data), Reading(), text.requested_tokenizer({}))
    return tokenizer.vocab_size, text_facts(corpus, tokenizer), corpus


def plan_time(
    given: Mapping[str, Any],
    vocab_size: int,
    facts: TextFacts | None,
    backend: str,
    device: Device | None,
) -> TimedRun:
    """Return the run that fits into the minutes of the options, on a device or (None) on this one.

    Without a text, assume one like tiny Shakespeare that no run reads twice.
    """
    from mlx_randygpt.planning.expected_loss import TextFacts
    from mlx_randygpt.planning.plan import Workload, make_plan, usual_threads

    facts = facts or TextFacts(n_tokens=LONG_TEXT)
    if device is None:
        threads = given.get("threads") or usual_threads(backend)
        return choose(given, vocab_size, facts, measure_here(backend, threads))

    def estimate(model: ModelConfig, train: TrainConfig, _: float) -> float:
        micro = replace(train, grad_accum=1)
        work = Workload(model=model, train=micro, backend=backend, tokens=1)
        return make_plan(work, device).step_seconds

    return choose(given, vocab_size, facts, estimate)


def choice_json(chosen: TimedRun | None, knows_loss: bool) -> dict[str, Any]:
    """Return the choice as JSON keys and values; an empty dict without a time."""
    if chosen is None:
        return {}
    return {
        "preset": chosen.train.preset,
        "iters": chosen.train.iters,
        "expected_loss": chosen.loss if knows_loss else None,
        "uses_all_time": chosen.is_full,
    }


def measure_program(backend: str) -> int:
    """Return the peak memory of a process that has imported all that `mlxgpt train` imports."""
    script = (
        "import sys; import mlx_randygpt.cli.training.run; "
        "from mlx_randygpt.backends import choose; "
        "from mlx_randygpt.backends.base import resident_bytes; "
        "choose(sys.argv[1]); print(resident_bytes())"
    )
    words = [sys.executable, "-c", script, "auto" if backend == "mlx" else backend]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return int(done.stdout)


def draw(plan: Plan, model: ModelConfig, train: TrainConfig) -> None:
    """Print the plan as tables."""
    from mlx_randygpt.cli.training.request import describe_model

    hosts = f"{plan.hosts} × {plan.device}" if plan.hosts > 1 else plan.device
    optimizer = {"muon": "Muon", "adamw": "AdamW"}[train.optimizer]
    recomputed = ", activations recomputed" if train.checkpoint_activations else ""
    backend = {"mlx": "MLX", "numpy": "NumPy"}.get(plan.backend, plan.backend)
    show_facts(
        [
            ("Model", describe_model(model)),
            ("Run", f"{train.recipe} recipe, {optimizer}, {train.dtype}{recomputed}"),
            ("Device", f"{hosts}, {backend}"),
        ]
    )
    echo()
    show(memory_table(plan))
    echo()
    show_facts(facts(plan, model, train))


def memory_table(plan: Plan) -> Any:
    """Return the bytes by kind with a bar each, their sum, and whether it fits."""
    from rich.table import Table
    from rich.text import Text

    from mlx_randygpt.planning.footprint import KINDS

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    largest = max(plan.memory.values())
    for kind, description in KINDS.items():
        if size := plan.memory.get(kind):
            bar = "━" * math.ceil(BAR_WIDTH * size / largest)
            table.add_row(kind, format_bytes(size), bar, description)
    verdict = Text("fits", "bold green") if plan.fits else Text("does not fit", "bold red")
    room = Text(f"of {format_bytes(plan.device_bytes)}  ").append_text(verdict)
    table.add_row(Text("total", "bold"), Text(format_bytes(plan.memory_bytes), "bold"), room)
    return table


def facts(plan: Plan, model: ModelConfig, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Yield batch, time and cost as names and values."""
    on_hosts = f" on {plan.hosts} hosts" if plan.hosts > 1 else ""
    size = f"{plan.batch_size} × {model.block_size:,} tokens"
    yield "Batch", f"{size}{on_hosts}{passes(plan, train)}"
    yield "Limit", largest(plan.largest_batch)
    if plan.host_bytes:
        yield "Host", f"{format_bytes(plan.host_bytes)} of host memory, to save checkpoints"
    network = f", network {format_duration(plan.network_seconds)}" if plan.hosts > 1 else ""
    yield "Step", f"{format_duration(plan.step_seconds)}{network}"
    yield "Speed", f"{plan.tokens_per_second:,.0f} tokens/s"
    time = format_duration(3600 * plan.hours)
    yield "Time", f"{time} for {format_tokens(plan.tokens)} tokens, {plan.steps:,} steps"
    if plan.cost is not None and plan.cost_per_million_tokens is not None:
        yield "Cost", f"{plan.cost:,.2f}; {plan.cost_per_million_tokens:.4g} per million tokens"
    elif plan.tokens >= 1e6:
        yield "", f"{format_duration(3600 * plan.hours_per_million_tokens)} per million tokens"
    yield "Source", f"memory: {plan.source['memory']}"
    yield "", f"time: {plan.source['time']}"
    if plan.hosts > 1:
        yield "", f"network: {plan.source['network']}"


def largest(sequences: int) -> str:
    """Describe the largest batch that fits."""
    if sequences == LIMITS["batch_size"]:
        return "any batch: it is computed in chunks of bounded size"
    return f"{sequences:,} sequences on one device in one pass" if sequences else "none fits"


def passes(plan: Plan, train: TrainConfig) -> str:
    """Describe how a host splits its share of a step, if it does."""
    share = -(-plan.batch_size // plan.hosts)
    in_passes = f", {plan.sequences} per pass" if plan.sequences < share else ""
    return in_passes + (f", {train.grad_accum} of them per step" if train.grad_accum > 1 else "")


def format_tokens(n: float) -> str:
    """Return `4,096,000`, `300 million` or `10 billion`."""
    if n < 1e7:
        return f"{n:,.0f}"
    return f"{n / 1e6:,.4g} million" if n < 1e9 else f"{n / 1e9:,.4g} billion"
