"""Opens pages in Debian's Chromium, and fails on everything that a page must not do."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

CHROMIUM = shutil.which("chromium")
OPTIONS = ("--no-sandbox", "--disable-gpu", "--disable-background-networking")

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: make system")


@contextmanager
def chromium() -> Iterator[Browser]:
    """Runs the browser."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=list(OPTIONS))
        yield browser
        browser.close()


@contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """Opens a page; it may neither log an error, nor open a dialog, nor load anything."""
    found: list[str] = []
    with browser.new_context(**options) as context:
        page = context.new_page()
        page.on("console", lambda message: found.append(message.text))
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("dialog", lambda dialog: found.append(dialog.message))
        page.on("request", lambda request: found.append(request.url))
        page.goto(path.as_uri())
        page.wait_for_selector("tbody th")
        yield page
        assert [line for line in found if not line.startswith("data:")] == [path.as_uri()]


def names(page: Page, table: int = 0) -> list[str]:
    """The whole names of the rows that are in the document."""
    rows = page.locator(f"#table-{table} tbody tr:not(.group) th.name")
    return [str(row.get_attribute("title")) for row in rows.all()]


def cells(page: Page, column: int, table: int = 0) -> list[str]:
    """The texts of a column of tensors, the first beside the names being 0."""
    path = f"#table-{table} tbody tr:not(.group) td:nth-of-type({column + 1}) > span"
    return page.locator(path).all_text_contents()
