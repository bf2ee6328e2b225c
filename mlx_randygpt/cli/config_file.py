"""The option `--config`: a TOML file whose values become the defaults of a command."""

from __future__ import annotations

import reprlib
import tomllib
from pathlib import Path
from typing import Any

import click

RESUME_NEWEST = "@newest"  # what a bare --resume passes on


def _config_option() -> click.Option:
    return click.Option(
        ["--config"],
        type=click.Path(exists=True, dir_okay=False, path_type=Path),
        is_eager=True,
        expose_value=False,
        callback=_load_config,
        help="TOML file with options of this command; the command line and MLXGPT_… win over it.",
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
