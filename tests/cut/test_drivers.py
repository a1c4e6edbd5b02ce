"""The search gives a driver only what can be sent elsewhere, and needs nothing written in place."""

import importlib
import inspect
import io
import pickle
import pkgutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import secateur
import secateur_server.cut
from secateur_server.backends import backend_for
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.allocation import lamp
from secateur_server.cut.drivers import Driver, Local, Task
from secateur_server.cut.plan import plan
from secateur_server.cut.prune import prune
from secateur_server.importance.random import Random
from secateur_server.runtime.context import Found, Item, RequestContext
from secateur_server.spec.rules import GuardRails, Rail, Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import PATIENCE, inner_server
from tests.contract.test_golden import check, families
from tests.cut.test_same_bits import WAYS, cut_into, every_rule
from tests.definition import amount_of, rule
from tests.masks import packed, unpacked


class Pickler(pickle.Pickler):
    """Pickles what a tensor has, and not what its storage has around it."""

    def reducer_override(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return NotImplemented
        data = value.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()
        return _tensor, (data, value.dtype, value.shape)


def _tensor(data: bytes, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    return (
        torch.frombuffer(bytearray(data), dtype=dtype).view(*shape)
        if data
        else torch.empty(shape, dtype=dtype)
    )


def sent(value: Any) -> bytes:
    """A task with its piece, or a result, as bytes."""
    into = io.BytesIO()
    Pickler(into).dump(value)
    return into.getvalue()


def worked(data: bytes) -> bytes:
    """Does a task that was sent, with nothing of the request but what came with it."""
    task, piece = pickle.loads(data)
    return sent(task(RequestContext(), backend_for(torch.device("cpu")), piece))


class Remote:
    """A driver whose pieces and results are bytes on their way."""

    def __init__(self, device: torch.device, send: Callable[..., Iterable[bytes]] = map) -> None:
        self.backend, self.threads, self._send = backend_for(device), 3, send
        self.tasks: set[str] = set()

    def map(
        self, context: RequestContext, task: Task[Item, Found], pieces: Iterable[Item]
    ) -> list[Found]:
        assert isinstance(task, partial) or inspect.isfunction(task)
        function = task.func if isinstance(task, partial) else task
        self.tasks.add(f"{function.__module__}.{function.__qualname__}")
        packets = [sent((task, piece)) for piece in context.each(pieces)]
        return [pickle.loads(data) for data in self._send(worked, packets)]


# Only pieces in files of a cluster need these: see tests/cluster/test_divided.py.
OF_CLUSTERS = {
    "secateur_server.cut.drivers.places._each",
    "secateur_server.cut.allocation.lamp_windows._buckets_there",
}


def all_tasks() -> set[str]:
    """The functions of cut/ that take the request, a backend and a piece."""
    package = secateur_server.cut
    return {
        f"{module.name}.{name}"
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}.")
        for name, value in vars(importlib.import_module(module.name)).items()
        if inspect.isfunction(value)
        and value.__module__ == module.name
        and list(inspect.signature(value).parameters)[:2] == ["context", "backend"]
        and len(inspect.signature(value).parameters) > 2
    }


def model() -> dict[str, Parameter]:
    """Tensors with ties, one of them partly pruned, of two sizes and dtypes."""
    numbers = torch.Generator().manual_seed(0)
    a, b = (torch.randn(size, generator=numbers) for size in ((24, 40), (13, 33)))
    kept = torch.rand(13, 33, generator=numbers) > 0.3
    return {
        "a": Parameter(a.mul(8).round()),
        "b": Parameter(b, packed(kept)),
        "c": Parameter(torch.randn(30, 8, generator=numbers).half()),
    }


def rules() -> list[Selection]:
    """One of each way through the search."""
    names = ["a", "b", "c"]
    rails = GuardRails((Rail("rail", ("a",), 0.1, 0.25),))
    row = {"scope": "row", "of_all": True}
    return [
        *every_rule(["a", "b"]),
        rule(names, 0.4, guard_rails=rails),
        rule(names, 0.4, importance=Random(1), guard_rails=rails),
        rule(names, 0.5, allocation="lamp"),
        rule(names, 0.5, allocation="erk"),
        rule(["a"], 0.3, **row),
        rule(["b"], 0.6, **row),
    ]


def results(driver: Callable[[torch.device], Driver] | None) -> list[object]:
    """The masks and choices of each rule, and of plans."""
    context, extras = RequestContext(driver=driver), {"scores": torch.arange(960.0).view(24, 40)}
    found: list[object] = []
    for one in rules():
        pruned, (choices,) = prune(context, model(), [one], extras)
        found += [{name: unpacked(of).tolist() for name, of in pruned.items()}, list(choices)]
    for allocation in ("rank", "erk"):
        amounts = [amount_of(amount) for amount in (0.1, 0.3, 0.7)]
        planned = plan(context, rule(["a", "b"], allocation=allocation), amounts, model(), {})
        found += [(list(outcome.choices), dict(outcome.removed)) for outcome in planned]
    return found


def test_all_tasks_are_sent_and_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    remote, expected = Remote(torch.device("cpu")), results(None)
    assert results(lambda device: remote) == expected
    for way in WAYS:
        with monkeypatch.context() as small:  # few units take the way of millions
            cut_into(small, 64, way)
            small.setattr(TorchBackend, "batch", 128)
            small.setattr(lamp, "FEW", 100)
            assert results(lambda device: remote) == expected
    assert remote.tasks == all_tasks() - OF_CLUSTERS


@pytest.mark.slow  # a process takes seconds to import torch
def test_another_process_gives_the_same_bits() -> None:
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        assert results(lambda device: Remote(device, pool.map)) == results(None)


def test_bits_in_parts_are_those_of_one_part(monkeypatch: pytest.MonkeyPatch) -> None:
    """A request with little memory for its work gets the bits of few units at once."""
    cut_into(monkeypatch, 64, "ties in a sample")
    monkeypatch.setattr(TorchBackend, "batch", 64)
    for amount in (0.4, 0.9):
        whole = rule(["a", "b", "c"], amount)
        found, _ = prune(RequestContext(work_memory=200), model(), [whole], {})
        expected, _ = prune(RequestContext(), model(), [whole], {})
        assert all(torch.equal(unpacked(found[n]), unpacked(of)) for n, of in expected.items())


@pytest.fixture(scope="module")
def client() -> Iterator[secateur.Client]:
    """A client of a server whose driver sends everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Local, "on", Remote)
        with inner_server() as server, secateur.Client(server.address, timeout=PATIENCE) as client:
            yield client


@pytest.mark.slow
@families
def test_what_a_server_sends_is_golden(
    client: secateur.Client, tmp_path: Path, family: str
) -> None:
    check(family, client, tmp_path)
