"""Files that change while they are read."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from secateur_proto import pruner_pb2 as pb
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_proto.spec_pb2 import PruningSpec
from secateur_server.errors import UriChanged
from secateur_server.uris.local import LocalFile
from tests.conftest import caught
from tests.contract.raw import check_serves, entry, failure, file, header, message, spec
from tests.uris.served import MODEL, Served, check, saved, serving, weights


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("changing")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    with serving("--allow-path", str(root)) as running:
        yield running


def test_change_is_detected(root: Path) -> None:
    path = saved(root / "written.safetensors", MODEL)
    for change in (lambda: path.write_bytes(path.read_bytes()), lambda: os.truncate(path, 8192)):
        file = LocalFile("uri", path.as_uri(), [root])
        file.check_unchanged()
        change()
        with pytest.raises(UriChanged, match="changed while it was read"):
            file.check_unchanged()
        file.close()


def test_replaced_file_is_read_in_its_old_state(root: Path) -> None:
    path = saved(root / "replaced.safetensors", MODEL)
    file, before = LocalFile("uri", path.as_uri(), [root]), path.read_bytes()
    os.replace(saved(root / "new.safetensors", weights((1,))), path)
    assert bytes(file.data) == before
    file.check_unchanged()
    file.close()


@pytest.mark.parametrize("left", [0, 100, 4096, 99_999])
def test_truncated_file_is_read_as_zeros_and_detected(root: Path, left: int) -> None:
    """Without a handler, reading a truncated mapping would kill the process."""
    path = root / "cut.safetensors"
    path.write_bytes(b"\1" * 100_000)
    file = LocalFile("uri", path.as_uri(), [root])
    os.truncate(path, left)
    whole = -(-left // 4096) * 4096  # of the last page the system gives the rest as zeros
    assert bytes(file.data) == b"\1" * left + b"\0" * (100_000 - left)
    os.truncate(path, 100_000)
    os.utime(path, ns=(file.opened.st_atime_ns, file.opened.st_mtime_ns))
    if whole < 100_000:  # pages were gone, whatever the file says of itself
        with pytest.raises(UriChanged):
            file.check_unchanged()
    file.close()


def grow(path: Path) -> None:
    os.truncate(path, path.stat().st_size + 1)


def cut_off(path: Path) -> None:
    os.truncate(path, 1000)


@pytest.mark.parametrize(
    ("is_written", "change"),
    [
        (False, cut_off),
        (True, grow),
        pytest.param(True, cut_off, marks=pytest.mark.slow),
        pytest.param(False, grow, marks=pytest.mark.slow),
    ],
)
def test_change_while_reading_ends_that_call_only(
    served: Served, root: Path, is_written: bool, change: Callable[[Path], None]
) -> None:
    """Of the model here are only holes, which take no disk.  is_written: the result, by then."""
    path, size = root / "holes.safetensors", 256 << 20
    target = root / "out.safetensors"
    rules = PruningSpec(rules=[*spec("w").rules] * 8)  # so that it takes its time
    fields = {"output": pb.OUTPUT_DENSE, "destination_uri": target.as_uri(), "spec": rules}
    first = message("Prune", header=header("Prune", 0, uri=path.as_uri(), **fields))

    def begin() -> Any:
        target.unlink(missing_ok=True)
        path.write_bytes(file({"w": entry("F32", [size >> 2], 0, size)}))
        os.truncate(path, path.stat().st_size + size)
        call = PrunerStub(served.channel).Prune(iter([first]), timeout=300)
        next(iter(call))
        return call

    found = None
    for _ in range(10):  # on a busy machine the change may come too late
        call = caught(begin, lambda: not is_written or len(list(root.glob(".*.unfinished"))) == 1)
        change(path)
        if found := failure(list, call):
            break
    check(found, "ABORTED", "URI_CHANGED", "holes.safetensors")
    assert not target.exists()
    assert not list(root.glob(".*.unfinished"))
    check_serves(served.server, served.channel)


@pytest.mark.parametrize("change", [cut_off, grow])
@pytest.mark.parametrize("method", ["Prune", "Finalize"])
def test_change_while_the_answer_is_sent_is_detected(
    served: Served, root: Path, method: str, change: Callable[[Path], None]
) -> None:
    """The report has been sent by then, so only the status can tell."""
    path = saved(root / "sent.safetensors", weights((1 << 10, 1 << 12)))
    fields = {"output": pb.OUTPUT_DENSE, "spec": spec("*")} if method == "Prune" else {}
    first = message(method, header=header(method, 0, uri=path.as_uri(), **fields))
    call = getattr(PrunerStub(served.channel), method)(iter([first]), timeout=300)
    for part in call:
        if part.HasField("result"):
            break
    change(path)
    check(failure(list, call), "ABORTED", "URI_CHANGED", "sent.safetensors")
    check_serves(served.server, served.channel)
