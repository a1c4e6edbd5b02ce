"""secateur.compare: two models, tensor by tensor."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.numpy import save_file

import secateur
from tests.conftest import examples

Arrays = dict[str, NDArray[Any]]

A: Arrays = {"w": np.array([[0.0, 1.0], [0.0, 2.0]], np.float32), "only.a": np.ones(3, np.float16)}
B: Arrays = {"w": np.array([[1.0], [2.0]], np.float32), "only.b": np.zeros(2, np.float64)}


def test_tensors_are_compared_by_their_names(client: secateur.Client) -> None:
    found = secateur.compare(A, B, client)
    assert list(found.tensors) == ["w", "only.a", "only.b"]
    assert (found.only_in_a, found.only_in_b) == (("only.a",), ("only.b",))
    w = found.tensors["w"]
    assert w.a is not None
    assert w.b is not None
    assert (w.a.shape, w.a.zeros, w.a.bytes) == ((2, 2), 2, 16)
    assert (w.b.shape, w.b.zeros, w.b.bytes) == ((2, 1), 0, 8)


def test_the_text_has_both_side_by_side(client: secateur.Client) -> None:
    lines = str(secateur.compare(A, B, client, labels=("before", "after"))).splitlines()
    assert lines[:2] == ["A: before", "B: after"]
    assert lines[3].split() == ["w", "50.00%", "0.00%", "2", "0", "16", "8", "2x2", "2x1"]
    assert lines[4].split()[:3] == ["only.a", "0.00%", "-"]
    assert lines[-3] == "7 and 4 parameters, 22 and 24 bytes"
    assert lines[-2:] == ["only in before: only.a", "only in after: only.b"]
    assert " parameters, " not in str(secateur.compare(A, A, client))


@examples(40)
@given(st.data())
def test_to_dict_has_what_numpy_counts(client: secateur.Client, data: st.DataObject) -> None:
    arrays = st.lists(st.sampled_from([0.0, 1.0]), min_size=1, max_size=6).map(np.array)
    model = st.dictionaries(st.sampled_from("abcd"), arrays, max_size=4)
    models = data.draw(st.tuples(model, model))
    found = secateur.compare(models[0], models[1], client).to_dict()
    assert found == json.loads(json.dumps(found, default=list)) | {"tensors": found["tensors"]}
    for side, mine in zip("ab", models, strict=True):
        assert found[side]["zeros"] == sum(int((array == 0).sum()) for array in mine.values())
        for name, tensor in found["tensors"].items():
            if name not in mine:
                assert tensor[side] is None
                continue
            array = mine[name]
            counts = tensor[side]["zeros"], tensor[side]["total"], tensor[side]["bytes"]
            assert counts == (int((array == 0).sum()), array.size, array.nbytes)
    assert found["only_in_a"] == [name for name in models[0] if name not in models[1]]
    assert found["only_in_b"] == [name for name in models[1] if name not in models[0]]


def test_prefixes_of_wrappers_may_differ(client: secateur.Client) -> None:
    plain = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1))
    wrapped = torch.nn.DataParallel(plain)
    for models in ((plain, wrapped), (wrapped, plain)):
        found = secateur.compare(models[0], models[1], client)
        assert list(found.tensors) == list(models[0].state_dict())
        assert (found.only_in_a, found.only_in_b) == ((), ())
    # Names that the other model has as they are win.
    both = {"module.w": np.zeros(1), "x": np.ones(2), "w": np.ones(1)}
    found = secateur.compare(both, {"w": np.ones(3), "x": np.ones(2)}, client)
    assert found.only_in_a == ("module.w",)
    b = found.tensors["w"].b
    assert b is not None
    assert b.shape == (3,)


def test_reports_and_results_need_no_server(client: secateur.Client) -> None:
    specs = secateur.l1_unstructured("w", 1), secateur.l1_unstructured("w", 3)
    results = [client.prune(A, spec) for spec in specs]
    found = secateur.compare(results[0], results[1].report)
    assert (found.a, found.b) == tuple(result.report for result in results)
    final = secateur.compare(client.finalize(A), client.report(A))
    assert final.a.zeros == final.b.zeros == 2


@pytest.mark.usefixtures("at_server")
def test_paths_are_measured_by_the_server_of_the_environment(tmp_path: Path) -> None:
    for folder, model in (("x", A), ("y", B)):
        (tmp_path / folder).mkdir()
        save_file(model, tmp_path / folder / "model.safetensors")
    paths = [tmp_path / folder / "model.safetensors" for folder in "xy"]
    found = secateur.compare(paths[0], paths[1])
    assert found.labels == tuple(map(str, paths))
    save_file(B, tmp_path / "pruned.safetensors")
    assert secateur.compare(paths[0], tmp_path / "pruned.safetensors").labels == (
        "model.safetensors",
        "pruned.safetensors",
    )


def test_an_embedded_server_measures_without_any(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SECATEUR_SERVER", raising=False)
    assert secateur.compare(A, B).a.zeros == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"labels": "ab"}, r"^labels: 'ab' is not a pair of texts"),
        ({"labels": ("a", "")}, r"^labels: \('a', ''\) is not a pair of texts"),
        ({"client": "localhost:1"}, r"^client: 'localhost:1' is not a secateur\.Client"),
        ({"b": 3}, r"^a source is .*, not int"),
    ],
)
def test_wrong_arguments(client: secateur.Client, arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"a": A, "b": B, "client": client, **arguments}
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.compare(**given)
