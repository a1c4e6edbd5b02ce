"""Answers that the caller does not receive count until their calls are cut off."""

import socket
import struct
import threading
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from secateur_proto import plan_pb2, pruner_pb2
from tests.conftest import RunningServer, eventually, start_server, stop_server
from tests.contract.raw import file, header, message
from tests.operate.test_metrics import sample
from tests.runtime.test_requests_memory import MIB, SLACK, anonymous

# HTTP/2's frames.
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
ACK = END_STREAM = 1
END_HEADERS = 4


class NoWindow:
    """An HTTP/2 client that makes one call, and whose window for the answer is 0 bytes."""

    def __init__(self, address: str, path: str, request: bytes) -> None:
        host, port = address.split(":")
        self._socket = socket.create_connection((host, int(port)))
        no_window = struct.pack(">HI", 4, 0)  # SETTINGS_INITIAL_WINDOW_SIZE
        self._socket.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(SETTINGS, 0, 0, no_window)
        )
        threading.Thread(target=self._answer, daemon=True).start()
        fields = {
            **{":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"},
            **{"te": "trailers", "content-type": "application/grpc"},
        }
        self._socket.sendall(_frame(HEADERS, END_HEADERS, 1, b"".join(map(_field, fields.items()))))
        body = b"\0" + struct.pack(">I", len(request)) + request
        for begin in range(0, len(body), 16_000):
            flags = END_STREAM if begin + 16_000 >= len(body) else 0
            self._socket.sendall(_frame(DATA, flags, 1, body[begin : begin + 16_000]))

    def _answer(self) -> None:
        """Acknowledges settings and pings, so that the connection stays open."""
        received = self._socket.makefile("rb")
        try:
            while head := received.read(9):
                data = received.read(int.from_bytes(head[:3], "big"))
                if head[3] in (SETTINGS, PING) and not head[4] & ACK:
                    self._socket.sendall(_frame(head[3], ACK, 0, data if head[3] == PING else b""))
        except OSError:
            pass

    def close(self) -> None:
        self._socket.close()


def _frame(kind: int, flags: int, stream: int, data: bytes) -> bytes:
    head = struct.pack(">I", len(data))[1:] + bytes((kind, flags)) + struct.pack(">I", stream)
    return head + data


def _field(field: tuple[str, str]) -> bytes:
    """Encodes a header field as a literal of HPACK."""
    return b"\0" + b"".join(bytes((len(text),)) + text.encode() for text in field)


@pytest.fixture
def impatient() -> Iterator[RunningServer]:
    started = start_server("--memory-limit", "64MiB", "--idle-timeout", "5")
    yield started
    stop_server(started)


def test_untaken_answer_counts_until_its_call_is_cut_off(
    impatient: RunningServer,
) -> None:
    """A request of 45 KB has an answer of 27 MB. The memory is not enough for two of them."""
    names = [f"{number:05}" + "n" * 2000 for number in range(20)]
    entries = {
        name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * index, 4 * index + 4]}
        for index, name in enumerate(names)
    }
    data = file(entries, b"\1" * 80)
    amounts = [plan_pb2.Amount(fraction=number / 500) for number in range(1, 341)]
    first = header("Plan", len(data), amounts=amounts)
    request: bytes = message("Plan", header=first, data=data).SerializeToString()
    no_limit = [("grpc.max_receive_message_length", -1)]
    with grpc.insecure_channel(impatient.address, no_limit) as channel:
        plan: Any = channel.stream_unary("/secateur.v1.Pruner/Plan")
        answer: bytes = plan(iter([request]))
        assert len(pruner_pb2.PlanResponse.FromString(answer).plan.amounts) == 340
    before = anonymous(impatient)
    callers = [NoWindow(impatient.address, "/secateur.v1.Pruner/Plan", request) for _ in range(20)]
    eventually(lambda: sample(impatient, "secateur_request_bytes") > 32 * MIB, True)
    eventually(lambda: sample(impatient, "secateur_requests_in_flight"), 0)
    assert anonymous(impatient) - before < 64 * MIB + SLACK
    eventually(lambda: sample(impatient, "secateur_request_bytes"), 0)  # all were cut off
    for caller in callers:
        caller.close()
