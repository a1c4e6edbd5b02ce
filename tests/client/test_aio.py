"""secateur.aio.Client: what the tests of both clients cannot see."""

import asyncio
import inspect
import os
import socket
import threading
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur.calls.pruning import AsyncPrunerCalls
from tests.conftest import PATIENCE, RunningServer, eventually, examples
from tests.contract.raw import series

MIB = 1 << 20
MODEL = {"a": np.arange(1, 101, dtype=np.float32), "b": np.ones((4, 6), np.float32)}
HALF = secateur.l1_unstructured("*", 0.5)
BIG = {"w": np.random.default_rng(0).standard_normal(12 * MIB, np.float32)}  # 48 MiB

Aio = secateur.aio.Client


def served(server: RunningServer, use: Callable[[Aio], Awaitable[object]]) -> None:
    """Runs a function of a client in a loop of its own; gRPC and threads leave no error there."""
    reports: list[dict[str, Any]] = []

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, report: reports.append(report))
        async with Aio(server.address, timeout=PATIENCE) as client:
            await use(client)

    asyncio.run(main())
    assert reports == []


def handled(server: RunningServer, method: str, code: str) -> float:
    return series(server, "grpc_server_handled_total", grpc_method=method, grpc_code=code)


def bits(tensors: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    arrays = {name: np.asarray(tensor) for name, tensor in tensors.items()}
    return {name: (a.dtype, a.shape, a.tobytes()) for name, a in arrays.items()}


# Results ------------------------------------------------------------------------------------------


def test_it_has_the_methods_of_the_blocking_client_with_the_same_arguments() -> None:
    public = {name for name in dir(secateur.Client) if not name.startswith("_")}
    assert public == {name for name in dir(Aio) if not name.startswith("_")}
    for name in public:
        ours, theirs = getattr(Aio, name), getattr(secateur.Client, name)
        assert inspect.iscoroutinefunction(ours) or inspect.isasyncgenfunction(ours), name
        assert inspect.signature(ours).parameters == inspect.signature(theirs).parameters, name


OUTPUTS = ["masks", "reparametrized", "dense", "packed", "none"]


@examples(25)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 8), st.integers(1, 8)), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    amount=st.floats(0, 1),
    output=st.sampled_from(OUTPUTS),
    keep=st.booleans(),
)
def test_results_are_those_of_the_blocking_client(
    server: RunningServer,
    client: secateur.Client,
    shapes: list[tuple[int, int]],
    seed: int,
    amount: float,
    output: Any,
    keep: bool,
) -> None:
    rng = np.random.default_rng(seed)
    model = {f"t{index}": rng.standard_normal(shape) for index, shape in enumerate(shapes)}
    spec = secateur.global_unstructured("*", amount)
    expected = client.prune(model, spec, output, keep=keep)

    async def use(aio: Aio) -> None:
        found, report, plan, final = await asyncio.gather(
            aio.prune(model, spec, output, keep=keep),
            aio.report(model),
            aio.plan(model, spec, [0.1, 0.9]),
            aio.finalize(model),
        )
        assert str(found.report) == str(expected.report)
        if output != "none":
            assert bits(found.state_dict()) == bits(expected.state_dict())
        assert str(report) == str(client.report(model))
        assert str(plan) == str(client.plan(model, spec, [0.1, 0.9]))
        assert bits(final.state_dict()) == bits(model)
        assert str(await aio.sensitivity(model)) == str(client.sensitivity(model))
        assert await aio.server_info() == client.server_info()
        for kept in (found.checkpoint, expected.checkpoint):
            if kept is not None:
                await aio.delete(kept)

    served(server, use)


def test_checkpoints_go_both_ways(
    server: RunningServer, client: secateur.Client, tmp_path: Path
) -> None:
    async def use(aio: Aio) -> None:
        uploaded = await aio.upload(MODEL)
        assert await aio.checkpoint(uploaded.name) == client.checkpoint(uploaded.name)
        listed = [checkpoint.name async for checkpoint in aio.checkpoints()]
        assert uploaded.name in listed
        assert listed == [checkpoint.name for checkpoint in client.checkpoints()]
        await aio.download(uploaded, tmp_path / "x.safetensors")
        assert bits(secateur.load(tmp_path / "x.safetensors")) == bits(MODEL)
        await aio.delete(uploaded)
        with pytest.raises(secateur.CheckpointNotFound):
            await aio.checkpoint(uploaded.name)

    served(server, use)


def test_many_calls_at_once(server: RunningServer) -> None:
    async def use(aio: Aio) -> None:
        results = await asyncio.gather(*(aio.prune(MODEL, HALF) for _ in range(200)))
        assert {result.report.zeros for result in results} == {62}

    served(server, use)


# The event loop -----------------------------------------------------------------------------------


def test_the_loop_turns_while_the_model_is_read(server: RunningServer) -> None:
    """The array waits for the loop: if the client blocked that, it would wait in vain."""
    turned = threading.Event()

    class Slow:
        def __array__(self, *options: Any, **more: Any) -> Any:
            assert turned.wait(PATIENCE)
            return MODEL["a"]

    async def use(aio: Aio) -> None:
        reading = asyncio.create_task(aio.report({"a": Slow()}))
        await asyncio.sleep(0)
        turned.set()
        assert (await reading).total == 100

    served(server, use)


def test_progress_is_shown_in_the_loop(server: RunningServer) -> None:
    seen: list[tuple[int, int, int]] = []

    async def use(aio: Aio) -> None:
        here = threading.get_ident()
        await aio.report(BIG, progress=lambda *done: seen.append((threading.get_ident(), *done)))
        assert {thread for thread, _, _ in seen} == {here}
        assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
        assert seen[-1][1] == seen[-1][2] > 48 * MIB

    served(server, use)


class Stopped(BaseException):
    """Of the kind of SystemExit and KeyboardInterrupt, but asyncio passes it to the caller."""


@pytest.mark.parametrize("kind", [KeyError, asyncio.CancelledError, Stopped])
def test_an_error_of_progress_is_the_callers(
    server: RunningServer, tmp_path: Path, kind: type[BaseException]
) -> None:
    def fail(done: int, total: int) -> None:
        raise kind("mine")

    async def use(aio: Aio) -> None:
        checkpoint = await aio.upload(BIG)
        calls: list[Coroutine[Any, Any, object]] = [
            aio.report(BIG, progress=fail),
            aio.prune(BIG, HALF, "dense", progress=fail),
            aio.upload({"w": BIG["w"] + 1}, progress=fail),
            aio.download(checkpoint, tmp_path / "x.safetensors", progress=fail),
        ]
        for call in calls:
            with pytest.raises(kind, match="mine"):
                await call
        assert list(tmp_path.iterdir()) == []
        await aio.delete(checkpoint)

    served(server, use)


def test_without_a_loop_or_in_another_one_the_error_says_so(server: RunningServer) -> None:
    client = Aio(server.address)  # needs no loop
    call = client.report(MODEL)
    with pytest.raises(secateur.SecateurError, match="needs a running event loop"):
        call.send(None)

    async def first() -> None:
        assert (await client.report(MODEL)).total == 124

    async def second() -> None:
        for wrong in (client.report(MODEL), client.server_info(), client.wait_until_ready(1)):
            with pytest.raises(secateur.SecateurError, match="another event loop or process"):
                await wrong

    async def forked() -> None:
        await client.report(MODEL)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "getpid", lambda: -1)
            with pytest.raises(secateur.SecateurError, match="another event loop or process"):
                await client.report(MODEL)
        await client.close()

    asyncio.run(first())
    asyncio.run(second())
    client = Aio(server.address)
    asyncio.run(forked())


def test_channels(server: RunningServer) -> None:
    async def use() -> None:
        channel = grpc.aio.insecure_channel(server.address)
        async with Aio(channel=channel) as client:
            assert (await client.report(MODEL)).total == 124
        assert (await Aio(channel=channel).report(MODEL)).total == 124  # it was left open
        await channel.close()
        with pytest.raises(secateur.SecateurError, match="the client is closed"):
            await Aio(channel=channel).report(MODEL)

    asyncio.run(use())
    with (
        grpc.insecure_channel(server.address) as blocking,
        pytest.raises(secateur.SecateurError, match=r"is not a grpc\.aio\.Channel"),
    ):
        Aio(channel=blocking)  # type: ignore[arg-type]


def test_every_method_of_a_closed_client_says_so(server: RunningServer, tmp_path: Path) -> None:
    async def listed(aio: AsyncPrunerCalls) -> None:
        assert isinstance(aio, Aio)
        async for _ in aio.checkpoints():
            pass

    async def use() -> None:
        aio = Aio(server.address)
        await aio.report(MODEL)
        await aio.close()
        await aio.close()  # twice is once
        for call in (
            aio.prune(MODEL, HALF),
            aio.prune(MODEL, HALF, "dense", keep=True),
            aio.report(MODEL),
            aio.plan(MODEL, HALF),
            aio.sensitivity(MODEL),
            aio.finalize(MODEL),
            aio.upload(MODEL),
            aio.download("checkpoints/x", tmp_path / "x.safetensors"),
            aio.checkpoint("checkpoints/x"),
            aio.delete("checkpoints/x"),
            aio.server_info(),
            aio.wait_until_ready(1),
            listed(aio),
        ):
            with pytest.raises(secateur.SecateurError, match="the client is closed"):
                await call

    asyncio.run(use())


# Calls that are cancelled -------------------------------------------------------------------------


async def cancelled(begin: Callable[[Callable[[int, int], None]], Awaitable[object]]) -> None:
    """Begins a call with a `progress`, and cancels its task when a third of its bytes is sent."""

    def cancel(done: int, total: int) -> None:
        if done > total // 3:
            task.cancel()

    async def call() -> None:
        await begin(cancel)

    task = asyncio.create_task(call())
    with pytest.raises(asyncio.CancelledError):
        await task


@pytest.mark.parametrize("method", ["Report", "Prune", "Upload", "Download"])
def test_a_cancelled_call_ends_at_the_server_and_writes_nothing(
    server: RunningServer, tmp_path: Path, method: str
) -> None:
    path = tmp_path / "x.safetensors"
    before = handled(server, method, "Canceled")

    async def use(aio: Aio) -> None:
        stored = await aio.upload(BIG)
        calls: dict[str, Callable[[Any], Awaitable[object]]] = {
            "Report": lambda progress: aio.report(BIG, progress=progress),
            "Prune": lambda progress: aio.prune(BIG, HALF, "dense", progress=progress),
            "Upload": lambda progress: aio.upload({"w": BIG["w"] + 2}, progress=progress),
            "Download": lambda progress: aio.download(stored, path, progress=progress),
        }
        await cancelled(calls[method])
        assert list(tmp_path.iterdir()) == []
        await aio.delete(stored)

    served(server, use)
    eventually(lambda: handled(server, method, "Canceled"), before + 1)
    eventually(lambda: series(server, "secateur_requests_in_flight"), 0.0)


def test_a_cancelled_prune_deletes_what_it_uploaded(
    server: RunningServer, client: secateur.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [checkpoint.name for checkpoint in client.checkpoints()]

    async def use(aio: Aio) -> None:
        begun = asyncio.Event()
        pruned = aio._prune

        async def prune(*arguments: Any) -> Any:
            begun.set()
            return await pruned(*arguments)

        monkeypatch.setattr(aio, "_prune", prune)
        pruning = asyncio.create_task(aio.prune(BIG, HALF, "dense", keep=True))
        await begun.wait()
        pruning.cancel()
        with pytest.raises(asyncio.CancelledError):
            await pruning

    served(server, use)
    assert [checkpoint.name for checkpoint in client.checkpoints()] == before


def test_asyncio_timeout_ends_a_call_that_waits() -> None:
    """The listener never answers: only the timeout can end the call."""

    async def use(address: str) -> None:
        async with Aio(address) as aio:
            with pytest.raises(TimeoutError) as raised:
                async with asyncio.timeout(0.2):
                    await aio.report(MODEL)
            assert not isinstance(raised.value, secateur.SecateurError)

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(use(f"127.0.0.1:{silent.getsockname()[1]}"))


def test_close_fails_the_calls_that_run_and_cancels_no_task() -> None:
    async def use(address: str) -> None:
        async with Aio(address) as aio:
            asked = asyncio.create_task(aio.server_info())
            streamed = asyncio.create_task(aio.prune(BIG, HALF, "dense"))
            await asyncio.sleep(0.2)
            await aio.close()
            for task in (asked, streamed):
                with pytest.raises(secateur.Cancelled, match="closed"):
                    await task

    with socket.create_server(("127.0.0.1", 0)) as silent:
        asyncio.run(use(f"127.0.0.1:{silent.getsockname()[1]}"))
