"""What pages hold, without a browser."""

import base64
import hashlib
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur.page.rendering import MOST_BYTES, MOST_ROWS, render
from secateur.page.views import Column, Frame, Page, Table, size
from tests.conftest import examples
from tests.page.models import HOSTILE, lenet

SCRIPT = re.compile(r"<script(?P<type>[^>]*)>(?P<text>.*?)</script>", re.DOTALL)


def data_of(text: str) -> Any:
    """What the page's own script reads."""
    first, *_ = SCRIPT.finditer(text)
    assert first["type"] == ' id="data" type="application/json"'
    return json.loads(first["text"])


def page(names: list[str], frames: int = 1, **others: Any) -> Page:
    rows = [[0.5] for _ in names]
    table = Table(
        "Tensors", "tensor", [Column("sparsity", "share")], names, [Frame("", rows)] * frames
    )
    return Page("Title", "subtitle", [], tables=[table], **others)


class Reader(HTMLParser):
    """Reads a page as a browser does: its elements, and the texts of its warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.warnings: list[str] = []
        self.is_warning = False

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.is_warning = tag == "p" and ("class", "warning") in attributes
        if self.is_warning:
            self.warnings.append("")

    def handle_endtag(self, tag: str) -> None:
        self.is_warning = False

    def handle_data(self, data: str) -> None:
        if self.is_warning:
            self.warnings[-1] += data


NAMES = st.text(st.characters(exclude_categories=["Cc", "Cs"])) | st.sampled_from(HOSTILE)


@examples(50)
@given(st.lists(NAMES, unique=True))
def test_every_name_is_text_and_arrives_as_it_is(names: list[str]) -> None:
    text = render(page(names, warnings=names))
    assert data_of(text)["tables"][0]["names"] == names
    reader, empty = Reader(), Reader()
    reader.feed(text)
    empty.feed(render(page([])))
    assert reader.warnings[:-1] == names  # the last one is for browsers without scripts
    assert sorted(reader.tags) == sorted([*empty.tags, *(["p"] * len(names))])


def test_only_the_scripts_of_the_page_may_run() -> None:
    text = render(page(["a"]))
    policy = re.search(r'Content-Security-Policy" content="([^"]+)"', text)
    assert policy is not None
    rules = dict(rule.strip().split(" ", 1) for rule in policy[1].replace("&#39;", "'").split(";"))
    digests = [
        f"'sha256-{base64.b64encode(hashlib.sha256(match['text'].encode()).digest()).decode()}'"
        for match in SCRIPT.finditer(text)
        if not match["type"]
    ]
    assert rules["script-src"].split() == digests
    assert rules["default-src"] == "'none'"


def test_many_rows_and_amounts_are_cut_and_a_note_says_so() -> None:
    names = [f"layer.{n}.weight" for n in range(MOST_ROWS + 1)]
    text = render(page(names, frames=100))
    table = data_of(text)["tables"][0]
    assert table["names"] == names[:MOST_ROWS]
    assert len(table["frames"]) < 100
    assert f"this page has {MOST_ROWS:,} of {MOST_ROWS + 1:,} rows" in text
    assert len(text) < 10_000_000


def test_details_that_do_not_fit_are_left_out() -> None:
    details = {name: [("", {"pixels": "x" * (MOST_BYTES // 3)})] for name in "abcd"}
    text = render(page(list("abcd"), details=details))
    assert list(data_of(text)["details"]) == ["a", "b"]
    assert len(text) < 10_000_000


def test_infinities_are_texts(client: secateur.Client, tmp_path: Path) -> None:
    model = {"w": np.array([[1.0, np.inf], [np.inf, 2.0]], np.float32)}
    report = client.prune(model, secateur.l1_unstructured("w", 3), output="none", details=True)
    report.report.to_html(tmp_path / "page.html")
    data = data_of((tmp_path / "page.html").read_text())
    assert data["tables"][1]["frames"][0]["rows"][0][3] == "inf"


def test_a_page_without_tensors(client: secateur.Client, tmp_path: Path) -> None:
    client.report({}).to_html(tmp_path / "page.html")
    assert data_of((tmp_path / "page.html").read_text())["tables"][0]["names"] == []


def test_the_gain_of_a_smaller_module_is_a_total(client: secateur.Client, tmp_path: Path) -> None:
    cost = {"parameters": 10, "bytes": 40, "seconds": 0.5, "fastest": 0.4, "slowest": 0.6}
    before, after = (secateur.gain.__globals__["Cost"](macs=n, **cost) for n in (123_456, 98_765))
    report = client.report(lenet())
    report.to_html(tmp_path / "page.html", gain=secateur.Gain(before, after))
    text = (tmp_path / "page.html").read_text()
    assert "98,765" in text
    assert "before 123,456: 80.00% left" in text


def test_titles_may_be_any_text_and_a_gain_is_one(tmp_path: Path) -> None:
    report = secateur.Report({}, 0, 0, 0.0, (), "", "", secateur.Coverage(0, 0, 0, ()), ())
    report.to_html(tmp_path / "page.html", title="caf\udce9.safetensors")
    assert "<h1>caf?.safetensors</h1>" in (tmp_path / "page.html").read_text()
    with pytest.raises(secateur.InvalidSpec, match=r"^gain: 3 is not a secateur\.Gain$"):
        report.to_html(tmp_path / "none.html", gain=3)  # type: ignore[arg-type]
    assert not (tmp_path / "none.html").exists()


def test_an_amount_that_was_not_planned(client: secateur.Client, tmp_path: Path) -> None:
    plan = client.plan({"w": np.ones((4, 4))}, secateur.l1_unstructured("w", 0.5), [1, 0.5])
    for amount in (0.7, 1.0, "half"):
        with pytest.raises(secateur.InvalidSpec, match=r"^amount: .* was not planned.*1, 0\.5$"):
            plan.to_html(tmp_path / "page.html", amount=amount)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
    plan.to_html(tmp_path / "page.html", amount=1)


def test_import_secateur_imports_no_jinja2() -> None:
    code = "import sys, secateur; assert not {'jinja2', 'torch'} & sys.modules.keys()"
    assert subprocess.run([sys.executable, "-W", "error", "-c", code]).returncode == 0


def test_without_jinja2_the_extra_is_named(
    client: secateur.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "jinja2", None)
    (tmp_path / "page.html").write_text("before")
    with pytest.raises(secateur.SecateurError, match=r"pip install 'secateur\[html\]'"):
        client.report(lenet()).to_html(tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text() == "before"


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1 kB"),
        (22_713_728 * 4, "90.9 MB"),
        (3e15, "3e+03 TB"),
    ],
)
def test_sizes_for_people(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (".", r"^\.: is a folder; name a file"),
        ("none/page.html", r"^none/page\.html: no such folder exists$"),
        ("", r"^a path is empty$"),
        (3, r"^a path is a str or an os\.PathLike, not int$"),
    ],
)
def test_wrong_paths(path: Any, message: str) -> None:
    found = secateur.Sensitivity((0.5,), {"w": (0.1,)}, "magnitude")
    with pytest.raises(secateur.SecateurError, match=message):
        found.to_html(path)
