"""The live screen of a run.

It owns the terminal during the run and draws in at most 1 % of the time. Text from outside is never
interpreted as markup.
"""

from __future__ import annotations

import os
import time

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from mlx_randygpt.palette import TRAINING, VALIDATION
from mlx_randygpt.screen.curve import Frame, draw, frame
from mlx_randygpt.screen.plain import PlainLog
from mlx_randygpt.screen.run_summary import (
    Clock,
    Event,
    RunInfo,
    RunSummary,
    Urgency,
    numbers,
    outcome,
)
from mlx_randygpt.training.reports import EarlyLog, EarlySampleLog, EvalLog, Report, SampleLog
from mlx_randygpt.words import clean_text, format_clock, wrap_words

MIN_SECONDS = 0.25  # between two redraws
RENDER_SHARE = 0.01  # of the time that drawing can take
BESIDE_COLUMNS = 110  # from this width on, the sample is beside the curve
TILE_COLUMNS = 80  # from this width on, the numbers are in tiles
# Columns of a tile at width 80 (up to 1.5 times as many), and the colour of its line in the curve.
TILE_STYLES = ((15, TRAINING[0]), (18, VALIDATION[0]), (16, ""), (15, ""), (15, ""))
EVENT_STYLES = {
    Urgency.SAVED: "green",
    Urgency.NOTE: "bold",
    Urgency.WARNING: "magenta",
    Urgency.ERROR: "red",
}
MAX_NOTICES = 4  # rows of messages that stay
ENOUGH, ENOUGH_CURVE = 18, 12  # rows to share out, and those of the curve; more go to samples
SURE_EVENTS = 3  # rows of messages and saved files that come before the sample
SURE_NOTES = 2  # the same, with a sample, if they are only notes and files
ENOUGH_SAMPLE = 5  # rows of a sample that come before more notes
RISING = "red"  # the colour of a validation loss above the one before
ABOVE = "▴"  # in the top row: a validation loss above the curve
AXIS = 9  # columns left of the curve
SUMMARY = 23  # columns left of the values of the summary
# Sections with their minimum rows, the most important first; of events and facts some rows can do.
SECTIONS = (
    ("progress", 1),
    ("numbers", 4),
    ("footer", 1),
    ("curve", 5),
    ("header", 1),
    ("event", 1),
    ("sample", 3),
    ("facts", 3),
    ("gap", 1),
)


class Dashboard:
    """A screen that redraws itself when a report comes and a redraw is due; it leaves a summary."""

    def __init__(self, info: RunInfo, console: Console, clock: Clock = time.monotonic) -> None:
        self._run = RunSummary(info, clock)
        self._console = console
        self._clock = clock
        self._due_at = 0.0
        # The alternate screen, because resizing the window would tear the lines on the main one.
        self._live = Live(
            self,
            console=console,
            screen=True,
            auto_refresh=False,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def __enter__(self) -> Dashboard:
        self._live.start()
        self._draw()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()
        for line in summary(self._run, self._console):
            self._console.print(line, soft_wrap=True)  # a path is whole when it is copied

    def show(self, report: Report) -> None:
        """Add a report; redraw if it is due, or for an evaluation or a sample."""
        self._run.add(report)
        if isinstance(report, EvalLog | SampleLog | EarlyLog) or self._clock() >= self._due_at:
            self._draw()

    def note(self, text: str) -> None:
        """Show a message at once, and again in the summary."""
        self._run.add_event(text, Event(clean_text(text)))
        self._draw()

    def release_terminal(self) -> None:
        """Leave the alternate screen without drawing, for a signal handler about to exit."""
        os.write(self._console.file.fileno(), b"\x1b[?1049l\x1b[?25h")

    def reclaim_terminal(self) -> None:
        """Enter the alternate screen after `release_terminal`; the next report draws all of it."""
        os.write(self._console.file.fileno(), b"\x1b[?1049h\x1b[?25l")

    def _draw(self) -> None:
        started = self._clock()
        self._live.refresh()
        ended = self._clock()
        self._due_at = ended + max(MIN_SECONDS, (ended - started) / RENDER_SHARE)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from screen(self._run, console, options.max_width, options.height or console.height)


def make_view(
    info: RunInfo, console: Console, plain: bool = False, clock: Clock = time.monotonic
) -> Dashboard | PlainLog:
    """Return the live screen if `console` is a terminal that can show it, else the plain log."""
    # Ask the file itself: with FORCE_COLOR, rich takes a pipe for a terminal.
    capable = console.file.isatty() and console.is_terminal and not console.is_dumb_terminal
    if plain or not capable or console.options.ascii_only:
        return PlainLog(info, console.file, clock)
    return Dashboard(info, console, clock)


def screen(run: RunSummary, console: Console, width: int, height: int) -> list[Text]:
    """Return the whole screen, at most `height` lines of at most `width` columns."""
    beside = width >= BESIDE_COLUMNS
    n_events = len(_events(run, console, width, MAX_NOTICES + 1))
    calm = run.sample and all(event.urgency <= Urgency.NOTE for event in run.events.values())
    least = {"event": min(n_events, SURE_NOTES if calm else SURE_EVENTS)}
    more = {"sample": ENOUGH_SAMPLE if run.sample else 0, "event": n_events}
    rows = _rows(height, width, least, more)
    curve_width = width * 11 // 20 if beside else width
    curve = _curve(run, curve_width, rows["curve"])
    sample_width = width - curve_width - 2 if beside else width
    sample = _sample(run, console, sample_width, rows["sample"])
    if beside:
        for line, right in zip(curve, sample, strict=False):
            line.align("left", curve_width + 2)
            line.append_text(right)
        sample = []
    lines = [
        *[_header(run.info, width)] * rows["header"],
        *_facts(run.info, width)[: rows["facts"]],
        _progress(run, width),
        *[Text()] * rows["gap"],
        *_numbers(run, width)[: rows["numbers"]],
        *curve,
        *sample,
        *_events(run, console, width, rows["event"]),
        *[_footer(run.info, width)] * rows["footer"],
    ]
    for line in lines:
        line.no_wrap = True
        line.truncate(width, overflow="ellipsis")
    return lines[:height]


def _rows(height: int, width: int, least: dict[str, int], more: dict[str, int]) -> dict[str, int]:
    """Return the rows of each section: the minimum, up to `more` in that order, and all the rest.

    The rest goes to the curve, and below BESIDE_COLUMNS to the samples too. `least` takes the place
    of a minimum in SECTIONS.
    """
    beside = width >= BESIDE_COLUMNS
    rows: dict[str, int] = {}
    for name, minimum in SECTIONS:
        n_rows = minimum + (name == "numbers" and width < TILE_COLUMNS)
        n_rows = max(n_rows, least.get(name, 0))
        if name in ("event", "facts"):
            n_rows = min(n_rows, height)
        rows[name] = n_rows if n_rows <= height and not (name == "sample" and beside) else 0
        height -= rows[name]
    for name, n_rows in more.items():
        extra = max(min(n_rows - rows[name], height), 0) if rows[name] else 0
        rows[name] += extra
        height -= extra
    n_curve = height
    if rows["sample"]:
        n_curve = min((height * 2 + 2) // 3, ENOUGH_CURVE + max(height - ENOUGH, 0) // 3)
        rows["sample"] += height - n_curve
    rows["curve"] += n_curve if rows["curve"] else 0
    if beside:
        rows["sample"] = rows["curve"]
    return rows


def _rule(width: int, title: str, aside: Text | str = "") -> Text:
    head = Text.assemble(("── ", "dim"), (title, "cyan"), " ")
    tail = Text.assemble(" ", aside, (" ──", "dim")) if aside else Text()
    line = Text("─" * max(width - head.cell_len - tail.cell_len, 0), "dim")
    return head.append_text(line).append_text(tail)


def _ends(left: Text, right: Text, width: int) -> Text:
    """Put `left` at the left edge and `right` at the right; cut `left` if there is no room."""
    left.truncate(max(width - right.cell_len - 1, 0), overflow="ellipsis", pad=True)
    return left.append(" ").append_text(right)


def _header(info: RunInfo, width: int) -> Text:
    start = f"resumed at {info.start_step:,}, " if info.start_step else ""
    return _rule(width, "mlxgpt train", f"{start}{info.recipe} recipe → {clean_text(info.out)}")


def _facts(info: RunInfo, width: int) -> list[Text]:
    facts = (("model", info.model), ("data", info.data), ("backend", info.backend))
    n_name = 9 if width >= TILE_COLUMNS else 0
    return [
        Text.assemble((f" {name:{n_name}}"[: n_name + 1], "dim"), clean_text(fact))
        for name, fact in facts
    ]


def _progress(run: RunSummary, width: int) -> Text:
    share = min(run.step / run.info.iters, 1.0)
    head = f" step {run.step:,} of {run.info.iters:,} "
    percent, left = f" {int(share * 100):3} %", f"{format_clock(run.left)} left"
    for tail in (f"{percent}  {format_clock(run.elapsed)} elapsed, {left} ", f"{percent}  {left} "):
        n_bar = width - len(head) - len(tail)
        if n_bar >= 12:
            break
    n_done = int(n_bar * share)
    bar = (("━" * n_done, "cyan"), ("─" * (n_bar - n_done), "dim"))
    return Text.assemble((head, "bold"), *bar, tail)


def _numbers(run: RunSummary, width: int) -> list[Text]:
    colours = [colour for _, colour in TILE_STYLES]
    if run.val_rises:
        colours[1] = RISING
    styles = [f"bold {colour}" for colour in colours]
    if width < TILE_COLUMNS:
        return [
            Text.assemble((f" {name:14}", "dim"), (f"{value:10} ", style), ", ".join(details))
            for (name, value, *details), style in zip(numbers(run), styles, strict=False)
        ]
    rows = [Text(" ") for _ in range(4)]
    for number, (columns, _), style in zip(numbers(run), TILE_STYLES, styles, strict=False):
        tile = int(columns * min(width / TILE_COLUMNS, 1.5))
        for i, row in enumerate(rows):
            row.append(f"{number[i] if i < len(number) else '':{tile}}", ("dim", style, "", "")[i])
    return rows


def _section(rule: Text, lines: list[Text], height: int) -> list[Text]:
    """Return a rule and the lines below it, padded or cut to `height`."""
    return [rule, *lines, *(Text() for _ in range(height))][:height]


def _curve(run: RunSummary, width: int, height: int) -> list[Text]:
    legend = Text.assemble(("─", TRAINING[0]), " training  ", ("●", VALIDATION[0]), " validation")
    rule = _rule(width, "loss", legend)
    points, marks = run.losses.points, run.val_losses.points
    if len(points) < 2 or not height:
        waiting = Text(" The curve starts with the second step.", "dim")
        return _section(rule, [waiting], height)
    steps = (run.first_step, run.step)
    area = frame(points, marks, steps, (max(width - AXIS - 1, 1), height - 2))
    rows = [Text(line, TRAINING[0]) for line in draw(points, area)]
    for x, y in map(area.dot, marks):
        row, column, mark = rows[max(y, 0) // 4], x // 2, "●" if y >= 0 else ABOVE
        rows[max(y, 0) // 4] = Text.assemble(row[:column], (mark, VALIDATION[0]), row[column + 1 :])
    labelled = [Text.assemble((_label(area, i), "dim"), row) for i, row in enumerate(rows)]
    first = Text(" " * AXIS + f"step {area.first:,}", "dim")
    return [rule, *labelled, _ends(first, Text(f"{area.last:,} ", "dim"), width)]


def _label(area: Frame, row: int) -> str:
    """Return the axis left of one row, with values at the top, the middle and the bottom."""
    if row not in (0, area.height // 2, area.height - 1):
        return " " * (AXIS - 1) + "│"
    return f"{area.value(row):{AXIS - 2}.{2 if area.high - area.low >= 0.1 else 4}f} ┤"


def _sample(run: RunSummary, console: Console, width: int, height: int) -> list[Text]:
    log, when = run.sample, run.next_time("sample")
    if log is None:
        waiting = f" None yet; the first {when}." if when else " None."
        return _section(_rule(width, "sample"), [Text(waiting, "dim")], height)
    aside = ", next ".join(filter(None, (_origin(log), when)))
    lines = _text(log, console, width - 2, height - 1)
    for earlier in list(run.samples)[-2::-1]:
        n_left = height - len(lines) - 3
        if n_left < 2:
            break
        lines.append(Text(f" {_origin(earlier)}", "dim"))
        lines += _text(earlier, console, width - 2, n_left)
    return _section(_rule(width, "sample", aside), lines, height)


def _origin(log: SampleLog | EarlySampleLog) -> str:
    return f"{'early, ' if isinstance(log, EarlySampleLog) else ''}step {log.step:,}"


def _text(log: SampleLog | EarlySampleLog, console: Console, width: int, height: int) -> list[Text]:
    """Return the start of a sample without blank lines, prompt coloured, wrapped to `width`."""
    prompt, text = (
        clean_text(part, keep="\n") for part in (log.prompt, log.text[: width * height])
    )
    lines: list[Text] = []
    for part in Text.assemble((prompt, "cyan"), text).split("\n"):
        if part.plain.strip() and len(lines) < height:
            lines += part.wrap(console, width)
    return [Text.assemble(" ", line) for line in lines[:height]]


def _events(run: RunSummary, console: Console, width: int, height: int) -> list[Text]:
    """Return the messages that stay, the most urgent first, then the newest saved file."""
    stay = [event for event in reversed(run.events.values()) if event.urgency > Urgency.SAVED]
    files = [item for item in run.events.items() if item[1].urgency is Urgency.SAVED]
    saved = [_saved(path, event.line, width - 1) for path, event in files[-1:]]
    n_rows = max(height - len(saved), 1)
    lines: list[Text] = []
    for event in sorted(stay, key=lambda event: -event.urgency):
        wrapped = Text(event.line, EVENT_STYLES[event.urgency]).wrap(console, max(width - 1, 1))
        n_left = n_rows - len(lines)
        lines += wrapped[:n_left]
        if len(wrapped) > n_left > 0:
            lines[-1].truncate(max(width - 2, 1))
            lines[-1].append("…")
    lines += [Text(line, EVENT_STYLES[Urgency.SAVED]) for line in saved]
    return [Text.assemble(" ", line) for line in lines[:height]] or [Text()] * min(height, 1)


def _saved(path: str, line: str, width: int) -> str:
    """Return the line about a saved file, without the folder if it is too long."""
    folder = clean_text(path)[: -len(os.path.basename(path))]
    return line if cell_len(line) <= width else line.replace(folder, "", 1)


def _footer(info: RunInfo, width: int) -> Text:
    saves = Text.assemble((" saves to ", "dim"), clean_text(info.saves))
    if width < TILE_COLUMNS:
        saves = Text.assemble((" saves ", "dim"), clean_text(info.saves.rpartition(", ")[2]))
    return _ends(saves, Text.assemble("Ctrl-C", (" saves and stops ", "dim")), width)


def summary(run: RunSummary, console: Console) -> list[Text]:
    """Return what remains on the terminal: outcome, last sample, messages and saved files."""
    lines = []
    for name, value in outcome(run):
        for i, part in enumerate(wrap_words(value, max(console.width - SUMMARY, 1))):
            head = f" {'' if i else name:{SUMMARY - 1}}"
            lines.append(Text.assemble((head, "dim"), (part, "bold")))
    if lines:
        lines.insert(0, _rule(console.width, "mlxgpt train", run.info.recipe))
    if run.sample:
        lines.append(_rule(console.width, "sample", _origin(run.sample)))
        lines += _text(run.sample, console, console.width - 2, 6)
    for event in run.events.values():
        parts = wrap_words(event.line, console.width)
        lines += [Text(part, EVENT_STYLES[event.urgency]) for part in parts]
    return lines
