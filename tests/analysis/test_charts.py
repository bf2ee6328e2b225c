"""Pictures of runs, and their table."""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from metrics_files import evaluation, row, write

from mlx_randygpt.analysis.charts import limits, ticks
from mlx_randygpt.cli import group
from mlx_randygpt.cli.commands.runs import fitting_columns
from mlx_randygpt.config import install_command


@pytest.fixture
def two(tmp_path: Path) -> list[str]:
    for name, lr in (("fast", 0.2), ("slow & <low>", 0.1)):
        rows = [row(s, 4.0 / (1 + lr * s)) for s in range(1, 101)]
        rows += [evaluation(s, 5.0 / (1 + lr * s)) for s in (0, 50, 100)]
        write(tmp_path / name, "".join(rows), f"lr = {lr}\nseed = 1\n")
    return [str(tmp_path / "fast"), str(tmp_path / "slow & <low>")]


def call(*words: str) -> Result:
    return CliRunner().invoke(group, words)


def test_the_terminal_shows_four_charts_in_80_columns(two: list[str]) -> None:
    done = call("plot", *two)
    assert done.exit_code == 0
    for title in ("loss", "learning rate", "gradient norm", "tokens per second"):
        assert f"\n{title}" in done.stdout
    assert "lr=0.2" in done.stdout
    assert "seed" not in done.stdout
    charts = done.stdout.splitlines()[2:]
    assert max(map(len, charts)) <= 80
    assert "●" in done.stdout


@pytest.mark.parametrize("columns", [1, 8, 12, 14, 30, 50])
def test_a_narrow_terminal_gets_charts_of_the_least_width(two: list[str], columns: int) -> None:
    environ = {"FORCE_COLOR": "1", "COLUMNS": str(columns), "TERM": "xterm"}
    done = CliRunner().invoke(group, ["plot", *two], env=environ)
    assert (done.exit_code, done.exception) == (0, None)
    assert "●" in done.stdout


def test_the_highest_rate_is_inside_its_chart(tmp_path: Path) -> None:
    rates = [0.02 * min(s / 10, 1 - s / 200, 1) for s in range(1, 201)]
    write(tmp_path / "a", "".join(row(s, 2.0, lr=lr) for s, lr in enumerate(rates, 1)))
    lines = call("plot", str(tmp_path / "a")).stdout.splitlines()
    at = lines.index("learning rate")
    assert float(lines[at + 1].split()[0]) == pytest.approx(max(rates), rel=0.06)
    assert float(lines[at + 5].split()[0]) == 0.0


def test_the_page_names_the_command_that_writes_it(two: list[str], tmp_path: Path) -> None:
    file = str(tmp_path / "p.html")
    words = ["plot", *two, "--smooth", "5", "-o", file]
    assert call(*words).exit_code == 0
    [data] = re.findall(r"^const D = (.*);$", Path(file).read_text(), re.MULTILINE)
    assert shlex.split(json.loads(data)["command"]) == ["mlxgpt", *words]


@pytest.mark.parametrize("suffix", ["svg", "html"])
def test_a_picture_is_whole_and_asks_for_nothing(
    suffix: str, two: list[str], tmp_path: Path
) -> None:
    file = tmp_path / f"p.{suffix}"
    assert call("plot", *two, "-o", str(file)).exit_code == 0
    text = file.read_text()
    root = ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    tag = "{http://www.w3.org/2000/svg}"
    assert len(root.findall(f".//{tag}circle")) == 6
    assert len(root.findall(f".//{tag}polyline")) == 2 * 2 * 4
    words = [element.text for element in root.iter(f"{tag}text")]
    assert any("slow & <low>" in (word or "") for word in words)
    assert not any(
        mark in text.replace("http://www.w3.org", "") for mark in ("http", "url(", "src=")
    )


def test_the_line_of_a_picture_is_where_its_values_are(two: list[str], tmp_path: Path) -> None:
    file = tmp_path / "p.svg"
    call("plot", two[0], "-o", str(file))
    root = ElementTree.parse(file).getroot()
    dots = root.findall(".//{http://www.w3.org/2000/svg}circle")
    low, high = limits(
        np.array([4 / (1 + 0.2 * s) for s in range(1, 101)] + [5.0, 5 / 11, 5 / 21]).repeat(3),
        log=False,
    )
    at = [260 * (1 - (5.0 / (1 + 0.2 * s) - low) / (high - low)) for s in (50, 100)]
    found = [float(dot.get("cy", "nan")) for dot in dots[1:]]
    assert found == pytest.approx(at, abs=0.06)


def test_a_png_is_a_png(two: list[str], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file = tmp_path / "p.png"
    assert call("plot", *two, "-o", str(file)).exit_code == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_one_line_says_what_to_install(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = call("plot", *two, "-o", str(tmp_path / "p.png"))
    assert done.exit_code == 1
    assert install_command("plot") in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_what_cannot_be_drawn_is_refused(two: list[str], tmp_path: Path) -> None:
    assert call("plot", *two, "-o", "p.gif").exit_code == 2
    assert call("plot", str(tmp_path / "none")).exit_code == 1
    done = call("plot", *two, "-o", str(tmp_path / "no" / "p.svg"))
    assert (done.exit_code, "cannot be written" in done.stderr) == (1, True)


@pytest.mark.parametrize(("low", "high"), [(0.0, 1.0), (1.3, 4.4), (0.0, 1e6), (0.02, 0.0201)])
def test_ticks_are_few_round_and_inside(low: float, high: float) -> None:
    found = ticks(low, high, log=False)
    assert 3 <= len(found) <= 7
    assert low - 1e-9 <= found[0] < found[-1] <= high * (1 + 1e-9)


def test_runs_are_listed_with_the_best_first(two: list[str], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    done = call("runs", str(tmp_path), "--json")
    found = json.loads(done.stdout)["runs"]
    assert [Path(run["run"]).name for run in found] == ["fast", "slow & <low>"]
    assert [run["settings"] for run in found] == [{"lr": 0.2}, {"lr": 0.1}]
    assert found[0]["best_loss"] == found[0]["last_loss"] == pytest.approx(5 / 21)
    assert (found[0]["step"], found[0]["tokens"], found[0]["best_step"]) == (100, 6400, 100)
    assert "Skipped" in done.stderr
    assert "lr=0.2" in call("runs", str(tmp_path)).stdout


def test_on_a_narrow_terminal_the_names_of_the_runs_stay() -> None:
    names = ("best", "at step", "last", "train", "step", "time", "tokens")
    cells = [{"run": name, **dict.fromkeys(names, "1.2345")} for name in ("runs/small", "b")]
    assert fitting_columns(cells, 80) == list(names)
    assert fitting_columns(cells, 50) == ["best", "at step", "last", "step"]
    assert fitting_columns(cells, 22) == fitting_columns(cells, 5) == ["best"]
    long = [cell | {"run": "a" * 70} for cell in cells]
    assert fitting_columns(long, 83) == list(names)  # a long name is folded instead


def test_a_folder_without_runs_is_refused(tmp_path: Path) -> None:
    done = call("runs", str(tmp_path))
    assert (done.exit_code, "no run below" in done.stderr) == (1, True)


def at_terminal(columns: int, rows: int, *words: str) -> list[str]:
    environ = {"FORCE_COLOR": "1", "COLUMNS": str(columns), "LINES": str(rows), "TERM": "xterm"}
    done = CliRunner().invoke(group, words, env=environ)
    assert (done.exit_code, done.exception) == (0, None)
    return re.sub(r"\x1b\[[0-9;]*m", "", done.stdout).splitlines()


@pytest.mark.parametrize(("columns", "rows"), [(60, 20), (80, 24), (140, 45)])
def test_a_plot_fits_the_terminal(
    two: list[str], columns: int, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    lines = at_terminal(columns, rows, "plot")
    assert len(lines) < rows  # one is for the prompt
    assert max(map(len, lines)) <= columns
    for title in ("loss", "learning rate", "gradient norm", "tokens per second"):
        assert any(title in line for line in lines)
    if rows > 40:
        assert len(lines) > 35


def test_plot_without_runs_uses_those_that_are_here(
    two: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call("plot").stdout == call("plot", "fast", "slow & <low>").stdout
    monkeypatch.chdir(tmp_path / "fast")
    assert call("plot").stdout == call("plot", ".").stdout


def test_plot_without_runs_draws_the_newest_if_there_are_many(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for n in range(9):
        write(tmp_path / f"run{n}", row(1, 2.0) + row(2, 1.0))
        os.utime(tmp_path / f"run{n}" / "metrics.jsonl", (n, n))
    monkeypatch.chdir(tmp_path)
    done = call("plot")
    assert "Plotted: the newest 7 of 9 runs" in done.stderr
    assert "run8" in done.stdout
    assert "run1" not in done.stdout
