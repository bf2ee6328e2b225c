"""What commands share: error lines, `--config` and `--debug`, the model options."""

from __future__ import annotations

import contextlib
import reprlib
import signal
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from errno import EDQUOT, EFBIG, EIO, ENOSPC
from pathlib import Path
from typing import Any, TypeVar

import click

from mlx_randygpt.config import ARCHS, BACKENDS, DEFAULT_PRESET, PRESETS, RECIPES, UserError

F = TypeVar("F", bound=Callable[..., Any])
RESUME_NEWEST = "@newest"  # what a bare --resume passes on
_DEBUG = "mlx_randygpt.debug"
NO_MEMORY = (  # MLX says so in a RuntimeError: its allocator, Metal's command buffers, CUDA
    "unable to allocate", "maximum allowed buffer size", "insufficient memory", "out of memory",
)  # fmt: skip


class Command(click.Command):
    """A command whose failures are one line on stderr and exit code 1, tracebacks on `--debug`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.params += [_config_option(), _debug_option()]

    def invoke(self, ctx: click.Context) -> Any:
        try:
            with _interruptible():
                return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, BrokenPipeError):
            raise
        except KeyboardInterrupt:
            click.echo("\nInterrupted.", err=True)
            ctx.exit(130)
        except Exception as error:
            if ctx.meta.get(_DEBUG):
                raise
            raise click.ClickException(_one_line(error)) from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is a KeyboardInterrupt while a command runs; before and after, it ends the process."""
    old = signal.getsignal(signal.SIGINT)
    if old == signal.SIG_DFL:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)


def model_options(defaults: bool = True) -> Callable[[F], F]:
    """The options that decide the model: recipe, preset and the numbers of it. `defaults` names
    them in the help; where a checkpoint decides there are none."""

    def default(text: str) -> str:
        return f"  [default: {text}]" if defaults else ""

    options = [
        click.option(
            "--recipe",
            type=click.Choice(sorted(RECIPES)),
            help=f"Model and rates.{default('modern')}",
        ),
        click.option(
            "--arch",
            type=click.Choice(list(ARCHS)),
            help=f"Our model or GPT-2's.{default('gpt')}",
        ),
        click.option(
            "--preset",
            type=click.Choice(list(PRESETS)),
            metavar="NAME",
            help=f"Sizes by name; see `mlxgpt presets`.{default(DEFAULT_PRESET)}",
        ),
        click.option("--n-layer", type=int, help="Layers."),
        click.option("--n-head", type=int, help="Attention heads."),
        click.option("--n-embd", type=int, help="Width."),
        click.option("--block-size", type=int, help="Context, in tokens."),
        click.option("--dropout", type=float, help=f"After attention and MLP.{default('rule')}"),
    ]

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def backend_option(function: F) -> F:
    """--backend, for every command that computes."""
    choice = click.Choice(["auto", *BACKENDS])
    text = "auto: MLX where it has a GPU, else NumPy."
    return click.option("--backend", type=choice, default="auto", show_default=True, help=text)(
        function
    )


def json_option(function: F) -> F:
    """--json, for every command that reports figures."""
    text = "Print exactly one JSON object on stdout."
    return click.option("--json", is_flag=True, help=text)(function)


def print_json(values: dict[str, Any]) -> None:
    """One JSON object on stdout; what is not finite becomes null."""
    import json

    from mlx_randygpt.records import strict

    click.echo(json.dumps(strict(values), ensure_ascii=False))


def default_checkpoint(path: Path | None) -> Path:
    """`path`, else the best checkpoint in checkpoints/, else the newest; CheckpointError: none.
    The best of a run that was only evaluated before its first step is the newest."""
    from mlx_randygpt.checkpoint import BEST, NEWEST, CheckpointError, peek_step

    if path is not None:
        return path
    best, newest = Path("checkpoints", BEST), Path("checkpoints", NEWEST)
    if best.exists() and not (newest.exists() and peek_step(best) == 0):
        return best
    if newest.exists():
        return newest
    raise CheckpointError(
        f"there is neither {BEST} nor {NEWEST} in checkpoints/; "
        "`mlxgpt train` makes them, or give the path of a checkpoint"
    )


def show(renderable: Any) -> None:
    """Print what rich can draw; piped, it is plain text as wide as it needs to be."""
    from rich.console import Console

    at_terminal = sys.stdout.isatty()
    console = Console(
        width=None if at_terminal else 1000, force_terminal=at_terminal,
        markup=False, highlight=False, emoji=False,
    )  # fmt: skip
    with console.capture() as captured:
        console.print(renderable)
    for line in captured.get().removesuffix("\n").split("\n"):
        click.echo(line.rstrip())


def show_facts(facts: Iterable[tuple[str, str]]) -> None:
    """A name and its value a line, aligned; what a terminal could act on is replaced."""
    from rich.table import Table

    from mlx_randygpt.tally import clean

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, clean(value))
    show(table)


def readable_bytes(n_bytes: int) -> str:
    """`202.1 kB`, `14.5 MB`, `23.6 GB`."""
    units = (("GB", 1e9), ("MB", 1e6), ("kB", 1e3))
    unit, scale = next((u for u in units if n_bytes >= u[1]), units[-1])
    return f"{n_bytes / scale:,.1f} {unit}"


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="TOML file with options of this command; the command line and MLXGPT_… win over it.",
    )


def _debug_option() -> click.Option:
    return click.Option(
        ["--debug"],
        is_flag=True,
        is_eager=True,
        expose_value=False,
        callback=lambda ctx, _, value: ctx.meta.update({_DEBUG: value}),
        help="Show the traceback of an error.",
    )


def _load_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make the file's values the defaults: keys as the options are spelled, `-` or `_` alike."""
    if path is None:
        return
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise click.BadParameter(f"{path} is not a TOML file: {reason}", ctx, param) from error
    known = {_spelled(option): option for option in ctx.command.params}
    values: dict[str, Any] = {}
    for key, value in content.items():
        spelling = key.replace("_", "-")
        if spelling not in known or spelling in ("config", "debug"):
            raise click.BadParameter(
                f"{path}: {_shown(key)} is not an option of `mlxgpt {ctx.command.name}`", ctx, param
            )
        try:
            values[str(known[spelling].name)] = _fitting(known[spelling], value)
        except TypeError as error:
            raise click.BadParameter(
                f"{path}: {key} = {reprlib.repr(value)}: {error}", ctx, param
            ) from error
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _fitting(option: click.Parameter, value: Any) -> Any:
    """A TOML value as the option takes it; TypeError says what it should be."""
    if option.multiple:
        return [
            _fitting_one(option, one) for one in (value if isinstance(value, list) else [value])
        ]
    return _fitting_one(option, value)


def _fitting_one(option: click.Parameter, value: Any) -> Any:
    kinds: tuple[type, ...] = (str,)
    if isinstance(option, click.Option) and option.is_flag:
        kinds = (bool,)
    elif isinstance(option.type, click.types.IntParamType):
        kinds = (int,)
    elif isinstance(option.type, click.types.FloatParamType):
        kinds = (int, float)
    elif option.name == "resume":
        if isinstance(value, bool):
            return RESUME_NEWEST if value else None
        kinds = (str, bool)
    elif option.name in ("save_every", "micro_batch") and type(value) is int:
        return str(value)
    if type(value) not in kinds:
        raise TypeError(f"it should be {' or '.join(kind.__name__ for kind in kinds)}")
    return value


def _shown(key: str) -> str:
    return key if key.isprintable() and len(key) < 40 else reprlib.repr(key)


def _spelled(option: click.Parameter) -> str:
    longest = max(option.opts, key=len)
    return longest.lstrip("-")


def _one_line(error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError) or any(said in text.lower() for said in NO_MEMORY):
        return f"out of memory ({text}); try a smaller --batch-size, --block-size or model"
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT, EFBIG, EIO):
        return f"the output cannot be written: {error.strerror}"
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
