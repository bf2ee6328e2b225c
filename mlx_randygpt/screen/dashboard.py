"""The live screen of a run, and its plain twin for pipes: reports in, lines out.

Owns the layout and the terminal while a run lasts, and draws in at most 1 % of the time. Knows
nothing of models, arrays, signals or exit codes. Text from outside is never read as markup.
"""

from __future__ import annotations

import os
import time

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from mlx_randygpt.screen.curve import Frame, draw, frame
from mlx_randygpt.screen.plain import PlainLog
from mlx_randygpt.screen.run_summary import Clock, RunInfo, RunSummary, numbers, outcome
from mlx_randygpt.screen.words import clean, duration
from mlx_randygpt.training.reports import EvalLog, Report, SampleLog

QUIET_SECONDS = 0.25  # shortest time between two drawings
RENDER_SHARE = 0.01  # of the time, for drawing
SIDE_BY_SIDE = 110  # columns from which the sample stands beside the curve
TILES = 80  # columns from which the numbers stand in tiles
# Columns of a tile at 80 (they grow to one and a half), and the colour of what the curve shows too.
TILE_STYLES = ((12, "cyan"), (18, "magenta"), (16, ""), (16, ""), (16, ""))
AXIS = 9  # columns left of the curve
# Section and the fewest rows it is worth, the most needed first.
SECTIONS = (("progress", 1), ("numbers", 4), ("footer", 1), ("curve", 5), ("header", 4),
            ("event", 1), ("sample", 3), ("gap", 1))  # fmt: skip


class Dashboard:
    """A screen that redraws itself when a report comes and drawing is due; leaves a summary."""

    def __init__(self, info: RunInfo, console: Console, clock: Clock = time.monotonic) -> None:
        self._tally = RunSummary(info, clock)
        self._console = console
        self._clock = clock
        self._due_at = 0.0
        # The other screen, because lines already drawn would be torn when the window is resized.
        self._live = Live(
            self, console=console, screen=True, auto_refresh=False,
            redirect_stdout=False, redirect_stderr=False,
        )  # fmt: skip

    def __enter__(self) -> Dashboard:
        self._live.start()
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        for line in summary(self._tally, self._console):
            self._console.print(line, soft_wrap=True)

    def show(self, report: Report) -> None:
        self._tally.add(report)
        if isinstance(report, EvalLog | SampleLog) or self._clock() >= self._due_at:
            self._draw()

    def note(self, text: str) -> None:
        """A line for the person: on the screen at once, and left behind at the end."""
        self._tally.add_event(text, clean(text))
        self._draw()

    def release_terminal(self) -> None:
        """Leave the alternate screen without drawing, for a signal handler about to exit."""
        os.write(self._console.file.fileno(), b"\x1b[?1049l\x1b[?25h")

    def reclaim_terminal(self) -> None:
        """Enter the alternate screen after `release_terminal`; the next report draws all of it."""
        os.write(self._console.file.fileno(), b"\x1b[?1049h\x1b[?25l")

    def _draw(self) -> None:
        began = self._clock()
        self._live.refresh()
        ended = self._clock()
        self._due_at = ended + max(QUIET_SECONDS, (ended - began) / RENDER_SHARE)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from screen(self._tally, console, options.max_width, options.height or console.height)


def make_view(
    info: RunInfo, console: Console, plain: bool = False, clock: Clock = time.monotonic
) -> Dashboard | PlainLog:
    """The screen where `console` is a terminal that can show it, plain lines elsewhere."""
    # The file itself is asked: rich takes a pipe for a terminal where FORCE_COLOR is set.
    capable = console.file.isatty() and console.is_terminal and not console.is_dumb_terminal
    if plain or not capable or console.options.ascii_only:
        return PlainLog(info, console.file, clock)
    return Dashboard(info, console, clock)


def screen(tally: RunSummary, console: Console, width: int, height: int) -> list[Text]:
    """The whole screen, at most `height` lines of at most `width` columns."""
    beside = width >= SIDE_BY_SIDE
    rows = _rows(height, width, beside)
    curve_width = width * 11 // 20 if beside else width
    curve = _curve(tally, curve_width, rows["curve"])
    sample_width = width - curve_width - 2 if beside else width
    sample = _sample(tally, console, sample_width, rows["sample"])
    if beside:
        for line, right in zip(curve, sample, strict=False):
            line.align("left", curve_width + 2)
            line.append_text(right)
        sample = []
    lines = [
        *_header(tally.info, width)[: rows["header"]],
        _progress(tally, width),
        *[Text()] * rows["gap"],
        *_numbers(tally, width)[: rows["numbers"]],
        *curve, *sample,
        *[_event(tally)] * rows["event"],
        *[_footer(tally.info, width)] * rows["footer"],
    ]  # fmt: skip
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def _rows(height: int, width: int, beside: bool) -> dict[str, int]:
    """How many rows each section gets: what is needed most first, the rest to curve and sample."""
    rows: dict[str, int] = {}
    for name, least in SECTIONS:
        least += name == "numbers" and width < TILES
        rows[name] = least if least <= height and not (name == "sample" and beside) else 0
        height -= rows[name]
    more = min(12, (height * 2 + 2) // 3 if rows["sample"] else height) if rows["curve"] else 0
    rows["curve"] += more
    if beside:
        rows["sample"] = rows["curve"]
    elif rows["sample"]:
        rows["sample"] += min(6, height - more)
    return rows


def _rule(width: int, title: str, aside: Text | str = "") -> Text:
    head = Text.assemble(("── ", "dim"), (title, "cyan"), " ")
    tail = Text.assemble(" ", aside, (" ──", "dim")) if aside else Text()
    line = Text("─" * max(width - head.cell_len - tail.cell_len, 0), "dim")
    return head.append_text(line).append_text(tail)


def _ends(left: Text, right: Text, width: int) -> Text:
    """`left` at the left edge, `right` at the right; when there is not room, `left` is cut."""
    left.truncate(max(width - right.cell_len - 1, 0), overflow="ellipsis", pad=True)
    return left.append(" ").append_text(right)


def _header(info: RunInfo, width: int) -> list[Text]:
    start = f", resumed at {info.start_step:,}" if info.start_step else ""
    facts = (("model", info.model), ("data", info.data), ("backend", info.backend))
    return [
        _rule(width, "mlxgpt train", f"{info.recipe} recipe → {clean(info.out)}{start}"),
        *(Text.assemble((f" {name:9}", "dim"), clean(fact)) for name, fact in facts),
    ]


def _progress(tally: RunSummary, width: int) -> Text:
    share = min(tally.step / tally.info.iters, 1.0)
    head = f" step {tally.step:,} of {tally.info.iters:,} "
    percent, left = f" {int(share * 100):3} %", f"{duration(tally.left)} left"
    for tail in (f"{percent}  {duration(tally.elapsed)} elapsed, {left} ", f"{percent}  {left} "):
        n_bar = width - len(head) - len(tail)
        if n_bar >= 12:
            break
    n_done = int(n_bar * share)
    bar = (("━" * n_done, "cyan"), ("─" * (n_bar - n_done), "dim"))
    return Text.assemble((head, "bold"), *bar, tail)


def _numbers(tally: RunSummary, width: int) -> list[Text]:
    if width < TILES:
        return [
            Text.assemble((f" {name:14}", "dim"), (f"{value:13}", "bold"), ", ".join(details))
            for name, value, *details in numbers(tally)
        ]
    rows = [Text(" ") for _ in range(4)]
    for number, (least, colour) in zip(numbers(tally), TILE_STYLES, strict=False):
        tile = int(least * min(width / TILES, 1.5))
        styles = ("dim", f"bold {colour}", "", "")
        for i, (row, style) in enumerate(zip(rows, styles, strict=True)):
            row.append(f"{number[i] if i < len(number) else '':{tile}}", style)
    return rows


def _section(rule: Text, lines: list[Text], height: int) -> list[Text]:
    """A rule and lines below it, filled up or cut to `height`."""
    return [rule, *lines, *(Text() for _ in range(height))][:height]


def _curve(tally: RunSummary, width: int, height: int) -> list[Text]:
    legend = Text.assemble(("─", "cyan"), " training  ", ("●", "magenta"), " validation")
    rule = _rule(width, "loss", legend)
    points, marks = tally.losses.points, tally.val_losses.points
    if len(points) < 2 or not height:
        waiting = Text(" The curve starts with the second step.", "dim")
        return _section(rule, [waiting], height)
    steps = (tally.info.start_step, tally.step)
    area = frame(points, marks, steps, (max(width - AXIS - 1, 1), height - 2))
    rows = [Text(line, "cyan") for line in draw(points, area)]
    for x, y in map(area.dot, marks):
        if y >= 0:
            row, column = rows[y // 4], x // 2
            rows[y // 4] = Text.assemble(row[:column], ("●", "magenta"), row[column + 1 :])
    labelled = [Text.assemble((_label(area, i), "dim"), row) for i, row in enumerate(rows)]
    first = Text(" " * AXIS + f"step {area.first:,}", "dim")
    return [rule, *labelled, _ends(first, Text(f"{area.last:,} ", "dim"), width)]


def _label(area: Frame, row: int) -> str:
    """The axis left of one row: the value at the top, the middle and the bottom."""
    if row not in (0, area.height // 2, area.height - 1):
        return " " * (AXIS - 1) + "│"
    return f"{area.value(row):{AXIS - 2}.{2 if area.high - area.low >= 0.1 else 4}f} ┤"


def _sample(tally: RunSummary, console: Console, width: int, height: int) -> list[Text]:
    log = tally.sample
    if log is None:
        return _section(_rule(width, "sample"), [Text(" None yet.", "dim")], height)
    lines = _text(log, console, width - 2, height - 1)
    return _section(_rule(width, "sample", f"step {log.step:,}"), lines, height)


def _text(log: SampleLog, console: Console, width: int, height: int) -> list[Text]:
    """The beginning of a sample: blank lines left out, the prompt marked, wrapped to `width`."""
    prompt, text = (clean(part, keep="\n") for part in (log.prompt, log.text[: width * height]))
    lines: list[Text] = []
    for part in Text.assemble((prompt, "cyan"), text).split("\n"):
        if part.plain.strip() and len(lines) < height:
            lines += part.wrap(console, width)
    return [Text.assemble(" ", line) for line in lines[:height]]


def _event(tally: RunSummary) -> Text:
    line, style = list(tally.events.values())[-1] if tally.events else ("", "")
    return Text(f" {line}", style)


def _footer(info: RunInfo, width: int) -> Text:
    saves = Text.assemble((" saves to ", "dim"), clean(info.saves))
    return _ends(saves, Text.assemble("Ctrl-C", (" saves and stops ", "dim")), width)


def summary(tally: RunSummary, console: Console) -> list[Text]:
    """What stays on the terminal: the outcome, the last sample, notes and saved files."""
    facts = outcome(tally)
    lines = [Text.assemble((f" {name:22}", "dim"), (value, "bold")) for name, value in facts]
    if lines:
        lines.insert(0, _rule(console.width, "mlxgpt train", tally.info.recipe))
    if tally.sample:
        lines.append(_rule(console.width, "sample", f"step {tally.sample.step:,}"))
        lines += _text(tally.sample, console, console.width - 2, 6)
    return lines + [Text(line, style) for line, style in tally.events.values()]
