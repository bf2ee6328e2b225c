"""The docs that are contracts match the code: options, backend members, checkpoint fields."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import click
import pytest

from mlx_randygpt.backends.base import Backend, Scorer
from mlx_randygpt.cli import COMMANDS, group
from mlx_randygpt.config import ModelConfig, TrainConfig
from mlx_randygpt.progress import Progress

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CLI = {part.partition("\n")[0]: part for part in (DOCS / "cli.md").read_text().split("\n## ")}
SHARED = CLI["For every command"]
SAMPLING = CLI["sample"].partition("### Sampling options")[2]


def code(text: str) -> str:
    """Return what is in single backticks."""
    return " ".join(re.findall(r"`([^`]+)`", re.sub("```.*?```", "", text, flags=re.DOTALL)))


def named_options(text: str) -> set[str]:
    return set(re.findall(r"--[a-z][a-z-]+", code(text)))


def options_of(name: str) -> set[str]:
    """Return the long options of a command and of its subcommands."""
    command = group.get_command(click.Context(group), name)
    commands = command.commands.values() if isinstance(command, click.Group) else [command]
    params = [param for each in commands if each for param in each.params]
    return {o for p in params for o in (*p.opts, *p.secondary_opts) if o.startswith("--")}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_docs_name_every_option_of_a_command(name: str) -> None:
    documented = CLI[name] + SHARED + (SAMPLING if name in ("chat", "serve") else "")
    assert options_of(name) <= named_options(documented)


def test_the_tables_name_no_option_that_does_not_exist() -> None:
    rows = "\n".join(re.findall(r"^\|.*", "\n".join(CLI.values()), re.MULTILINE))
    exist = set().union(*map(options_of, COMMANDS))
    assert named_options(rows) <= exist | {"--help", "--version"}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_site_has_a_page_with_every_option_of_a_command(name: str, built_docs: Path) -> None:
    page = (built_docs / "commands" / name / "index.html").read_text()
    listed = " ".join(re.findall("<tr>\\s*<td><code>([^<]*)</code></td>", page))
    assert options_of(name) | {"--help"} == set(re.findall(r"--[a-z][a-z-]+", listed))


def test_the_navigation_leads_to_the_page_of_every_command(built_docs: Path) -> None:
    links = re.findall(r'href="commands/([a-z-]+)/"', (built_docs / "index.html").read_text())
    assert set(links) == set(COMMANDS)


def test_no_page_shows_the_backslash_before_a_pipe(built_docs: Path) -> None:
    pages = {str(page): page.read_text() for page in built_docs.glob("**/index.html")}
    assert [path for path, text in pages.items() if re.search(r"<code>[^<]*\\\|", text)] == []
    assert (
        "<code>--backend auto|mlx|numpy</code>" in (built_docs / "cli" / "index.html").read_text()
    )


@pytest.mark.parametrize("protocol", [Scorer, Backend])
def test_the_architecture_lists_every_member_of_a_backend(protocol: type) -> None:
    members = {n for n in {**vars(protocol), **protocol.__annotations__} if not n.startswith("_")}
    assert members <= set(re.findall(r"\w+", code((DOCS / "architecture.md").read_text())))


@pytest.mark.parametrize("record", [ModelConfig, TrainConfig, Progress])
def test_the_format_lists_every_field_of_a_checkpoint(record: type) -> None:
    text = code((DOCS / "checkpoint-format.md").read_text())
    assert {field.name for field in fields(record)} <= set(re.findall(r"\w+", text))


@pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda page: page.stem)
def test_every_column_of_a_table_has_a_header(page: Path) -> None:
    text = re.sub("```.*?```", "", page.read_text(), flags=re.DOTALL)
    headers = re.findall(r"^\|(.*)\|\n\|[-|: ]+\|$", text, re.MULTILINE)
    assert [row for row in headers if not all(map(str.strip, row.split("|")))] == []


def test_the_links_of_the_readme_lead_to_a_file_and_a_heading() -> None:
    for link in re.findall(r"\]\(((?!https?:)[^)]+)\)", (ROOT / "README.md").read_text()):
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        headings = (
            re.findall(r"^#+ (.*)", (ROOT / path).read_text(), re.MULTILINE) if anchor else []
        )
        slugs = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
        assert anchor in slugs | {""}, link
