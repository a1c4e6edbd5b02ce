"""Bars in a notebook, executed by a real kernel."""

import nbformat
from nbclient import NotebookClient

from tests.conftest import PATIENCE, RunningServer

BEGIN = """
import sys
import numpy as np
import secateur
from secateur import progress
client = secateur.Client({address!r})
model = {{"w": np.zeros(4_000_000, np.float32)}}
"""
REPORT = "client.report(model, progress={}).zeros"
WITHOUT_WIDGETS = "sys.modules['ipywidgets'] = None"
WITH_WIDGETS = """
for name in [name for name in sys.modules if name.startswith(("tqdm", "ipywidgets"))]:
    del sys.modules[name]
"""
WIDGET = "application/vnd.jupyter.widget-view+json"


def outputs(*cells: str) -> list[list[nbformat.NotebookNode]]:
    """What each cell shows beside its value."""
    made = [nbformat.v4.new_code_cell(cell) for cell in cells]  # type: ignore[no-untyped-call]
    notebook = nbformat.v4.new_notebook(cells=made)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=PATIENCE, kernel_name="python3").execute()
    return [
        [output for output in cell.outputs if output.output_type != "execute_result"]
        for cell in notebook.cells
    ]


def test_a_notebook_shows_widgets_or_text_and_no_warnings(server: RunningServer) -> None:
    always, later = "progress.NOTEBOOK_DELAY = 0", "progress.NOTEBOOK_DELAY = 1e6"
    none = REPORT.format("None")
    shown = outputs(
        BEGIN.format(address=server.address),
        f"{WITHOUT_WIDGETS}\n{REPORT.format(True)}",
        f"{WITH_WIDGETS}\n{REPORT.format(True)}",
        f"{always}\n{none}",
        f"{later}\n{none}",
        f"{always}\n{REPORT.format(False)}",
    )
    assert shown[0] == shown[4] == shown[5] == []
    assert {output.name for output in shown[1]} == {"stderr"}
    text = "".join(output.text for output in shown[1])
    assert "upload" in text
    assert "Warning" not in text
    for widgets in shown[2:4]:
        assert widgets
        assert all(WIDGET in output.data for output in widgets)
