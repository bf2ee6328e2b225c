"""The option `--config`: a TOML file whose values become the defaults of a command."""

from __future__ import annotations

import reprlib
import tomllib
from pathlib import Path
from typing import Any

import click

from mlx_randygpt.cli.values import ExistingFile
from mlx_randygpt.files import read_text
from mlx_randygpt.words import one_line

RESUME_NEWEST = "@newest"  # value of a bare --resume


def config_option() -> click.Option:
    """Return the option `--config`."""
    return click.Option(
        ["--config"],
        type=ExistingFile(),
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="Read options from a TOML file; the command line and MLXGPT_… override it.",
    )


def _load_config(ctx: click.Context, param: click.Parameter, path: Path | None) -> None:
    """Make the values of the file the defaults of the command; `-` and `_` in keys are the same."""
    if path is None:
        return
    try:
        content = tomllib.loads(read_text(path, "utf-8-sig"))
    except OSError as error:
        raise click.BadParameter(f"{path} cannot be read: {error.strerror}", ctx, param) from error
    except (ValueError, RecursionError) as error:
        raise click.BadParameter(
            f"{path} is not a TOML file: {one_line(error)}", ctx, param
        ) from error
    by_name = {_long_name(option): option for option in ctx.command.params}
    values: dict[str, Any] = {}
    for key, value in content.items():
        option = by_name.get(key.replace("_", "-"))
        if option is None or option.name in ("config", "debug"):
            raise click.BadParameter(
                f"{path}: {_quote(key)} is not an option of `mlxgpt {ctx.command.name}`", ctx, param
            )
        try:
            values[str(option.name)] = _convert(option, value)
        except TypeError as error:
            raise click.BadParameter(
                f"{path}: {key} = {reprlib.repr(value)}: {error}", ctx, param
            ) from error
    ctx.default_map = {**(ctx.default_map or {}), **values}


def _convert(option: click.Parameter, value: Any) -> Any:
    """Return a TOML value as the option takes it; raise TypeError with the type it should have."""
    if option.multiple:
        return [_convert_one(option, x) for x in (value if isinstance(value, list) else [value])]
    return _convert_one(option, value)


def _convert_one(option: click.Parameter, value: Any) -> Any:
    types: tuple[type, ...] = (str,)
    if isinstance(option, click.Option) and option.is_flag:
        types = (bool,)
    elif isinstance(option.type, click.types.IntParamType):
        types = (int,)
    elif isinstance(option.type, click.types.FloatParamType):
        types = (int, float)
    elif option.name == "resume":
        if isinstance(value, bool):
            return RESUME_NEWEST if value else None
        types = (str, bool)
    elif option.name in ("save_every", "micro_batch") and type(value) is int:
        return str(value)
    if type(value) not in types:
        raise TypeError(f"it should be {' or '.join(t.__name__ for t in types)}")
    return value


def _quote(key: str) -> str:
    return key if key.isprintable() and len(key) < 40 else reprlib.repr(key)


def _long_name(option: click.Parameter) -> str:
    return max(option.opts, key=len).lstrip("-")
