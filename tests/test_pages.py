"""Test the written pages and the docs site in a real browser: by keyboard, on a phone, in the dark.

Skipped where Chromium or playwright is missing; `.ci/run` installs both.
"""

from __future__ import annotations

import functools
import http.server
import json
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("playwright")
pytest.importorskip("axe_playwright_python")

from browsing import SCREENS, each_scheme, each_screen, excess_width, opened, problems
from playwright.sync_api import Browser, expect

from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.progress import Progress
from mlx_randygpt.training.reports import EvalLog, StepLog

pytestmark = pytest.mark.slow


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(built_docs: Path) -> Iterator[dict[str, str]]:
    """The docs, served: the URL of each page by its path."""
    handler = functools.partial(Quiet, directory=str(built_docs))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        paths = [page.relative_to(built_docs).as_posix() for page in built_docs.rglob("*.html")]
        yield {path: f"http://127.0.0.1:{server.server_port}/{path}" for path in sorted(paths)}
        server.shutdown()
        thread.join()


@pytest.fixture
def folder(make_run: Callable[..., Any], text: str, tmp_path: Path) -> Path:
    """The folder of a run with a model, metrics and samples."""
    run, backend = make_run("modern")
    (tmp_path / "text.txt").write_text(text)
    data = {**run.data, "paths": [str(tmp_path / "text.txt")]}
    tokenizer = run.tokenizer.to_json()
    saved = Checkpoint(run.model, run.train, Progress(), tokenizer, data, "numpy", backend.state())
    save_checkpoint(tmp_path / "checkpoint.safetensors", saved)
    logs: list[StepLog | EvalLog] = [
        StepLog(n, 1.5 + 2 / n, 0.02 - n / 9000, 0.5, 64 * n, 900.0, n / 9, 10**8, 2.2)
        for n in range(1, 101)
    ]
    logs += [EvalLog(n, 1.6 + 2 / n, 2.4, 1.6 + 2 / n, n, n / 9) for n in (25, 50, 75, 100)]
    rows = (json.dumps(metrics_row(log, 1)) + "\n" for log in logs)
    (tmp_path / "metrics.jsonl").write_text("".join(rows))
    samples = [{"step": n, "prompt": "The", "text": f" king of {n}"} for n in (50, 100)]
    (tmp_path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return tmp_path


def written(command: str, folder: Path, *more: str) -> Path:
    """The page that a command writes about the run."""
    out = folder / f"{command}.html"
    done = CliRunner().invoke(group, [command, str(folder), "-o", str(out), *more])
    assert done.exit_code == 0, done.output
    return out


@pytest.mark.parametrize("command", ["inspect", "plot"])
@each_scheme
@each_screen
def test_a_written_page_is_accessible(
    size: tuple[int, int], scheme: str, command: str, folder: Path, browser: Browser
) -> None:
    for page in opened(browser, written(command, folder).as_uri(), size, scheme):
        assert problems(page) == []
        assert excess_width(page) == 0


def objections(
    browser: Browser, url: str, size: tuple[int, int], scheme: str, *, contrast: bool = True
) -> list[str]:
    """What is wrong with a page of the docs."""
    wrong = []
    for page in opened(browser, url, size, scheme):
        wide = "[...document.querySelectorAll('.md-typeset__scrollwrap')]"
        page.wait_for_function(f"{wide}.every(box => box.hasAttribute('tabindex'))")
        wrong = problems(page, contrast=contrast) + [
            f"{excess_width(page)} pixels too wide"
        ] * excess_width(page)
    return wrong


@each_scheme
def test_every_page_of_the_docs_is_accessible(
    scheme: str, site: dict[str, str], browser: Browser
) -> None:
    """On a phone, half of the pages in each scheme; the colours, which all share, are below."""
    pages = list(site.items())[scheme == "dark" :: 2]
    found = {
        path: objections(browser, url, SCREENS[0], scheme, contrast=False) for path, url in pages
    }
    assert {path: wrong for path, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize("path", ["data/index.html", "notebook/index.html", "python/index.html"])
@each_scheme
@each_screen
def test_the_docs_are_accessible_on_any_screen(
    size: tuple[int, int], scheme: str, path: str, site: dict[str, str], browser: Browser
) -> None:
    assert objections(browser, site[path], size, scheme) == []


def test_inspect_is_read_by_keyboard(folder: Path, browser: Browser) -> None:
    for page in opened(browser, written("inspect", folder).as_uri(), SCREENS[0], "light"):
        for box, says, key in (
            ("text", "shares", "ArrowLeft"),
            ("heads", "which", "ArrowRight"),
            ("plane", "of", "ArrowRight"),
            ("strip", "there", "ArrowRight"),
        ):
            before = page.locator(f"#{says}").text_content()
            page.locator(f"#{box}").focus()
            page.keyboard.press(key)
            assert page.locator(f"#{says}").text_content() != before, box
        expect(page.locator("#which")).to_have_text("Layer 1, head 2")
        page.locator("#heads").focus()
        page.keyboard.press("ArrowDown")
        expect(page.locator("#which")).to_have_text("Layer 2, head 2")
        page.locator("#hardest .t").first.focus()
        page.keyboard.press("ArrowRight")
        expect(page.locator("#nats")).to_contain_text("nats")
        expect(page.locator("#command")).to_have_text(
            f"mlxgpt sample --checkpoint {folder}/checkpoint.safetensors"
        )


def test_inspect_shows_which_token_of_a_passage_is_meant(folder: Path, browser: Browser) -> None:
    for page in opened(browser, written("inspect", folder).as_uri(), SCREENS[0], "light"):
        for kind in ("hardest", "easiest"):
            page.locator(f"#{kind} .t").first.focus()
            expect(page.locator(f"#{kind} .now")).to_have_count(1)
            expect(page.locator("#nats")).to_be_in_viewport()
            page.keyboard.press("End")
            assert re.fullmatch(r"“.*” [\d.]{1,5} nats, .*", page.locator("#nats").inner_text())
        expect(page.locator("#hardest .now")).to_have_count(0)
        expect(page.locator("#easiest .t").first.locator("span").last).to_have_class(
            re.compile("now")
        )


def test_inspect_names_what_the_model_does_not_know(folder: Path, browser: Browser) -> None:
    out = written("inspect", folder, "--text", "the ¤ ship")
    for page in opened(browser, out.as_uri(), SCREENS[1], "light"):
        expect(page.locator("#warnings")).to_contain_text("¤")


def test_a_plot_gives_the_values_of_a_step(folder: Path, browser: Browser) -> None:
    for page in opened(browser, written("plot", folder).as_uri(), SCREENS[1], "light"):
        page.locator("#charts").focus()
        expect(page.locator("#values")).to_contain_text("step 100\n")
        page.keyboard.press("Home")
        expect(page.locator("#values")).to_contain_text("step 1\n")
        page.keyboard.press("End")
        expect(page.locator("#values")).to_contain_text("step 100\n")
        expect(page.locator("#values td").nth(1)).to_have_text("1.62")
        assert problems(page) == []
        page.locator("#charts .wide").hover()
        expect(page.locator("#values")).not_to_contain_text("step 100\n")
        page.locator("#copy").click()
        expect(page.locator("#command")).to_have_text(f"mlxgpt plot {folder} -o {folder}/plot.html")
        page.set_viewport_size({"width": 390, "height": 800})
        expect(page.locator("#charts .narrow")).to_be_visible()
        expect(page.locator("#charts .wide")).to_be_hidden()
        assert excess_width(page) == 0
