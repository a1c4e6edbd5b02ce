"""Calls that a cluster serves, where it can, and else this server."""

from collections.abc import Sequence
from contextlib import ExitStack, suppress

from secateur_proto import pruner_pb2 as pb
from secateur_server.api.answers import Made
from secateur_server.api.finalize import finalize_call
from secateur_server.api.plan import plan_call
from secateur_server.api.prune import prune_call
from secateur_server.api.report import report_call
from secateur_server.api.shards.finalize import finalize_files
from secateur_server.api.shards.model import NotDivisible
from secateur_server.api.shards.plan import plan_files
from secateur_server.api.shards.prune import prune_files
from secateur_server.api.shards.report import report_files
from secateur_server.cut.drivers import Cluster
from secateur_server.granularity.group import Group
from secateur_server.spec.rules import Rule
from secateur_server.state_dict.sources import Call, Sources


def divided_report(
    sources: Sources, cluster: Cluster | None, call: Call[pb.ReportHeader]
) -> pb.ReportResponse:
    """Makes the answer of a call of Report."""
    if cluster is not None:
        with suppress(NotDivisible):
            return report_files(sources, cluster, call)
    return report_call(sources, call)


def divided_plan(
    sources: Sources, cluster: Cluster | None, call: Call[pb.PlanHeader], asked: Sequence[Rule]
) -> bytes:
    """Makes the answer of a call of Plan. The arguments are those of plan_call."""
    if cluster is not None:
        with suppress(NotDivisible):
            return plan_files(sources, cluster, call, asked)
    return plan_call(sources, call, asked)


def divided_prune(
    sources: Sources,
    cluster: Cluster | None,
    call: Call[pb.PruneHeader],
    asked: Sequence[Rule],
    held: ExitStack,
) -> Made:
    """Makes the answer of a call of Prune. The arguments are those of prune_call."""
    if cluster is not None:
        with suppress(NotDivisible), ExitStack() as opened:
            made = prune_files(sources, cluster, call, asked, opened)
            held.push(opened.pop_all())
            return made
    return prune_call(sources, call, asked, held)


def divided_finalize(
    sources: Sources,
    cluster: Cluster | None,
    call: Call[pb.FinalizeHeader],
    asked: Sequence[Group],
    held: ExitStack,
) -> Made:
    """Makes the answer of a call of Finalize. The arguments are those of finalize_call."""
    if cluster is not None:
        with suppress(NotDivisible), ExitStack() as opened:
            made = finalize_files(sources, cluster, call, asked, opened)
            held.push(opened.pop_all())
            return made
    return finalize_call(sources, call, asked, held)
