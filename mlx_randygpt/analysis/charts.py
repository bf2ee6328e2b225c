"""Pictures of runs as SVG, as an HTML page around the SVG, and as PNG by matplotlib.

Four panels, one below the other: loss, learning rate, gradient norm, tokens per second. All runs
share the panels, in colours that differ on light and dark backgrounds.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mlx_randygpt.analysis.metrics import MetricsError, RunRecord, differing_settings, smooth
from mlx_randygpt.config import install_command
from mlx_randygpt.palette import RUNS, VALIDATION, page_style
from mlx_randygpt.state import Array

PANELS = (  # series, title, scale
    ("loss", "loss (nats per token)", "linear"),
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("tokens_per_second", "tokens per second", "linear"),
)
WIDTH, NARROW, LEFT, RIGHT = 840, 390, 62, 20  # NARROW: on a phone
MAX_LABEL = 100  # characters
LETTER = 7  # the mean width of one, at least
LEGEND_ROW, TITLE, AXIS = 20, 30, 28  # heights
TALL, LOW = 260, 120  # heights of the plot areas: loss, others
CUT = 0.995  # share of the values that a panel shows; an initial spike can exceed it
STYLE = "svg{font:12px system-ui,sans-serif} svg text{fill:var(--ink)} .grid{stroke:var(--line)}"


def labels(records: Sequence[RunRecord], most: int = MAX_LABEL) -> list[str]:
    """Return a label for each run: its name and the settings that differ between runs."""
    differing = differing_settings(list(records))
    return [
        _cut(
            "  ".join(
                [record.name, *(f"{name}={setting_text(v[i])}" for name, v in differing.items())]
            ),
            most,
        )
        for i, record in enumerate(records)
    ]


def setting_text(value: object) -> str:
    """Format the value of a setting, or a dash if the run has none."""
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def svg(records: Sequence[RunRecord], span: float, width: int = WIDTH, name: str = "") -> str:
    """Return the SVG picture; lines are smoothed over `span` steps, `name` is its class."""
    names = [_cut(label, (width - LEFT - 30) // LETTER) for label in labels(records)]
    y = 12 + LEGEND_ROW * len(names)
    parts = [
        f'<g transform="translate({LEFT},{8 + LEGEND_ROW * i})">'
        f'<line x2="22" y1="9" y2="9" stroke="{_colour(i)}" stroke-width="3"/>'
        f'<text x="30" y="13">{escape(label)}</text></g>'
        for i, label in enumerate(names)
    ]
    last = max((float(t[-1, 0]) for r in records for t in r.series.values() if len(t)), default=1.0)
    for series, title, scale in PANELS:
        height = TALL if series == "loss" else LOW
        parts.append(f'<g transform="translate(0,{y + TITLE})">')
        size = {"width": width, "height": height}
        panel = _Panel(name=series, title=title, log=scale == "log", last=last, **size)
        parts += _draw_panel(panel, records, span)
        parts.append("</g>")
        y += TITLE + height + AXIS
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" role="img" '
        f'class="{name}" aria-label="loss, learning rate, gradient norm and speed over steps">'
    )
    style = f"<style>{page_style('svg')}\n{STYLE}</style>"
    paper = '<rect fill="var(--sheet)" width="100%" height="100%"/>'
    return "\n".join([head, style, paper, *parts, "</svg>\n"])


def page(records: Sequence[RunRecord], span: float, command: str) -> str:
    """Return a self-contained page: the picture, one for a phone, and the values at a step.

    `command` is the command that writes it again.
    """
    pictures = svg(records, span, WIDTH, "wide") + svg(records, span, NARROW, "narrow")
    steps = [float(t[-1, 0]) for record in records for t in record.series.values() if len(t)]
    values = {
        "left": LEFT,
        "right": RIGHT,
        "last": max(steps, default=1.0),
        "command": command,
        "runs": [{"name": record.name, "panels": [*_values(record, span)]} for record in records],
    }
    template = Path(__file__).with_name("plot.html").read_text(encoding="utf-8")
    title = escape(" · ".join(record.name for record in records))
    content = json.dumps(values, ensure_ascii=False).replace("<", "\\u003c")
    marks = (("STYLE", page_style(":root")), ("TITLE", title), ("PICTURES", pictures))
    for mark, text in marks:
        template = template.replace(f"/*{mark}*/", text)
    return template.replace("/*DATA*/null", content)


def _values(record: RunRecord, span: float) -> Iterator[dict[str, Any]]:
    """Yield the curves of a run as the page shows their values, and its evaluations."""
    titles = {"loss": "training loss"} | {name: title for name, title, _ in PANELS[1:]}
    curves = [(title, name, record.series[name]) for name, title in titles.items()]
    curves.insert(1, ("validation loss", "lr", record.series["val_loss"]))  # lr: not smoothed
    for title, name, table in curves:
        curve = draw_curve(name, table, span) if len(table) else table[:, 1]
        shown = [float(f"{value:.4g}") for value in curve]
        yield {"title": title, "steps": [round(float(x)) for x in table[:, 0]], "values": shown}


def write_png(file: BinaryIO, records: Sequence[RunRecord], span: float) -> None:
    """Write the picture as PNG; raise MetricsError if matplotlib is not installed."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetricsError(
            f"a PNG needs matplotlib; {install_command('plot')}, or give -o a name that "
            "ends in .svg or .html, which need no library"
        ) from error
    figure = Figure(figsize=(9, 10), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    areas = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=[2, 1, 1, 1])
    for axes, (name, title, scale) in zip(areas, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_yscale(scale)
        axes.grid(alpha=0.3)
        for i, (record, label) in enumerate(zip(records, labels(records), strict=True)):
            table, colour = record.series[name], _colour(i)
            axes.fill_between(table[:, 0], table[:, 2], table[:, 3], color=colour, alpha=0.18, lw=0)
            axes.plot(table[:, 0], draw_curve(name, table, span), color=colour, lw=1.2, label=label)
            if name == "loss":
                marks = record.series["val_loss"]
                axes.plot(marks[:, 0], marks[:, 1], "o", color=_mark_colour(i, records), ms=3)
                axes.set_ylim(*limits(_losses(records), log=False))
    areas[-1].set_xlabel("step")
    figure.legend(*areas[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8)
    figure.savefig(file, format="png")


@dataclass(frozen=True, kw_only=True)
class _Panel:
    """One panel of the picture: its series, its axes and the mapping from values to pixels."""

    name: str  # of the series
    title: str
    log: bool
    last: float  # the last step of all runs
    width: int
    height: int
    low: float = 0.0
    high: float = 1.0

    def x(self, steps: Any) -> Any:
        """Return the horizontal pixels of steps."""
        return LEFT + steps / self.last * (self.width - LEFT - RIGHT)

    def y(self, values: Array) -> Array:
        """Return the vertical pixels of values, clipped to the panel."""
        share = (_scaled(values, self.log) - self.low) / (self.high - self.low)
        return self.height * (1 - np.clip(share, 0, 1))


def _draw_panel(panel: _Panel, records: Sequence[RunRecord], span: float) -> list[str]:
    """Return the SVG elements of one panel: title, axes, and the curves of all runs."""
    is_loss = panel.name == "loss"
    tables = [record.series[panel.name] for record in records]
    marks = [record.series["val_loss"] if is_loss else np.empty((0, 4)) for record in records]
    values = np.concatenate([t[:, 1:].ravel() for t in (*tables, *marks)])
    low, high = limits(values, panel.log)
    panel = replace(panel, low=low, high=high)
    note = " · training; ● validation" if is_loss else ""
    parts = [
        f'<text x="{LEFT}" y="-10" font-weight="600">{panel.title}'
        f'<tspan font-weight="400" opacity=".7">{note}</tspan></text>'
    ]
    parts += _draw_axes(panel)
    for i, (table, mark) in enumerate(zip(tables, marks, strict=True)):
        if len(table):
            parts += _draw_series(panel, table, _colour(i), span)
        every = len(mark) // 200 + 1
        fill = _mark_colour(i, records)
        for x, y in zip(panel.x(mark[::every, 0]), panel.y(mark[::every, 1]), strict=True):
            parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" class="dot" '
                'stroke="var(--sheet)"/>'
            )
    return parts


def _draw_axes(panel: _Panel) -> list[str]:
    """Return grid lines with their values, and the steps below."""
    parts = []
    for tick in ticks(panel.low, panel.high, panel.log):
        y = panel.height * (1 - (tick - panel.low) / (panel.high - panel.low))
        text = _tick(10**tick if panel.log else tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{panel.width - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in ticks(0, panel.last, False):
        x = panel.x(tick)
        anchor = "end" if x > panel.width - RIGHT - 20 else "middle"
        parts.append(
            f'<text x="{x:.1f}" y="{panel.height + 16}" text-anchor="{anchor}">{_tick(tick)}</text>'
        )
    return parts


def _draw_series(panel: _Panel, table: Array, colour: str, span: float) -> list[str]:
    """Return the range of a series as a band, its means as a faint line, the smoothed curve."""
    xs = panel.x(table[:, 0])
    top, bottom = panel.y(table[:, 3]), panel.y(table[:, 2])
    band = _points(np.append(xs, xs[::-1]), np.append(top, bottom[::-1]))
    means = _points(xs, panel.y(table[:, 1]))
    curve = _points(xs, panel.y(draw_curve(panel.name, table, span)))
    return [
        f'<polygon points="{band}" fill="{colour}" opacity=".18"/>',
        f'<polyline points="{means}" fill="none" stroke="{colour}" opacity=".3"/>',
        f'<polyline points="{curve}" fill="none" stroke="{colour}" stroke-width="1.6"/>',
    ]


def draw_curve(name: str, table: Array, span: float) -> Array:
    """Return the curve of a series: smoothed, except for the learning rate."""
    return table[:, 1] if name == "lr" else smooth(table, span)


def limits(values: Array, log: bool) -> tuple[float, float]:
    """Return the lowest and highest value of an axis, as powers of ten if it is logarithmic."""
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(np.quantile(values, CUT))
    low, high = (math.log10(low), math.log10(max(high, low))) if log else (low, high)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room if low < 0 or log or low > high / 3 else 0.0, high + room


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Return three to six round values between low and high, as powers of ten if logarithmic."""
    if log:
        factors = (1, 2, 5) if high - low < 2 else (1,)
        decades = range(math.floor(low), math.ceil(high) + 1)
        powers = [math.log10(m * 10.0**p) for p in decades for m in factors]
        inside = [power for power in powers if low <= power <= high]
        return inside[:: len(inside) // 7 + 1] or [(low + high) / 2]
    raw = (high - low) / 5
    unit = 10 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _scaled(values: Array, log: bool) -> Array:
    return np.log10(np.maximum(values, 1e-30)) if log else values


def _tick(value: float) -> str:
    if abs(value) >= 10_000:
        return f"{value / 1e6:g} M" if abs(value) >= 1e6 else f"{value / 1e3:g} k"
    return f"{value:.4g}"


def _points(x: Array, y: Array) -> str:
    return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(x, y, strict=True))


def _colour(i: int) -> str:
    return RUNS[i % len(RUNS)][1]


def _mark_colour(i: int, records: Sequence[RunRecord]) -> str:
    """Return the colour of a run's evaluations; a single run has another for its curve."""
    return _colour(i) if len(records) > 1 else VALIDATION[1]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _losses(records: Sequence[RunRecord]) -> Array:
    tables = [record.series[name] for record in records for name in ("loss", "val_loss")]
    return np.concatenate([table[:, 1:].ravel() for table in tables])
