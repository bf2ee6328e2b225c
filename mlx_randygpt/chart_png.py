"""The picture of `charts` as PNG, by matplotlib, which is asked for only then."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_randygpt.charts import COLOURS, PANELS, drawn, labels, limits
from mlx_randygpt.metrics import MetricsError, RunRecord
from mlx_randygpt.state import Array


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
            axes.plot(table[:, 0], drawn(name, table, span), color=colour, lw=1.2, label=label)
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
