"""The client pauses Python's search for reference cycles, and leaves it as the caller has it."""

import gc

import numpy as np
import pytest

import secateur
from secateur.cycles import no_search_for_cycles
from secateur.source import read_source


def test_the_search_continues_after_an_error() -> None:
    @no_search_for_cycles()
    def fail() -> None:
        assert not gc.isenabled()
        raise ValueError("of the function")

    with pytest.raises(ValueError, match="of the function"):
        fail()
    assert gc.isenabled()


def test_a_search_that_the_caller_has_turned_off_is_not_turned_on() -> None:
    gc.disable()
    try:
        with no_search_for_cycles():
            assert not gc.isenabled()
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_many_tensors_are_read_without_a_search() -> None:
    model = {f"w{index}": np.ones(1, np.float32) for index in range(10_000)}
    searches: list[str] = []
    gc.callbacks.append(lambda phase, info: searches.append(phase))
    try:
        source = read_source(model)
    finally:
        gc.callbacks.pop()
    assert len(source.tensors) == 10_000
    assert len(searches) <= 2  # after the pause: begin and end of one search
    with pytest.raises(secateur.InvalidStateDict):
        read_source({"w": "no tensor"})
    assert gc.isenabled()
