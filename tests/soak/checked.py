"""Calls whose answers are compared with torch."""

import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import secateur
from secateur.literals import Output
from tests.soak.models import Case, Digests, Expected, digests, packed

OUTPUTS: tuple[Output, ...] = ("masks", "dense", "reparametrized", "none")
FLOATS = ("F64", "F32", "F16", "BF16")


def check_same(found: Digests, expected: Digests, what: str) -> None:
    wrong = {
        name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name)
    }
    assert not wrong, f"{what}: {sorted(wrong)} differ from torch's"


def check_report(report: secateur.Report, zeros: Mapping[str, int], what: str) -> None:
    """Checks the zeros in a report."""
    found = {name: tensor.zeros for name, tensor in report.tensors.items()}
    assert found == {name: zeros[name] for name in found}, what
    assert report.zeros == sum(found.values()), what


def check_result(result: secateur.PruneResult, output: Any, expected: Expected, case: Case) -> None:
    check_report(result.report, expected.zeros, case.name)
    if output == "masks":
        masks = {name: packed(torch.as_tensor(mask)) for name, mask in result.masks.items()}
        # A checkpoint, or a source with pairs, may have masks that the spec does not name.
        named = {name: expected.masks[name] for name in masks}
        assert masks.keys() == result.report.tensors.keys(), case.name
        check_same(digests(masks), named, f"masks, {case.name}")
    elif output == "dense":
        check_same(digests(result.state_dict("dense")), expected.dense, f"dense, {case.name}")
    elif output == "reparametrized":
        found = digests(result.state_dict("reparametrized"))
        check_same(found, expected.reparametrized, f"pairs, {case.name}")


def prune(client: secateur.Client, case: Case, draws: random.Random) -> None:
    """Prunes tensors or a file."""
    output, is_file = draws.choice(OUTPUTS), draws.random() < 0.3
    source = case.path if is_file else case.source
    check_result(client.prune(source, case.spec, output, False), output, case.pruned, case)


def report(client: secateur.Client, case: Case) -> None:
    found = client.report(case.source, progress=False)
    check_report(found, case.folded.zeros, f"report, {case.name}")
    assert found.tensors.keys() == case.folded.zeros.keys()


def finalize(client: secateur.Client, case: Case) -> None:
    found = client.finalize(case.source, progress=False)
    check_same(digests(found.state_dict()), case.folded.dense, f"finalize, {case.name}")


def prune_handle(
    client: secateur.Client,
    checkpoint: secateur.Checkpoint,
    case: Case,
    draws: random.Random,
    keep: bool = False,
) -> secateur.Checkpoint | None:
    """Prunes a checkpoint of the source of a case."""
    output = draws.choice(OUTPUTS)
    result = client.prune(checkpoint, case.spec, output, False, keep)
    check_result(result, output, case.pruned, case)
    return result.checkpoint


def prune_again(
    client: secateur.Client, kept: secateur.Checkpoint, case: Case, draws: random.Random
) -> None:
    """Prunes the checkpoint of the first prune."""
    if case.again:
        output = draws.choice(OUTPUTS)
        result = client.prune(kept, case.spec, output, False)
        check_result(result, output, case.again, case)


def report_handle(
    client: secateur.Client, kept: secateur.Checkpoint, expected: Expected, case: Case
) -> None:
    check_report(client.report(kept, progress=False), expected.zeros, f"by handle, {case.name}")


def finalize_handle(client: secateur.Client, kept: secateur.Checkpoint, case: Case) -> None:
    found = client.finalize(kept, progress=False)
    check_same(digests(found.state_dict()), case.pruned.dense, f"finalize by handle, {case.name}")


def download(
    client: secateur.Client,
    checkpoint: secateur.Checkpoint,
    expected: Expected,
    case: Case,
    output: Any,
    path: Path,
) -> None:
    """Downloads a checkpoint to `path`, compares it, and removes the file."""
    try:
        client.download(checkpoint, path, output, False)
        found = digests(safetensors.torch.load(path.read_bytes()))
    finally:
        path.unlink(missing_ok=True)
    check_same(found, getattr(expected, output), f"{output} downloaded, {case.name}")
