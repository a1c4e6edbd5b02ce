"""The documentation site: it builds without warnings, is complete, and needs no network."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from google.protobuf.descriptor import FileDescriptor

import secateur
from secateur_proto import (
    checkpoint_pb2,
    checkpoints_pb2,
    plan_pb2,
    pruner_pb2,
    report_pb2,
    spec_pb2,
)

PROTOS = (checkpoint_pb2, checkpoints_pb2, plan_pb2, pruner_pb2, report_pb2, spec_pb2)


def build(folder: Path) -> dict[str, str]:
    """Builds the site as `make docs` does, in four seconds. Returns its pages by their paths."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", f"--site-dir={folder}"]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.html")}


def test_the_site_builds_and_is_complete(tmp_path: Path) -> None:
    """One test, so that a run builds the site once."""
    pages = build(tmp_path)
    check_that_nothing_is_external(pages)
    check_that_code_in_tables_can_be_copied(pages)
    check_that_every_public_name_is_documented_once(pages)
    check_that_everything_of_the_protos_is_documented(pages)


def check_that_nothing_is_external(pages: dict[str, str]) -> None:
    loaded = re.compile(
        r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=[\"']?(?:https?:)?//[^>]*>"
    )
    assert [found for text in pages.values() for found in loaded.findall(text)] == []


def check_that_code_in_tables_can_be_copied(pages: dict[str, str]) -> None:
    """A `|` in the code of a cell must be escaped on GitHub, where the site shows the backslash."""
    escaped = re.compile(r"<td[^>]*>(?:(?!</td>).)*<code>[^<]*\\\|[^<]*</code>")
    assert [found for text in pages.values() for found in escaped.findall(text)] == []


def check_that_every_public_name_is_documented_once(pages: dict[str, str]) -> None:
    """In docs/api. Where a function has the name of its module, its path has the name twice."""
    whole = "".join(pages.values())
    counts = {
        name: len(re.findall(rf'<h2 id="secateur(?:\.{name})?\.{name}"', whole))
        for name in secateur.__all__
    }
    assert {name: count for name, count in counts.items() if count != 1} == {}


def check_that_everything_of_the_protos_is_documented(pages: dict[str, str]) -> None:
    for proto in PROTOS:
        text = pages[f"grpc/{Path(proto.DESCRIPTOR.name).stem}.html"]
        assert [part for part in html_of(proto.DESCRIPTOR) if part not in text] == []


def html_of(file: FileDescriptor) -> Iterator[str]:
    """Yields HTML that the page of a .proto file must have."""
    for service in file.services_by_name.values():
        yield f">service {service.name}<"
        yield from (f">rpc {method.name}<" for method in service.methods)
    for message in file.message_types_by_name.values():
        yield f">{message.name}<"
        yield from (f"<td><code>{f.name}</code></td>\n<td>{f.number}</td>" for f in message.fields)
    for enum in file.enum_types_by_name.values():
        yield f">{enum.name}<"
        yield from (f"<td><code>{v.name}</code></td>\n<td>{v.number}</td>" for v in enum.values)


@pytest.mark.slow
def test_the_site_in_a_browser(tmp_path: Path) -> None:
    """On a phone no page scrolls sideways; nothing fails or is fetched; the search finds pages."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: make system")
    paths = [path for path in build(tmp_path) if path != "404.html"]  # its links are absolute
    requests: list[str] = []
    errors: list[str] = []
    with sync_playwright() as tools:
        browser = tools.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 360, "height": 740})
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda said: errors.append(said.text) if said.type == "error" else None)
        widths = {}
        for path in paths:
            page.goto(f"file://{tmp_path / path}")
            widths[path] = page.evaluate("document.documentElement.scrollWidth")
        page.set_viewport_size({"width": 1280, "height": 900})
        page.goto(f"file://{tmp_path / 'index.html'}")
        page.get_by_placeholder("Search").fill("guard rails")
        page.locator(".md-search-result__link").first.wait_for()
        found = page.locator(".md-search-result__link").evaluate_all("all => all.map(a => a.href)")
        browser.close()
    assert {path: width for path, width in widths.items() if width > 360} == {}
    assert [url for url in requests if not url.startswith(("file://", "data:", "blob:"))] == []
    assert errors == []
    assert any("methods.html" in url for url in found), found
