"""What this machine can do at best: a raw streamed upload, and a copy in memory."""

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import grpc
import numpy as np

from secateur_proto.framing import CHUNK_BYTES


@contextmanager
def raw_upload() -> Iterator[Callable[[memoryview], float]]:
    """A server that counts bytes and does nothing else, in a process of its own.

    Yields: a function that streams bytes to it in chunks of CHUNK_BYTES, and returns the seconds.
    """
    with _server() as channel:
        call: Any = channel.stream_unary("/bounds/Upload")

        def upload(data: memoryview) -> float:
            starts = range(0, len(data), CHUNK_BYTES)
            begin = time.perf_counter()
            counted = call(bytes(data[start : start + CHUNK_BYTES]) for start in starts)
            assert int(counted) == len(data)
            return time.perf_counter() - begin

        yield upload


@contextmanager
def raw_echo() -> Iterator[Callable[[bytes], float]]:
    """A server that gives back what it gets.  Yields: a function that returns the seconds."""
    with _server() as channel:
        call: Any = channel.unary_unary("/bounds/Echo")

        def echo(data: bytes) -> float:
            begin = time.perf_counter()
            assert call(data) == data
            return time.perf_counter() - begin

        yield echo


@contextmanager
def _server() -> Iterator[grpc.Channel]:
    context = get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=_serve, args=(there,), daemon=True)
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{here.recv()}") as channel:
        yield channel
    server.terminate()
    server.join()


def _serve(pipe: Connection) -> None:
    def count(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(map(len, messages))).encode()

    def echo(message: bytes, context: grpc.ServicerContext) -> bytes:
        return message

    server = grpc.server(ThreadPoolExecutor(1))
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Upload": grpc.stream_unary_rpc_method_handler(count),
        "Echo": grpc.unary_unary_rpc_method_handler(echo),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("bounds", handlers)])
    pipe.send(server.add_insecure_port("127.0.0.1:0"))
    server.start()
    server.wait_for_termination()


def memory_copy(size: int) -> float:
    """The seconds of one copy of `size` bytes to memory that was touched before."""
    source, target = np.ones(size, np.uint8), np.ones(size, np.uint8)
    begin = time.perf_counter()
    np.copyto(target, source)
    return time.perf_counter() - begin
