"""Series of runs as one SVG picture, drawn here, and that picture as a page of its own.

Panels one below the other: loss, learning rate, gradient norm, tokens per second; the runs over
each other in colours that are told apart in light and in dark. Reads no file.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from pathlib import Path

import numpy as np

from mlx_randygpt.analysis.metrics import MetricsError, RunRecord, differing_settings, smooth
from mlx_randygpt.state import Array

PANELS = (  # series, title, scale
    ("loss", "loss (nats per token)", "linear"),
    ("lr", "learning rate", "linear"),
    ("grad_norm", "gradient norm", "log"),
    ("tokens_per_second", "tokens per second", "linear"),
)
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#e879a6", "#a78bfa", "#b08968", "#22b8cf", "#94a3b8")
WIDTH, LEFT, RIGHT = 840, 74, 20
LEGEND_ROW, TITLE, AXIS = 20, 30, 28  # heights
TALL, LOW = 260, 120  # plot areas: of the loss, of the others
CUT = 0.995  # share of the values that a panel must show; a first spike may leave it
STYLE = """
svg{--ink:#1f2937;--faint:#d7dce3;--paper:#ffffff;font:12px system-ui,sans-serif}
svg text{fill:var(--ink)} .grid{stroke:var(--faint)} .paper{fill:var(--paper)}
@media (prefers-color-scheme:dark){svg{--ink:#e5e7eb;--faint:#374151;--paper:#111827}}
"""


def labels(records: Sequence[RunRecord]) -> list[str]:
    """For each run its name and the settings that are not the same in all."""
    found = differing_settings(list(records))
    return [
        _cut(
            "  ".join([record.name, *(f"{name}={setting_text(v[i])}" for name, v in found.items())])
        )
        for i, record in enumerate(records)
    ]


def setting_text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:g}" if isinstance(value, float) else str(value)


def svg(records: Sequence[RunRecord], span: float) -> str:
    """The picture; `span` is the number of steps that lines are smoothed over."""
    names = labels(records)
    y = 12 + LEGEND_ROW * len(names)
    parts = [
        f'<g transform="translate({LEFT},{8 + LEGEND_ROW * i})">'
        f'<line x2="22" y1="9" y2="9" stroke="{_colour(i)}" stroke-width="3"/>'
        f'<text x="30" y="13">{escape(name)}</text></g>'
        for i, name in enumerate(names)
    ]
    last = max((float(t[-1, 0]) for r in records for t in r.series.values() if len(t)), default=1.0)
    for name, title, scale in PANELS:
        height = TALL if name == "loss" else LOW
        parts.append(f'<g transform="translate(0,{y + TITLE})">')
        parts += _panel(records, name, title, scale == "log", last, height, span)
        parts.append("</g>")
        y += TITLE + height + AXIS
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y}" role="img" '
        f'aria-label="loss, learning rate, gradient norm and speed over steps">'
    )
    return "\n".join(
        [head, f"<style>{STYLE}</style>", '<rect class="paper" width="100%" height="100%"/>',
         *parts, "</svg>\n"]
    )  # fmt: skip


def page(records: Sequence[RunRecord], span: float) -> str:
    """The picture as a page that needs nothing else."""
    title = escape(" · ".join(record.name for record in records))
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width"><title>{title}</title>'
        "<style>:root{color-scheme:light dark}body{margin:0}svg{display:block;max-width:1100px;"
        "margin:auto}@media (prefers-color-scheme:dark){body{background:#111827}}</style>"
        f"{svg(records, span)}</html>\n"
    )


def _panel(
    records: Sequence[RunRecord], name: str, title: str, log: bool, last: float, height: int,
    span: float,
) -> list[str]:  # fmt: skip
    tables = [record.series[name] for record in records]
    marks = [
        record.series["val_loss"] if name == "loss" else np.empty((0, 4)) for record in records
    ]
    values = np.concatenate([t[:, 1:].ravel() for t in (*tables, *marks)])
    note = " · training, smoothed; ● validation" if name == "loss" else ""
    parts = [f'<text x="{LEFT}" y="-10" font-weight="600">{title}'
             f'<tspan font-weight="400" opacity=".7">{note}</tspan></text>']  # fmt: skip
    low, high = limits(values, log)

    def place(steps: Array, of: Array) -> tuple[Array, Array]:
        share = (_scaled(of, log) - low) / (high - low)
        return LEFT + steps / last * (WIDTH - LEFT - RIGHT), height * (1 - np.clip(share, 0, 1))

    for tick in ticks(low, high, log):
        y = height * (1 - (tick - low) / (high - low))
        text = _tick(10**tick if log else tick)
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    for tick in ticks(0, last, False):
        x = LEFT + tick / last * (WIDTH - LEFT - RIGHT)
        anchor = "end" if x > WIDTH - RIGHT - 20 else "middle"
        parts.append(f'<text x="{x:.1f}" y="{height + 16}" text-anchor="{anchor}">'
                     f"{_tick(tick)}</text>")  # fmt: skip
    for i, (table, mark) in enumerate(zip(tables, marks, strict=True)):
        if len(table):
            xs, top = place(table[:, 0], table[:, 3])
            _, bottom = place(table[:, 0], table[:, 2])
            band = _points(np.append(xs, xs[::-1]), np.append(top, bottom[::-1]))
            parts.append(f'<polygon points="{band}" fill="{_colour(i)}" opacity=".18"/>')
            line = _points(*place(table[:, 0], table[:, 1]))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{_colour(i)}" '
                         'opacity=".3"/>')  # fmt: skip
            line = _points(*place(table[:, 0], draw_curve(name, table, span)))
            parts.append(f'<polyline points="{line}" fill="none" stroke="{_colour(i)}" '
                         'stroke-width="1.6"/>')  # fmt: skip
        if len(mark):
            xs, ys = place(mark[:, 0], mark[:, 1])
            parts += [
                f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{_colour(i)}" class="dot" '
                'stroke="var(--paper)"/>'
                for a, b in zip(xs[:: len(xs) // 200 + 1], ys[:: len(xs) // 200 + 1], strict=True)
            ]
    return parts


def draw_curve(name: str, table: Array, span: float) -> Array:
    """The line of a series: smoothed where it is noisy, the learning rate as it was."""
    return table[:, 1] if name == "lr" else smooth(table, span)


def limits(values: Array, log: bool) -> tuple[float, float]:
    """Lowest and highest value of an axis, in powers of ten for a logarithmic one."""
    values = values[np.isfinite(values) & ((values > 0) | (not log))]
    if not len(values):
        return 0.0, 1.0
    low, high = float(values.min()), float(np.quantile(values, CUT))
    low, high = (math.log10(low), math.log10(max(high, low))) if log else (low, high)
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    return low - room if low < 0 or log or low > high / 3 else 0.0, high + room


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Three to six round values between low and high; for a logarithmic axis their powers."""
    if log:
        powers = [math.log10(m * 10.0**p) for p in range(math.floor(low), math.ceil(high) + 1)
                  for m in ((1, 2, 5) if high - low < 2 else (1,))]  # fmt: skip
        found = [power for power in powers if low <= power <= high]
        return found[:: len(found) // 7 + 1] or [(low + high) / 2]
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
    return COLOURS[i % len(COLOURS)]


def _cut(text: str) -> str:
    return text if len(text) <= 100 else text[:99] + "…"


def write_png(path: Path, records: Sequence[RunRecord], span: float) -> None:
    """MetricsError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MetricsError(
            "a PNG needs matplotlib; pip install 'mlx-randygpt[plot]', or give -o a name that "
            "ends in .svg or .html, which need nothing"
        ) from error
    figure = Figure(figsize=(9, 10), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    areas = figure.subplots(len(PANELS), 1, sharex=True, height_ratios=[2, 1, 1, 1])
    for axes, (name, title, scale) in zip(areas, PANELS, strict=True):
        axes.set_title(title, loc="left", fontsize=9)
        axes.set_yscale(scale)
        axes.grid(alpha=0.3)
        for i, (record, label) in enumerate(zip(records, labels(records), strict=True)):
            table, colour = record.series[name], COLOURS[i % len(COLOURS)]
            axes.fill_between(table[:, 0], table[:, 2], table[:, 3], color=colour, alpha=0.18, lw=0)
            axes.plot(table[:, 0], draw_curve(name, table, span), color=colour, lw=1.2, label=label)
            if name == "loss":
                marks = record.series["val_loss"]
                axes.plot(marks[:, 0], marks[:, 1], "o", color=colour, ms=3)
                axes.set_ylim(*limits(_losses(records), log=False))
    areas[-1].set_xlabel("step")
    figure.legend(*areas[0].get_legend_handles_labels(), loc="outside upper left", fontsize=8)
    figure.savefig(path, format="png")


def _losses(records: Sequence[RunRecord]) -> Array:
    tables = [record.series[name] for record in records for name in ("loss", "val_loss")]
    return np.concatenate([table[:, 1:].ravel() for table in tables])
