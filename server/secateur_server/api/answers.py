"""Answers of many messages: progress while the server works, then the result and its files."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import wait
from contextlib import ExitStack
from functools import partial
from typing import Any

from secateur_server.api.convert.checkpoint import file_message, progress_message
from secateur_server.api.stream import responses
from secateur_server.backends.cores import one_thread
from secateur_server.backends.threads import Pool
from secateur_server.operate.metrics import Metrics
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.wire.writer import OutgoingFile, chunks

# Seconds between messages of progress, and until a cancelled call is noticed.
PROGRESS_SECONDS = 0.2

# A result, the files that are sent behind it, and what raises if their source has changed by then.
Made = tuple[Any, list[OutgoingFile], Callable[[], None]]

# Makes the answer of a call. The stack keeps the source open until the files have been sent.
Work = Callable[[ExitStack], Made]


class Answers:
    """Makes and sends the answers of calls.

    Args:
        metrics: Counts what is sent.
        calls: The largest number of concurrent calls.
    """

    def __init__(self, metrics: Metrics, calls: int) -> None:
        self._metrics = metrics
        # One worker for each call that reports progress. With fewer, a call could wait for a worker
        # where the scheduler does not see it, behind calls that wait for memory.
        self._workers = Pool(calls, "work", one_thread)

    def close(self) -> None:
        """Ends the workers, when no more calls come."""
        self._workers.shutdown(wait=False)

    def send(self, call: Call[Any], work: Work, make: Callable[..., Any]) -> Iterator[Any]:
        """Does the work of a call, and yields the messages of its answer.

        Args:
            call: The call.
            work: Makes the answer.
            make: Makes a message.
        """
        with ExitStack() as held:
            result, files, check = yield from self._run(call, partial(work, held), make)
            sent = partial(self._metrics.sent, call.context)
            yield from responses(make, result, chunks(call.context, files), sent)
            check()

    def _run(
        self, call: Call[Any], work: Callable[[], Made], make: Callable[..., Any]
    ) -> Generator[Any, None, Made]:
        """Returns what `work` returns. Yields progress, unless the data comes with the call."""
        if not call.header.WhichOneof("source"):
            return work()
        future = self._workers.submit(work)
        try:
            while not wait([future], PROGRESS_SECONDS).done:
                yield make(progress=progress_message(call.context))
        finally:
            if not future.cancel():  # if a worker has begun it
                if not future.done():
                    call.context.cancel()
                wait([future])
        try:
            return future.result()
        finally:
            del future  # its error refers to this frame: the cycle would keep the tensors


def written(
    sources: Sources,
    call: Call[Any],
    result: Any,
    files: list[OutgoingFile],
    check_unchanged: Callable[[], None],
) -> Made:
    """Writes the files to the destination of a call, if it has one.

    Args:
        sources: Writes them.
        call: With a header that has `destination_uri`.
        result: Of the call; the files are added to it.
        files: To write, or to send.
        check_unchanged: Raises an error if the source of the call has changed. It is read again
            while files are written or sent.

    Returns:
        The result, the files that remain to be sent, and the check that follows them.
    """
    result.files.extend(map(file_message, files))
    size, uri = sum(file.size for file in files), call.header.destination_uri
    if not uri:
        result.data_bytes = size
        return result, files, check_unchanged
    call.context.begin("write", size)
    sources.write(call.context, uri, files, check_unchanged)
    return result, [], check_unchanged
