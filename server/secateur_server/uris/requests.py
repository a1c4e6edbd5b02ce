"""Requests to remote stores: each ends in time, and the threads that they take are bounded."""

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any, TypeVar

from secateur_server.errors import QueueFull
from secateur_server.runtime.context import RequestContext

Found = TypeVar("Found")

# Requests at once that need a thread. A library may wait in one for longer than any call does.
MAX_THREADS = 32
# How soon a request notices that its caller has left.
LOOK_SECONDS = 0.2
RETRY_SECONDS = 1.0


class Requests:
    """Makes requests with fsspec's file systems.

    A request on an event loop, as of s3:// and http://, takes no thread and is cancelled when
    nobody waits for it any more. Any other request takes one of a bounded number of threads until
    the library gives up. These are daemon threads: a server that ends does not wait for them.
    """

    def __init__(self, timeout: float) -> None:
        """timeout: seconds that a store has for each request."""
        self._timeout = timeout
        self._free = threading.Semaphore(MAX_THREADS)

    def start(
        self, context: RequestContext, system: Any, name: str, *arguments: Any, **options: Any
    ) -> Future[Any]:
        """Starts a method of a file system."""
        if system.async_impl and hasattr(system, f"_{name}"):
            coroutine = getattr(system, f"_{name}")(*arguments, **options)
            return asyncio.run_coroutine_threadsafe(coroutine, system.loop)
        return self.in_thread(context, partial(getattr(system, name), *arguments, **options))

    def in_thread(
        self, context: RequestContext, function: Callable[[], Found], can_leave: bool = True
    ) -> Future[Found]:
        """Starts a function in a thread.

        Args:
            context: The request.
            function: What to run.
            can_leave: Whether to give up when the caller has left.

        Raises:
            QueueFull: All threads wait for stores that do not answer.
            Cancelled: The caller has left.
        """
        end = time.monotonic() + self._timeout
        while not self._free.acquire(timeout=min(LOOK_SECONDS, self._timeout)):
            if can_leave:
                context.check()
            if time.monotonic() > end:
                raise QueueFull(
                    "call", f"{MAX_THREADS} requests to remote stores wait already", RETRY_SECONDS
                )
        return self._run(function)

    def result(
        self, context: RequestContext, coming: Future[Found], can_leave: bool = True
    ) -> Found:
        """Waits for a request, and cancels it when nobody waits for it any more.

        Args:
            context: The request.
            coming: The request.
            can_leave: Whether to give up when the caller has left.

        Raises:
            TimeoutError: The store has not answered.
            Cancelled: The caller has left.
        """
        end = time.monotonic() + self._timeout
        try:
            while not wait([coming], timeout=min(LOOK_SECONDS, self._timeout)).done:
                if can_leave:
                    context.check()
                if time.monotonic() > end:
                    raise TimeoutError(f"no answer for {self._timeout:g} seconds (--idle-timeout)")
        except BaseException:
            coming.cancel()
            raise
        return coming.result()

    def finish(self, function: Callable[[], None]) -> None:
        """Runs what has to be done even when the caller has left, and waits only so long for it."""
        if self._free.acquire(timeout=self._timeout):
            wait([self._run(function)], timeout=self._timeout)
        else:
            function()

    def _run(self, function: Callable[[], Found]) -> Future[Found]:
        coming: Future[Found] = Future()
        coming.set_running_or_notify_cancel()  # from here on nobody can cancel it

        def call() -> None:
            try:
                coming.set_result(function())
            except BaseException as error:
                coming.set_exception(error)
            finally:
                self._free.release()

        try:
            threading.Thread(target=call, name="remote", daemon=True).start()
        except BaseException:
            self._free.release()
            raise
        return coming
