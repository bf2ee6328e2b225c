"""Every page in a real browser: accessible, without errors, by keyboard, on a phone, by day and night.

Skipped where Chromium or playwright is missing; `.ci/run` installs both.
"""

from __future__ import annotations

import functools
import http.server
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("playwright")
axe = pytest.importorskip("axe_playwright_python.sync_playwright")

from playwright.sync_api import Browser, Page, expect

from mlx_randygpt.analysis.metrics import metrics_row
from mlx_randygpt.checkpoint import Checkpoint, save_checkpoint
from mlx_randygpt.cli import group
from mlx_randygpt.progress import Progress
from mlx_randygpt.training.reports import EvalLog, StepLog

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
SCREENS = [(390, 844), (1280, 800)]
each_screen = pytest.mark.parametrize("size", SCREENS, ids=["phone", "desktop"])
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The docs, built and served."""
    build = pytest.importorskip("mkdocs.commands.build").build
    load_config = pytest.importorskip("mkdocs.config").load_config
    folder = tmp_path_factory.mktemp("site")
    build(load_config(str(ROOT / "mkdocs.yml"), site_dir=str(folder)))
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
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


@pytest.fixture(params=["inspect", "plot"])
def page_file(request: pytest.FixtureRequest, folder: Path) -> Path:
    """A page that a command writes."""
    out = folder / f"{request.param}.html"
    words = {"inspect": [str(folder), "--text", "The old king"], "plot": [str(folder)]}
    done = CliRunner().invoke(group, [request.param, *words[request.param], "-o", str(out)])
    assert done.exit_code == 0, done.output
    return out


def opened(browser: Browser, url: str, size: tuple[int, int], scheme: Any) -> Iterator[Page]:
    """A page; at the end it has said nothing and asked for nothing from elsewhere."""
    viewport: Any = {"width": size[0], "height": size[1]}
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: said.type != "error" or wrong.append(said.text))
    page.goto(url)
    yield page
    page.context.close()
    assert wrong == []


def problems(page: Page) -> list[str]:
    """What axe-core objects to, and whether the page is wider than the screen."""
    found = axe.Axe().run(page).response["violations"]
    lines = [f"{v['id']}: {n['html'][:120]}" for v in found for n in v["nodes"][:3]]
    width = page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return lines + ([f"{width} px too wide"] if width > 0 else [])


@each_scheme
@each_screen
def test_a_written_page_is_accessible(
    size: tuple[int, int], scheme: str, page_file: Path, browser: Browser
) -> None:
    for page in opened(browser, page_file.as_uri(), size, scheme):
        assert problems(page) == []


@each_scheme
@each_screen
@pytest.mark.parametrize("name", ["", "cli/", "architecture/", "python/"])
def test_the_docs_are_accessible(
    name: str, size: tuple[int, int], scheme: str, site: str, browser: Browser
) -> None:
    for page in opened(browser, f"{site}/{name}", size, scheme):
        expect(page.locator("h1").first).to_be_visible()
        assert problems(page) == []
