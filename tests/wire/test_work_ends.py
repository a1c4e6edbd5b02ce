"""When a call is cancelled, its work ends soon, whatever its spec asks for."""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch

import secateur
from secateur_proto import plan_pb2
from secateur_proto import pruner_pb2 as pb
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.api.convert.plan import encode_plan, unplanned
from secateur_server.api.convert.report import encode_report
from secateur_server.backends import cores
from secateur_server.cut.plan import plan
from secateur_server.cut.prune import prune
from secateur_server.errors import Cancelled
from secateur_server.report.tensors import measure_tensors
from secateur_server.report.warnings import changes_of, warnings_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Fraction
from secateur_server.spec.decode import decode_spec
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import RunningServer, caught, eventually
from tests.contract.raw import series
from tests.definition import catalog_of

TENSORS = 300
MODEL = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(TENSORS)}
SPECS = {
    "each tensor": secateur.l1_unstructured("*", 0.5),
    "global": secateur.global_unstructured("*", 0.5),
    "LAMP": secateur.lamp("*", 0.5),
    "uniform": secateur.select("*", 0.5, scope="global", allocation="uniform"),
    "normalized": secateur.select("*", 0.5, scope="global", normalization="mean"),
    "groups": secateur.grouped([secateur.group(n, secateur.member(n)) for n in MODEL], 0.5),
}
MESSAGES = {name: spec.encode(MODEL)[0] for name, spec in SPECS.items()}
PARAMETERS = {key: Parameter(weight) for key, weight in MODEL.items()}
CATALOG = catalog_of(PARAMETERS)
AMOUNTS = [Fraction(0.25), Fraction(0.5), Fraction(0.75)]


class CountedWatch(RequestContext):
    """Stops itself at a check, and measures the lines of Python between two checks."""

    def __init__(self, last: int | None = None) -> None:
        super().__init__()
        self.checks = self.lines = self.longest = 0
        self._last = last

    def check(self) -> None:
        self.checks += 1
        self.longest, self.lines = max(self.longest, self.lines), 0
        if self.checks == self._last:
            self.cancel()
        super().check()

    def trace(self, frame: FrameType, event: str, argument: object) -> Any:
        """For sys.settrace."""
        self.lines += event == "line"
        return self.trace


def work(context: RequestContext, name: str, is_plan: bool) -> None:
    """All that a server does with a spec, from its message to that of the answer."""
    asked = decode_spec(context, MESSAGES[name])
    rules = resolve(context, asked, CATALOG)
    if is_plan:
        assert isinstance(rules[0], Selection)
        outcomes = plan(context, rules[0], AMOUNTS, PARAMETERS, {})
        before = {name: unplanned(context, PARAMETERS[name]) for name in rules[0].tensors}
        for _ in encode_plan(context, outcomes, before):
            pass
        return
    pruned, choices = prune(context, PARAMETERS, rules, {})
    report = encode_report(context, measure_tensors(context, pruned), CATALOG, "", "", choices)
    changes = changes_of(context, report, CATALOG, PARAMETERS, pruned)
    warnings_of(context, report, asked, rules, CATALOG, changes)


@pytest.fixture
def _in_one_thread() -> Iterator[None]:
    cores._thread.in_pool = True
    yield
    cores._thread.in_pool = False


@pytest.mark.usefixtures("_in_one_thread")
@pytest.mark.parametrize("is_plan", [False, True])
@pytest.mark.parametrize("name", SPECS)
def test_every_stage_checks_for_cancellation_often(name: str, is_plan: bool) -> None:
    work(RequestContext(), name, is_plan)  # compiles what is not compiled yet
    watch = CountedWatch()
    before = sys.gettrace()
    sys.settrace(watch.trace)
    try:
        work(watch, name, is_plan)
    finally:
        sys.settrace(before)
    # Simple loops need no check. Of 12,000 tensors so many lines take some 50 ms.
    assert watch.longest <= 60 * TENSORS
    for last in {1, watch.checks // 4, watch.checks // 2, watch.checks - 1}:
        stopped = CountedWatch(last)
        with pytest.raises(Cancelled):
            work(stopped, name, is_plan)
        assert stopped.checks == last


def test_cancelled_work_ends(server: RunningServer, channel: grpc.Channel) -> None:
    names = [f"layers.{i}.weight" for i in range(4000)]
    data = safetensors.torch.save({name: torch.randn(4, 4) for name in names})
    given, _ = secateur.lamp("*", 0.5).encode(dict.fromkeys(names, torch.zeros(4, 4)))
    first = pb.PlanHeader(data_bytes=len(data), spec=given)
    first.amounts.extend(plan_pb2.Amount(fraction=i / 1000) for i in range(1, 1000))

    def in_flight() -> float:
        return series(server, "secateur_requests_in_flight")

    def begin() -> Any:
        request = pb.PlanRequest(header=first, data=data)
        return PrunerStub(channel).Plan.future(iter([request]), timeout=300)

    eventually(in_flight, 0.0)
    call = caught(begin, lambda: in_flight() == 1.0)
    call.cancel()
    eventually(in_flight, 0.0)
    assert call.code() == grpc.StatusCode.CANCELLED
