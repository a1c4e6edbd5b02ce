"""Requests to remote stores, with a time limit each and a limited number of threads."""

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

# Requests that need a thread at once. A library may block a thread longer than any call lasts.
MAX_THREADS = 32
# The interval between checks for cancellation.
CHECK_SECONDS = 0.2
RETRY_SECONDS = 1.0


class Requests:
    """Makes requests with fsspec's file systems.

    A request on an event loop, as for s3:// and http://, needs no thread, and is cancelled with its
    call. Any other request occupies one of MAX_THREADS threads until the library gives up. These
    are daemon threads, so that a server can stop without waiting for them.

    Attributes:
        timeout: Seconds that a store has for each request.
    """

    def __init__(self, timeout: float) -> None:
        self.timeout = timeout
        self._free = threading.Semaphore(MAX_THREADS)

    def start(
        self, context: RequestContext, system: Any, name: str, *arguments: Any, **options: Any
    ) -> Future[Any]:
        """Starts a method of a file system.

        Args:
            context: The request.
            system: A file system of fsspec.
            name: Of the method.
            arguments: Of the method.
            options: Keyword arguments of the method.

        Raises:
            QueueFull: All threads wait for stores that do not answer.
            Cancelled: The request has been cancelled.
        """
        if system.async_impl and hasattr(system, f"_{name}"):
            coroutine = getattr(system, f"_{name}")(*arguments, **options)
            return asyncio.run_coroutine_threadsafe(coroutine, system.loop)
        return self.in_thread(context, partial(getattr(system, name), *arguments, **options))

    def in_thread(
        self, context: RequestContext, function: Callable[[], Found], is_cancellable: bool = True
    ) -> Future[Found]:
        """Starts a function in a thread.

        Args:
            context: The request.
            function: What to run.
            is_cancellable: Whether to give up if the call is cancelled.

        Raises:
            QueueFull: All threads wait for stores that do not answer.
            Cancelled: The request has been cancelled.
        """
        end = time.monotonic() + self.timeout
        while not self._free.acquire(timeout=min(CHECK_SECONDS, self.timeout)):
            if is_cancellable:
                context.check()
            if time.monotonic() > end:
                raise QueueFull(
                    "call",
                    f"{MAX_THREADS} requests to remote stores are waiting already; retry later",
                    RETRY_SECONDS,
                )
        return self._run(function)

    def result(
        self, context: RequestContext, future: Future[Found], is_cancellable: bool = True
    ) -> Found:
        """Waits for the answer of a store, and cancels the request if its call is cancelled.

        Args:
            context: The call.
            future: The request to the store.
            is_cancellable: Whether to give up if the call is cancelled.

        Raises:
            TimeoutError: The store has not answered.
            Cancelled: The call has been cancelled.
        """
        end = time.monotonic() + self.timeout
        try:
            while not wait([future], timeout=min(CHECK_SECONDS, self.timeout)).done:
                if is_cancellable:
                    context.check()
                if time.monotonic() > end:
                    raise TimeoutError(f"no answer for {self.timeout:g} seconds (--idle-timeout)")
        except BaseException:
            future.cancel()
            raise
        return future.result()

    def finish(self, function: Callable[[], None]) -> None:
        """Runs cleanup in a thread, even after cancellation, and waits for it up to the timeout."""
        if self._free.acquire(timeout=self.timeout):
            wait([self._run(function)], timeout=self.timeout)
        else:
            function()

    def _run(self, function: Callable[[], Found]) -> Future[Found]:
        future: Future[Found] = Future()
        future.set_running_or_notify_cancel()  # a running thread cannot be cancelled

        def call() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            finally:
                self._free.release()

        try:
            threading.Thread(target=call, name="remote", daemon=True).start()
        except BaseException:
            self._free.release()
            raise
        return future
