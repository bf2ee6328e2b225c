"""`--help`: what a beginner needs comes first, in full sentences, with the defaults of the code."""

from __future__ import annotations

import re
from collections.abc import Iterator

import click
import pytest
from click.testing import CliRunner

from mlx_randygpt import settings
from mlx_randygpt.cli import COMMANDS, SECTIONS, group
from mlx_randygpt.config import TrainConfig

FIXED = {  # defaults that neither recipe, preset nor text decide
    "seed",
    "grad_accum",
    "grad_clip",
    "eval_every",
    "sample_every",
    "save_every",
    "log_every",
    "on_nan",
    "dtype",
}


def commands() -> Iterator[tuple[str, click.Command]]:
    for name in COMMANDS:
        command = group.get_command(click.Context(group), name)
        if isinstance(command, click.Group):
            yield from ((f"{name} {sub}", each) for sub, each in command.commands.items())
        elif command:
            yield name, command


ALL = dict(commands())


def help_of(name: str) -> str:
    done = CliRunner().invoke(group, [*name.split(), "--help"], terminal_width=80)
    assert done.exit_code == 0
    return done.stdout


def sections(text: str) -> dict[str, str]:
    parts = re.split(r"^(\S.*):\n", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_command_is_in_one_section() -> None:
    listed = [name for commands in SECTIONS.values() for name in commands]
    assert sorted(listed) == sorted(set(listed)) == sorted(COMMANDS)
    assert set(SECTIONS) < set(sections(help_of("")))


def test_train_begins_with_the_options_of_a_beginner() -> None:
    found = sections(help_of("train"))
    first = re.findall(r"^  (--[a-z-]+)", found["Options"], re.MULTILINE)
    assert first[:5] == ["--data", "--preset", "--iters", "--minutes", "--hours"]
    assert len(first) <= 11
    assert next(iter(found)) == "Options"
    assert list(found)[-1] == "For every command"


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_listed_once(name: str) -> None:
    lines = "".join(sections(help_of(name)).values())
    listed = re.findall(r"^  (?:-\w, )?(--[a-z-]+)", lines, re.MULTILINE)
    own = [param.opts[-1] for param in ALL[name].params if isinstance(param, click.Option)]
    long = [option for option in own if option.startswith("--")]
    assert sorted(listed) == sorted([*long, "--help"])


@pytest.mark.parametrize("name", ALL)
def test_the_help_of_an_option_is_a_sentence(name: str) -> None:
    for param in ALL[name].params:
        if isinstance(param, click.Option):
            sentence = (param.help or "").partition("  [default")[0]
            assert re.fullmatch(r"[A-Z].*\.|.*; repeatable\.", sentence), (param.name, sentence)


@pytest.mark.parametrize("name", sorted(FIXED))
def test_a_default_in_the_help_is_that_of_the_settings(name: str) -> None:
    option = next(param for param in ALL["train"].params if param.name == name)
    value = getattr(TrainConfig(), name)
    named = f"{value:g}" if isinstance(value, float) else str(value)
    assert isinstance(option, click.Option)
    assert f"[default: {named}]" in (option.help or "")


def test_a_text_decides_defaults_only_where_there_is_one() -> None:
    by_text = f"{settings.SMALL_TEXT_PRESET} for a short text"
    dropout = f"{settings.DROPOUT} for a large model on a short text"
    says = {name for name in ALL if by_text in re.sub(r"\s+", " ", help_of(name))}
    assert says == {"train", "find-lr"}
    assert all(dropout in re.sub(r"\s+", " ", help_of(name)) for name in says)


@pytest.mark.parametrize(
    ("words", "near"), [(["trian"], "train"), (["smple"], "sample"), (["data", "fetsh"], "fetch")]
)
def test_a_misspelt_command_gets_a_suggestion(words: list[str], near: str) -> None:
    done = CliRunner().invoke(group, words)
    assert done.exit_code == 2
    assert f"No such command {words[-1]!r}; did you mean {near}?" in done.stderr


def test_a_misspelt_option_gets_a_suggestion() -> None:
    done = CliRunner().invoke(group, ["train", "--itres", "5"])
    assert done.exit_code == 2
    assert "--iters" in done.stderr
