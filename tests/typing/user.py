"""A user's program, for `mypy --strict`: types are as they say, and wrong uses are errors.

An ignored error that mypy does not find is an error itself. Nothing here runs.
"""

import asyncio
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Literal, assert_type

import numpy as np

import secateur

MODEL = {"w": np.ones((4, 4), np.float32)}
SPEC = secateur.l1_unstructured("w", 0.5) + secateur.ln_structured("w", 1, n=2, dim=0)


def blocking(client: secateur.Client) -> None:
    result = client.prune(MODEL, SPEC)
    assert_type(result, secateur.PruneResult[Literal["masks"]])
    assert_type(result.masks, dict[str, Any])
    assert_type(result.report, secateur.Report)
    assert_type(result.report.tensors["w"].sparsity, float)
    assert_type(result.checkpoint, secateur.Checkpoint | None)
    assert_type(result.state_dict("dense"), dict[str, Any])
    result.save("masks.safetensors", "masks")
    assert_type(client.report(MODEL, details=True), secateur.Report)
    assert_type(client.plan(MODEL, SPEC, [0.1, 2]), secateur.Plan)
    assert_type(client.sensitivity(MODEL), secateur.Sensitivity)
    assert_type(client.server_info(), secateur.ServerInfo)
    final = client.finalize(MODEL, output="packed")
    assert_type(final.state_dict(), dict[str, Any])


def checkpoints(client: secateur.Client) -> None:
    stored = client.upload(MODEL)
    assert_type(stored, secateur.Checkpoint)
    assert_type(client.checkpoints(), Iterator[secateur.Checkpoint])
    client.download(client.checkpoint(stored.name), "x.safetensors", "reparametrized")
    client.delete(stored)


def outputs(client: secateur.Client, module: object) -> None:
    client.prune(MODEL, SPEC, "reparametrized").apply_to(module)
    client.prune(MODEL, SPEC, output="shrunk").shrink(module)
    assert_type(client.prune(MODEL, SPEC, output="none").report, secateur.Report)


def threads(client: secateur.Client) -> None:
    with ThreadPoolExecutor() as pool:
        running = pool.submit(client.prune, MODEL, SPEC)
        assert_type(running, Future[secateur.PruneResult[Literal["masks"]]])
        assert_type(pool.submit(client.report, MODEL).result(), secateur.Report)


async def with_asyncio() -> None:
    async with secateur.aio.Client("localhost:50051", timeout=60) as client:
        assert_type(client, secateur.aio.Client)
        result, report = await asyncio.gather(client.prune(MODEL, SPEC), client.report(MODEL))
        assert_type(result, secateur.PruneResult[Literal["masks"]])
        assert_type(report, secateur.Report)
        dense = await client.prune(MODEL, SPEC, output="dense")
        assert_type(dense, secateur.PruneResult[Literal["dense"]])
        async for checkpoint in client.checkpoints():
            assert_type(checkpoint, secateur.Checkpoint)
        await client.download("checkpoints/x", "x.safetensors")
        _ = client.prune(MODEL, SPEC).report  # type: ignore[attr-defined]
        _ = dense.masks  # type: ignore[misc]


def any_output(result: secateur.PruneResult) -> Mapping[str, Any]:
    """A result without its output in the type may have everything."""
    return result.masks


def wrong(client: secateur.Client, module: object, text: str) -> None:
    client.prune(MODEL, SPEC, output="mask")  # type: ignore[call-overload]
    client.prune(MODEL, SPEC, text)  # type: ignore[call-overload]
    client.prune(MODEL, SPEC, prior="zero")  # type: ignore[call-overload]
    _ = client.prune(MODEL, SPEC, output="dense").masks  # type: ignore[misc]
    client.prune(MODEL, SPEC, output="none").apply_to(module)  # type: ignore[misc]
    client.prune(MODEL, SPEC).shrink(module)  # type: ignore[misc]
    client.prune(MODEL, SPEC).state_dict("none")  # type: ignore[arg-type]
    client.finalize(MODEL, output="masks")  # type: ignore[arg-type]
    client.download("checkpoints/x", "x.safetensors", "none")  # type: ignore[arg-type]
    secateur.select("w", 0.5, scope="layer")  # type: ignore[arg-type]
    secateur.select("w", 0.5, allocation="lmap")  # type: ignore[arg-type]
    secateur.grouped([], 0.5, combination="min")  # type: ignore[arg-type]
    secateur.global_unstructured("w", 0.5, importance="l2")  # type: ignore[arg-type]
