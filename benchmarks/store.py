"""A store of many checkpoints: how long its server takes to start, and to answer while it evicts.

    python benchmarks/store.py                  # 20,000 and 100,000 checkpoints
    python benchmarks/store.py --counts 20000

Each checkpoint is a file of its own of 264 bytes. A quota makes 680 of them go for one upload.
"""

import argparse
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from blake3 import blake3
from safetensors.torch import save

import secateur
from common import running_server, timed
from secateur_server.operate.tokens_file import read_tokens
from secateur_server.storage.blobs import disk_bytes
from secateur_server.storage.records import StoredFile, new_record, write_record
from secateur_server.storage.store import Store

EVICTED = 680
TOKEN = "a token of the benchmark"
STORE_BYTES = 1 << 40

COLUMNS = ("checkpoints", "start, s", "evicted", "upload, s", "Gets", "p50, ms", "p99, ms")


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--counts", type=int, nargs="*", default=[20_000, 100_000])
    print("  ".join(COLUMNS))
    for count in parser.parse_args().counts:
        print("  ".join(row(compare(count))), flush=True)


def row(found: dict[str, Any]) -> tuple[str, ...]:
    """A line of the table."""
    seconds = f"{found['start']:.2f}", f"{found['evicted']:.0f}", f"{found['upload']:.2f}"
    gets = f"{len(found['gets'])}", *(f"{1000 * _part(found['gets'], n):.1f}" for n in (50, 99))
    return f"{found['count']}", *seconds, *gets


def _part(seconds: list[float], percent: int) -> float:
    return statistics.quantiles(seconds, n=100)[percent - 1]


def compare(count: int) -> dict[str, Any]:
    """Seconds of a start, of an upload that evicts, and of each Get meanwhile."""
    folder = Path(tempfile.mkdtemp(prefix="secateur-bench-", dir="/var/tmp"))
    try:
        tokens = folder / "tokens"
        tokens.write_text(f'[tenants.bench]\ntokens = ["{TOKEN}"]\n')
        (owner,) = {tenant.owner for tenant in read_tokens(tokens).values()}
        with patch("os.fsync"):
            held = _fill(folder / "store", owner, count)
        tokens.write_text(tokens.read_text() + f'store = "{held}"\n')
        start, store = timed(lambda: Store(folder / "store", STORE_BYTES, ttl=0))
        store.close()
        options = ("--store-dir", str(folder / "store"), "--store-max-bytes", str(STORE_BYTES))
        with running_server(*options, "--tokens-file", str(tokens)) as server:
            return {"count": count, "start": start, **_evict(server.address, held // count)}
    finally:
        shutil.rmtree(folder)


def _fill(folder: Path, owner: str, count: int) -> int:
    """Makes a store's folder.  Returns: the bytes that it holds."""
    for name in ("blobs", "parts", f"checkpoints/{owner}"):
        (folder / name).mkdir(parents=True)
    held = 0
    for index in range(count):
        data = save({"w": torch.full((50,), index)})
        digest = blake3(data).hexdigest()
        (folder / "blobs" / digest).write_bytes(data)
        (folder / "blobs" / f"{digest}.sums").write_bytes(blake3(data).digest())
        record = new_record((StoredFile("model.safetensors", len(data), digest),), None)
        write_record(folder / "checkpoints" / owner, record)
        held += record.disk_bytes + disk_bytes(len(data))
    return held


def _evict(address: str, each: int) -> dict[str, Any]:
    """Seconds of an upload that evicts EVICTED checkpoints, and of Gets meanwhile."""
    model, gets, is_over = {"w": torch.randn(EVICTED * each // 4)}, list[float](), threading.Event()
    with secateur.Client(address, token=TOKEN) as client:
        newest = next(client.checkpoints()).name

        def get() -> None:
            while not is_over.is_set():
                gets.append(timed(lambda: client.checkpoint(newest))[0])
                time.sleep(0.001)

        getting = threading.Thread(target=get)
        before = sum(1 for _ in client.checkpoints())
        getting.start()
        upload, _ = timed(lambda: client.upload(model, progress=False))
        is_over.set()
        getting.join()
        evicted = before + 1 - sum(1 for _ in client.checkpoints())
    return {"upload": upload, "gets": gets, "evicted": evicted}


if __name__ == "__main__":
    main()
