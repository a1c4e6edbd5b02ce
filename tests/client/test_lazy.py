"""Reports and plans that are decoded when they are read behave as plain dicts and tuples."""

import copy
import json
import pickle

import numpy as np
import pytest

import secateur

MODEL = {f"w{i}": np.arange(1.0, 6.0 + i) for i in range(3)}
SPEC = secateur.l1_unstructured("*", 2)


def test_a_report_is_that_of_plain_dicts_and_tuples(client: secateur.Client) -> None:
    report = client.prune(MODEL, SPEC).report
    plain = dict(report.tensors)
    assert (list(plain), len(report.tensors)) == (["w0", "w1", "w2"], 3)
    assert report.tensors == plain
    assert plain == report.tensors
    assert repr(report.tensors) == repr(plain)
    assert "w1" in report.tensors
    assert report.tensors["w1"] is report.tensors["w1"]
    with pytest.raises(KeyError):
        report.tensors["w3"]
    (choices,) = report.rules
    assert choices == tuple(choices)
    assert choices != tuple(choices)[:2]
    assert [choice.tensors for choice in choices[1:]] == [("w1",), ("w2",)]
    assert hash(choices) == hash(tuple(choices))
    assert repr(choices) == repr(tuple(choices))


def test_answers_are_copied_pickled_and_written_as_json(client: secateur.Client) -> None:
    report = client.prune(MODEL, SPEC).report
    plan = client.plan(MODEL, SPEC, [1, 0.5])
    for answer in (report, plan):
        for made in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
            assert made == answer
            assert made.to_dict() == answer.to_dict()
        assert json.loads(json.dumps(answer.to_dict())) is not None
    assert report.to_dict()["tensors"]["w2"]["pruned"] == 2
    assert report.to_dict()["rules"][0][1]["tensors"] == ("w1",)
    assert plan.to_dict()["amounts"][0]["tensors"]["w0"]["pruned"] == 1


def test_small_and_large_masks_are_unpacked_alike(client: secateur.Client) -> None:
    sizes = [0, 1, 8, 700_000, 3, 20, 600_000, 9]
    model = {f"w{i}": np.arange(1.0, 1.0 + size) for i, size in enumerate(sizes)}
    spec = secateur.custom_from_mask({name: of % 3 == 0 for name, of in model.items()})
    masks = client.prune(model, spec).masks
    assert list(masks) == list(model)
    for name, weight in model.items():
        np.testing.assert_array_equal(masks[name], weight % 3 == 0)
