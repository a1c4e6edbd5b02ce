"""Bad requests of many kinds, each with its expected error."""

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import torch

import secateur
from secateur_proto import checkpoints_pb2
from secateur_proto.checkpoints_pb2_grpc import CheckpointsStub
from secateur_proto.pruner_pb2_grpc import PrunerStub
from tests.contract.raw import Failure, bearer, entry, failure, file, header, message, spec
from tests.reference import Tensors
from tests.storage.stored import file_message, upload_file, upload_requests

Error = type[secateur.SecateurError]

SELECTION = "spec.rules[0].selection"
WEIGHTS = {"w": torch.arange(1.0, 13.0).view(4, 3)}
GOOD = file({"w": entry("F32", [2], 0, 8)}, bytes(8))


@dataclass(frozen=True)
class Connection:
    """A connection of a caller, with its token."""

    address: str
    channel: grpc.Channel
    token: str
    client: secateur.Client


def wrong(connection: Connection, draws: random.Random, folder: Path) -> str:
    """Makes one bad call, and checks its error. Returns its kind."""
    kinds = {**_of_client(connection, folder), **_raw(connection, draws)}
    name = draws.choice(sorted(kinds))
    kinds[name]()
    return name


# Through the client --------------------------------------------------------------------------


def _of_client(connection: Connection, folder: Path) -> dict[str, Callable[[], None]]:
    client = connection.client

    def pruned(model: Tensors, spec: secateur.Spec, kind: Error, field: str) -> None:
        _raises(kind, field, lambda: client.prune(model, spec, progress=False))

    nan = {"w": torch.tensor([1.0, float("nan")])}
    pair = {"w_orig": torch.ones(2, 3), "w_mask": torch.ones(3, 2)}
    unfit, broken = secateur.InvalidSpec, secateur.InvalidStateDict
    nobodys = secateur.CheckpointNotFound
    l1, ln, custom = secateur.l1_unstructured, secateur.ln_structured, secateur.custom_from_mask
    return {
        "unknown tensor": lambda: pruned(WEIGHTS, l1("v", 0.5), unfit, f"{SELECTION}.tensors[0]"),
        "count": lambda: pruned(WEIGHTS, l1("w", 13), unfit, f"{SELECTION}.count"),
        "dim": lambda: pruned(WEIGHTS, ln("w", 1, 2, 2), unfit, f"{SELECTION}.dim"),
        "NaN": lambda: pruned(nan, l1("w", 0.5), unfit, "data['w']"),
        "mask of 2": lambda: pruned(
            WEIGHTS,
            custom({"w": WEIGHTS["w"]}),
            unfit,
            "spec.rules[0].custom_masks.masks['w']",
        ),
        "no pair": lambda: pruned(pair, l1("w", 0.5), broken, "data['w_mask']"),
        "unknown checkpoint": lambda: _raises(
            nobodys, None, lambda: client.checkpoint("checkpoints/" + "0" * 32)
        ),
        "download of nothing": lambda: _raises(
            nobodys,
            None,
            lambda: client.download("checkpoints/nothing", folder / "none.safetensors"),
        ),
        "delete of nothing": lambda: _raises(
            nobodys, None, lambda: client.delete("checkpoints/nothing")
        ),
        "forbidden file": lambda: _raises(
            secateur.PermissionDenied, None, lambda: client.report("file:///etc/passwd")
        ),
        "wrong token": lambda: _unknown(connection.address),
    }


def _unknown(address: str) -> None:
    with secateur.Client(address, token="nobody has this token", timeout=60) as stranger:
        _raises(secateur.Unauthenticated, None, lambda: stranger.report(WEIGHTS, progress=False))


def _raises(kind: Error, field: str | None, call: Callable[[], object]) -> None:
    error = _error_of(call)
    assert isinstance(error, kind), repr(error)
    assert error.field == field, repr(error)


def _error_of(call: Callable[[], object]) -> secateur.SecateurError | None:
    try:
        call()
    except secateur.SecateurError as error:
        return error
    return None


# Raw -----------------------------------------------------------------------------------------


def _raw(connection: Connection, draws: random.Random) -> dict[str, Callable[[], None]]:
    """Returns bad calls that the client cannot make."""
    rpc = draws.choice(("Prune", "Report", "Finalize"))

    def sent(reason: str, field: str, announced: int, *pieces: bytes) -> None:
        first = header(rpc, announced)
        messages = [message(rpc, header=first), *(message(rpc, data=piece) for piece in pieces)]
        _check(_send(connection, rpc, messages), reason, field)

    noise = draws.randbytes(200)
    broken = "INVALID_STATE_DICT"
    return {
        "noise": lambda: sent(broken, "data", 200, noise),
        "too short": lambda: sent(broken, "data", len(GOOD) + 1, GOOD),
        "too long": lambda: sent(broken, "data", len(GOOD), GOOD, b"!"),
        "no header": lambda: _check(
            _send(connection, rpc, [message(rpc, data=GOOD)]), "INVALID_REQUEST", "header"
        ),
        "two headers": lambda: _check(
            _send(connection, rpc, [message(rpc, header=header(rpc, len(GOOD)))] * 2),
            "INVALID_REQUEST",
            "header",
        ),
        "fraction": lambda: _check(
            _send(connection, "Prune", [_prune(spec("w", fraction=1.5))]),
            "INVALID_SPEC",
            f"{SELECTION}.fraction",
        ),
        "no model so large": lambda: _too_large(connection, rpc),
        "wrong digest": lambda: _wrong_digest(connection),
        "offset": lambda: _wrong_offset(connection),
    }


def _prune(wanted: object) -> object:
    return message("Prune", header=header("Prune", len(GOOD), spec=wanted), data=GOOD)


def _send(connection: Connection, rpc: str, messages: list[object]) -> Failure | None:
    def call() -> None:
        method = getattr(PrunerStub(connection.channel), rpc)
        answer = method(iter(messages), timeout=60, metadata=bearer(connection.token))
        list(answer) if rpc != "Report" else answer

    return failure(call)


def _check(found: Failure | None, reason: str, field: str) -> None:
    assert found is not None, "a bad call succeeded"
    assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, reason), found
    assert found.fields == (field,), found


def _too_large(connection: Connection, rpc: str) -> None:
    found = _send(connection, rpc, [message(rpc, header=header(rpc, 1 << 40))])
    assert found is not None, "a bad call succeeded"
    code = grpc.StatusCode.RESOURCE_EXHAUSTED
    assert (found.code, found.reason) == (code, "MODEL_TOO_LARGE"), found


def _upload(
    connection: Connection, requests: Iterator[checkpoints_pb2.UploadRequest]
) -> Failure | None:
    upload = CheckpointsStub(connection.channel).Upload
    return failure(upload, requests, timeout=60, metadata=bearer(connection.token))


def _wrong_digest(connection: Connection) -> None:
    announced = file_message(GOOD, blake3="0" * 64)
    found = _upload(connection, upload_requests([upload_file(announced)], GOOD))
    _check(found, "INVALID_STATE_DICT", "data")


def _wrong_offset(connection: Connection) -> None:
    nobodys = file_message(GOOD, blake3="1" * 64)
    found = _upload(connection, upload_requests([upload_file(nobodys, 1)], GOOD[1:]))
    _check(found, "INVALID_REQUEST", "header.files[0].offset")
