"""A family of cases: the details of reports."""

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import secateur as s
from tests.contract import golden_models as models
from tests.contract.golden_digests import Case, Parts, Source, digest


def details() -> dict[str, Case]:
    sources: dict[str, Source] = {
        "mixed": models.mixed,
        "edges": models.edges,
        "pieces": models.pieces,
        "alike": models.alike,
        "bfloat16": partial(models.of_dtype, torch.bfloat16),
    }
    whole = detailed(partial(models.of_dtype, torch.int64), ["a", "b", "c"])
    return {name: detailed(source) for name, source in sources.items()} | {"int64": whole}


def detailed(source: Source, tensors: str | list[str] = "*") -> Case:
    """Makes a case of the details of a report, and of a dense prune."""

    def case(client: s.Client, folder: Path) -> Parts:
        model = source()
        spec = s.l1_unstructured(tensors, 0.5)
        return {
            "report": _digest(client.report(model, tensors, details=True)),
            "prune": _digest(client.prune(model, spec, "dense", details=True).report),
        }

    return case


def _digest(report: s.Report) -> str:
    def parts() -> Iterator[bytes]:
        for name, tensor in report.tensors.items():
            yield name.encode()
            if tensor.details is not None:
                yield from _described(tensor.details)

    return digest(parts())


def _described(found: s.TensorDetails) -> Iterator[bytes]:
    histogram = found.histogram
    yield repr([histogram.largest, histogram.zeros, histogram.non_finite]).encode()
    arrays: list[Any] = [histogram.kept, histogram.pruned, *found.groups.values()]
    for image in found.images:
        arrays += [np.array([image.rows, image.columns, *image.pixels.shape]), image.pixels]
    for dim, flags in found.zero_slices.items():
        arrays += [np.array([dim]), flags]
    yield from (array.tobytes() for array in arrays)
