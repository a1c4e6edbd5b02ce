"""The benchmark of quality on its smallest models: networks that read digits.

Each is right about 95 % of 450 images. So an image is 0.07 % of the mean of three, and the bounds
leave room for other machines.
"""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch

import secateur

pytestmark = [pytest.mark.slow, pytest.mark.quality]

NAMES = ("magnitude", "Wanda", "magnitude + refit", "Wanda + refit")


@pytest.fixture(scope="module")
def quality() -> Iterator[ModuleType]:
    """The module, whose neighbours are imported as it does."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend("benchmarks")
        import quality

        yield quality


@pytest.fixture(scope="module")
def found(quality: ModuleType) -> Any:
    """The outcomes of half of the methods."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # more would wait for each other while other tests use a core
    methods = {name: quality.METHODS[name] for name in NAMES}
    with secateur.embedded(device="cpu") as client:
        readers = quality.cases("LeNet", None)
        compared = quality.mean([quality.compare(client, case, methods) for case in readers])
    torch.set_num_threads(before)
    return compared


def test_refit_restores_what_pruning_lost(quality: ModuleType, found: Any) -> None:
    for target in ("50 %", "70 %"):
        assert quality.closed(found, "magnitude + refit", target) > 0.7
        assert quality.closed(found, "Wanda + refit", target) > 0.7


def test_methods_are_in_the_order_of_their_costs(found: Any) -> None:
    values = {name: found.outcomes[name]["70 %"].value for name in NAMES}
    assert found.unpruned > 0.94
    assert values["magnitude"] < values["Wanda"] < values["Wanda + refit"]
    assert values["magnitude"] < values["magnitude + refit"]


def test_the_table_has_a_line_for_each_method(quality: ModuleType, found: Any) -> None:
    lines = list(quality.rows([found], lambda outcome: f"{outcome.value:.2f}"))
    assert [name for name, *_ in lines] == list(NAMES)
    assert {len(line) for line in lines} == {len(quality.columns([found]))}
