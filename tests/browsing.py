"""Opening pages in the fixture `browser`, and what axe-core objects to on them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page

SCREENS = [(390, 844), (1280, 800)]
each_screen = pytest.mark.parametrize("size", SCREENS, ids=["phone", "desktop"])
each_scheme = pytest.mark.parametrize("scheme", ["light", "dark"])


def opened(browser: Browser, url: str, size: tuple[int, int], scheme: Any) -> Iterator[Page]:
    """Yield a page once; at the end no error may have been reported on it."""
    viewport: Any = {"width": size[0], "height": size[1]}
    page = browser.new_context(viewport=viewport, color_scheme=scheme).new_page()
    page.set_default_navigation_timeout(90_000)  # milliseconds, for a busy machine
    wrong: list[str] = []
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("console", lambda said: said.type != "error" or wrong.append(said.text))
    page.goto(url)
    yield page
    page.context.close()
    assert wrong == []


def problems(page: Page, *, contrast: bool = True) -> list[str]:
    """Return what axe-core objects to; contrast takes it most of its time."""
    rules = {} if contrast else {"color-contrast": {"enabled": False}}
    options = {"resultTypes": ["violations"], "rules": rules}
    found = Axe().run(page, options=options).response["violations"]
    return [f"{v['id']}: {node['html'][:120]}" for v in found for node in v["nodes"][:3]]


def excess_width(page: Page) -> int:
    """Return how many pixels the page is wider than the screen."""
    return int(page.evaluate("document.documentElement.scrollWidth - innerWidth"))
