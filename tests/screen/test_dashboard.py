"""The screen and the plain log: what they show, what they cost, what they never let through."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from mlx_randygpt.screen.curve import Curve, Frame, draw, frame
from mlx_randygpt.screen.dashboard import Dashboard, make_view, screen
from mlx_randygpt.screen.history import History
from mlx_randygpt.screen.plain import PlainLog
from mlx_randygpt.screen.run_summary import Event, RunInfo, RunSummary, Urgency, save_line
from mlx_randygpt.training.evaluation import overfitting
from mlx_randygpt.training.reports import (
    EarlyEvalLog,
    EarlySampleLog,
    EndLog,
    EvalLog,
    NoteLog,
    Report,
    SampleLog,
    SaveLog,
    StepLog,
)
from mlx_randygpt.words import clean_text, format_clock

INFO = RunInfo(
    model="1.2 M parameters, 6 layers × 8 heads × 128, context 64",
    data="data/shakespeare.txt: 1,115,394 characters, vocabulary 68",
    backend="NumPy on 2 threads (MLX has no GPU here)",
    recipe="modern",
    saves="checkpoints/checkpoint.safetensors, every 60s",
    out="checkpoints",
    iters=1000,
)
EARLY = frozenset({"evaluation", "sample"})
SAMPLE = SampleLog(500, "ROMEO:", "\n[red]x[/] says\x1b[31m\x07 he\t\u202e, 東京 " * 40)
CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


class Now:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def step(n: int, loss: float = 2.0) -> StepLog:
    return StepLog(
        n, loss, 3.91e-2, 0.42, n * 4096, 4096 * 5.2, n / 5.2, 312_000_000, loss / 0.6931
    )


def evaluation(n: int, loss: float, best: float, best_step: int) -> EvalLog:
    return EvalLog(n, loss, loss / math.log(2), best, best_step, 1.0)


def reports(n: int = 600) -> Iterator[Report]:
    for i in range(1, n + 1):
        yield step(i, 1.5 + 2.7 * math.exp(-i / 100))
        if i % 100 == 0:
            yield evaluation(i, 1.7 + 1 / i, 1.7 + 1 / i, i)
            yield SaveLog(i, "checkpoints/checkpoint_best.safetensors", True, 1.7 + 1 / i)
    yield SAMPLE


class Screen(io.StringIO):
    """A file that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def terminal(width: int = 80, height: int = 24, **environ: str) -> Console:
    environ = {"TERM": "xterm-256color", **environ}
    return Console(file=Screen(), width=width, height=height, _environ=environ)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def tally_of(*some: Report) -> RunSummary:
    tally = RunSummary(INFO, Now())
    for report in some:
        tally.add(report)
    return tally


def shown(tally: RunSummary, width: int = 80, height: int = 24) -> list[str]:
    """The screen as a terminal of that size receives it, without styles."""
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    for line in screen(tally, console, width, height):
        console.print(line)
    return written(console).splitlines()


def plain(*some: Report, clock: Callable[[], float] | None = None) -> list[str]:
    out = io.StringIO()
    with PlainLog(INFO, out, clock or Now()) as log:
        for report in some:
            log.show(report)
    return out.getvalue().splitlines()


def test_plain_lines_hold_no_control_codes() -> None:
    log = plain(*reports(), SaveLog(600, "a\x1b[2Jb", False, math.nan, "disk\nfull"))
    assert not CONTROL.search("\n".join(log))
    assert all(line.isprintable() for line in log)


def test_plain_step_and_eval_lines_read_as_documented() -> None:
    log = plain(step(250, 1.9231), evaluation(250, 1.821, 1.821, 250))
    assert (
        "step 250/1000 | loss 1.9231 | 2.77 bits/byte | lr 3.91e-02 | grad 0.42 | "
        "21,299 tok/s | 5.2 it/s | 00:00 elapsed | 02:24 left" in log
    )
    assert "eval 250 | val loss 1.8210 | perplexity 6.18 | 2.63 bits/byte | best" in log


def test_plain_prints_first_and_last_step_and_one_a_second() -> None:
    now, out = Now(), io.StringIO()
    with PlainLog(INFO, out, now) as log:
        for i in range(1, 41):
            log.show(step(i))
            now.seconds += 0.125
    steps = [line.split("/")[0] for line in out.getvalue().splitlines() if line.startswith("step ")]
    assert steps == ["step 1", "step 9", "step 17", "step 25", "step 33", "step 40"]


def test_plain_indents_samples() -> None:
    assert {"    ROMEO:", "    [b]Away[/]"} <= set(plain(SampleLog(5, "ROMEO:", "\n[b]Away[/]")))


def test_saves_keep_their_spelling() -> None:
    newest = SaveLog(89, "out/checkpoint.safetensors", False, math.nan)
    best = SaveLog(75, "out/checkpoint_best.safetensors", True, 1.5)
    assert save_line(newest) == "✓ Saved out/checkpoint.safetensors (iter 89)"
    assert save_line(best) == "✓ Saved out/checkpoint_best.safetensors (best loss 1.5000 @75)"


def test_a_failed_save_says_why() -> None:
    line = save_line(SaveLog(89, "out/c.safetensors", False, math.nan, "No space left on device"))
    assert "could not save" in line.lower()
    assert "No space left" in line


@pytest.mark.parametrize("width", [1, 20, 40, 60, 80, 109, 120, 200])
@pytest.mark.parametrize("height", [1, 3, 10, 16, 24, 30, 50])
def test_the_screen_stays_inside_the_terminal(width: int, height: int) -> None:
    for tally in (tally_of(), tally_of(step(1)), tally_of(*reports())):
        lines = shown(tally, width, height)
        assert len(lines) <= height
        assert max(Console(width=999).render_str(x, markup=False).cell_len for x in lines) <= width


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_24_rows_show_every_number(width: int) -> None:
    text = "\n".join(shown(tally_of(*reports()), width, 24))
    for part in ("step 600 of 1,000", "60 %", "perplexity 5.48", "bits/byte", "at step 600",
                 "3.91e-02", "gradient 0.42", "tok/s", "5.2 steps/s", "312 MB", "●", "ROMEO:",
                 "✓ Saved", "Ctrl-C saves and stops"):  # fmt: skip
        assert part in text


def test_notes_give_way_to_a_sample_and_warnings_do_not() -> None:
    run = tally_of(SampleLog(500, "ROMEO:", "".join(f"\nline {n}" for n in range(9))))
    for line in ("first", "second", "third", "fourth"):
        run.add_event(line, Event(f"{line} note"))
    text = "\n".join(shown(run, 80, 24))
    assert all(part in text for part in ("fourth note", "line 2"))
    assert "first note" not in text
    assert "first note" in "\n".join(shown(run, 80, 40))
    for line in ("first", "second"):
        run.add_event(line, Event(f"{line} warning", Urgency.WARNING))
    text = "\n".join(shown(run, 80, 24))
    assert all(part in text for part in ("first warning", "second warning", "line 1"))


@pytest.mark.parametrize("width", [80, 120])
def test_markup_in_a_sample_is_shown_as_it_is(width: int) -> None:
    text = "\n".join(shown(tally_of(*reports()), width))
    assert "[red]x[/] says" in text
    assert not CONTROL.search(text)


def test_clean_replaces_what_a_terminal_could_act_on() -> None:
    assert clean_text("a\x1b[2J\tb\u202e\n\x9b") == "a�[2J b� �"
    assert clean_text("a\nb", keep="\n") == "a\nb"


def test_a_million_steps_keep_bounded_points() -> None:
    curve = Curve(256)
    for i in range(1, 1_000_001):
        curve.add(i, i / 1e6)
    steps = [x for x, _ in curve.points]
    assert 128 <= len(steps) <= 256
    assert steps == sorted(steps)
    assert steps[0] < 8192
    assert max(abs(x / 1e6 - y) for x, y in curve.points) < 1e-9  # pairs are averaged, not dropped


def test_events_are_bounded_and_the_newest_of_a_path_is_kept() -> None:
    tally = tally_of(*(SaveLog(i, f"c-{i % 50}", False, math.nan) for i in range(1000)))
    assert len(tally.events) == 10
    assert list(tally.events.values())[-1] == Event("✓ Saved c-49 (iter 999)", Urgency.SAVED)


def test_a_line_is_drawn_from_corner_to_corner() -> None:
    frame = Frame(first=0, last=10, low=0.0, high=1.0, width=2, height=1)
    assert draw([(0, 1.0), (10, 0.0)], frame) == ["⠑⢄"]


def test_a_spike_costs_no_more_than_the_height() -> None:
    frame = Frame(first=0, last=10, low=0.0, high=1.0, width=2, height=1)
    assert frame.dot((5, 1e30))[1] == -1
    assert draw([(0, 0.0), (5, 1e30), (10, 0.0)], frame)[0].strip()


def test_reports_out_of_order_do_not_break_the_screen() -> None:
    late = tally_of(step(500), step(400), step(501), evaluation(900, 1.0, 1.0, 900))
    assert "●" in "\n".join(shown(late))


def test_a_nan_loss_is_shown_and_not_averaged() -> None:
    tally = tally_of(step(1, 3.0), step(2, math.nan), step(3, 3.0))
    assert tally.loss == 3.0
    assert "raw nan" in "\n".join(shown(tally_of(step(1, 3.0), step(2, math.nan))))


def test_drawing_stays_within_one_percent(monkeypatch: pytest.MonkeyPatch) -> None:
    now, drawn = Now(), []
    dashboard = Dashboard(INFO, terminal(), now)

    def refresh() -> None:
        drawn.append(now.seconds)
        now.seconds += 0.01

    monkeypatch.setattr(dashboard._live, "refresh", refresh)
    for i in range(1, 1001):
        dashboard.show(step(i))
        now.seconds += 0.01
    assert 9 <= len(drawn) <= 11  # 10 s and a drawing of 10 ms: one a second
    dashboard.show(evaluation(1000, 2.0, 2.0, 1000))
    dashboard.show(SAMPLE)
    assert drawn[-1] == now.seconds - 0.01
    assert drawn[-2] == drawn[-1] - 0.01


def test_a_run_of_few_steps_is_as_fast_as_its_steps() -> None:
    tally = RunSummary(INFO, Now())
    for n, seconds in ((1, 1.0), (2, 1.001)):  # the first is told when the second is taken
        tally.add(replace(step(n), seconds=seconds))
    assert tally.tokens_per_second == step(2).tokens_per_second


def test_the_summary_holds_the_outcome_and_what_was_said() -> None:
    console = terminal()
    with Dashboard(INFO, console, Now()) as dashboard:
        for report in reports():
            dashboard.show(report)
        dashboard.note("Interrupted at iteration 600. Saving checkpoint...")
        dashboard.show(evaluation(600, 1.9, 1.7017, 600))
        dashboard.show(SaveLog(600, "checkpoints/checkpoint.safetensors", False, math.nan))
    left = re.sub(r"\x1b\[[?\d;]*[a-zA-Z]", "", written(console).split("\x1b[?1049l")[1])
    for part in ("600 of 1,000", "1.7017 at step 600", "21,299 tokens/s", "[red]x[/]"):
        assert part in left
    lines = left.splitlines()
    interrupted = lines.index("Interrupted at iteration 600. Saving checkpoint...")
    assert lines[interrupted + 1] == "✓ Saved checkpoints/checkpoint.safetensors (iter 600)"


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (140, 45)])
def test_every_validation_loss_is_inside_the_chart(size: tuple[int, int]) -> None:
    far = [evaluation(n, 3.0 + n / 100, 3.0, 0) for n in (100, 200, 300, 400)]
    run = tally_of(*(step(n, 4 * math.exp(-n / 50)) for n in range(1, 401)), *far)
    picture = "\n".join(shown(run, *size)).split("loss")[-1]
    assert picture.count("●") == 1 + len(far)  # and the legend


def test_an_untrained_validation_loss_may_lie_above_the_chart() -> None:
    area = frame([(n, 2.0) for n in range(10)], [(0, 4.5), (5, 3.0)], (0, 10), (20, 5))
    assert (area.low, area.high) == (2.0, 3.0)
    run = tally_of(*(step(n, 2.0) for n in range(1, 11)), evaluation(0, 4.5, 4.5, 0))
    assert "▴" in "\n".join(shown(run))


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (140, 45)])
def test_a_warning_stays_whatever_is_saved_after_it(size: tuple[int, int]) -> None:
    run = tally_of(step(1), NoteLog(9, "Overfitting: " + "a long reason " * 12))
    for i in range(50):
        run.add(SaveLog(i, f"c-{i}", False, math.nan))
        run.add(step(i))
    text = "\n".join(shown(run, *size))
    assert "Overfitting" in text
    assert "c-49" in text
    assert ("…" in text) == (size[0] == 60)  # the rest of the reason


@pytest.mark.parametrize("size", [(60, 20), (80, 24), (140, 45)])
def test_nothing_that_matters_is_cut(size: tuple[int, int]) -> None:
    warning = overfitting(0.123, 4.567, 3, 12_750)
    info = replace(INFO, out="runs/long", saves="runs/long/checkpoint.safetensors, every 60s")
    run = RunSummary(replace(info, model=INFO.model.replace("1.2 M", "106,112")), Now())
    path = "runs/a-folder-with-a-long-name/checkpoint_best.safetensors"
    for report in (step(1, 4.0), step(2, 4.0), evaluation(2, 4.8, 2.5, 1), NoteLog(9, warning),
                   SaveLog(2, path, True, 2.5071), SAMPLE):  # fmt: skip
        run.add(report)
    lines = shown(run, *size)
    text = " ".join(" ".join(lines).split())
    for part in (warning, "context 64" if size[0] > 60 else "106,112", "6.92 bits/byte",
                 "(best loss 2.5071 @2)", "every 60s", "Ctrl-C saves and stops",
                 "[red]x"):  # fmt: skip
        assert part in text


def test_a_validation_loss_says_where_it_comes_from() -> None:
    now = Now()
    run = RunSummary(replace(INFO, eval_every=250, sample_every=500, early=EARLY), now)
    run.add(evaluation(0, 4.6, 4.6, 0))
    text = "\n".join(shown(run))
    for part in ("at the start", "next in 00:20", "None yet; the first in 00:20."):
        assert part in text
    run.add(step(1))
    now.seconds = 12.0
    assert "next in 00:08" in "\n".join(shown(run))
    run.add(EarlyEvalLog(40, 2.25, 3.2, 2500, 20.0))
    run.add(EarlySampleLog(40, "ROMEO:", "\nIs it so?", 20.0))
    for size in ((60, 20), (80, 24), (140, 45)):
        text = "\n".join(shown(run, *size))
        for part in ("2.2500", "early, step 40", "2,500 tokens", "next in 00:20", "Is it so?"):
            assert part in text
    run.add(replace(step(245), tokens_per_second=4096.0))  # one step a second
    run.add(evaluation(250, 2.0, 2.0, 250))
    run.add(replace(step(251), tokens_per_second=4096.0))
    text = "\n".join(shown(run))
    assert "2.0000" in text
    assert "next in 04:09" in text  # the evaluation of step 500
    assert "early, step 40, next in 00:20" in text  # the sample is still early


def test_the_last_evaluation_announces_no_other() -> None:
    run = RunSummary(replace(INFO, iters=1), Now())
    run.add(step(1))
    assert run.next_time("evaluation") == ""
    assert "next" not in "\n".join(shown(run))


def test_plain_early_lines_read_as_documented() -> None:
    early = EarlySampleLog(85, "ROMEO:", "\nAy", 20.4)
    assert plain(EarlyEvalLog(85, 2.2295, 3.21, 2500, 20.4), early)[4:] == [
        "early eval 85 | val loss 2.2295 | perplexity 9.30 | 3.21 bits/byte | 2,500 tokens | "
        "next in 00:20",
        "early sample 85",
        "    ROMEO:",
        "    Ay",
    ]


def test_a_failed_save_comes_before_a_warning_until_it_succeeds() -> None:
    failed = SaveLog(5, "c", False, math.nan, "disk full")
    run = tally_of(step(1), failed, NoteLog(9, "Overfitting"), SaveLog(9, "d", False, math.nan))
    text = "\n".join(shown(run, 80, 40))
    assert -1 < text.index("disk full") < text.index("Overfitting") < text.index("Saved d")
    run.add(SaveLog(10, "c", False, math.nan))
    assert "disk full" not in "\n".join(shown(run, 80, 40))


@pytest.mark.parametrize("width", [60, 80])
def test_a_rising_validation_loss_is_red(width: int) -> None:
    for losses, red in (((2.0, 1.9), False), ((2.0, 1.9, 1.95), True), ((2.0, 2.1, 2.05), False)):
        evaluations = [evaluation(n, loss, 1.9, 1) for n, loss in enumerate(losses)]
        lines = screen(tally_of(step(1), *evaluations), terminal(), width, 24)
        styles = {span.style for line in lines for span in line.spans}
        assert ("bold red" in styles) == red


def test_a_resumed_run_shows_what_it_did_before() -> None:
    past = History(
        losses=tuple((n, 4.0 - n / 200) for n in range(1, 301)),
        evaluations=(evaluation(0, 4.5, 4.5, 0), evaluation(300, 3.1, 3.1, 300)),
    )
    info = replace(INFO, start_step=300, history=past)
    text = "\n".join(shown(RunSummary(info, Now())))
    assert text.count("●") == 2  # the legend and step 300
    for part in ("3.1000", "at step 300", "step 300 of", "step 0"):
        assert part in text
    run = RunSummary(info, Now())
    run.add(step(301, 2.5))
    assert run.loss == pytest.approx(2.5, abs=0.1)  # smoothed with what came before
    assert "bold red" not in {
        span.style for line in screen(run, terminal(), 80, 24) for span in line.spans
    }


def test_an_early_stop_is_named_in_the_outcome() -> None:
    assert "steps: 9 of 1,000, stopped early: no new best" in plain(step(9), EndLog(9, "patience"))


def test_restore_leaves_the_other_screen_without_drawing(tmp_path: Path) -> None:
    with (tmp_path / "tty").open("w") as file:
        Dashboard(INFO, Console(file=file), Now()).release_terminal()
    assert (tmp_path / "tty").read_bytes() == b"\x1b[?1049l\x1b[?25h"


def test_no_color_is_honoured() -> None:
    console = terminal(NO_COLOR="1")
    with Dashboard(INFO, console, Now()) as dashboard:
        for report in reports():
            dashboard.show(report)
    codes = {int(c) for m in re.findall(r"\x1b\[([\d;]+)m", written(console)) for c in m.split(";")}
    assert codes <= {0, 1, 2}  # bold and dim remain


def test_time_left_counts_from_the_first_report_of_a_resumed_run() -> None:
    now = Now()
    tally = RunSummary(INFO, now)
    now.seconds = 30.0  # compiling
    tally.add(step(500))
    now.seconds = 50.0
    tally.add(step(600))
    assert (tally.elapsed, tally.left) == (50.0, 80.0)
    assert [format_clock(s) for s in (0, 59.6, 3730, math.nan)] == [
        "00:00", "01:00", "1:02:10", "--:--",
    ]  # fmt: skip


def test_a_pipe_gets_plain_lines_and_a_terminal_the_screen() -> None:
    assert isinstance(make_view(INFO, terminal(), plain=False), Dashboard)
    assert isinstance(make_view(INFO, terminal(), plain=True), PlainLog)
    assert isinstance(make_view(INFO, terminal(TERM="dumb"), plain=False), PlainLog)
    pipe = Console(file=io.StringIO(), _environ={"FORCE_COLOR": "1"})
    assert isinstance(make_view(INFO, pipe, plain=False), PlainLog)


@pytest.mark.parametrize(
    ("loss", "reading"),
    [(3.0, "hardly a word"), (2.3, "invented"), (1.8, "no sense"), (1.4, "little sense")],
)
def test_the_end_says_what_the_loss_means(loss: float, reading: str) -> None:
    lines = plain(step(9), evaluation(9, loss + 0.1, loss, 7), EndLog(9, "done"))
    unsure = f"that is: as unsure as among {math.exp(loss):.1f} equally likely tokens"
    assert unsure in lines
    assert any(
        reading in line and f"({loss / math.log(2):.2f} bits/byte)" in line for line in lines
    )


@pytest.mark.parametrize(("width", "height"), [(80, 40), (140, 45)])
def test_a_tall_screen_is_used_to_its_last_row(width: int, height: int) -> None:
    samples = [SampleLog(n, "ROMEO:", f" Line of {n}." * 20) for n in range(100, 900, 100)]
    lines = shown(tally_of(*reports(), *samples), width, height)
    assert len(lines) == height
    assert "Ctrl-C saves and stops" in lines[-1]
    text = "\n".join(lines)
    for n in (800, 700):
        assert f"Line of {n}." in text
    assert text.index("Line of 800.") < text.index("Line of 700.")
