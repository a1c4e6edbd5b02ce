"""N:M patterns and zero blocks in reports, compared with loops over all groups and blocks."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import secateur
from secateur.report import ZeroBlocks
from secateur.report_decoding import decode_report
from secateur_proto import report_pb2 as pb
from secateur_server.api.convert.tables import encode_choice
from secateur_server.backends import kernels
from secateur_server.backends.scan import Scan
from secateur_server.backends.torch_backend import TorchBackend
from secateur_server.cut.choice import Bound, Choice
from secateur_server.report.measure import measure
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.parameter import Parameter
from tests.conftest import examples
from tests.masks import packed

Patterns = tuple[tuple[int, int], ...]
Blocks = tuple[tuple[int, int, int], ...]


def patterns_of(zero: Tensor) -> Patterns:
    """Applies the definition to a bool tensor of zeros."""
    if not zero.dim() or not zero.numel():
        return ()
    lines = (
        zero.movedim(min(1, zero.dim() - 1), -1).flatten(0, -2) if zero.dim() > 1 else zero[None]
    )
    found = []
    for m in (2, 4, 8, 16):
        groups = [line[i : i + m] for line in lines.tolist() for i in range(0, len(line), m)]
        n = max(group.count(False) for group in groups)
        found += [(n, m)] if n < m else []
    return tuple(found)


def blocks_of(zero: Tensor) -> Blocks:
    """Applies the definition to a bool tensor of zeros."""
    found = []
    for side in (4, 8, 16, 32):
        if zero.dim() < 2 or not zero.numel():
            break
        matrix = zero.flatten(1)
        rows, columns = (range(0, size, side) for size in matrix.shape)
        whole = [bool(matrix[i : i + side, j : j + side].all()) for i in rows for j in columns]
        if not any(whole):
            break
        found.append((side, sum(whole), len(whole)))
    return tuple(found)


def measured(
    weight: Tensor, kept: Tensor | None, scan: Scan | None = None
) -> tuple[Patterns, Blocks]:
    mask = None if kept is None else packed(kept)
    structure = measure(RequestContext(), Parameter(weight, mask, scan)).structure
    blocks = tuple((b.side, b.zero, b.total) for b in structure.zero_blocks)
    return structure.patterns, blocks


@st.composite
def sparse(draw: st.DrawFn) -> tuple[Tensor, Tensor | None]:
    """Draws a tensor with zeros of both signs, single and in blocks, and a mask."""
    sides = {1: 200, 2: 70, 3: 24, 4: 8}
    dims = draw(st.integers(0, 4))
    least = draw(st.sampled_from([1, 1, 1, 1, 0]))
    shape = [draw(st.integers(least, sides[dims])) for _ in range(dims)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    dense = draw(st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]))
    values = torch.rand(shape, generator=generator)
    weight = torch.where(values < dense, values - 2, torch.tensor([0.0, -0.0])[dims % 2])
    if dims > 1 and weight.numel():
        matrix = weight.view(shape[0], -1)
        for size in draw(st.lists(st.sampled_from([4, 8, 20, 40]), max_size=3)):
            row, column = (draw(st.integers(0, (n - 1) // 4)) * 4 for n in matrix.shape)
            matrix[row : row + size, column : column + size] = 0
    share = draw(st.sampled_from([None, 0.05, 0.5, 1.0]))
    return weight, None if share is None else torch.rand(shape, generator=generator) < share


@pytest.mark.parametrize("is_compiled", [True, False])
@examples(150)
@given(drawn=sparse(), piece=st.sampled_from([64, 512, 1 << 20]))
def test_structure_is_that_of_the_definition(
    is_compiled: bool, drawn: tuple[Tensor, Tensor | None], piece: int
) -> None:
    weight, kept = drawn
    zero = weight == 0 if kept is None else (weight == 0) | ~kept
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TorchBackend, "piece", piece)
        patch.setattr(kernels, "enabled", is_compiled)
        assert measured(weight, kept) == (patterns_of(zero), blocks_of(zero))


LARGE = [(1000, 1200), (1001, 1200), (2, 600_001), (1300, 450, 2), (1_100_000, 1)]


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_the_last_group_of_a_large_tensor_counts(shape: tuple[int, ...]) -> None:
    kept = torch.zeros(shape, dtype=torch.bool)
    kept[-1, -3:] = True
    begin = max(0, (shape[1] - 1) // 16 * 16 - 16)  # all groups before are zeros
    expected = patterns_of(~kept[-1:, begin:])
    assert measured(torch.zeros(shape) + 1, kept)[0] == expected
    known = Scan(1, (), None)  # the weight has no zeros, so only the mask is scanned
    assert measured(torch.zeros(shape), kept, known)[0] == expected


@pytest.mark.parametrize("shape", LARGE, ids=str)
def test_the_last_block_of_a_large_tensor_counts(shape: tuple[int, ...]) -> None:
    matrix = torch.ones(shape).flatten(1)
    row, column = ((size - 1) // 4 * 4 for size in matrix.shape)
    matrix[row:, column:] = 0
    total = (row // 4 + 1) * (column // 4 + 1)
    assert measured(matrix.view(shape), None)[1][0] == (4, 1, total)


@pytest.mark.parametrize("shape", [(1024, 1030), (40, 30_000), (1_000_000, 3)], ids=str)
def test_blocks_of_a_large_tensor_are_counted_wherever_they_lie(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    grid = [-(-size // 32) for size in shape]
    blocks = torch.rand(grid) < 0.5
    kept = blocks.repeat_interleave(32, 0).repeat_interleave(32, 1)[: shape[0], : shape[1]]
    _, found = measured(torch.ones(shape), kept)
    assert found[-1] == (32, int((~blocks).sum()), blocks.numel())
    assert [side for side, _, _ in found] == [4, 8, 16, 32]


DTYPES = [
    *(torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int8, torch.uint8, torch.int64),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_of_every_dtype_count(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, -0.0, 1.0, 3.0], [5.0, 0.0, -0.0, 7.0]]).repeat(8, 4)
    assert measured(weight.to(dtype), None) == (((2, 4), (4, 8), (8, 16)), ())


def test_nan_is_not_zero() -> None:
    assert measured(torch.full((8, 8), torch.nan), None) == (((8, 16),), ())


def structured() -> dict[str, Tensor]:
    """A tensor for a 2:4 mask along the second dimension, one with zero blocks, and a dense one."""
    torch.manual_seed(0)
    blocks = torch.ones(12, 10)
    blocks[4:8, :4] = 0
    blocks[8:, 8:] = -0.0  # the corner is an incomplete block of 8 x 8 as well
    return {"two.weight": torch.rand(6, 16, 3) + 1, "blocks": blocks, "dense": torch.ones(9, 9)}


MASK = torch.tensor([[True], [True], [False], [False]]).repeat(4, 1).expand(6, 16, 3)


def test_a_report_has_patterns_and_blocks(client: secateur.Client) -> None:
    result = client.prune(structured(), secateur.custom_from_mask({"two.weight": MASK}))
    final = client.finalize(result.state_dict("reparametrized")).report
    assert not final.is_pruned
    for report in (result.report, client.report(result.state_dict("dense")), final):
        two = report.tensors["two.weight"]
        assert two.patterns == ("2:4", "4:8", "8:16")
        assert two.zero_blocks == (ZeroBlocks(4, 8, 24),)  # 12 columns: 6 kept, 6 not
    blocks, dense = final.tensors["blocks"], final.tensors["dense"]
    assert blocks.zero_blocks == (ZeroBlocks(4, 2, 9), ZeroBlocks(8, 1, 4))
    assert (blocks.patterns, dense.patterns, dense.zero_blocks) == (("10:16",), ("9:16",), ())
    plain = json.loads(json.dumps(final.to_dict()))["tensors"]
    assert plain["two.weight"]["patterns"] == ["2:4", "4:8", "8:16"]
    assert plain["blocks"]["zero_blocks"] == [
        {"side": 4, "zero": 2, "total": 9},
        {"side": 8, "zero": 1, "total": 4},
    ]


def test_the_table_shows_only_significant_patterns(client: secateur.Client) -> None:
    """Neither 9:16 of 9 columns nor 4:8 beside 2:4, and no column if no tensor has a pattern."""
    report = client.prune(structured(), secateur.custom_from_mask({"two.weight": MASK})).report
    head, first, total, rule, coverage, note = str(report).splitlines()
    assert head.endswith("  zero slices  patterns")
    assert first.split()[-4:] == ["0/6", "8/16", "0/3", "2:4"]
    assert total.endswith("50.00%")
    assert rule == "rule 1: 144 of 288 units asked for, 144 pruned"
    assert coverage.startswith("covers 288 of ")
    assert note.startswith("note: ")
    assert "<td>2:4</td>" in report._repr_html_()
    dense = client.report({"dense": torch.ones(9, 9)})
    assert dense.tensors["dense"].patterns == ("9:16",)
    assert "patterns" not in str(dense) + dense._repr_html_()


SHOWN = [
    ((4, 16), ["1:4", "2:8", "4:16"], "1:4"),
    ((4, 32), ["1:4", "2:8", "3:16"], "1:4 3:16"),
    ((4, 16), ["1:2", "1:4", "2:8"], "1:4"),
    ((32,), ["0:2", "0:4", "0:8", "0:16"], ""),  # wholly zero
    ((4, 32), ["3:4", "7:8", "13:16"], ""),  # chance
    ((4, 32), ["3:4", "4:8", "9:16"], "4:8"),
    ((7, 3), ["3:4", "3:8", "3:16"], ""),
    ((), [], ""),
]


@pytest.mark.parametrize(("shape", "patterns", "shown"), SHOWN)
def test_patterns_that_follow_from_others_are_not_shown(
    shape: tuple[int, ...], patterns: list[str], shown: str
) -> None:
    pairs = [map(int, pattern.split(":")) for pattern in patterns]
    tensor = pb.TensorReport(name="w", shape=shape)
    for n, m in pairs:
        tensor.patterns.add(n=n, m=m)
    first = str(decode_report(pb.SparsityReport(tensors=[tensor]))).splitlines()[1]
    assert first.split("0.00%")[1].split() == shown.split()


def test_the_table_shows_requested_and_pruned_units(client: secateur.Client) -> None:
    model = {"a": torch.ones(5), "b": torch.arange(2000.0) / 512}
    spec = secateur.l1_unstructured(["a", "b"], 0.6) + secateur.random_unstructured("a", 1)
    lines = str(client.prune(model, spec).report).splitlines()
    assert [line for line in lines if line.startswith("rule")] == [
        "rule 1 (2 tensors): 1,203 of 2,005 units asked for, 1,203 pruned",
        "rule 2: 1 of 2 units asked for, 1 pruned",
    ]
    lines = str(client.prune(model, secateur.l1_unstructured("a", 0.6)).report).splitlines()
    assert "rule 1: 3 of 5 units asked for, 3 pruned, threshold 1, ties 3 of 5" in lines


def choice(*names: str, requested: int, pruned: int, bounds: tuple[Bound, ...] = ()) -> pb.Choice:
    return encode_choice(Choice(names, 100, requested, pruned, 0.5, 1, 1, bounds))


def test_choices_without_differences_share_a_line() -> None:
    bound = (Bound("f", "max_sparsity", 60),)
    rules = [
        [choice(name, requested=60, pruned=60) for name in "abc"]
        + [
            choice("d", requested=60, pruned=50),
            choice("f", requested=60, pruned=60, bounds=bound),
        ],
        [choice(*names, requested=20, pruned=20) for names in ("ab", "cd")],
        [choice("a", requested=2, pruned=2), choice("b", requested=2, pruned=1)],
    ]
    reports = [pb.RuleReport(choices=choices) for choices in rules]
    lines = str(decode_report(pb.SparsityReport(rules=reports))).splitlines()
    end = "threshold 0.5"
    assert [line for line in lines if line.startswith("rule")] == [
        "rule 1 (3 tensors): 180 of 300 units asked for, 180 pruned",
        f"rule 1 (d): 60 of 100 units asked for, 50 pruned, {end}",
        f"rule 1 (f): 60 of 100 units asked for, 60 pruned, {end}; bounds: f max_sparsity",
        "rule 2 (4 tensors in 2 sets): 40 of 200 units asked for, 40 pruned",
        f"rule 3 (a): 2 of 100 units asked for, 2 pruned, {end}",
        f"rule 3 (b): 2 of 100 units asked for, 1 pruned, {end}",
    ]


def test_the_table_names_guard_rails_that_changed_the_choice() -> None:
    rails = Bound("fc1.weight", "max_sparsity", 20), Bound("fc2.weight", "keep_at_least", 30)
    names = "fc1.weight", "fc2.weight"
    choice = encode_choice(Choice(names, 100, 60, 50, 0.0123, 5, 3, rails))
    both = pb.RuleReport(choices=[choice, choice])
    report = decode_report(pb.SparsityReport(rules=[both]))
    ((found, _),) = report.rules
    assert [(b.tensor, b.rail, b.pruned) for b in found.bounds] == [
        ("fc1.weight", "max_sparsity", 20),
        ("fc2.weight", "keep_at_least", 30),
    ]
    assert str(report).splitlines()[-1] == (
        "rule 1 (fc1.weight and 1 more): 60 of 100 units asked for, 50 pruned, threshold 0.0123, "
        "ties 3 of 5; bounds: fc1.weight max_sparsity, fc2.weight keep_at_least"
    )
