"""Rubbish in rules that update weights: each call is served, and what it returns is finite."""

import math
from typing import Any, cast

import grpc
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from secateur_proto import pruner_pb2
from secateur_proto import spec_pb2 as pb
from secateur_proto.pruner_pb2_grpc import PrunerStub
from secateur_server.solvers.scaling import exponent_beyond, scaled
from tests.conftest import examples
from tests.contract import raw

Tensors = dict[str, Tensor]
Method = dict[str, Any]

SPARSEGPT: Method = {"sparsegpt": pb.SparseGpt()}
ALPS: Method = {"alps": pb.Alps()}
REFIT: Method = {"refit": pb.Refit()}
METHODS = {"sparsegpt": SPARSEGPT, "alps": ALPS, "refit": REFIT}
of_all_methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def gram_of(inputs: int, rows: int = 0, seed: int = 0) -> Tensor:
    x = torch.randn(rows or 2 * inputs + 1, inputs, generator=torch.Generator().manual_seed(seed))
    return x.T @ x


def triangle_of(gram: Tensor) -> Tensor:
    return gram[tuple(torch.triu_indices(*gram.shape))].float()


def rules_of(method: Method, **fields: Any) -> list[pb.Rule]:
    """The rule of a method. A refit has a rule before it that prunes half."""
    fields = {"tensors": ["w"], "grams": {"w": pb.Gram(holder="g")}, **method, **fields}
    if "refit" in method:
        half = raw.spec("w", random=pb.Random()).rules
        return [*half, pb.Rule(solver=pb.Solver(**fields))]
    if not fields.keys() & {"count", "pattern", "fraction"}:
        fields["fraction"] = 0.5
    return [pb.Rule(solver=pb.Solver(**fields))]


def prune(
    channel: grpc.Channel, rules: list[pb.Rule], tensors: Tensors, **fields: Any
) -> tuple[Any, Tensors]:
    """Sends tensors in their order, Gram matrices last. Returns the report and the result."""
    data = file_of(tensors)
    fields = {"output": pruner_pb2.OUTPUT_DENSE, **fields}
    first = raw.header("Prune", len(data), spec=pb.PruningSpec(rules=rules), **fields)
    request = pruner_pb2.PruneRequest(header=first, data=data)
    answers = list(PrunerStub(channel).Prune(iter([request]), timeout=raw.TIMEOUT))
    return answers[0].result.report, safetensors.torch.load(b"".join(a.data for a in answers))


def file_of(tensors: Tensors, metadata: dict[str, str] | None = None) -> bytes:
    names = {torch.float8_e4m3fn: "F8_E4M3", torch.bfloat16: "BF16", torch.float64: "F64"}
    table: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    data = b""
    for name, tensor in tensors.items():
        part = bytes(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        dtype = names.get(tensor.dtype, "F32")
        table[name] = raw.entry(dtype, list(tensor.shape), len(data), len(data) + len(part))
        data += part
    return raw.file(table, data)


def refused(channel: grpc.Channel, rules: list[pb.Rule], tensors: Tensors) -> raw.Failure:
    with pytest.raises(grpc.RpcError) as caught:
        prune(channel, rules, tensors)
    found = raw.read_failure(cast(grpc.Call, caught.value))
    assert (found.code, found.domain) == (raw.INVALID_ARGUMENT, "secateur"), found
    return found


def zeros(result: Tensors) -> Tensor:
    return result["w"].float() == 0


@pytest.mark.parametrize(
    ("first", "shape"),
    [
        (raw.spec("w", importance_scores={"w": "g"}, granularity=2, dim=0), (36, 8)),
        (raw.spec("w", magnitude=None, activation=pb.Activation(outputs={"w": "g"})), (36, 8)),
        (raw.masks(w="g"), (1, 1)),
    ],
    ids=["scores", "factors", "mask"],
)
def test_a_gram_matrix_has_no_other_role(
    channel: grpc.Channel, first: pb.PruningSpec, shape: tuple[int, int]
) -> None:
    tensors = {"w": torch.randn(shape), "g": triangle_of(gram_of(shape[1]))}
    found = refused(channel, [*first.rules, *rules_of(REFIT)[1:]], tensors)
    assert found.fields == ("spec.rules[1].solver.grams['w']",), found


@of_all_methods
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("shape", [(0, 8), (8, 0), (0, 0), (0, 4, 2), (2, 0, 3)])
def test_empty_weights(
    channel: grpc.Channel, method: Method, shape: tuple[int, ...], is_transposed: bool
) -> None:
    inputs = shape[0] if is_transposed else math.prod(shape[1:])
    grams = {"w": pb.Gram(holder="g", is_transposed=is_transposed)}
    tensors = {"w": torch.zeros(shape), "g": triangle_of(gram_of(inputs))}
    for fields in ({}, {"scope": pb.SCOPE_PER_ROW, "count": 0}) if method is ALPS else ({},):
        report, found = prune(channel, rules_of(method, grams=grams, **fields), tensors)
        assert found["w"].shape == shape
        assert [choice.pruned for rule in report.rules for choice in rule.choices] == [0]


@of_all_methods
def test_weights_of_eight_bits(channel: grpc.Channel, method: Method) -> None:
    weight = torch.randn(6, 8).to(torch.float8_e4m3fn)
    _, found = prune(channel, rules_of(method), {"w": weight, "g": triangle_of(gram_of(8))})
    assert found["w"].dtype == torch.float8_e4m3fn
    assert int(zeros(found).sum()) == 24
    assert bool(found["w"].float().isfinite().all())


@of_all_methods
@pytest.mark.parametrize("of_weight", [-120, -20, 0, 20, 120])
@pytest.mark.parametrize("of_gram", [-130, -40, 0, 60, 110])
def test_the_scale_of_weights_and_grams_does_not_matter(
    channel: grpc.Channel, method: Method, of_weight: int, of_gram: int
) -> None:
    weight, gram = torch.randn(6, 8, generator=torch.Generator().manual_seed(2)), gram_of(8)
    _, expected = prune(channel, rules_of(method), {"w": weight, "g": triangle_of(gram)})
    given = {"w": weight * 2.0**of_weight, "g": triangle_of(gram * 2.0**of_gram)}
    _, found = prune(channel, rules_of(method), given)
    assert torch.equal(zeros(found), zeros(expected))
    torch.testing.assert_close(found["w"] * 2.0**-of_weight, expected["w"], rtol=1e-4, atol=1e-4)


@of_all_methods
def test_one_huge_weight_hides_no_other(channel: grpc.Channel, method: Method) -> None:
    weight = torch.arange(1.0, 49).view(6, 8)
    weight[0, 0] = 1e38
    _, found = prune(channel, rules_of(method), {"w": weight, "g": triangle_of(torch.eye(8))})
    assert int(zeros(found).sum()) == 24
    if method is not REFIT:
        lowest = weight.view(-1).argsort()[:24]
        per_block = zeros(found).view(-1).nonzero().view(-1)
        assert torch.equal(per_block, lowest.sort().values)


def test_weights_that_float32_cannot_hold_are_named(channel: grpc.Channel) -> None:
    weight = torch.ones(2, 8, dtype=torch.float64)
    weight[1, 2] = 1e300
    tensors = {"w": weight, "g": triangle_of(gram_of(8))}
    found = refused(channel, rules_of(SPARSEGPT), tensors)
    assert found.fields == ("data['w']",), found
    assert "1e+300" in found.message


def test_weights_that_no_rule_moves_keep_all_their_bits(channel: grpc.Channel) -> None:
    weight = torch.rand(4, 8, dtype=torch.float64) + 1
    gram = gram_of(8)
    gram[3], gram[:, 3] = 0, 0
    tensors = {"w": weight, "g": triangle_of(gram)}
    _, same = prune(channel, [rules_of(REFIT)[1]], tensors)
    assert torch.equal(same["w"], weight), "nothing is pruned"
    for method in METHODS.values():
        dense, pairs = (
            prune(channel, rules_of(method), tensors, output=output)[1]
            for output in (pruner_pb2.OUTPUT_DENSE, pruner_pb2.OUTPUT_REPARAMETRIZED)
        )
        kept = ~zeros(dense)
        assert torch.equal(dense["w"][:, 3][kept[:, 3]], weight[:, 3][kept[:, 3]]), "it is dead"
        assert torch.equal(pairs["w_orig"][~kept], weight[~kept])


def test_a_dead_input_has_no_products(channel: grpc.Channel) -> None:
    gram = gram_of(8)
    gram[3, 3] = 0
    for method in METHODS.values():
        tensors = {"w": torch.randn(6, 8), "g": triangle_of(gram)}
        found = refused(channel, rules_of(method), tensors)
        assert found.fields == ("data['g']",), found
        assert "[3, " in found.message


def test_scales_are_exact_powers_of_two() -> None:
    for value in (2.0**-149, 2.0**-120, 1e-3, 1.0, 3e38):
        values = torch.tensor([value, -value / 2, 0.0])
        exponent = exponent_beyond(values, 20)
        usual = scaled(values, -exponent)
        assert 2.0**-21 <= float(usual.abs().max()) <= 2.0**20
        assert torch.equal(scaled(usual, exponent), values)
    assert exponent_beyond(torch.zeros(2), 20) == 0
    assert exponent_beyond(torch.zeros(0), 20) == 0


KINDS = ("random", "zero", "equal", "dead columns", "low rank", "almost singular", "huge", "tiny")


@st.composite
def calls(draw: st.DrawFn) -> tuple[Tensors, pb.Solver, Tensor]:
    """Tensors, a solver, and the candidates."""
    seed = draw(st.integers(0, 99))
    numbers = torch.Generator().manual_seed(seed)
    rows, inputs = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    weight = torch.randn(rows, inputs, generator=numbers)
    kind = draw(st.sampled_from(KINDS))
    weight = {"zero": weight * 0, "equal": weight * 0 + 1, "huge": weight * 2.0**120}.get(
        kind, weight
    )
    gram = gram_of(inputs, seed=seed, rows=1 if kind == "low rank" else 0)
    if kind == "dead columns":
        dead = torch.rand(inputs, generator=numbers) < 0.5
        gram[dead], gram[:, dead] = 0, 0
    if kind == "almost singular":
        gram = torch.ones(inputs, inputs) + 1e-6 * torch.eye(inputs)
    gram = gram * {"huge": 2.0**100, "tiny": 2.0**-120, "zero": 0}.get(kind, 1)
    mask = torch.rand(rows, inputs, generator=numbers) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    fields: dict[str, Any] = draw(st.sampled_from([SPARSEGPT, ALPS]))
    if "alps" in fields and draw(st.booleans()):
        fields = {**fields, "scope": pb.SCOPE_PER_ROW, "fraction": draw(st.floats(0, 1))}
    elif inputs % 4 == 0 and draw(st.booleans()):
        fields = {**fields, "pattern": pb.Pattern(n=draw(st.integers(1, 3)), m=4)}
    elif draw(st.booleans()):
        fields = {**fields, "count": draw(st.integers(0, int(mask.sum())))}
    else:
        fields = {**fields, "fraction": draw(st.floats(0, 1))}
    solver = pb.Solver(tensors=["w"], grams={"w": pb.Gram(holder="g")}, **fields)
    tensors = {"w_orig": weight, "w_mask": mask.float(), "g": triangle_of(gram)}
    return tensors, solver, mask


def asked(solver: pb.Solver, candidates: Tensor) -> int:
    if solver.HasField("pattern"):
        groups = candidates.view(-1, solver.pattern.m).sum(1)
        return int((groups - solver.pattern.n).clamp(min=0).sum())
    if solver.scope == pb.SCOPE_PER_ROW:
        return sum(round(solver.fraction * n) for n in candidates.sum(1).tolist())
    total = int(candidates.sum())
    return solver.count if solver.HasField("count") else round(solver.fraction * total)


@examples(60)
@given(call=calls())
def test_exactly_what_is_asked_is_pruned_and_all_is_finite(
    channel: grpc.Channel, call: tuple[Tensors, pb.Solver, Tensor]
) -> None:
    tensors, solver, candidates = call
    for more in ([], [pb.Solver(tensors=["w"], grams=solver.grams, refit=pb.Refit())]):
        rules = [pb.Rule(solver=one) for one in (solver, *more)]
        report, found = prune(channel, rules, tensors, output=pruner_pb2.OUTPUT_REPARAMETRIZED)
        kept, weight = found["w_mask"].bool(), found["w_orig"]
        assert bool(weight.isfinite().all())
        assert not bool((kept & ~candidates).any())
        assert int((candidates & ~kept).sum()) == asked(solver, candidates)
        ((choice,),) = [rule.choices for rule in report.rules if rule.choices]
        assert choice.pruned == asked(solver, candidates)
        assert torch.equal(weight[~kept], tensors["w_orig"][~kept])


def test_names_of_one_tensor_have_one_gram_matrix(channel: grpc.Channel) -> None:
    gram = triangle_of(gram_of(8))
    tensors = {"w": torch.randn(4, 8), "g": gram, "h": gram}
    grams = {"w": pb.Gram(holder="g"), "x": pb.Gram(holder="h")}
    rules = rules_of(SPARSEGPT, grams=grams)
    data = file_of(tensors, {"x": "w"})
    spec = pb.PruningSpec(rules=rules)
    found = raw.send_file(channel, "Prune", data, spec=spec, output=pruner_pb2.OUTPUT_DENSE)
    assert found is not None
    assert found.code == raw.INVALID_ARGUMENT, found
    assert "'x'" in found.message, "the other name"
