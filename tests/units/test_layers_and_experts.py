"""The least influential layers and experts are removed."""

from typing import Any

import numpy as np
import pytest

import secateur
from secateur import Statistics, UnitStatistics
from tests.shrinking.tiny_transformers import inputs, tiny


def influence(*means: float, count: int = 10) -> UnitStatistics:
    counts = np.full(len(means), count)
    return UnitStatistics(np.array(means) * counts, counts)


BLOCKS = Statistics({}, {"layers": influence(0.3, 0.1, 0.5, 0.1)})
TWO = Statistics({}, {"a": influence(1), "b": influence(1, 2)})


def test_the_least_influential_layers() -> None:
    assert secateur.least_influential(BLOCKS, 1) == [1]
    assert secateur.least_influential(BLOCKS, 3) == [0, 1, 3]
    model = {f"layers.{layer}.w": np.full(1, layer) for layer in range(4)}
    shorter = secateur.depth(model, secateur.least_influential(BLOCKS, 2))
    assert {name: int(value[0]) for name, value in shorter.items()} == {
        "layers.0.w": 0,
        "layers.1.w": 2,
    }


@pytest.mark.parametrize(
    ("statistics", "count", "stack", "message"),
    [
        (BLOCKS, 4, None, r"count: 4 is not an int in \[0, 4\)"),
        (BLOCKS, 1, "x", "stack: 'x' is none of layers"),
        (TWO, 1, None, "stack: the statistics have a, b; name one"),
        (Statistics({}), 1, None, "have no block influence; see blocks="),
        (Statistics({}, {"a": influence(1, 2, count=0)}), 1, None, "a.0: no token reached"),
        ({}, 1, None, "is not a Statistics"),
    ],
)
def test_wrong_layers(statistics: Any, count: int, stack: str | None, message: str) -> None:
    with pytest.raises(secateur.SecateurError, match=message):
        secateur.least_influential(statistics, count, stack)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral"])
def test_the_experts_with_the_smallest_outputs(name: str, client: secateur.Client) -> None:
    model = tiny(name)
    config = model.config.to_dict() | {"model_type": name}
    groups = secateur.transformer_groups(config, ["experts"], source=model)
    statistics = secateur.calibrate(model, [inputs(model)])
    scores = secateur.reap(statistics, groups)
    spec = secateur.grouped(groups, 0.5, importance_scores=scores, scope="tensor", align=1)
    result = client.prune(model, spec)
    for group, (path, units) in zip(groups, statistics.experts.items(), strict=True):
        np.testing.assert_array_equal(scores[group.name], units.sums / np.maximum(units.counts, 1))
        kept = result.masks[f"{path}.down_proj"].flatten(1).any(1).numpy()
        assert set(np.flatnonzero(~kept)) == set(np.argsort(scores[group.name])[:2])


def test_wrong_experts() -> None:
    statistics = Statistics({}, experts={"e": influence(1, 2)})
    group = secateur.group("g", secateur.member("e.down"))
    assert secateur.reap(statistics, [group])["g"].tolist() == [1, 2]
    for member in (secateur.member("e.down", 1), secateur.member("x.down")):
        with pytest.raises(secateur.InvalidStatistics, match="g: the statistics have no experts"):
            secateur.reap(statistics, [secateur.group("g", member)])
    halves = secateur.group("g", secateur.member("e.down", stride=2))
    with pytest.raises(secateur.InvalidSpec, match=r"g: e.down: a unit is not one expert"):
        secateur.reap(statistics, [halves])
