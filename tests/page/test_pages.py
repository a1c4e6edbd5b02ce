"""A page of a report in a browser; the other pages are in test_browser.py, which is slow."""

from pathlib import Path

import numpy as np
from playwright.sync_api import Browser, expect

import secateur
from tests.page.browsing import cells, names, needs_chromium, opened
from tests.page.models import HOSTILE, hostile, lenet

MODEL = lenet()
NAME = "classifier.fc2.weight"


@needs_chromium
def test_a_report_sorts_searches_and_zooms(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    model = {**MODEL, **hostile()}
    spec = secateur.global_unstructured(["*.weight", HOSTILE[0]], 0.5)
    result = client.prune(model, spec, details=True)
    report, path = result.report, tmp_path / "page.html"
    report.to_html(path, title=HOSTILE[1])
    with opened(browser, path) as page:
        assert page.title() == HOSTILE[1]
        assert set(names(page)) == set(report.tensors)

        page.get_by_label("Group by module").uncheck()
        page.get_by_role("button", name="sparsity").click()
        falling = sorted((tensor.sparsity for tensor in report.tensors.values()), reverse=True)
        assert cells(page, 0) == [f"{100 * sparsity:.2f}%" for sparsity in falling]
        page.get_by_role("button", name="sparsity").click()
        assert cells(page, 0) == [f"{100 * sparsity:.2f}%" for sparsity in reversed(falling)]

        page.get_by_label("Search tensors").fill("FC weight")
        assert sorted(names(page)) == sorted(name for name in report.tensors if "fc" in name)
        page.get_by_role("button", name=NAME).click()
        details = page.locator("#details")
        expect(details.locator("h3")).to_have_text(NAME)
        ((choice,),) = report.rules
        assert (
            f"threshold {choice.threshold:.6g}" in details.locator("figcaption").first.inner_text()
        )

        # The canvas has a dark pixel for each weight that is kept.
        alphas = details.locator("canvas").first.evaluate(
            "c => [...c.getContext('2d').getImageData(0, 0, c.width, c.height).data]"
        )[3::4]
        assert np.array_equal(np.array(alphas) > 0, result.masks[NAME].ravel())
        width = "c => c.getBoundingClientRect().width"
        before = details.locator("canvas").first.evaluate(width)
        details.get_by_role("button", name="Zoom in").click()
        assert details.locator("canvas").first.evaluate(width) == 2 * before
