"""Results as frames of pandas."""

import subprocess
import sys
from typing import Any

import numpy as np
import pandas as pd
import pytest

import secateur

MODEL: dict[str, Any] = {
    "conv": np.arange(16, dtype=np.float32).reshape(2, 8),
    "fc": np.arange(12, dtype=np.float16).reshape(3, 4),
    "scale": np.ones((), np.float64),
}
HALF = secateur.l1_unstructured(["conv", "fc"], 0.5)


def dtypes(frame: pd.DataFrame) -> dict[str, str]:
    return {str(name): str(dtype) for name, dtype in frame.dtypes.items()}


def test_a_report_has_a_row_for_each_tensor(client: secateur.Client) -> None:
    frame = client.report(MODEL).to_frame()
    assert list(frame.index) == list(MODEL)
    assert frame.index.name == "tensor"
    assert dtypes(frame) == {
        **{"shape": "object", "dtype": "str", "bytes": "int64", "zeros": "int64"},
        **{"total": "int64", "sparsity": "float64", "pruned": "int64", "is_pruned": "bool"},
    }
    assert list(frame["shape"]) == [array.shape for array in MODEL.values()]
    assert list(frame["dtype"]) == ["F32", "F16", "F64"]
    assert list(frame["bytes"]) == [array.nbytes for array in MODEL.values()]
    assert list(frame.zeros) == [1, 1, 0]
    assert list(frame.sparsity) == [1 / 16, 1 / 12, 0.0]
    pruned = client.prune(MODEL, HALF).report.to_frame()
    assert list(pruned.pruned) == [8, 6]
    assert pruned.is_pruned.all()
    assert pruned.loc["fc", "sparsity"] == 0.5


def test_frames_without_rows_have_their_dtypes(client: secateur.Client) -> None:
    assert dtypes(client.report({}).to_frame()) == dtypes(client.report(MODEL).to_frame())


@pytest.mark.parametrize(
    ("amounts", "dtype"),
    [([0.0, 0.5], "float64"), ([1, 3], "Int64"), ([1, 1.0], "object")],
)
def test_a_plan_and_a_sensitivity_have_a_row_for_each_tensor_and_amount(
    client: secateur.Client, amounts: list[float], dtype: str
) -> None:
    plan = client.plan(MODEL, HALF, amounts)
    frame = plan.to_frame()
    assert list(frame.index) == ["conv", "fc"] * 2
    expected = {"pruned": "int64", "total": "int64", "sparsity": "float64"}
    assert dtypes(frame) == {"amount": dtype, **expected, "norm_removed": "float64"}
    assert [(type(a), a) for a in frame.amount[::2].tolist()] == [(type(a), a) for a in amounts]
    assert (frame.pruned / frame.total == frame.sparsity).all()
    pruned = frame.groupby("amount", sort=False).pruned.sum()
    if len(pruned) == 2:  # pandas takes 1 and 1.0 for the same
        assert list(pruned) == [planned.pruned for planned in plan.amounts]
    sensitivity = client.sensitivity(MODEL, ["conv", "fc"], amounts)
    frame = sensitivity.to_frame()
    assert dtypes(frame) == {"amount": dtype, "norm_removed": "float64"}
    for name, shares in sensitivity.norm_removed.items():
        assert list(frame.loc[name].norm_removed) == list(shares)
        assert list(frame.loc[name].amount) == amounts


def test_a_comparison_has_both_models_side_by_side(client: secateur.Client) -> None:
    other = {"fc": np.zeros((1, 2)), "new": np.ones(3, np.float32)}
    frame = secateur.compare(MODEL, other, client).to_frame()
    assert list(frame.index) == ["conv", "fc", "scale", "new"]
    assert dtypes(frame) == {
        **{"sparsity_a": "float64", "sparsity_b": "float64", "zeros_a": "Int64"},
        **{"zeros_b": "Int64", "bytes_a": "Int64", "bytes_b": "Int64"},
        **{"shape_a": "object", "shape_b": "object"},
    }
    assert list(frame.loc["fc"]) == [1 / 12, 1.0, 1, 2, 24, 16, (3, 4), (1, 2)]
    assert list(frame.isna().loc["new"]) == [True, False] * 4
    assert list(frame.isna().loc["scale"]) == [False, True] * 4


def test_an_amount_that_is_no_number_is_missing(client: secateur.Client) -> None:
    plan = client.plan(MODEL, secateur.select("fc", secateur.threshold(3)))
    assert plan.to_frame().amount.isna().all()
    assert plan.to_frame().pruned["fc"] == 3


def test_without_the_packages_errors_name_the_extra(
    client: secateur.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    report, plan = client.report(MODEL), client.plan(MODEL, HALF)
    for module in ("pandas", "matplotlib.pyplot"):
        monkeypatch.setitem(sys.modules, module, None)
    found: list[Any] = [report, plan, client.sensitivity(MODEL)]
    for result in found:
        for call, package in ((result.to_frame, "pandas"), (result.plot, "matplotlib")):
            said = rf"^{call.__name__} needs {package}: pip install 'secateur\[notebook\]' \("
            with pytest.raises(secateur.SecateurError, match=said):
                call()


def test_the_client_imports_neither() -> None:
    code = "import secateur, sys; print({'pandas', 'matplotlib', 'tqdm'} & sys.modules.keys())"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.stdout == "set()\n"
