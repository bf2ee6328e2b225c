"""`mlxgpt plot`: draw the curves of runs in the terminal or as a picture."""

from __future__ import annotations

import shlex
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlx_randygpt.cli.errors import Command
from mlx_randygpt.cli.output import echo, show
from mlx_randygpt.cli.values import FilePath, Number
from mlx_randygpt.palette import RUNS, VALIDATION

if TYPE_CHECKING:
    from rich.text import Text

    from mlx_randygpt.analysis.metrics import RunRecord

MIN_WIDTH, MAX_WIDTH = 30, 160  # columns of all charts; a narrower terminal wraps or cuts them
AXIS, MARGIN = 9, 3  # columns left and right of a chart
KEY = 5  # columns left of the name of a run
N_OTHERS, GAP = 3, 1  # charts side by side below that of the loss, and the columns between them
SIDE_BY_SIDE = 54  # the least width for that
HEIGHTS = (12, 5)  # rows of the loss and of the others, if nothing limits them
MIN_HEIGHTS, MAX_HEIGHTS = (4, 3), (30, 12)


@click.command("plot", cls=Command)
@click.argument("runs", nargs=-1, type=FilePath(path_type=Path))
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

    A RUN is a folder of `train --out`, or a metrics.jsonl; without it, the runs below the current
    folder are plotted, the newest 7. The legend lists the settings that differ.
    """
    from mlx_randygpt.analysis.metrics import read_run

    if output is not None and output.suffix not in (".svg", ".html", ".png"):
        raise click.UsageError(f"-o {output}: the name should end in .svg, .html or .png")
    records = [read_run(path) for path in runs] or _newest_runs()
    ends = [float(t[-1, 0]) for record in records for t in record.series.values() if len(t)]
    span = 0.01 * max(ends) if smooth is None else smooth
    if output is None:
        _draw(records, span)
        return
    options = [] if smooth is None else ["--smooth", str(smooth).removesuffix(".0")]
    names = [record.name for record in records]
    again = shlex.join(["mlxgpt", "plot", *names, *options, "-o", str(output)])
    _write(output, records, span, again)
    echo(f"✓ Saved {output}")


def _newest_runs() -> list[RunRecord]:
    """Return the runs below the current folder, the newest if there are more than colours."""
    from mlx_randygpt.analysis.metrics import runs_below

    found = runs_below([Path()], lambda reason: echo(f"Skipped: {reason}", err=True))
    by_age = sorted(found, key=lambda folder: (folder / "metrics.jsonl").stat().st_mtime)
    shown = by_age[-len(RUNS) :]
    if len(shown) < len(found):
        echo(f"Plotted: the newest {len(shown)} of {len(found)} runs; name others", err=True)
    return [record for folder, record in found.items() if folder in shown]


def _write(output: Path, records: list[RunRecord], span: float, again: str) -> None:
    from mlx_randygpt import files
    from mlx_randygpt.analysis.charts import page, svg, write_png
    from mlx_randygpt.analysis.metrics import MetricsError

    try:
        if output.suffix == ".png":
            write_png(picture := BytesIO(), records, span)
            files.write(output, picture.getvalue())
            return
        text = page(records, span, again) if output.suffix == ".html" else svg(records, span)
        files.write(output, text.encode("utf-8", "replace"))  # a name need not be UTF-8
    except OSError as error:
        raise MetricsError(f"{output} cannot be written: {error.strerror}") from error


def _draw(records: list[RunRecord], span: float) -> None:
    from rich.console import Console
    from rich.text import Text

    from mlx_randygpt.analysis.charts import MAX_LABEL, PANELS, labels
    from mlx_randygpt.words import clean_text

    console = Console(highlight=False)
    width = max(MIN_WIDTH, min(console.width, MAX_WIDTH)) if console.is_terminal else 80
    legend = [
        Text.assemble((f"{_letter(i)} ━━ ", _colour(i)), clean_text(label))
        for i, label in enumerate(labels(records, max(MAX_LABEL, width - KEY)))
    ]
    if console.is_terminal and width >= SIDE_BY_SIDE:
        legend = [part for line in legend for part in line.wrap(console, width)]
        picture = _beside(records, width, console.height - len(legend) - 1, span)
    else:
        heights = {name: HEIGHTS[name != "loss"] for name, *_ in PANELS}
        charts = [chart(records, name, (width, n), span) for name, n in heights.items()]
        picture = [line for lines in charts if lines for line in (Text(), *lines)]
    for line in legend:
        show(line, console, soft_wrap=not console.is_terminal)
    for line in picture:
        show(line, console, no_wrap=True, overflow="ignore", crop=False)


def _beside(records: list[RunRecord], width: int, height: int, span: float) -> list[Text]:
    """Return the loss and, side by side below it, the others, in `height` rows if possible."""
    from rich.text import Text

    from mlx_randygpt.analysis.charts import PANELS

    n_other = min(max(height // 5, MIN_HEIGHTS[1]), MAX_HEIGHTS[1])
    n_loss = min(max(height - n_other - 5, MIN_HEIGHTS[0]), MAX_HEIGHTS[0])
    loss, *others = (name for name, *_ in PANELS)
    column = (width - GAP * (N_OTHERS - 1)) // N_OTHERS
    charts = [chart(records, name, (column, n_other), span) for name in others]
    lines = chart(records, loss, (width, n_loss), span)
    lines += [Text()] * (bool(lines) and any(charts))
    for row in zip_longest(*filter(None, charts), fillvalue=Text()):
        line = Text()
        for part in row:
            line.append_text(part).append(" " * max(column + GAP - part.cell_len, 0))
        lines.append(line)
    return lines


def chart(records: list[RunRecord], name: str, size: tuple[int, int], span: float) -> list[Text]:
    """Return a title, the curves of all runs in braille dots, and the steps below.

    `size` is the width and the rows of the curves. Each has its letter at its end; the loss also
    shows the evaluations, as ●.
    """
    import numpy as np
    from rich.text import Text

    from mlx_randygpt.analysis.charts import PANELS, draw_curve, limits
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
    last = int(max(step for step, _ in points))
    n_columns, n_rows = box = (size[0] - AXIS - MARGIN, size[1])
    if name in ("loss", "grad_norm"):  # whose first values can exceed the chart
        area = frame([*chain(*lines)], [*chain(*marks)], (0, last), box)
    else:
        low, high = limits(np.array([value for _, value in points]), log=False)
        area = Frame(0, last, low, high, *box)
    rows = [[(" ", "")] * (n_columns + 2) for _ in range(n_rows)]
    for i, (line, mark) in enumerate(zip(lines, marks, strict=True)):
        for row, drawn in zip(rows, draw(line, area), strict=True):
            for column, dots in enumerate(drawn):
                if dots != " ":
                    row[column] = (dots, _colour(i))
        for x, y in map(area.dot, mark):
            if y >= 0:
                rows[y // 4][x // 2] = ("●", _colour(i) if len(records) > 1 else VALIDATION[0])
        if line and len(records) > 1:
            x, y = area.dot(line[-1])
            rows[max(y, 0) // 4][x // 2 + 1] = (_letter(i), f"bold {_colour(i)}")
    title = next(title for panel, title, _ in PANELS if panel == name)
    head = f"{title}, ● validation" if any(marks) else title
    axis = [" " * (AXIS - 1) + "│" for _ in rows]
    for i in (0, n_rows - 1):
        axis[i] = f"{_value(area.value(i)):>{AXIS - 2}} ┤"
    picture = [Text.assemble((tick, "dim"), *row) for tick, row in zip(axis, rows, strict=True)]
    first = "step 0" if n_columns > 20 else "0"
    below = f"{'':{AXIS}}{first}{last:>{max(n_columns - len(first), 0)},}"
    return [Text(head, "bold"), *picture, Text(below, "dim")]


def _value(value: float) -> str:
    """Return a value in at most seven characters; rounding errors of zero are zero."""
    if abs(value) >= 1e5:
        return f"{value / 1e6:.3g} M"
    value = value if abs(value) > 1e-12 else 0.0
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}".replace("e-0", "e-")


def _letter(i: int) -> str:
    return chr(ord("a") + i % 26)


def _colour(i: int) -> str:
    return RUNS[i % len(RUNS)][0]
