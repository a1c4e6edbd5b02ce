"""Shards that do not fit their index: errors of the client and the server name the fault."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import secateur
from tests.client.sharded import (
    INDEX,
    SHARDS,
    change_index,
    metadata_of,
    real_weights,
    write_shards,
)
from tests.contract.raw import check_serves
from tests.uris.served import Served, check, check_refused, serving_here


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shards")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving_here("--allow-path", str(root)) as running:
        yield running


@pytest.fixture(autouse=True)
def _the_server_goes_on(served: Served) -> Iterator[None]:
    yield
    check_serves(served.server, served.channel)


@pytest.fixture(scope="module")
def model(crepe: Path) -> dict[str, Tensor]:
    return real_weights(crepe)


@pytest.fixture
def out(root: Path, request: pytest.FixtureRequest) -> Path:
    made = root / f"out-{request.node.name}"
    made.mkdir()
    return made


def no_json(index: Path) -> None:
    index.write_text('{"weight_map": ')


def no_map(index: Path) -> None:
    index.write_text('{"metadata": {"total_size": 5}}')


def no_names(index: Path) -> None:
    index.write_text('{"weight_map": {}}')


def no_files(index: Path) -> None:
    index.write_text('{"weight_map": {"conv1.weight": 5}}')


def no_text(index: Path) -> None:
    index.write_bytes(b'{"weight_map": {"\xff": "x"}}')


def a_list(index: Path) -> None:
    index.write_text('["weight_map"]')


def surrogate(index: Path) -> None:
    index.write_text('{"weight_map": {"w": "\\ud800"}}')


def deep(index: Path) -> None:
    index.write_text("[" * 100_000)


def odd_metadata(index: Path) -> None:
    table = json.loads(index.read_text())
    index.write_text(json.dumps({**table, "metadata": [1]}))


def missing_shard(index: Path) -> None:
    (index.parent / SHARDS[1]).unlink()


def other_shard(index: Path) -> None:
    change_index(index, conv1__weight=SHARDS[2])


def no_such_tensor(index: Path) -> None:
    change_index(index, ghost=SHARDS[0])


def twice(index: Path) -> None:
    shard = index.parent / SHARDS[2]
    again = {"conv1.weight": torch.arange(12.0)}
    save_file(again, shard, metadata=metadata_of(shard))
    table = json.loads(index.read_text())["weight_map"]
    gone = {n.replace(".", "__"): None for n, f in table.items() if f == SHARDS[2]}
    change_index(index, **gone, conv1__weight=SHARDS[2])


def empty_shard(index: Path) -> None:
    (index.parent / SHARDS[1]).write_bytes(b"")


def broken_shard(index: Path) -> None:
    data = (index.parent / SHARDS[1]).read_bytes()
    (index.parent / SHARDS[1]).write_bytes(data[:-1])


NO_INDEX = [no_json, no_map, no_names, no_files, no_text, a_list, surrogate, deep, odd_metadata]
BROKEN: list[tuple[Callable[[Path], None], list[str]]] = [
    *((change, [INDEX]) for change in NO_INDEX),
    (missing_shard, [SHARDS[1]]),
    (other_shard, ["conv1.weight", SHARDS[2]]),
    (no_such_tensor, ["ghost", SHARDS[0]]),
    (twice, ["conv1.weight", SHARDS[0], SHARDS[2]]),
    (empty_shard, [SHARDS[1]]),
    (broken_shard, [SHARDS[1]]),
]


@pytest.mark.parametrize(("change", "parts"), BROKEN, ids=[c.__name__ for c, _ in BROKEN])
def test_the_error_names_the_broken_file(
    served: Served,
    out: Path,
    model: dict[str, Tensor],
    change: Callable[[Path], None],
    parts: list[str],
) -> None:
    index = write_shards(out, model)
    change(index)
    with pytest.raises(secateur.InvalidStateDict) as of_client:
        served.client.report(out)
    found = served.read(index.as_uri())
    if change is missing_shard:
        check(found, "NOT_FOUND", "URI_NOT_FOUND", *parts)
    else:
        check(found, "INVALID_ARGUMENT", "INVALID_STATE_DICT", *parts)
    assert not [part for part in parts if part not in str(of_client.value)], of_client.value


@pytest.mark.parametrize(
    "place", ["../outside.safetensors", "/etc/passwd", "..", ".", "", "a/b"], ids=range(6)
)
def test_shards_are_beside_their_index(
    served: Served, out: Path, model: dict[str, Tensor], place: str
) -> None:
    index = write_shards(out, model)
    change_index(index, conv1__weight=place)
    with pytest.raises(secateur.InvalidStateDict, match=r"conv1\.weight.*not beside"):
        served.client.report(index)
    check_refused(served.read(index.as_uri()))


def test_a_folder_needs_one_index(served: Served, out: Path, model: dict[str, Tensor]) -> None:
    with pytest.raises(secateur.InvalidStateDict, match="holds no model; known are model"):
        served.client.report(out)
    write_shards(out, model)
    write_shards(out, model, "other.safetensors.index.json")
    with pytest.raises(secateur.InvalidStateDict, match=f"holds 2 models: {INDEX}, other"):
        served.client.report(out)
