"""Encodes the server's version, features and limits."""

from importlib.metadata import version

from google.protobuf.descriptor import EnumDescriptor

from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2


def encode_server_info(max_model_bytes: int) -> pb.GetServerInfoResponse:
    """Makes the answer of GetServerInfo. Features are read from the contract's descriptors."""
    return pb.GetServerInfoResponse(
        version=version("secateur"),
        outputs=_values(pb.Output.DESCRIPTOR),
        importances=_fields("importance"),
        granularities=_values(spec_pb2.Granularity.DESCRIPTOR),
        scopes=_values(spec_pb2.Scope.DESCRIPTOR),
        amounts=_fields("amount"),
        allocations=_values(spec_pb2.Allocation.DESCRIPTOR),
        max_model_bytes=max_model_bytes,
    )


def _values(enum: EnumDescriptor) -> list[str]:
    """The names of an enum's values, without the unspecified one."""
    return [value.name for value in enum.values if value.number]


def _fields(oneof: str) -> list[str]:
    """The names of the fields of a oneof of Selection."""
    return [field.name for field in spec_pb2.Selection.DESCRIPTOR.oneofs_by_name[oneof].fields]
