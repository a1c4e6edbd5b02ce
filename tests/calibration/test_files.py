"""Files of statistics: written and read, made by other programs, and damaged."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import secateur
from secateur import LayerStatistics, Statistics
from secateur.calibration.triangle import Triangle
from tests.calibration.naive import needed
from tests.conftest import examples

FINITE = st.floats(-1e100, 1e100)
POSITIVE = st.floats(0, 1e100)
METADATA = {"secateur.statistics": '{"version": 1}'}


@st.composite
def layers(draw: st.DrawFn) -> dict[str, LayerStatistics]:
    names = draw(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1), unique=True, max_size=4)
    )
    shared = draw(st.lists(st.integers(1, 3), min_size=2, max_size=2))
    grams = [
        Triangle.of(draw(arrays(np.float32, (n, n), elements=st.floats(0, 10, width=32))))
        for n in shared
    ]
    return {name: draw(layer(grams)) for name in names}


@st.composite
def layer(draw: st.DrawFn, grams: list[Triangle]) -> LayerStatistics:
    gram = draw(st.sampled_from([None, *grams]))
    inputs = draw(st.integers(1, 4)) if gram is None else gram.size
    count = draw(st.integers(1, 2**53) | st.floats(0.5, 1e9))
    signed, unsigned = (
        arrays(np.float64, inputs, elements=FINITE),
        arrays(np.float64, inputs, elements=POSITIVE),
    )
    return LayerStatistics(
        count,
        draw(unsigned),
        draw(st.none() | signed),
        draw(st.none() | unsigned),
        draw(st.integers(0, 1)),
        gram,
    )


@examples(200)
@given(values=layers())
def test_what_is_saved_is_loaded(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, LayerStatistics]
) -> None:
    path = tmp_path_factory.mktemp("files") / "statistics.safetensors"
    statistics = Statistics(values)
    statistics.save(path)
    loaded = Statistics.load(path)
    assert loaded == statistics
    assert list(loaded) == list(statistics)
    assert len(set(loaded.gram_owners().values())) == len(set(statistics.gram_owners().values()))
    with safe_open(path, "numpy"):
        pass
    again = path.with_name("again")
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()


def test_the_layout(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    gram = Triangle.of(np.array([[1.0, 2.0], [2.0, 5.0]]))
    one = LayerStatistics(
        3, np.array([1.0, 5.0]), np.array([-1.0, 0.0]), np.array([1.0, 2.0]), 1, gram
    )
    other = LayerStatistics(2.5, np.array([1.0, 5.0]), input_dim=0, triangle=gram)
    Statistics({"q": one, "k": other}).save(path)
    stored = load_file(path)
    assert {name: (value.dtype.name, value.tolist()) for name, value in stored.items()} == {
        "q.count": ("int64", 3),
        "q.sum_squares": ("float64", [1, 5]),
        "q.sum": ("float64", [-1, 0]),
        "q.sum_abs": ("float64", [1, 2]),
        "q.gram": ("float32", [1, 2, 5]),
        "k.count": ("float64", 2.5),
        "k.sum_squares": ("float64", [1, 5]),
    }
    with safe_open(path, "numpy") as file:
        assert json.loads(file.metadata()["secateur.statistics"]) == {
            "version": 1,
            "layers": {"k": {"input_dim": 0, "gram": "q"}},
        }


def test_a_file_of_another_program(tmp_path: Path) -> None:
    path = tmp_path / "made"
    tensors = {
        "fc.weight.count": np.array(4.0),
        "fc.weight.sum_squares": np.array([1.0, 9]),
    }
    save_file(tensors, path, METADATA)
    found = Statistics.load(path)["fc.weight"]
    assert found == LayerStatistics(4, np.array([1.0, 9.0]))
    assert type(found.count) is int
    assert found.rms.tolist() == [0.5, 1.5]


GOOD: dict[str, Any] = {
    "a.count": np.array(4),
    "a.sum_squares": np.array([1.0, 9]),
    "a.gram": np.array([1, 2, 3], np.float32),
    "b.count": np.array(4),
    "b.sum_squares": np.array([1.0, 9]),
}


def written(path: Path, tensors: dict[str, Any], described: Any = None) -> Path:
    text = described if isinstance(described, str) else json.dumps(described or {"version": 1})
    kept = {
        name: np.asarray(value) for name, value in (GOOD | tensors).items() if value is not None
    }
    save_file(kept, path, {"secateur.statistics": text})
    return path


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"a.count": None}, "a.count: is missing"),
        ({"a.sum_squares": None}, "a.sum_squares: is missing"),
        ({"a.count": 0}, "a.count: 0 is not a number above 0"),
        ({"a.count": -1.5}, "a.count: -1.5 is not a number above 0"),
        ({"a.count": np.nan}, "a.count: nan is not a number above 0"),
        ({"a.count": np.float32(1)}, r"a.count: is F32 of shape \[\], not F64 or I64 with 0 dim"),
        ({"a.count": np.array([4])}, r"a.count: is I64 of shape \[1\], not F64 or I64 with 0 dim"),
        ({"a.sum_squares": np.array([1, 2])}, r"a.sum_squares: is I64 of shape \[2\], not F64"),
        ({"a.sum_squares": np.array([])}, "a.sum_squares: has 0 elements, not 1 or more"),
        ({"a.sum_squares": np.array([1, -2.0])}, r"a.sum_squares\[1\]: -2.0 is not a finite num"),
        ({"a.sum_squares": np.array([np.inf, 1])}, r"a.sum_squares\[0\]: inf is not a finite nu"),
        ({"a.sum": np.array([1, np.nan])}, r"a.sum\[1\]: nan is not finite"),
        ({"a.sum": np.array([1.0])}, "a.sum: has 1 elements, not 2"),
        ({"a.sum_abs": np.array([-1.0, 1])}, r"a.sum_abs\[0\]: -1.0 is not a finite number from"),
        ({"a.gram": np.ones(4, np.float32)}, r"a.gram: has 4 elements, which is not n \* \(n"),
        ({"a.gram": np.ones(0, np.float32)}, r"a.gram: has 0 elements, which is not n \* \(n"),
        ({"a.gram": np.ones(6, np.float32)}, "a.gram: is of a matrix of 3 rows, .* 2 inputs of a"),
        ({"a.gram": np.ones(3)}, r"a.gram: is F64 of shape \[3\], not F32"),
        ({"a.mean": np.ones(3)}, "a.mean: is not NAME.count, NAME.sum_squares, NAME.sum, NAME."),
        ({"count": np.ones(3)}, "count: is not NAME.count"),
    ],
)
def test_damaged_tensors(tmp_path: Path, tensors: dict[str, Any], message: str) -> None:
    path = written(tmp_path / "file", tensors)
    with pytest.raises(secateur.InvalidStatistics, match=f"^{path}: {message}"):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("described", "message"),
    [
        ("{", "'{' is not JSON"),
        ("[" * 100_000, "'.* is not JSON"),
        ("3", "version None is unknown, only 1 is known; update secateur"),
        ({"version": 2}, "version 2 is unknown, only 1 is known; update secateur"),
        ({"version": True}, "version True is unknown"),
        ({"version": 1, "layers": []}, r"layers: \[\] is not an object"),
        ({"version": 1, "layers": {"a": 3}}, "layers: a: 3 is not an object"),
        ({"version": 1, "layers": {"c": {}}}, "layers: c has no tensors"),
        ({"version": 1, "layers": {"a": {"x": 1}}}, "layers: a: 'x' is neither input_dim nor gram"),
        ({"version": 1, "layers": {"a": {"gram": 1}}}, "layers: a.gram: 1 is not the name of a la"),
        ({"version": 1, "layers": {"a": {"input_dim": 2}}}, "layers: a.input_dim: 2 is neither 0"),
        ({"version": 1, "layers": {"a": {"input_dim": True}}}, "layers: a.input_dim: True is nei"),
    ],
)
def test_damaged_metadata(tmp_path: Path, described: Any, message: str) -> None:
    path = written(tmp_path / "file", {}, described)
    with pytest.raises(
        secateur.InvalidStatistics, match=f"^{path}: metadata secateur.statistics: {message}"
    ):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"a": {"gram": "b"}}, "a.gram: exists, but the metadata refers to that of b"),
        ({"b": {"gram": "c"}}, "b: its gram is that of c, which has no own gram"),
        ({"b": {"gram": "b"}}, "b: its gram is that of b, which has no own gram"),
    ],
)
def test_wrong_references(tmp_path: Path, layers: Any, message: str) -> None:
    path = written(tmp_path / "file", {}, {"version": 1, "layers": layers})
    with pytest.raises(secateur.InvalidStatistics, match=f"^{path}: {message}"):
        Statistics.load(path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, np.nan, 1], r"a.gram\[1\]: nan is not finite"),
        ([1, 1, -1], r"a.gram\[2\]: -1.0 is on the diagonal, below 0"),
    ],
)
def test_a_gram_is_checked_when_it_is_used(
    tmp_path: Path, values: list[float], message: str
) -> None:
    path = written(tmp_path / "file", {"a.gram": np.array(values, np.float32)})
    found = Statistics.load(path)
    assert found["a"].count == 4
    with pytest.raises(secateur.InvalidStatistics, match=f"^{path}: {message}"):
        _ = needed(found["a"].gram)


def test_other_files(tmp_path: Path) -> None:
    path = tmp_path / "file"
    for content, message in ((b"", "is empty"), (b"GGUF", "GGUF"), (b"x" * 99, "is text")):
        path.write_bytes(content)
        with pytest.raises(secateur.InvalidStatistics, match=f"^{path}: .*{message}"):
            Statistics.load(path)
    save_file(GOOD, path)
    with pytest.raises(secateur.InvalidStatistics, match=r"has no secateur\.statistics"):
        Statistics.load(path)
    with pytest.raises(secateur.InvalidStatistics, match="No such file"):
        Statistics.load(tmp_path / "none")
    with pytest.raises(secateur.InvalidStatistics, match="Is a directory"):
        Statistics.load(tmp_path)
    with pytest.raises(secateur.SecateurError, match="a path is a str"):
        Statistics.load(3)  # type: ignore[arg-type]


def test_a_save_is_whole_or_changes_nothing(tmp_path: Path) -> None:
    def fails() -> Any:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"before")
    broken = LayerStatistics(1, np.ones(2), triangle=Triangle(2, fails))
    with pytest.raises(secateur.SecateurError, match=f"^{path}: cannot write it: No space left"):
        Statistics({"a": broken}).save(path)
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(secateur.SecateurError, match="cannot write it: No such file"):
        Statistics({}).save(tmp_path / "none" / "file")


def test_grams_are_read_after_the_file_is_replaced(tmp_path: Path) -> None:
    path = written(tmp_path / "file", {})
    found = Statistics.load(path)
    found.save(path)
    assert needed(found["a"].gram).tolist() == [[1, 2], [2, 3]]
    assert found == Statistics.load(path)
