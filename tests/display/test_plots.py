"""Results as plots of matplotlib: what the artists hold, and that a canvas draws them."""

import io
from collections.abc import Iterator
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

from matplotlib import pyplot

import secateur

MODEL = {
    "conv": np.arange(16, dtype=np.float32).reshape(2, 8),
    "a$b$c_{": np.arange(12, dtype=np.float32).reshape(3, 4),
    "very.long." * 10 + "weight": np.ones((2, 2), np.float32),
}
MANY = {f"layer.{n}.weight": np.array([[0.0, n % 2], [1, 1]], np.float32) for n in range(5000)}
EACH = secateur.l1_unstructured("*", 0.5)


@pytest.fixture(autouse=True)
def _no_windows(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Nothing may show a figure."""

    def show(*arguments: object, **keywords: object) -> None:
        raise AssertionError("a figure is shown")

    monkeypatch.setattr(pyplot, "show", show)
    yield
    pyplot.close("all")


def drawn(ax: Any) -> bytes:
    """Draws the figure."""
    image = io.BytesIO()
    ax.figure.savefig(image, dpi=40)
    return image.getvalue()


def labels(ticks: Any) -> list[str]:
    return [label.get_text() for label in ticks]


def test_a_report_has_a_bar_for_each_tensor(client: secateur.Client) -> None:
    report = client.prune(MODEL, EACH + secateur.l1_unstructured("conv", 0.5)).report
    ax: Any = report.plot()
    assert [bar.get_width() for bar in ax.patches] == [
        tensor.sparsity for tensor in report.tensors.values()
    ]
    assert labels(ax.get_yticklabels())[:2] == list(MODEL)[:2]
    assert len(labels(ax.get_yticklabels())[2]) == 40
    bottom, top = ax.get_ylim()
    assert bottom > top, "the first tensor is on top"
    assert ax.lines[0].get_xdata()[0] == report.sparsity
    assert drawn(ax)


def test_a_plan_is_a_curve(client: secateur.Client) -> None:
    plan = client.plan(MODEL, EACH, [0.9, 0.1, 0.5])
    line: Any
    (line,) = plan.plot().lines
    planned = [plan.amounts[i] for i in (1, 2, 0)]
    assert list(line.get_xdata()) == [of.sparsity for of in planned]
    assert list(line.get_ydata()) == [of.norm_removed for of in planned]


def test_a_sensitivity_is_a_heat_map(client: secateur.Client) -> None:
    sensitivity = client.sensitivity(MODEL, amounts=[0.25, 0.5, 1])
    ax: Any = sensitivity.plot()
    (image,) = ax.images
    assert image.get_array().tolist() == [list(v) for v in sensitivity.norm_removed.values()]
    assert labels(ax.get_xticklabels()) == ["0.25", "0.5", "1"]
    assert labels(ax.get_yticklabels())[1] == "a$b$c_{"
    assert image.get_cmap().name == "cividis"
    assert drawn(ax)


def test_axes_of_the_caller_are_drawn_on_and_returned(client: secateur.Client) -> None:
    results = (client.report(MODEL), client.plan(MODEL, EACH), client.sensitivity(MODEL))
    for result in results:
        _, ax = pyplot.subplots()
        figures = pyplot.get_fignums()
        assert result.plot(ax) is ax
        assert result.plot(ax=ax) is ax
        assert pyplot.get_fignums() == figures
        assert drawn(ax)


def test_thousands_of_tensors_are_few_artists(client: secateur.Client) -> None:
    for result in (client.report(MANY), client.sensitivity(MANY, amounts=[0.5, 0.75])):
        ax: Any = result.plot()
        assert len(ax.get_children()) < 60
        assert len(ax.get_yticklabels()) == 40
        assert labels(ax.get_yticklabels())[1] == "layer.125.weight"
        assert drawn(ax)
    (image,) = ax.images
    assert image.get_array().shape == (5000, 2)


def test_the_bars_of_thousands_have_the_values(client: secateur.Client) -> None:
    report = client.report(MANY)
    bars: Any
    (bars,) = report.plot().patches
    values, edges, _ = bars.get_data()
    assert list(values) == [tensor.sparsity for tensor in report.tensors.values()]
    assert list(edges[:2]) == [-0.5, 0.5]


def test_nothing_is_drawn_of_nothing(client: secateur.Client) -> None:
    assert drawn(client.report({}).plot())
