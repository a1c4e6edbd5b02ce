"""A model of 8 GiB on a server that may use 2 GiB."""

import mmap
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from safetensors import safe_open

import secateur
from secateur_proto.framing import file_header
from tests.conftest import RunningServer, start_command, stop_server

LIMIT = 2 << 30
SHAPE = (1 << 15, 1 << 12)
TENSORS = 16  # of 512 MiB each

Array = npt.NDArray[np.float32]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder on a disk. pytest's folders may be in memory."""
    made = Path(tempfile.mkdtemp(prefix="secateur-large-", dir="/var/tmp"))
    if shutil.disk_usage(made).free < 40 << 30:
        shutil.rmtree(made)
        pytest.skip("needs 40 GiB of disk")
    yield made
    shutil.rmtree(made)


@pytest.fixture
def small_server(folder: Path) -> Iterator[RunningServer]:
    """A server whose memory, including the page cache, the kernel limits to LIMIT."""
    group = memory_group()
    server = start_command("--store-dir", str(folder / "store"), "--allow-path", str(folder))
    (group / "cgroup.procs").write_text(str(server.process.pid))
    yield server
    stop_server(server)
    group.rmdir()


def memory_group() -> Path:
    """Makes a control group with a limit, of version 2 or 1."""
    root = Path("/sys/fs/cgroup")
    is_new = (root / "cgroup.controllers").exists()
    group = (root if is_new else root / "memory") / "secateur-test"
    try:
        group.mkdir(exist_ok=True)
        (group / ("memory.max" if is_new else "memory.limit_in_bytes")).write_text(str(LIMIT))
    except OSError as error:
        pytest.skip(f"no memory group can be made here: {error}")
    return group


def write_model(path: Path) -> list[Array]:
    """Writes normal weights. Returns them as mapped memory."""
    names = [f"layers.{number}.weight" for number in range(TENSORS)]
    header = file_header([(name, "F32", SHAPE) for name in names])
    random, rows = np.random.default_rng(0), SHAPE[0] // 8
    with path.open("wb") as file:
        file.write(header)
        for _ in range(8 * TENSORS):
            file.write(random.standard_normal((rows, SHAPE[1]), dtype=np.float32).data)
    return map_model(path, len(header))


def map_model(path: Path, header_bytes: int) -> list[Array]:
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    values = np.frombuffer(mapped, np.float32, offset=header_bytes)
    return list(values.reshape(TENSORS, *SHAPE))


def check_global(weights: list[Array], masks: list[npt.NDArray[np.bool_]], count: int) -> None:
    """Checks the definition: the `count` lowest magnitudes, and the first ones at the threshold."""
    assert sum(int(mask.size - mask.sum()) for mask in masks) == count
    magnitudes = [np.abs(weight) for weight in weights]
    cut = max(float(m[~mask].max()) for m, mask in zip(magnitudes, masks, strict=True))
    least = min(float(m[mask].min()) for m, mask in zip(magnitudes, masks, strict=True))
    assert least >= cut
    at_cut = [mask[m == cut] for m, mask in zip(magnitudes, masks, strict=True)]
    kept = np.concatenate(at_cut)
    assert (np.sort(kept) == kept).all()  # all pruned ones precede the kept ones


@pytest.mark.slow
def test_model_of_four_times_the_memory_is_served(
    folder: Path, small_server: RunningServer
) -> None:
    source, out = folder / "model.safetensors", folder / "out.safetensors"
    weights = write_model(source)
    total = TENSORS * SHAPE[0] * SHAPE[1]
    spec = secateur.global_unstructured("*", 0.5)
    with secateur.Client(small_server.address, timeout=600) as client:
        checkpoint = client.upload(source)
        result = client.prune(checkpoint, spec, keep=True)
        masks = [np.asarray(mask) for mask in result.masks.values()]
        check_global(weights, masks, total // 2)
        assert result.checkpoint is not None
        again = client.prune(result.checkpoint, spec, output="none")
        assert again.report.zeros == total // 4 * 3
        assert client.report(result.checkpoint).zeros == total // 2
        client.finalize(result.checkpoint, destination=f"file://{out}")
    header_bytes = out.stat().st_size - 4 * total
    for weight, folded, mask in zip(weights, map_model(out, header_bytes), masks, strict=True):
        assert np.array_equal(folded, weight * mask)


@pytest.mark.slow
def test_model_of_four_times_the_memory_is_shrunk(
    folder: Path, small_server: RunningServer
) -> None:
    source, out = folder / "model.safetensors", folder / "out.safetensors"
    weights = write_model(source)
    names = [f"layers.{number}.weight" for number in range(TENSORS)]
    groups = [secateur.group(name, secateur.member(name, dim=1)) for name in names]
    spec = secateur.grouped(groups, 0.5, scope="tensor")
    with secateur.Client(small_server.address, timeout=600) as client:
        destination = f"file://{out}"
        result = client.prune(f"file://{source}", spec, "shrunk", destination=destination)
    shrinkage = result.report.shrinkage
    assert shrinkage is not None
    zeros = 0
    with safe_open(out, "numpy") as smaller:
        for name, weight in zip(names, weights, strict=True):
            kept = list(shrinkage.groups[name].kept)
            norms = np.abs(weight).sum(0, dtype=np.float64)
            assert sorted(np.argsort(norms)[SHAPE[1] // 2 :]) == kept
            found = smaller.get_tensor(name)
            assert np.array_equal(found, weight[:, kept])
            zeros += int(np.count_nonzero(found == 0))
    assert result.report.zeros == zeros
