"""How results show themselves in notebooks."""

from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur.display.notebook import Displayed, html_of, paragraphs
from secateur.tables import Table
from tests.conftest import examples

MANY = {f"layer.{number}.weight": np.ones((2, 2), np.float32) for number in range(5000)}
NAME = '<script>alert("1")</script>&amp;'


class Read(HTMLParser):
    """The rows of a table and the lines beside it, as a browser reads them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.rows: list[list[str]] = []
        self.lines: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
        elif tag == "p":
            self.lines.append("")

    def handle_data(self, data: str) -> None:
        if self.lasttag == "p":
            self.lines[-1] += data
        else:
            self.rows[-1][-1] += data


def pretty(value: object) -> str:
    """The text that IPython shows."""
    from IPython.lib.pretty import pretty

    return str(pretty(value))  # type: ignore[no-untyped-call]


# Not \r, which a browser reads as \n.
TEXT = st.text(st.characters(exclude_characters="\r\0", codec="utf-8"))


@examples(50)
@given(st.lists(st.lists(TEXT, min_size=3, max_size=3), min_size=1, max_size=8), st.lists(TEXT))
def test_every_text_is_read_as_it_is(rows: list[list[str]], lines: list[str]) -> None:
    found = Read(html_of(Table(rows, below=tuple(lines[:9]))))
    assert found.rows == rows
    assert found.lines == lines[:9]
    assert found.tags <= {"table", "tr", "th", "td", "p"}


@pytest.fixture(scope="module")
def results(client: secateur.Client) -> dict[str, object]:
    """Every kind of result, of a model with a name that is HTML, or of many tensors."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 4))
    spec = secateur.l1_unstructured("*", 0.5)
    statistics = secateur.calibrate(module, [torch.ones(2, 4)], progress=False)
    model = {NAME: np.ones((2, 2), np.float32)}
    return {
        "report": client.report(model),
        "plan": client.plan(model, spec, [0.1, 3]),
        "sensitivity": client.sensitivity(model),
        "prune": client.prune(model, spec),
        "finalize": client.finalize(model),
        "gain": secateur.gain(module, module, torch.ones(1, 4)),
        "statistics": secateur.Statistics({NAME: statistics["0.weight"]}),
        "checkpoint": client.upload(model),
        "long report": client.report(MANY),
        "long plan": client.plan(model, spec, [n / 1000 for n in range(1000)]),
        "long sensitivity": client.sensitivity(MANY, amounts=[n / 20 for n in range(20)]),
        "long prune": client.prune(MANY, spec),
        "long finalize": client.finalize(MANY),
        "long statistics": secateur.Statistics(dict.fromkeys(MANY, statistics["0.weight"])),
    }


def test_each_result_is_small_and_has_no_markup_of_a_name(results: dict[str, object]) -> None:
    for kind, result in results.items():
        shown: str = result._repr_html_()  # type: ignore[attr-defined]
        assert len(shown) < 12_000, kind
        found = Read(shown)
        assert len(found.rows) <= 31, kind
        assert {len(row) for row in found.rows} == {len(found.rows[0])}, kind
        assert found.tags <= {"table", "tr", "th", "td", "p"}, kind
        assert "color" not in shown, kind  # the notebook's theme has them
        assert len(pretty(result)) < 12_000, kind


def test_a_long_table_has_its_first_and_last_rows_and_says_how_many_are_left_out(
    results: dict[str, object],
) -> None:
    report = results["long report"]
    assert isinstance(report, secateur.Report)
    rows = Read(report._repr_html_()).rows
    names = [row[0] for row in rows]
    assert names[1:25] == [f"layer.{number}.weight" for number in range(24)]
    assert names[25] == "… 4,972 more"
    assert names[26:] == [*(f"layer.{number}.weight" for number in range(4996, 5000)), "total"]
    assert rows[-1][5] == "20,000"
    assert len(str(report).splitlines()) > 5000  # the text is whole
    assert [line.split()[0] for line in pretty(report).splitlines()[:3]] == names[:3]
    sensitivity = results["long sensitivity"]
    assert isinstance(sensitivity, secateur.Sensitivity)
    assert Read(sensitivity._repr_html_()).rows[0][-4:] == ["0.4", "…", "0.9", "0.95"]


def test_a_table_of_thirty_rows_is_whole() -> None:
    class Rows(Displayed):
        def table(self) -> Table:
            return Table([("number",), *((str(n),) for n in range(count))])

    for count, shown in ((30, 30), (31, 30)):
        found = [row[0] for row in Read(Rows()._repr_html_()).rows[1:]]
        assert len(found) == shown
        whole = [str(n) for n in range(count)]
        assert found == whole if count == 30 else found == [*whole[:24], "… 2 more", *whole[-5:]]


def test_a_result_shows_its_lines_and_its_report(results: dict[str, object]) -> None:
    result = results["prune"]
    assert isinstance(result, secateur.PruneResult)
    shown = result._repr_html_()
    assert shown == paragraphs([repr(result)]) + result.report._repr_html_()
    final = results["finalize"]
    assert isinstance(final, secateur.FinalizeResult)
    shown = final._repr_html_()
    assert shown == paragraphs(str(final).splitlines()) + final.report._repr_html_()
    assert Read(shown).rows[1][0] == NAME


def test_a_checkpoint_shows_its_name_and_sizes(results: dict[str, object]) -> None:
    checkpoint = results["checkpoint"]
    assert isinstance(checkpoint, secateur.Checkpoint)
    rows = dict(Read(checkpoint._repr_html_()).rows)
    assert rows["checkpoint"] == checkpoint.name
    assert rows["created"] == f"{checkpoint.create_time:%Y-%m-%d %H:%M:%S} UTC"
    assert rows["bytes"] == f"{checkpoint.size_bytes:,}, and 0 of masks"
