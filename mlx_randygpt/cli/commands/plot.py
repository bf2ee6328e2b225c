"""`mlxgpt plot`: draw the curves of runs in the terminal or as a picture."""

from __future__ import annotations

from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.output import echo, show
from mlx_randygpt.cli.values import FilePath, Number

if TYPE_CHECKING:
    from rich.text import Text

    from mlx_randygpt.analysis.metrics import RunRecord

STYLES = ("cyan", "yellow", "green", "magenta", "blue", "red", "white")
MIN_WIDTH, MAX_WIDTH = 30, 120  # columns of a chart; a narrower terminal wraps or cuts it
AXIS, HEIGHTS = 10, (12, 5)  # columns left of a chart; rows of the loss, of the others


@click.command("plot", cls=Command)
@click.argument("runs", nargs=-1, required=True, type=FilePath(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=FilePath(path_type=Path, dir_okay=False),
    help="Write a picture: .svg, .html or .png.  [default: draw in the terminal]",
)
@click.option(
    "--smooth", type=Number(0), help="Average over this many steps.  [default: 1 % of all]"
)
def command(runs: tuple[Path, ...], output: Path | None, smooth: float | None) -> None:
    """Plot loss, learning rate, gradient norm and speed of one or more runs.

    A RUN is a folder of `train --out`, or a metrics.jsonl. The legend lists the settings that
    differ.
    """
    from mlx_randygpt.analysis.metrics import read_run

    if output is not None and output.suffix not in (".svg", ".html", ".png"):
        raise click.UsageError(f"-o {output}: the name should end in .svg, .html or .png")
    records = [read_run(path) for path in runs]
    ends = [float(t[-1, 0]) for record in records for t in record.series.values() if len(t)]
    span = 0.01 * max(ends) if smooth is None else smooth
    if output is None:
        _draw(records, span)
        return
    _write(output, records, span)
    echo(f"✓ Saved {output}")


def _write(output: Path, records: list[RunRecord], span: float) -> None:
    from mlx_randygpt import files
    from mlx_randygpt.analysis.charts import page, svg, write_png
    from mlx_randygpt.analysis.metrics import MetricsError

    try:
        if output.suffix == ".png":
            write_png(picture := BytesIO(), records, span)
            files.write(output, picture.getvalue())
            return
        text = page(records, span) if output.suffix == ".html" else svg(records, span)
        files.write(output, text.encode("utf-8", "replace"))  # a name need not be UTF-8
    except OSError as error:
        raise MetricsError(f"{output} cannot be written: {error.strerror}") from error


def _draw(records: list[RunRecord], span: float) -> None:
    from rich.console import Console
    from rich.text import Text

    from mlx_randygpt.analysis.charts import PANELS, labels
    from mlx_randygpt.words import clean_text

    console = Console(highlight=False)
    width = max(MIN_WIDTH, min(console.width, MAX_WIDTH)) if console.is_terminal else 80
    for i, label in enumerate(labels(records)):
        line = Text.assemble((f"{_letter(i)} ━━ ", STYLES[i % len(STYLES)]), clean_text(label))
        show(line, console, soft_wrap=not console.is_terminal)
    for name, title, _ in PANELS:
        for line in chart(records, name, title, width, span):
            show(line, console, no_wrap=True, overflow="ignore", crop=False)


def chart(records: list[RunRecord], name: str, title: str, width: int, span: float) -> list[Text]:
    """Return a title, the curves of all runs in braille dots, and the steps below.

    Each curve has its letter at its end; the loss also shows the evaluations, as ●.
    """
    import numpy as np
    from rich.text import Text

    from mlx_randygpt.analysis.charts import draw_curve, limits
    from mlx_randygpt.screen.curve import Frame, draw, frame

    lines = [
        list(zip(table[:, 0].tolist(), draw_curve(name, table, span).tolist(), strict=True))
        for table in (record.series[name] for record in records)
    ]
    evaluations = [r.series["val_loss"] for r in records] if name == "loss" else []
    marks = [[(step, value) for step, value, *_ in table.tolist()] for table in evaluations]
    marks = marks or [[] for _ in records]
    points = [point for line in (*lines, *marks) for point in line]
    if not points:
        return []
    n_rows, last = HEIGHTS[name != "loss"], int(max(step for step, _ in points))
    size = (width - AXIS - 3, n_rows)
    if name in ("loss", "grad_norm"):  # whose first values can exceed the chart
        area = frame([*chain(*lines)], [*chain(*marks)], (0, last), size)
    else:
        low, high = limits(np.array([value for _, value in points]), log=False)
        area = Frame(0, last, low, high, *size)
    rows = [[(" ", "")] * (size[0] + 2) for _ in range(n_rows)]
    for i, (line, mark) in enumerate(zip(lines, marks, strict=True)):
        style = STYLES[i % len(STYLES)]
        for row, drawn in zip(rows, draw(line, area), strict=True):
            for column, dots in enumerate(drawn):
                if dots != " ":
                    row[column] = (dots, style)
        for x, y in map(area.dot, mark):
            if y >= 0:
                rows[y // 4][x // 2] = ("●", style)
        if line and len(records) > 1:
            x, y = area.dot(line[-1])
            rows[max(y, 0) // 4][x // 2 + 1] = (_letter(i), f"bold {style}")
    head = f"{title}, ● validation" if name == "loss" and any(marks) else title
    axis = [" " * (AXIS - 1) + "│" for _ in rows]
    for i in (0, n_rows - 1):
        axis[i] = f"{_value(area.value(i)):>{AXIS - 2}} ┤"
    picture = [Text.assemble((tick, "dim"), *row) for tick, row in zip(axis, rows, strict=True)]
    below = f"{'':{AXIS}}{'step 0':<{size[0] // 2}}{last:>{size[0] - size[0] // 2},}"
    return [Text(""), Text(head, "bold"), *picture, Text(below, "dim")]


def _value(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _letter(i: int) -> str:
    return chr(ord("a") + i % 26)
