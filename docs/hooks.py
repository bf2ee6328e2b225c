"""Hooks of mkdocs: one page per command, rendered from the program's own help at build time."""

from __future__ import annotations

import inspect
import re
from typing import Any

import click

from mlx_randygpt.cli import COMMANDS, SECTIONS, group
from mlx_randygpt.cli.errors import Command

CODE = re.compile(r"`[^`\n]*`")
LIMITS = re.compile(r"(?:[-\d]+<=?)?x[<>]=?[-\d]+")  # of a number, as click writes them


def on_config(config: Any) -> Any:
    """Add the pages to the navigation, in the sections of `mlxgpt --help`."""
    pages = next(entry["Commands"] for entry in config.nav if "Commands" in entry)
    for title, names in SECTIONS.items():
        pages.append({title: [{name: path_of(name)} for name in names]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages to the site."""
    from mkdocs.structure.files import File

    for name in COMMANDS:
        files.append(File.generated(config, path_of(name), content=page(name)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Write | for \\| in code in tables: GitHub needs the backslash, mkdocs would show it."""
    return re.sub(r"^\|.*", lambda row: CODE.sub(unescape, row[0]), markdown, flags=re.MULTILINE)


def unescape(code: re.Match[str]) -> str:
    return code[0].replace("\\|", "|")


def path_of(name: str) -> str:
    return f"commands/{name}.md"


def page(name: str) -> str:
    """Return the page of a command, in Markdown."""
    root = click.Context(group, info_name="mlxgpt", **group.context_settings)
    command = group.get_command(root, name)
    assert command is not None
    parts = [
        f"# mlxgpt {name}",
        f"Messages, JSON output and details: [the command line](../cli.md#{name}). Any option can "
        "also come from [a file or the environment](../cli.md#where-a-setting-comes-from).",
    ]
    if isinstance(command, click.Group):
        context = click.Context(command, info_name=name, parent=root)
        for sub, each in command.commands.items():
            parts += [f"## {name} {sub}", *describe(each, context, sub, "###")]
    else:
        parts += describe(command, root, name, "##")
    return "\n\n".join(parts) + "\n"


def describe(command: click.Command, parent: click.Context, name: str, level: str) -> list[str]:
    """Return the usage, the description and a table of options for each section of the help."""
    context = click.Context(command, info_name=name, parent=parent)
    usage = " ".join(command.get_usage(context).removeprefix("Usage: ").split())
    parts = [f"```\n{usage}\n```", prose(inspect.cleandoc(command.help or ""))]
    assert isinstance(command, Command)
    for title, records in command.sections(context).items():
        rows = ["| option | default | meaning |", "|---|---|---|"]
        rows += [table_row(spec, text) for spec, text in records]
        parts += [f"{level} {title}", "\n".join(rows)]
    return parts


def table_row(spec: str, text: str) -> str:
    """Return the row of an option with a help text such as "Use this many.  [default: 1; x>=1]"."""
    meaning, *extras = text.split("  [")
    facts = "; ".join(extra.removesuffix("]") for extra in extras)
    limits = LIMITS.search(facts)
    default = LIMITS.sub("", facts).strip("; ").removeprefix("default: ")
    if limits:
        meaning += f" `{limits[0]}`"
    if not default and " " not in spec:
        default = "off"  # a flag
    option = spec.replace("|", "\\|")
    return f"| `{option}` | {prose(default)} | {prose(meaning)} |"


def prose(text: str) -> str:
    """Return the text with options in code and the characters of Markdown escaped."""
    parts = re.split(f"({CODE.pattern})", text)
    for i in range(0, len(parts), 2):
        escaped = re.sub(r"[*|\\]", r"\\\g<0>", parts[i]).replace("<", "&lt;")
        parts[i] = re.sub(r"(?<![\w-])--[a-z][a-z-]+", r"`\g<0>`", escaped)
    return "".join(parts)
