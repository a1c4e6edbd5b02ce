"""Names and globs: their matches compared with fnmatch, and the work and memory for many."""

import sys
import tracemalloc
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from types import FrameType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur_server.errors import Cancelled, InvalidSpec
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.globs import (
    MOST_GLOB_CHARACTERS,
    MOST_GLOBS,
    matches,
)
from tests.conftest import examples

many = examples(300)
GLOBS = st.lists(st.text("ab[]!-*?.^", max_size=8), max_size=6)
NAMES = st.lists(st.text("ab[]!-*?.^", max_size=6), max_size=6, unique=True)


def lines(function: Callable[[], Any]) -> int:
    """Counts the lines of Python that a function runs, as a measure of work."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        function()
    finally:
        sys.settrace(before)
    return count


def is_match(pattern: str, name: str, names: Sequence[str]) -> bool:
    return name == pattern if pattern in names else fnmatchcase(name, pattern)


@given(GLOBS, NAMES)
@many
def test_names_and_globs_match_as_in_fnmatch(patterns: list[str], names: list[str]) -> None:
    found = matches(RequestContext(), "tensors", patterns, {name: name for name in names})
    expected = {
        name: [index for index, pattern in enumerate(patterns) if is_match(pattern, name, names)]
        for name in names
    }
    assert found.first == {name: indices[0] for name, indices in expected.items() if indices}
    matched = {index for indices in expected.values() for index in indices}
    unmatched = [index for index in range(len(patterns)) if index not in matched]
    assert found.unmatched == (unmatched[0] if unmatched else None)


def names_of(count: int) -> dict[str, str]:
    return {name: name for name in (f"layers.{i // 50}.w.{i % 50}.weight" for i in range(count))}


KINDS: dict[str, Callable[[int], str]] = {
    "names": lambda i: f"layers.{i // 50}.w.{i % 50}.weight",
    "a star at the end": lambda i: f"layers.{i // 50}.w.{i % 50}.*",
    "stars": lambda i: f"*.{i // 50}.*.{i % 50}.weight",
    "sets": lambda i: f"layer[a-z].{i // 50}.?.{i % 50}.*",
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_number_of_steps_is_linear_in_globs_and_names(kind: str) -> None:
    def work(count: int) -> int:
        patterns = [KINDS[kind](i) for i in range(count)]
        return lines(lambda: matches(RequestContext(), "tensors", patterns, names_of(count)))

    assert work(800) < 2.5 * work(400)


def test_matching_keeps_no_memory() -> None:
    names, globs = names_of(100), [f"{i}{'x' * 40}[a-{chr(200 + i % 99)}]*" for i in range(2000)]
    matches(RequestContext(), "tensors", globs[:1000], names)
    tracemalloc.start()
    try:
        matches(RequestContext(), "tensors", globs[1000:], names)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak > 1 << 20  # so the measurement works
    assert kept < 100 << 10


@pytest.mark.parametrize(
    ("globs", "limit"),
    [
        ([f"{i}*" for i in range(MOST_GLOBS + 1)], MOST_GLOBS),
        ([f"{i:03}{'x' * 990}*" for i in range(600)], MOST_GLOB_CHARACTERS),
    ],
)
def test_more_globs_than_the_limit_are_an_error_with_the_limit(
    globs: list[str], limit: int
) -> None:
    with pytest.raises(InvalidSpec, match=f"^tensors: .*{limit}"):
        matches(RequestContext(), "tensors", globs, names_of(1))


def test_globs_that_need_too_many_steps_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur_server.state_dict.globs.MOST_VISITS", 50_000)
    stars = ["*".join(["", *f"{i:010b}", ""]) for i in range(1 << 10)]
    names = {name: name for name in (f"{i * 2654435761 % (1 << 64):064b}" for i in range(100))}
    with pytest.raises(InvalidSpec, match=r"^tensors: .*50000 steps"):
        matches(RequestContext(), "tensors", stars, names)
    assert matches(RequestContext(), "tensors", stars[:10], names).unmatched is None


def test_cancellation_ends_the_matching() -> None:
    context = RequestContext()
    context.cancel()
    with pytest.raises(Cancelled):
        matches(context, "tensors", ["*.weight"], names_of(1))
