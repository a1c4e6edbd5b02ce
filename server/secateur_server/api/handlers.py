"""Registers the services, with a codec that does not copy data."""

from collections.abc import Mapping
from typing import Any

import grpc

from secateur_proto import checkpoints_pb2, pruner_pb2
from secateur_proto.codec import SINGLE, Decoder, encode
from secateur_server.api.checkpoints import Checkpoints
from secateur_server.api.pruner import Pruner


def add_pruner(pruner: Pruner, server: grpc.Server) -> str:
    """Adds the service Pruner to a server, and returns its name."""
    name = pruner_pb2.DESCRIPTOR.services_by_name["Pruner"].full_name
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Prune": grpc.stream_stream_rpc_method_handler(
            pruner.Prune, Decoder(pruner_pb2.PruneRequest.FromString), encode
        ),
        "Report": grpc.stream_unary_rpc_method_handler(
            pruner.Report, Decoder(pruner_pb2.ReportRequest.FromString), encode
        ),
        "Plan": grpc.stream_unary_rpc_method_handler(
            pruner.Plan, Decoder(pruner_pb2.PlanRequest.FromString), encode
        ),
        "Finalize": grpc.stream_stream_rpc_method_handler(
            pruner.Finalize, Decoder(pruner_pb2.FinalizeRequest.FromString), encode
        ),
        "GetServerInfo": grpc.unary_unary_rpc_method_handler(
            pruner.GetServerInfo, pruner_pb2.GetServerInfoRequest.FromString, encode
        ),
    }
    single = grpc.unary_unary_rpc_method_handler(
        pruner.prune_single, Decoder(pruner_pb2.PruneRequest.FromString), encode
    )
    server.add_generic_rpc_handlers([_Handlers(name, handlers, single)])
    return name


def add_checkpoints(checkpoints: Checkpoints, server: grpc.Server) -> str:
    """Adds the service Checkpoints to a server, and returns its name."""
    name = checkpoints_pb2.DESCRIPTOR.services_by_name["Checkpoints"].full_name
    unary = grpc.unary_unary_rpc_method_handler
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {
        "Upload": grpc.stream_unary_rpc_method_handler(
            checkpoints.Upload, Decoder(checkpoints_pb2.UploadRequest.FromString), encode
        ),
        "QueryUpload": unary(
            checkpoints.QueryUpload, checkpoints_pb2.QueryUploadRequest.FromString, encode
        ),
        "Download": grpc.unary_stream_rpc_method_handler(
            checkpoints.Download, checkpoints_pb2.DownloadRequest.FromString, encode
        ),
        "Get": unary(checkpoints.Get, checkpoints_pb2.GetRequest.FromString, encode),
        "List": unary(checkpoints.List, checkpoints_pb2.ListRequest.FromString, encode),
        "Delete": unary(checkpoints.Delete, checkpoints_pb2.DeleteRequest.FromString, encode),
    }
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
    return name


class _Handlers(grpc.GenericRpcHandler):
    """The methods of a service. `single` replaces Prune for calls that declare to be unary."""

    def __init__(self, service: str, handlers: Mapping[str, Any], single: Any) -> None:
        self._handlers = {f"/{service}/{name}": handler for name, handler in handlers.items()}
        self._prune, self._single = f"/{service}/Prune", single

    def service(self, handler_call_details: Any) -> Any:
        """As grpc.GenericRpcHandler.service."""
        method, metadata = handler_call_details.method, handler_call_details.invocation_metadata
        is_single = method == self._prune and SINGLE in (metadata or ())
        return self._single if is_single else self._handlers.get(method)
