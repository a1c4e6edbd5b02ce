"""Registers the services as the contract describes them, with a codec that does not copy data."""

from collections.abc import Mapping
from typing import Any

import grpc
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass

from secateur_proto import checkpoints_pb2, pruner_pb2
from secateur_proto.codec import SINGLE, Decoder, encode
from secateur_server.api.checkpoints import Checkpoints
from secateur_server.api.pruner import Pruner

# By whether the client and the server send streams of messages.
_KINDS: Mapping[tuple[bool, bool], Any] = {
    (False, False): grpc.unary_unary_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


def add_pruner(pruner: Pruner, server: grpc.Server) -> str:
    """Adds the service Pruner to a server, and returns its name."""
    name, handlers = _methods(pruner_pb2.DESCRIPTOR, "Pruner", pruner)
    single = grpc.unary_unary_rpc_method_handler(
        pruner.prune_single, Decoder(pruner_pb2.PruneRequest.FromString), encode
    )
    server.add_generic_rpc_handlers([_Handlers(name, handlers, single)])
    return name


def add_checkpoints(checkpoints: Checkpoints, server: grpc.Server) -> str:
    """Adds the service Checkpoints to a server, and returns its name."""
    name, handlers = _methods(checkpoints_pb2.DESCRIPTOR, "Checkpoints", checkpoints)
    server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(name, handlers)])
    return name


def _methods(file: FileDescriptor, service: str, servicer: object) -> tuple[str, dict[str, Any]]:
    """The name of a service of a .proto file, and a handler for each of its methods."""
    described = file.services_by_name[service]
    handlers = {
        method.name: _handler(method, getattr(servicer, method.name))
        for method in described.methods
    }
    return described.full_name, handlers


def _handler(method: MethodDescriptor, behavior: Any) -> Any:
    parse = GetMessageClass(method.input_type).FromString
    decode = Decoder(parse) if method.client_streaming else parse  # later messages have only data
    return _KINDS[method.client_streaming, method.server_streaming](behavior, decode, encode)


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
