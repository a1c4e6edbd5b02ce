"""The browser of a module's tests."""

from collections.abc import Iterator

import pytest
from playwright.sync_api import Browser

from tests.page.browsing import chromium


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """While it runs, this thread has a running event loop, in which others cannot run one."""
    with chromium() as running:
        yield running
