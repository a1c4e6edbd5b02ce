"""Encodes the server's version, features and limits."""

import platform
from collections.abc import Collection
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

import torch
from google.protobuf.descriptor import EnumDescriptor

from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2
from secateur_server.cut import allocation
from secateur_server.granularity import GRANULARITIES
from secateur_server.importance import IMPORTANCES
from secateur_server.outputs import OUTPUTS
from secateur_server.spec.amounts import AMOUNTS
from secateur_server.spec.decode import ALLOCATIONS, SCOPES
from secateur_server.spec.solvers import SOLVERS


def encode_server_info(max_model_bytes: int, device: torch.device) -> pb.GetServerInfoResponse:
    """Makes the answer of GetServerInfo. The features are what the registries have."""
    known = {*allocation.ALLOCATIONS, *allocation.TABLES}
    divided = [number for number, name in ALLOCATIONS.items() if name in known]
    return pb.GetServerInfoResponse(
        version=version("secateur"),
        outputs=_values(pb.Output.DESCRIPTOR, OUTPUTS),
        importances=IMPORTANCES,
        granularities=_values(
            spec_pb2.Granularity.DESCRIPTOR, {*GRANULARITIES, spec_pb2.GRANULARITY_GROUP}
        ),
        scopes=_values(spec_pb2.Scope.DESCRIPTOR, SCOPES),
        amounts=AMOUNTS,
        allocations=_values(spec_pb2.Allocation.DESCRIPTOR, divided),
        max_model_bytes=max_model_bytes,
        solvers=SOLVERS,
        device=str(device),
        versions=_versions(),
    )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version(), "torch": torch.__version__}
    with suppress(PackageNotFoundError):
        found["numba"] = version("numba")
    return found


def _values(enum: EnumDescriptor, known: Collection[int]) -> list[str]:
    """The names of an enum's known values, without the unspecified one."""
    return [value.name for value in enum.values if value.number and value.number in known]
