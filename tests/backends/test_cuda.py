"""Masks on a GPU are those of the CPU. Without a GPU the kernels are interpreted."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from secateur_server import backends
from secateur_server.cut import select
from secateur_server.cut.prune import prune
from secateur_server.granularity.element import Element
from secateur_server.granularity.slice import Slice
from secateur_server.importance.activation import Activation
from secateur_server.importance.magnitude import Magnitude
from secateur_server.importance.random import Random
from secateur_server.report.measure import measure
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.amounts import Count, Fraction
from secateur_server.spec.rules import CustomMasks, Rule, Selection
from secateur_server.state_dict.fold import fold
from secateur_server.state_dict.parameter import Parameter
from tests.masks import unpacked

pytest.importorskip("triton", reason="there is no Triton for this platform")
from secateur_server.backends import kernels, kernels_triton, triton_backend
from secateur_server.backends.torch_backend import TorchBackend

HAS_GPU = torch.cuda.is_available()
GPU = pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")
INTERPRETED = pytest.mark.skipif(HAS_GPU, reason="the GPU's own kernels are compiled")
WHERE = [
    pytest.param("cuda", marks=[pytest.mark.gpu, GPU]),
    pytest.param("interpreted", marks=INTERPRETED),
]
CPU = torch.device("cpu")


@pytest.fixture(params=WHERE)
def to_gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], str]:
    """A function that selects the GPU's kernels from then on, and returns the device to use."""

    def start() -> str:
        if request.param == "cuda":
            return "cuda"
        compiled = kernels, triton_backend.TritonBackend(CPU)
        monkeypatch.setattr(backends, "_compiled", lambda: compiled)
        return "cpu"

    return start


_INPUTS = {"a": "a.in", "b": "b.in"}
WANDA = Activation("a", 1.0, _INPUTS, {}, is_relative=False)
RIA = Activation("a", 0.7, _INPUTS, {"b": "b.out"}, is_relative=True)
RULES: dict[str, Rule] = {
    "l1": Selection("r", ("a", "b"), Magnitude(), Element(), "tensor", Fraction(0.3), {}),
    "global": Selection("r", ("a", "b"), Magnitude(), Element(), "global", Fraction(0.5), {}),
    "scores": Selection("r", ("a",), Magnitude(), Element(), "global", Fraction(0.5), {"a": "s"}),
    "random": Selection("r", ("a", "b"), Random(7), Element(), "global", Fraction(0.5), {}),
    "l2": Selection("r", ("a", "b"), Magnitude(2.0), Slice(0), "tensor", Fraction(0.4), {}),
    "inf": Selection("r", ("b",), Magnitude(float("inf")), Slice(-1), "tensor", Count(5), {}),
    "random slices": Selection("r", ("a", "b"), Random(1), Slice(1), "tensor", Count(3), {}),
    "wanda": Selection("r", ("a", "b"), WANDA, Element(), "row", Fraction(0.3), {}),
    "ria": Selection("r", ("a", "b"), RIA, Element(), "global", Fraction(0.3), {}),
    "custom": CustomMasks("r", [("a", "m")]),
}


# Each rule is the first one with float32, and with one of the other dtypes; in the slow suite with
# all of them. All continue with rules of elements, slices and random choices.
OTHERS = [torch.float64, torch.float16, torch.bfloat16]
FIRST = [
    pytest.param(dtype, rule, marks=[] if index % 3 == place else pytest.mark.slow)
    for index, rule in enumerate(RULES)
    for place, dtype in enumerate(OTHERS)
]


@pytest.mark.parametrize(("dtype", "first"), [*((torch.float32, rule) for rule in RULES), *FIRST])
def test_masks_and_reports_are_those_of_the_cpu(
    to_gpu: Callable[[], str], dtype: torch.dtype, first: str
) -> None:
    torch.manual_seed(0)
    shape = (16, 24, 3, 3)
    weights = {"a": torch.randn(shape).to(dtype), "b": torch.randn(33, 151).to(dtype)}
    extras = {"s": torch.randn(shape), "m": torch.rand(shape) > 0.5}
    extras |= {"a.in": torch.rand(24), "b.in": torch.rand(151).double(), "b.out": torch.rand(33)}
    after = RULES if dtype == torch.float32 else ("l1", "random", "l2")
    rules = [RULES[name] for name in (first, *after)]  # each prunes what the earlier ones kept
    assert_same(to_gpu, weights, rules, extras)


@pytest.mark.parametrize(
    "fraction", [0.3, *(pytest.param(f, marks=pytest.mark.slow) for f in (0.0, 1.0))]
)
def test_more_units_than_are_sorted_at_once(
    to_gpu: Callable[[], str], monkeypatch: pytest.MonkeyPatch, fraction: float
) -> None:
    """With ties; for the second rule some units are pruned already."""
    monkeypatch.setattr(
        triton_backend.TritonBackend, "ranked", 1 << 16
    )  # a tensor is more than a piece
    torch.manual_seed(0)
    weights = {name: torch.randn(150, 700).mul(50).round().div(50) for name in "ab"}
    rules = [
        Selection("r", ("a", "b"), importance, Element(), "global", Fraction(fraction), {})
        for importance in (Magnitude(), Random(5))
    ]
    assert_same(to_gpu, weights, rules, {})


@pytest.mark.parametrize("values", ["normal", "three values", "zeros"])
def test_a_sample_bounds_the_threshold(
    to_gpu: Callable[[], str], monkeypatch: pytest.MonkeyPatch, values: str
) -> None:
    """Lowers the limits, so that 65,536 units are sampled as millions are."""
    constants = {"LARGE": 1 << 16, "SAMPLE": 1 << 10, "FEW": 1 << 10, "FEW_OF": 4}
    for name, value in constants.items():
        monkeypatch.setattr(select, name, value)
    # Histograms are only for samples that do not bound the threshold well.
    monkeypatch.delattr(select, "_searched_bounds")
    torch.manual_seed(0)
    weight = torch.randn(select.LARGE + 1001)
    if values != "normal":
        weight = weight.sign() * (0 if values == "zeros" else (torch.rand_like(weight) > 0.4))
    rule = Selection("r", ("w",), Magnitude(), Element(), "global", Fraction(0.5), {})
    assert_same(to_gpu, {"w": weight}, [rule], {})


def assert_same(
    to_gpu: Callable[[], str],
    weights: dict[str, Tensor],
    rules: Sequence[Rule],
    extras: dict[str, Tensor],
) -> None:
    """Checks that a GPU gives the masks, choices, reports and weights of the CPU."""
    expected, choices = prune(
        RequestContext(), {n: Parameter(w.clone()) for n, w in weights.items()}, rules, extras
    )
    measures = {name: measure(RequestContext(), parameter) for name, parameter in expected.items()}
    for parameter in expected.values():
        fold(RequestContext(), parameter)
    device = to_gpu()
    found, found_choices = prune(
        RequestContext(),
        {name: Parameter(weight.to(device)) for name, weight in weights.items()},
        rules,
        {name: extra.to(device) for name, extra in extras.items()},
    )
    assert found_choices == choices
    assert found.keys() == expected.keys()
    for name, parameter in found.items():
        assert torch.equal(unpacked(parameter), unpacked(expected[name]))
        assert measure(RequestContext(), parameter) == measures[name]
        fold(RequestContext(), parameter)
        assert torch.equal(parameter.weight.cpu(), expected[name].weight)


def broken(*args: object, **switches: object) -> None:
    raise RuntimeError("Failed to find C compiler.")


def does_nothing(*args: object, **switches: object) -> None:
    pass


class Kernel:
    """Runs a function instead of a kernel."""

    def __init__(self, run: Callable[..., None]) -> None:
        self.run = run

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        return self.run


@INTERPRETED
def test_triton_is_the_backend_if_it_works() -> None:
    assert triton_backend.triton_or_torch(CPU) is triton_backend.TritonBackend


@INTERPRETED
@pytest.mark.parametrize("name", ["split", "count_digits", "extremes", "count_ones"])
@pytest.mark.parametrize("run", [broken, does_nothing])
def test_torch_is_the_backend_if_triton_fails(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    run: Callable[..., None],
) -> None:
    monkeypatch.setattr(kernels_triton, name, Kernel(run))
    assert triton_backend.triton_or_torch(CPU) is TorchBackend
    (message,) = caplog.messages
    assert message.startswith("cpu: kernels are not compiled, which would be faster: ")
    assert run is does_nothing or message.endswith("Failed to find C compiler.")


# Compiles every kernel for Hopper, and checks that loads of 4-byte scores are vectorized.
COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from secateur_server.backends import kernels_triton as kernels

OF_BYTES = {"counts": "*i64", "found": "*i64", "count": "*i64", "state": "i64", "begin": "i64"}
OF_BYTES |= dict.fromkeys(("unpruned", "kept", "within"), "*u8")

def compiled(kernel, bits, **switches):
    number = "i64" if bits == "*i64" else "i32"
    names = kernel.arg_names
    types = {n: OF_BYTES.get(n, bits if n == "bits" else number) for n in names}
    types |= dict.fromkeys(switches, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if "*" in types[n]}
    values = {(names.index(n),): value for n, value in switches.items()}
    source = ASTSource(kernel, types, values, aligned)
    return triton.compile(source, target=GPUTarget("cuda", 90, 32)).asm

for bits in ("*i8", "*i16", "*i32", "*i64"):
    for kernel in (kernels.split, kernels.count_digits):
        for are_all in (True, False):
            asm = compiled(kernel, bits, is_random=False, are_all=are_all)
            assert len(asm["cubin"]) > 0
            assert bits != "*i32" or "ld.global.v4.b32" in asm["ptx"], kernel
    asm = compiled(kernels.extremes, bits)
    assert bits != "*i32" or "ld.global.v4.b32" in asm["ptx"]
compiled(kernels.split, "*i32", is_random=True, are_all=True)
compiled(kernels.count_digits, "*i32", is_random=True, are_all=False)
compiled(kernels.count_ones, "*u8")
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_for_hopper_without_a_gpu(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert (ended.returncode, ended.stdout) == (0, "compiled\n"), ended.stderr
