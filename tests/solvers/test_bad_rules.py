"""Bad rules that update weights: each error names the field, and the server lives on."""

from typing import Any

import grpc
import numpy as np
import pytest

from secateur_proto import pruner_pb2
from secateur_proto import spec_pb2 as pb
from tests.contract import raw

INPUTS = 4
WEIGHT = np.arange(8, dtype=np.float32).reshape(2, INPUTS) + 1
TRIANGLE = np.eye(INPUTS, dtype=np.float32)[np.triu_indices(INPUTS)]
PATH = "spec.rules[0].solver"


def model(arrays: dict[str, np.ndarray[Any, Any]]) -> bytes:
    """A safetensors file with its tensors in this order."""
    table, data = {}, b""
    for name, array in arrays.items():
        dtype = {"float32": "F32", "float16": "F16", "int32": "I32"}[array.dtype.name]
        table[name] = raw.entry(dtype, list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    return raw.file(table, data)


def solver(**fields: Any) -> pb.Solver:
    choices: dict[str, Any] = {
        "tensors": ["w"],
        "grams": {"w": pb.Gram(holder="g")},
        "sparsegpt": pb.SparseGpt(),
        "fraction": 0.5,
        **fields,
    }
    return pb.Solver(**{name: value for name, value in choices.items() if value is not None})


def spec_of(*solvers: pb.Solver, after: pb.PruningSpec | None = None) -> pb.PruningSpec:
    rules = [pb.Rule(solver=one) for one in solvers]
    return pb.PruningSpec(rules=[*rules, *(after.rules if after else ())])


def failure(
    channel: grpc.Channel,
    spec: pb.PruningSpec,
    data: bytes = model({"w": WEIGHT, "g": TRIANGLE}),
    rpc: str = "Prune",
    **fields: Any,
) -> raw.Failure | None:
    if rpc == "Prune":
        fields = {"output": pruner_pb2.OUTPUT_DENSE, **fields}
    return raw.send_file(channel, rpc, data, spec=spec, **fields)


REFIT = {"sparsegpt": None, "fraction": None, "refit": pb.Refit()}
WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"tensors": []}, "tensors", "empty"),
    ({"tensors": ["v*"]}, "tensors[0]", "v*"),
    ({"grams": {}}, "grams['w']", "not set"),
    ({"grams": {"w": pb.Gram(holder="h")}}, "grams['w']", "h"),
    ({"grams": {"w": pb.Gram(holder="g"), "v": pb.Gram(holder="g")}}, "grams['v']", "prune"),
    ({"grams": {"w": pb.Gram(holder="g", is_transposed=True)}}, "grams['w']", "2 inputs"),
    ({"sparsegpt": None}, "method", "not set"),
    ({"fraction": None}, "amount", "not set"),
    ({"fraction": 1.5}, "fraction", "1.5"),
    ({"fraction": None, "count": 9}, "grams['w']", "9"),
    ({"fraction": None, "pattern": pb.Pattern(n=2, m=3)}, "pattern.m", "3"),
    ({"fraction": None, "pattern": pb.Pattern(n=4, m=4)}, "pattern", "4:4"),
    ({"scope": pb.SCOPE_PER_ROW}, "scope", "SCOPE_PER_TENSOR"),
    ({"scope": pb.SCOPE_GLOBAL}, "scope", "SCOPE_PER_TENSOR"),
    ({"sparsegpt": None, "alps": pb.Alps(), "scope": 77}, "scope", "SCOPE_PER_ROW"),
    ({"sparsegpt": pb.SparseGpt(damping=-1.0)}, "sparsegpt.damping", "-1.0"),
    ({"sparsegpt": pb.SparseGpt(damping=float("inf"))}, "sparsegpt.damping", "inf"),
    ({"sparsegpt": pb.SparseGpt(block_size=1 << 17)}, "sparsegpt.block_size", "131072"),
    ({**REFIT, "refit": pb.Refit(damping=float("nan"))}, "refit.damping", "nan"),
    ({**REFIT, "fraction": 0.5}, "amount", "refit"),
]


@pytest.mark.parametrize(("fields", "field", "part"), WRONG, ids=lambda given: str(given)[:50])
def test_a_wrong_field_is_named(
    channel: grpc.Channel, fields: dict[str, Any], field: str, part: str
) -> None:
    found = failure(channel, spec_of(solver(**fields)))
    assert found is not None
    assert (found.code, found.fields) == (raw.INVALID_ARGUMENT, (f"{PATH}.{field}",)), found
    assert part in found.message


def broken(index: int, value: float) -> np.ndarray[Any, Any]:
    values = TRIANGLE.copy()
    values[index] = value
    return values


@pytest.mark.parametrize(
    ("arrays", "field", "part"),
    [
        ({"w": WEIGHT, "g": broken(1, np.nan)}, "data['g']", "[0, 1]"),
        ({"w": WEIGHT, "g": broken(4, np.inf)}, "data['g']", "inf"),
        ({"w": WEIGHT, "g": broken(4, -1)}, "data['g']", "diagonal"),
        ({"w": WEIGHT, "g": broken(1, 9)}, f"{PATH}.grams['w']", "semidefinite"),
        ({"w": WEIGHT, "g": TRIANGLE[:9]}, f"{PATH}.grams['w']", "[9]"),
        ({"w": WEIGHT, "g": TRIANGLE.astype(np.float16)}, f"{PATH}.grams['w']", "F16"),
        ({"w": WEIGHT[0], "g": TRIANGLE}, f"{PATH}.tensors", "[4]"),
        ({"w": WEIGHT.astype(np.int32), "g": TRIANGLE}, f"{PATH}.tensors", "integers"),
        ({"w": WEIGHT + np.inf, "g": TRIANGLE}, "data['w']", "inf"),
        ({"g": TRIANGLE, "w": WEIGHT}, "data['g']", "last"),
    ],
)
def test_wrong_data_is_named(
    channel: grpc.Channel, arrays: dict[str, Any], field: str, part: str
) -> None:
    found = failure(channel, spec_of(solver()), model(arrays))
    assert found is not None
    assert (found.code, found.fields) == (raw.INVALID_ARGUMENT, (field,)), found
    assert part in found.message


def test_what_a_solver_cannot_be_used_with(channel: grpc.Channel) -> None:
    spec, other = spec_of(solver()), solver(grams={"w": pb.Gram(holder="h")})
    two = model({"w": WEIGHT, "g": TRIANGLE, "h": TRIANGLE})
    found = {
        "header.output": failure(channel, spec, output=pruner_pb2.OUTPUT_MASKS),
        "header.keep": failure(channel, spec, keep=True),
        "spec.rules": failure(channel, spec, rpc="Plan"),
        f"{PATH}": failure(channel, spec_of(solver(), after=raw.spec("w"))),
        "spec.rules[1].solver.grams['w']": failure(channel, spec_of(solver(), other), two),
    }
    for field, one in found.items():
        assert one is not None
        assert (one.code, one.fields) == (raw.INVALID_ARGUMENT, (field,)), one
    assert failure(channel, spec) is None


@pytest.mark.parametrize("change", [-4, 4])
def test_data_of_another_length_fails(channel: grpc.Channel, change: int) -> None:
    data = model({"w": WEIGHT, "g": TRIANGLE})
    sent = data[:change] if change < 0 else data + bytes(change)
    fields = {"spec": spec_of(solver()), "output": pruner_pb2.OUTPUT_DENSE}
    found = raw.send_file(channel, "Prune", sent, len(data), **fields)
    assert found is not None
    assert found.fields == ("data",), found
