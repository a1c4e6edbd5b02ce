"""Bytes that are nearly right, as hypothesis finds them; `make fuzz` looks longer, with atheris."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import examples
from tests.fuzz.seeds import SEEDS
from tests.fuzz.strategies import EDITS, STRATEGIES, edited
from tests.fuzz.targets import TARGETS

targets = pytest.mark.parametrize("target", TARGETS)


@targets
def test_good_bytes_are_read(target: str) -> None:
    for seed in SEEDS[target]():
        TARGETS[target](seed)


# What a fuzzer found once.
FOUND = [
    # A blank before the header's {: the library takes it, the format and we do not.
    ("safetensors_file", b"3\x00\xc3 {}"),
    # A name that stands twice: the library never sees that the first one's bytes do not fit.
    (
        "safetensors_file",
        b"*\x00\x01"
        b'{"w":{"dtype":"F32","shape":[2],"data_offsets":[0,16]},'
        b'"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}\0\0',
    ),
]


@pytest.mark.parametrize(("target", "data"), FOUND)
def test_what_was_found_once_is_read_or_refused(target: str, data: bytes) -> None:
    TARGETS[target](data)


@targets
@examples(150)
@given(st.data())
def test_what_is_nearly_right_is_read_or_refused(target: str, draw: st.DataObject) -> None:
    TARGETS[target](draw.draw(STRATEGIES[target]))


@targets
@examples(100)
@given(st.data())
def test_what_is_spoilt_is_read_or_refused(target: str, draw: st.DataObject) -> None:
    seed = draw.draw(st.sampled_from(list(SEEDS[target]())))
    TARGETS[target](edited(seed, draw.draw(EDITS)))


@targets
@examples(100)
@given(st.binary(max_size=100))
def test_any_bytes_are_read_or_refused(target: str, data: bytes) -> None:
    TARGETS[target](data)


@pytest.fixture(scope="module")
def peaks() -> dict[str, list[int]]:
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.memory"], stdout=subprocess.PIPE, check=True, timeout=300
    )
    found: dict[str, list[int]] = json.loads(ran.stdout)
    return found


BASE = 8 << 20


@pytest.mark.parametrize(
    ("factor", "kinds"),
    [
        pytest.param(1, ["a tensor"], id="data"),
        pytest.param(3, ["lists", "maps", "numbers", "entries", "deep"], id="what no header has"),
        pytest.param(9, ["texts", "a text", "a name"], id="text"),
        pytest.param(16, ["tiny tensors"], id="objects of tensors without elements"),
        pytest.param(18, ["a wide name"], id="4 bytes for every character because one needs them"),
    ],
)
def test_reading_takes_memory_for_what_was_sent_and_no_more(
    peaks: dict[str, list[int]], factor: int, kinds: list[str]
) -> None:
    """As a whole, json would make up to 30 times its size of a header."""
    for kind in kinds:
        announced, taken = peaks[kind]
        assert taken < factor * announced + BASE, kind
