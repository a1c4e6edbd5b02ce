"""Everything that docs/performance.md and docs/methods.md say of time, measured in one run.

    make bench                                                # 20 minutes
    python benchmarks/run.py --largest 10                     # 3 minutes
    python benchmarks/run.py --json FILE --svg FILE

It asserts no time; it fails where a mask differs from torch's in a single bit. Needs Linux.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import against_torch
import checkpoints
import details
import gpu
import lenet
import many
import many_small
import methods
import pack
import plan
import shapes
from common import environment
from drawing import draw


def main() -> None:
    """Measures, prints, and writes files where it is asked to."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--largest", type=int, default=500, help="millions of parameters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also writes every figure there")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="also draws time over parameters")
    options = parser.parse_args()
    found: dict[str, Any] = {"environment": environment()}
    print(", ".join(f"{name} {value}" for name, value in found["environment"].items()), flush=True)
    sizes = [millions for millions in (1, 10, 100) if millions <= options.largest]
    found["global_unstructured"] = [against_torch.compare(millions) for millions in sizes]
    show(against_torch.COLUMNS, map(against_torch.row, found["global_unstructured"]))
    found["lenet"] = lenet.compare()
    show(lenet.COLUMNS, lenet.rows(found["lenet"]))
    found["many"] = many.compare()
    show(many.COLUMNS, many.rows(found["many"]))
    found["many_small"] = many_small.compare()
    show(many_small.COLUMNS, many_small.rows(found["many_small"]))
    if options.largest >= checkpoints.MILLIONS:
        found["checkpoints"] = checkpoints.compare()
        show(checkpoints.COLUMNS, checkpoints.rows(found["checkpoints"]))
    found |= shapes.compare(options.largest)
    show(shapes.COLUMNS, shapes.rows(found["growth"]))
    show(shapes.COLUMNS, shapes.rows(found["methods"]))
    found["choices"] = methods.compare(options.largest)
    show(methods.COLUMNS, methods.rows(found["choices"]))
    found["plans"] = plan.compare(options.largest)
    show(plan.COLUMNS, plan.rows(found["plans"]))
    found["details"] = details.compare(options.largest)
    show(details.COLUMNS, details.rows(found["details"]))
    found["packed"] = pack.compare()
    show(pack.COLUMNS, pack.rows(found["packed"]))
    if torch.cuda.is_available():
        found["gpu"] = gpu.compare(min(2 * options.largest, gpu.most()))
        show(gpu.COLUMNS, gpu.rows(found["gpu"]))
    if options.json:
        options.json.write_text(json.dumps(found, indent=2) + "\n")
    if options.svg:
        options.svg.write_text(draw(found["global_unstructured"], found["growth"]))


def show(columns: Sequence[str], lines: Any) -> None:
    """Prints a table."""
    table = [tuple(columns), *lines]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    print()
    for line in table:
        first, *others = [cell.rjust(width) for cell, width in zip(line, widths, strict=True)]
        print("  ".join([first.strip().ljust(widths[0]), *others]), flush=True)


if __name__ == "__main__":
    main()
