"""Tests that take `kind` run for the blocking client and for that of asyncio."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any, TypeVar, cast

import pytest

import secateur

T = TypeVar("T")


class OnALoop:
    """secateur.aio.Client with the methods of secateur.Client, on an event loop in a thread."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        self._client = secateur.aio.Client(*arguments, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def _result(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)

        def call(*arguments: Any, **options: Any) -> Any:
            work = method(*arguments, **options)
            return self._result(work if inspect.iscoroutine(work) else _listed(work))

        return call

    def __enter__(self) -> "OnALoop":
        return self

    def __exit__(self, *error: object) -> None:
        self._result(self._client.close())
        self._result(self._loop.shutdown_default_executor())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _listed(items: AsyncIterator[T]) -> list[T]:
    return [item async for item in items]


both = pytest.mark.parametrize(
    "kind",
    [secateur.Client, cast(type[secateur.Client], OnALoop)],
    ids=["blocking", "asyncio"],
)
