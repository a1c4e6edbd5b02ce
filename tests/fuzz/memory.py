"""Measures the memory of reading files. Prints JSON: {kind: [bytes of the file, peak in bytes]}.

It runs in its own process, whose memory nothing else changes.
"""

import ctypes
import gc
import json
import os
from collections.abc import Callable
from contextlib import suppress

from secateur_proto.framing import file_header
from secateur_server.errors import RequestError
from secateur_server.runtime.context import RequestContext
from secateur_server.wire.reader import ByteStream, read_header, read_tensors
from tests.contract.raw import entry, file
from tests.fuzz.targets import CPU
from tests.processes import memory, reset_peak

SIZE = 2 << 20
CHUNK = 1 << 20


def _shape(size: int, unit: str) -> bytes:
    values = ",".join([unit] * (size // (len(unit) + 1)))
    return file(b'{"w":{"dtype":"U8","data_offsets":[0,0],"shape":[%b]}}' % values.encode())


def _map(size: int, pair: str) -> str:
    pairs = (pair % number for number in range(size // (len(pair) + 4)))
    return "{" + ",".join(pairs) + "}"


def _tiny(size: int) -> bytes:
    return file_header((f"{number:x}", "U8", (0,)) for number in range(size // 64))


KINDS: dict[str, Callable[[int], bytes]] = {
    "a tensor": lambda n: file({"w": entry("F32", [n // 4], 0, n)}, bytes(n)),
    "lists": lambda n: _shape(n, "[]"),
    "maps": lambda n: _shape(n, "{}"),
    "numbers": lambda n: _shape(n, "1e9"),
    "entries": lambda n: file(_map(n, '"%x":0').encode()),
    "texts": lambda n: file(b'{"__metadata__":%b}' % _map(n, '"%x":""').encode()),
    "a name": lambda n: file({"x" * n: 0}),
    "a wide name": lambda n: file(('{"😀' + "x" * n + '":0}').encode()),
    "a text": lambda n: file({"__metadata__": {"k": "x" * n}}),
    "tiny tensors": _tiny,
    "deep": lambda n: file(b'{"w":' + b"[" * n),
}


def read(data: bytes) -> None:
    """Reads a file as a call does, in chunks of the usual size."""
    view = memoryview(data)
    chunks = (bytes(view[at : at + CHUNK]) for at in range(0, len(data), CHUNK))
    with suppress(RequestError):
        stream = ByteStream(chunks, len(data))
        read_tensors(stream, read_header(RequestContext(), stream), CPU)


def peak(data: bytes) -> int:
    """Returns the growth of memory at the peak of reading a file."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # else reading would reuse free memory
    pid = os.getpid()
    reset_peak(pid)
    before = memory(pid, "VmRSS")
    read(data)
    return memory(pid, "VmHWM") - before


if __name__ == "__main__":
    read(KINDS["a tensor"](1 << 20))  # allocates what is needed only once
    found = {}
    for kind, make in KINDS.items():
        made = make(SIZE)
        found[kind] = [len(made), peak(made)]
    print(json.dumps(found))
