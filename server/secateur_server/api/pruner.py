"""The service that prunes. Each RPC's work is in a file of its own."""

from collections.abc import Callable, Iterator
from functools import partial

from secateur_proto import pruner_pb2 as pb
from secateur_proto.codec import Data
from secateur_server.api.answers import Answers
from secateur_server.api.convert.server_info import encode_server_info
from secateur_server.api.finalize import decode_finalize
from secateur_server.api.plan import decode_plan
from secateur_server.api.prune import decode_prune
from secateur_server.api.rules import extras_of, streamed_of
from secateur_server.api.shards.calls import (
    divided_finalize,
    divided_plan,
    divided_prune,
    divided_report,
)
from secateur_server.api.stream import open_request
from secateur_server.cut.drivers import Cluster
from secateur_server.errors import InvalidRequest
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.sources import Call, Sources


class Pruner:
    """The service secateur.v1.Pruner.

    Args:
        sources: Opens the sources of calls.
        calls: The largest number of concurrent calls.
        cluster: Works on the files of URIs, where it can; None: this server does.
    """

    def __init__(self, sources: Sources, calls: int, cluster: Cluster | None = None) -> None:
        self._sources, self._answers = sources, Answers(sources.metrics, calls)
        self._cluster = cluster

    def close(self) -> None:
        """Ends the workers, when no more calls come."""
        self._answers.close()

    def _count(self, context: RequestContext) -> Callable[[int], None]:
        return partial(self._sources.metrics.received, context)

    def Prune(
        self, messages: Iterator[pb.PruneRequest | Data], context: RequestContext
    ) -> Iterator[pb.PruneResponse | Data]:
        """Prunes, and returns masks or pruned tensors."""
        first, data = open_request(messages, self._count(context))
        rules = decode_prune(context, first.header)
        call = Call(context, first.header, data, extras_of(rules), streamed_of(rules))
        work = partial(divided_prune, self._sources, self._cluster, call, rules)
        yield from self._answers.send(call, work, pb.PruneResponse)

    def prune_single(
        self, message: pb.PruneRequest | Data, context: RequestContext
    ) -> pb.PruneResponse:
        """Does Prune with one message each way, for which gRPC is faster.

        Args:
            message: With all data.
            context: The request.

        Returns:
            The result and all data.

        Raises:
            InvalidRequest: The header names a source, so the answer may be large.
        """
        if isinstance(message, pb.PruneRequest) and message.header.WhichOneof("source"):
            raise InvalidRequest("header", "names a source, so that its answer must be a stream")
        answer = self.Prune(iter([message]), context)
        first, *others = (part for part in answer if not part.HasField("progress"))
        assert isinstance(first, pb.PruneResponse), "the first message has the result"
        size = sum(len(part.data) for part in others)
        context.charge("header.output", 2 * size, "an answer of one message")
        first.data = b"".join([first.data, *(part.data for part in others)])
        return first

    def Report(
        self, messages: Iterator[pb.ReportRequest | Data], context: RequestContext
    ) -> pb.ReportResponse:
        """Measures tensors."""
        first, data = open_request(messages, self._count(context))
        return divided_report(self._sources, self._cluster, Call(context, first.header, data))

    def Plan(self, messages: Iterator[pb.PlanRequest | Data], context: RequestContext) -> bytes:
        """Predicts a Prune for many amounts. Returns a PlanResponse, encoded."""
        first, data = open_request(messages, self._count(context))
        rules = decode_plan(context, first.header)
        call = Call(context, first.header, data, extras_of(rules))
        return divided_plan(self._sources, self._cluster, call, rules)

    def Finalize(
        self, messages: Iterator[pb.FinalizeRequest | Data], context: RequestContext
    ) -> Iterator[pb.FinalizeResponse | Data]:
        """Applies masks to their weights."""
        first, data = open_request(messages, self._count(context))
        groups = decode_finalize(context, first.header)
        call = Call(context, first.header, data)
        work = partial(divided_finalize, self._sources, self._cluster, call, groups)
        yield from self._answers.send(call, work, pb.FinalizeResponse)

    def GetServerInfo(
        self, message: pb.GetServerInfoRequest, context: RequestContext
    ) -> pb.GetServerInfoResponse:
        """Says what this server can do."""
        return encode_server_info(self._sources.largest, self._sources.device)
