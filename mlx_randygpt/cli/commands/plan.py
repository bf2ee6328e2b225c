"""`mlxgpt plan`: what a run will need, before it begins."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.options import (
    AUTO,
    backend_option,
    given_options,
    json_option,
    memory_options,
    model_options,
)
from mlx_randygpt.cli.output import print_json, readable_bytes, show, show_facts
from mlx_randygpt.config import DTYPES, LIMITS, OPTIMIZERS, ConfigError, ModelConfig, TrainConfig

if TYPE_CHECKING:
    from mlx_randygpt.planning.devices import Device
    from mlx_randygpt.planning.plan import Plan, Rate

VOCAB_SIZE, GPT2_VOCAB_SIZE = 67, 50257  # tiny Shakespeare's characters; GPT-2's subwords
BAR = 24  # columns
TEXT = 8_000_000  # bytes that reading a short text leaves behind


@click.command("plan", cls=Command)
@model_options()
@click.option("--vocab-size", type=click.IntRange(1), help="[default: 67; 50,257 for gpt2 presets]")
@click.option("--tokens", type=float, help="To train on.  [default: 1000 steps]")
@click.option("--batch-size", type=int, help="Sequences, over all hosts.  [default: preset, 64]")
@click.option("--grad-accum", type=int, help="Micro-batches per step.  [default: 1]")
@memory_options
@click.option("--optimizer", type=click.Choice(OPTIMIZERS), help="[default: recipe]")
@click.option("--dtype", type=click.Choice(DTYPES), help="[default: float32]")
@click.option(
    "--device", default="this", show_default=True, metavar="NAME", help="this, or one named above."
)
@click.option("--hosts", type=click.IntRange(1), default=1, show_default=True)
@click.option("--link", type=float, help="Between hosts, GB/s each way.  [default: the device's]")
@click.option("--cost-per-hour", type=click.FloatRange(0), help="Of one host.")
@click.option("--threads", type=int, help="NumPy backend.  [default: all cores]")
@backend_option
@json_option
def command(
    device: str, hosts: int, tokens: float | None, cost_per_hour: float | None,
    vocab_size: int | None, link: float | None, backend: str, json: bool, **options: Any,
) -> None:  # fmt: skip
    """Say what a run needs before it begins: memory, the batch that fits, time and cost.

    This machine is measured for a few seconds. Others are reckoned from published rates and stated
    assumptions: m2-ultra, m3-max, m3-ultra, m4-max, a100, h100, h200.
    """
    from dataclasses import replace
    from importlib import import_module

    from mlx_randygpt import settings
    from mlx_randygpt.backends import choose
    from mlx_randygpt.backends.base import resident_bytes
    from mlx_randygpt.planning.footprint import micro_batch
    from mlx_randygpt.planning.plan import make_plan

    given = given_options(options)
    is_gpt2 = str(given.get("preset", "")).startswith("gpt2")
    model, train = settings.resolve_new(
        given, vocab_size or (GPT2_VOCAB_SIZE if is_gpt2 else VOCAB_SIZE)
    )
    name = choose(backend)[0] if device == "this" else "mlx" if backend == "auto" else backend
    chosen = found_device(device, name)
    if link is not None:
        chosen = replace(chosen, link=link * 1e9)
    threads = train.threads or n_threads(name)
    if given.get(AUTO):
        size = micro_batch(name, model, train, chosen.memory, chosen.unified)
        train = replace(train, micro_batch=size)
    import_module("mlx_randygpt.cli.training.run")  # as `train` does, for what it takes of memory
    program = resident_bytes() + TEXT  # before anything is measured
    rate = measured(name, model, train, hosts, threads) if device == "this" else None
    wanted = 1000 * train.sequences_per_step * model.block_size if tokens is None else tokens
    if not 1 <= wanted < 1e18:
        raise ConfigError(f"tokens={wanted:g} is out of range; it must be 1 to 1e18")
    plan = make_plan(
        model, train, name, chosen, hosts=hosts, tokens=wanted, cost_per_hour=cost_per_hour,
        threads=threads, program=program, rate=rate,
    )  # fmt: skip
    if json:
        print_json(asdict(plan))
        return
    draw(plan, model, train)


def found_device(name: str, backend: str) -> Device:
    """The device of this name; ConfigError where there is none."""
    from mlx_randygpt.planning.devices import DEVICES, here

    if name == "this":
        return here(backend)
    if name not in DEVICES:
        raise ConfigError(f"device={name!r} is unknown; it is one of this, {', '.join(DEVICES)}")
    return DEVICES[name]


def n_threads(backend: str) -> int:
    from mlx_randygpt.backends.numpy.backend import available_cores

    return available_cores() if backend == "numpy" else 1


def measured(
    backend: str, model: ModelConfig, train: TrainConfig, hosts: int, threads: int
) -> Rate:
    """Short steps on this machine; says on stderr that they are under way."""
    from dataclasses import replace

    from mlx_randygpt.backends import make_backend
    from mlx_randygpt.backends.base import Backend
    from mlx_randygpt.model import initial_params
    from mlx_randygpt.planning.footprint import chunk_rows
    from mlx_randygpt.planning.plan import trial
    from mlx_randygpt.state import TrainState

    click.echo("Measuring short steps on this machine …", err=True)
    settings = replace(train, threads=threads, grad_accum=1)

    def make(shallow: ModelConfig) -> Backend:
        state = TrainState(0, initial_params(shallow, train.seed), {})
        return make_backend(backend, shallow, settings, state)

    sequences = -(-train.batch_size // hosts)
    few = threads * chunk_rows(model, sequences, threads)
    return trial(model, settings, make, sequences, few)


def draw(plan: Plan, model: ModelConfig, train: TrainConfig) -> None:
    """The plan for people."""
    from mlx_randygpt.cli.training.request import describe_model

    hosts = f"{plan.hosts} × {plan.device}" if plan.hosts > 1 else plan.device
    optimizer = {"muon": "Muon", "adamw": "AdamW"}[train.optimizer]
    kept = ", activations made again" if train.checkpoint_activations else ""
    backend = {"mlx": "MLX", "numpy": "NumPy"}.get(plan.backend, plan.backend)
    show_facts(
        [
            ("Model", describe_model(model)),
            ("Run", f"{train.recipe} recipe, {optimizer}, {train.dtype}{kept}"),
            ("Device", f"{hosts}, {backend}"),
        ]
    )
    click.echo()
    show(memory_table(plan))
    click.echo()
    show_facts(facts(plan, model, train))


def memory_table(plan: Plan) -> Any:
    """Bytes by kind, a bar each, and whether the sum fits."""
    from rich.table import Table
    from rich.text import Text

    from mlx_randygpt.planning.footprint import KINDS

    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(style="dim", no_wrap=True)
    most = max(plan.memory.values())
    for kind, words in KINDS.items():
        if size := plan.memory.get(kind):
            bar = "━" * math.ceil(BAR * size / most)
            table.add_row(kind, readable_bytes(size), bar, words)
    word = Text("fits", "bold green") if plan.fits else Text("does not fit", "bold red")
    room = Text(f"of {readable_bytes(plan.device_bytes)}  ").append_text(word)
    table.add_row(Text("in all", "bold"), Text(readable_bytes(plan.memory_bytes), "bold"), room)
    return table


def facts(plan: Plan, model: ModelConfig, train: TrainConfig) -> Iterator[tuple[str, str]]:
    """Batch, time and cost."""
    several = f" on {plan.hosts} hosts" if plan.hosts > 1 else ""
    size = f"{plan.batch_size} × {model.block_size:,} tokens"
    yield "Batch", f"{size}{several}{passes(plan, train)}"
    yield "Most", largest(plan.largest_batch)
    if plan.host_bytes:
        yield "Host", f"{readable_bytes(plan.host_bytes)} of its own memory besides, to save"
    network = f", {seconds(plan.network_seconds)} of it network" if plan.hosts > 1 else ""
    yield "Step", f"{seconds(plan.step_seconds)}{network}"
    yield "Speed", f"{plan.tokens_per_second:,.0f} tokens/s"
    yield "Time", f"{hours(plan.hours)} for {amount(plan.tokens)} tokens, {plan.steps:,} steps"
    if plan.cost is not None and plan.cost_per_million_tokens is not None:
        yield "Cost", f"{plan.cost:,.2f}; {plan.cost_per_million_tokens:.4g} per million tokens"
    elif plan.tokens >= 1e6:
        yield "", f"{hours(plan.hours_per_million_tokens)} per million tokens"
    yield "Source", f"memory: {plan.source['memory']}"
    yield "", f"time: {plan.source['time']}"
    if plan.hosts > 1:
        yield "", f"network: {plan.source['network']}"


def largest(sequences: int) -> str:
    """How many sequences a device can work through at once."""
    if sequences == LIMITS["batch_size"]:
        return "any batch: it is worked through in chunks of bounded size"
    return f"{sequences:,} sequences on one device in one pass" if sequences else "none fits"


def passes(plan: Plan, train: TrainConfig) -> str:
    """How a host works through its share, where not at once."""
    each = -(-plan.batch_size // plan.hosts)
    words = f", {plan.sequences} a pass" if plan.sequences < each else ""
    return words + (f", {train.grad_accum} of them a step" if train.grad_accum > 1 else "")


def amount(value: float) -> str:
    """`4,096,000`, `300 million`, `10 billion`."""
    if value < 1e7:
        return f"{value:,.0f}"
    return f"{value / 1e6:,.4g} million" if value < 1e9 else f"{value / 1e9:,.4g} billion"


def seconds(value: float) -> str:
    """`3.2 ms`, `1.4 s`."""
    return f"{1e3 * value:,.1f} ms" if value < 1 else f"{value:,.1f} s"


def hours(value: float) -> str:
    """`36 s`, `2.5 h`, `83 days`."""
    if value < 1:
        return f"{60 * value:,.1f} minutes" if value > 1 / 60 else f"{3600 * value:,.1f} s"
    return f"{value:,.1f} h" if value < 72 else f"{value / 24:,.0f} days"
