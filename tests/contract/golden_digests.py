"""The cases of the golden file, and the digests of their results.

A digest covers content in a canonical form: the sorted names, shapes and bits of masks; the sorted
names, dtypes, shapes and bytes of a state_dict; the bytes of a file as sent; all fields of reports
and plans as JSON. It does not cover texts for people (messages of warnings, the method of a plan),
names of checkpoints, and times.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from blake3 import blake3

import secateur
from secateur.literals import Form, Output

Parts = dict[str, str]
# Takes a client and an empty folder, which the server of the family `uris` may read and write.
Case = Callable[[secateur.Client, Path], Parts]
Source = Callable[[], Any]

WHOLE: tuple[Form, ...] = ("masks", "dense")
# Enough to detect accidental changes.
DIGEST_BYTES = 8

FORMS: tuple[Form, ...] = (*WHOLE, "reparametrized")


def digest(parts: Iterable[bytes]) -> str:
    """Hashes parts with their lengths, so that no byte can move from one part to the next."""
    hashed = blake3()
    for part in parts:
        hashed.update(len(part).to_bytes(8, "little"))
        hashed.update(part)
    return hashed.hexdigest(length=DIGEST_BYTES)


def of_json(*values: Any) -> str:
    return digest(json.dumps(value, sort_keys=True).encode() for value in values)


def of_masks(masks: Mapping[str, Any]) -> str:
    def described() -> Iterable[bytes]:
        for name, mask in sorted(masks.items()):
            flags = np.asarray(mask)
            assert flags.dtype == np.bool_
            yield f"{name} {flags.shape}".encode()
            yield np.packbits(flags, bitorder="little").tobytes()

    return digest(described())


def of_tensors(tensors: Mapping[str, Any]) -> str:
    def described() -> Iterable[bytes]:
        for name, value in sorted(tensors.items()):
            tensor = torch.as_tensor(value)
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode()
            data = tensor.contiguous().reshape(-1)
            yield data.view(torch.uint8).numpy().tobytes() if data.numel() else b""

    return digest(described())


def of_files(folder: Path) -> str:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return digest(
        part
        for path in files
        for part in (str(path.relative_to(folder)).encode(), path.read_bytes())
    )


def plain_report(report: secateur.Report) -> dict[str, Any]:
    """Converts a report to a dict without the digest of the answer, which is a part of its own."""
    table = report.to_dict()
    del table["output_blake3"]
    for warning in table["warnings"]:
        del warning["message"]
    return {**table, "order": list(report.tensors)}


def plain_plan(plan: secateur.Plan) -> dict[str, Any]:
    table = plan.to_dict()
    del table["method"]
    return {**table, "order": [list(amount.tensors) for amount in plan.amounts]}


def of_result(result: secateur.PruneResult, output: Any) -> Parts:
    """Returns the digests of the data of a result."""
    parts: Parts = {}
    if output == "packed":  # releases of zstd write other bytes
        parts["packed tensors"] = of_tensors(result.state_dict("packed"))
    elif sent := result.report.output_blake3:
        parts[f"{output} file"] = sent[: 2 * DIGEST_BYTES]
    elif output in ("dense", "reparametrized"):
        parts[f"{output} tensors"] = of_tensors(result.state_dict(output))
    if output in ("masks", "reparametrized"):
        parts[f"{output} as masks"] = of_masks(result.masks)
    return parts


def pruned(
    source: Source,
    spec: secateur.Spec,
    outputs: Sequence[Output] = WHOLE,
    prior: Any = "masks",
) -> Case:
    """Makes a case that prunes a model in the call, with each output.

    Args:
        source: Makes the model.
        spec: The spec.
        outputs: The outputs.
        prior: Whether zeros count as pruned.
    """

    def case(client: secateur.Client, folder: Path) -> Parts:
        parts: Parts = {}
        reports = []
        for output in outputs:
            result = client.prune(source(), spec, output, prior=prior)
            reports.append(plain_report(result.report))
            parts |= of_result(result, output)
        return parts | {"report": of_json(*reports)}

    return case


def all_pruned(
    sources: Mapping[str, Source], specs: Mapping[str, secateur.Spec], prior: Any = "masks"
) -> dict[str, Case]:
    """Makes a case for every pair of a source and a spec."""
    return {
        f"{name}, {what}": pruned(source, spec, prior=prior)
        for name, source in sources.items()
        for what, spec in specs.items()
    }


def from_files(source: Callable[[Path], Any], spec: secateur.Spec) -> Case:
    """Makes a case that prunes files, which `source` writes to a folder and the client reads."""

    def case(client: secateur.Client, folder: Path) -> Parts:
        written = source(folder)
        return pruned(lambda: written, spec, FORMS)(client, folder)

    return case


def planned(
    source: Source,
    spec: secateur.Spec,
    amounts: Sequence[float] | None = None,
    prior: Any = "masks",
) -> Case:
    def case(client: secateur.Client, folder: Path) -> Parts:
        plan = client.plan(source(), spec, amounts, prior=prior)
        return {"plan": of_json(plain_plan(plan))}

    return case


def reported(source: Source, tensors: str | list[str] | None = None) -> Case:
    def case(client: secateur.Client, folder: Path) -> Parts:
        return {"report": of_json(plain_report(client.report(source(), tensors)))}

    return case


def finalized(source: Source, tensors: str | list[str] | None = None) -> Case:
    def case(client: secateur.Client, folder: Path) -> Parts:
        result = client.finalize(source(), tensors)
        return {
            "report": of_json(plain_report(result.report)),
            "file": result.report.output_blake3[: 2 * DIGEST_BYTES],
        }

    return case


def measured_each(source: Source, **choices: Any) -> Case:
    """Makes a case of the sensitivity of a model."""

    def case(client: secateur.Client, folder: Path) -> Parts:
        table = client.sensitivity(source(), **choices).to_dict()
        del table["method"]
        return {"sensitivity": of_json(table)}

    return case


def stored(source: Callable[[Path], Any], spec: secateur.Spec, again: secateur.Spec) -> Case:
    """Makes a case that prunes a checkpoint, keeps the result, and makes every call on it.

    Args:
        source: Makes a model, and may write it to the folder.
        spec: Of the first prune.
        again: Of the second prune, of the result.
    """

    def case(client: secateur.Client, folder: Path) -> Parts:
        uploaded = client.upload(source(folder))
        first = client.prune(uploaded, spec, keep=True)
        assert first.checkpoint is not None
        try:
            parts = of_result(first, "masks") | {"first": of_json(plain_report(first.report))}
            return parts | _uses(client, first.checkpoint, again, folder / "downloads")
        finally:
            client.delete(first.checkpoint)
            client.delete(uploaded)

    return case


def _uses(
    client: secateur.Client, kept: secateur.Checkpoint, again: secateur.Spec, folder: Path
) -> Parts:
    files = [[file.filename, file.size_bytes, file.blake3] for file in kept.files]
    parts = {"files": of_json([*files, kept.size_bytes, kept.mask_bytes])}
    found = pruned(lambda: kept, again, FORMS)(client, folder)
    parts |= {f"again: {part}": digest for part, digest in found.items()}
    for output in FORMS:
        (folder / output).mkdir(parents=True)
        is_one = len(kept.files) == 1 or output == "masks"
        client.download(kept, folder / output / ("m.safetensors" if is_one else ""), output)
    final = client.finalize(kept)
    return parts | {
        "downloads": of_files(folder),
        "plan": of_json(plain_plan(client.plan(kept, again, [0.1, 0.5]))),
        "report": of_json(plain_report(client.report(kept))),
        "final report": of_json(plain_report(final.report)),
        "final tensors": of_tensors(final.state_dict()),
    }


def opened(source: Callable[[Path], Any], spec: secateur.Spec, name: str) -> Case:
    """Makes a case that prunes files which the server reads and writes.

    Args:
        source: Writes the files to a folder.
        spec: The spec.
        name: The name of the file or of the index in the folder.
    """

    def case(client: secateur.Client, folder: Path) -> Parts:
        source(folder)
        uri, out = f"{folder.as_uri()}/{name}", folder / "out"
        result = client.prune(uri, spec)
        parts = of_result(result, "masks")
        parts["reports"] = of_json(*map(plain_report, (result.report, client.report(uri))))
        for output in FORMS:
            (out / output).mkdir(parents=True)
            to = "masks.safetensors" if output == "masks" else name
            client.prune(uri, spec, output, destination=f"{out.as_uri()}/{output}/{to}")
        return parts | {"written": of_files(out)}

    return case
