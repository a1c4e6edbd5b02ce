"""The bounds of details of reports: bytes, memory, and the end of a request."""

import math
import tracemalloc

import grpc
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from secateur_proto import pruner_pb2 as pb
from secateur_proto import pruner_pb2_grpc
from secateur_proto.report_pb2 import Details, SparsityReport, TensorReport
from secateur_server.api.details import add_details, choose_detailed
from secateur_server.backends import kernels
from secateur_server.backends.masks import Mask
from secateur_server.errors import Cancelled
from secateur_server.report.details import choose, details_of
from secateur_server.report.images import images_of
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.masks import packed


def raw_report(
    channel: grpc.Channel, source: dict[str, Tensor], max_bytes: int
) -> dict[str, TensorReport]:
    """The reports of tensors as messages, by name."""
    data = save(source)
    header = pb.ReportHeader(data_bytes=len(data), details=Details(max_bytes=max_bytes))
    request = pb.ReportRequest(header=header, data=data)
    answer = pruner_pb2_grpc.PrunerStub(channel).Report(iter([request]))
    return {tensor.name: tensor for tensor in answer.report.tensors}


@examples(15)
@given(budget=st.integers(1, 200_000), seed=st.integers(0, 1 << 30))
def test_the_largest_tensors_get_details_within_the_budget(
    channel: grpc.Channel, budget: int, seed: int
) -> None:
    numbers = np.random.default_rng(seed)
    source = {
        f"{i}": torch.from_numpy(numbers.integers(0, 3, numbers.integers(1, 99, 2)).astype("f4"))
        for i in range(60)
    }
    source["large"] = torch.arange(90_000.0).view(300, 300) % 2
    reports = raw_report(channel, source, budget)
    sizes = [report.details.ByteSize() for report in reports.values() if report.HasField("details")]
    assert sum(max(size, 1024) for size in sizes) <= budget
    least = min((r.total for r in reports.values() if r.HasField("details")), default=0)
    others = [r.total for r in reports.values() if not r.HasField("details")]
    if sizes:
        assert max(others, default=0) <= least
    if budget > 20_000:
        assert reports["large"].HasField("details")


def test_the_budget_bounds_how_many_tensors_have_details(channel: grpc.Channel) -> None:
    source = {f"{i}": torch.tensor([1.0, 0.0]) for i in range(500)}
    reports = raw_report(channel, source, 100 << 10)
    assert [name for name, report in reports.items() if report.HasField("details")] == list(
        reports
    )[:100]


def test_a_budget_that_is_too_large(channel: grpc.Channel) -> None:
    assert raw_report(channel, {"w": torch.ones(2)}, 16 << 20)["w"].HasField("details")
    with pytest.raises(grpc.RpcError) as raised:
        raw_report(channel, {"w": torch.ones(2)}, (16 << 20) + 1)
    assert raised.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    said = raised.value.details()
    assert said is not None
    assert said.startswith("header.details.max_bytes: 16777217 is above")


class Ending(RequestContext):
    """Is cancelled at the check after `checks` others."""

    def __init__(self, checks: float) -> None:
        super().__init__()
        self.checks = checks

    def check(self) -> None:
        self.checks -= 1
        if self.checks < 0:
            raise Cancelled("call", "ended")


def measured(context: RequestContext, parameter: Parameter) -> None:
    (histogram,) = choose(context, {"w": parameter}, 1 << 20).histograms.values()
    details_of(context, histogram, parameter, (1, 0))


@pytest.mark.parametrize("compiled", [True, False])
def test_a_request_ends_within_each_pass(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "enabled", compiled)
    weight = torch.ones(2100, 1000)
    weight[5] = 0
    parameter = Parameter(weight, packed(torch.arange(weight.numel()) % 3 > 0))
    whole = Ending(math.inf)
    counted = Ending(1000)
    measured(whole, parameter)
    measured(counted, parameter)
    checks = 1000 - int(counted.checks)
    assert checks >= 5 * 3  # extremes, magnitudes, nonzero, groups and pixels, in three pieces
    for count in range(0, checks, 3):
        with pytest.raises(Cancelled):
            measured(Ending(count), parameter)


def test_images_take_little_memory() -> None:
    shape = (10_000, 20_000)  # 25 MB of bits, in 191 pieces of which each counts all pixels
    bits = torch.arange(math.prod(shape) // 8).to(torch.uint8)
    mask = Mask(bits, math.prod(shape))
    images_of(RequestContext(), mask, (600, 600))  # compiles
    tracemalloc.start()
    try:
        images = images_of(RequestContext(), mask, shape)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()
    assert np.frombuffer(images[0].pixels, np.uint8).mean() == pytest.approx(127.5, abs=1)


def test_details_count_against_the_memory_of_requests() -> None:
    charged = []
    context = RequestContext(
        charge=lambda context, field, size, what: charged.append((field, size))
    )
    parameters = {f"{i}": Parameter(torch.eye(100 * i + 1)) for i in range(5)}
    header = pb.ReportHeader(details=Details(max_bytes=150_000))
    report = SparsityReport(
        tensors=[TensorReport(name=name, zero_slices=(0, 0)) for name in parameters]
    )
    histograms = choose_detailed(context, header, parameters)
    add_details(context, report, histograms, parameters)
    sizes = [tensor.details.ByteSize() for tensor in report.tensors]
    ((field, size),) = charged
    assert field == "header.details"
    assert 30_000 < sum(sizes) <= size / 3 <= 150_000
    assert choose_detailed(context, pb.ReportHeader(), parameters) == {}
    assert len(charged) == 1
