"""Specs that are wrong, or do not fit the tensors."""

from collections.abc import Iterator
from typing import Any

import grpc
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2
from tests.conftest import RunningServer
from tests.contract.raw import (
    RPCS,
    check_invalid,
    check_serves,
    confined_server,
    entry,
    failure,
    file,
    header,
    is_served,
    kept_open,
    masks,
    message,
    send,
    send_file,
    spec,
    unhurried,
)

NAN, INF = float("nan"), float("inf")
INVALID_SPEC, INVALID_STATE_DICT = "INVALID_SPEC", "INVALID_STATE_DICT"
HALF_OF_FC = torch.tensor([[1.0, 0, 1], [0, 1, 0], [1, 0, 1], [0, 1, 0]])
MODEL = {
    "conv.weight": torch.randn(2, 3, 2, 2),
    "cube": torch.randn(2, 3, 4),
    "fc.weight": torch.randn(4, 3),
    "fc.bias": torch.randn(4),
    "scalar": torch.tensor(1.5),
    "steps": torch.arange(12).reshape(4, 3),
    "flags": HALF_OF_FC == 1,
    "old_orig": torch.randn(4, 3),
    "old_mask": HALF_OF_FC,
    "z.turned": torch.randn(3, 4),
    "z.nan": torch.where(HALF_OF_FC == 0, NAN, 1.0),
    "z.half": torch.where(HALF_OF_FC == 0, 0.5, 1.0),
    "z.two": HALF_OF_FC * 2,
    "z.minus": -HALF_OF_FC.to(torch.int32),
    "z.complex": torch.zeros(4, 3, dtype=torch.complex64),
}
DATA = safetensors.torch.save(MODEL)
SLICES = {"granularity": spec_pb2.GRANULARITY_SLICE}
NUCLEAR = spec_pb2.Magnitude(matrix_norm=spec_pb2.MATRIX_NORM_NUCLEAR)
AT = "spec.rules[0].selection"
MASKS = "spec.rules[0].custom_masks.masks"


@pytest.fixture(autouse=True)
def _server_still_serves(server: RunningServer, channel: grpc.Channel) -> Iterator[None]:
    """After each test the next good request is served, and nothing of the bad ones is held."""
    yield
    check_serves(server, channel)


def fc(**fields: Any) -> spec_pb2.PruningSpec:
    return spec("fc.weight", **fields)


def slices(name: str, **fields: Any) -> spec_pb2.PruningSpec:
    return spec(name, **SLICES, **fields)


def scored(holder: str, **fields: Any) -> spec_pb2.PruningSpec:
    return fc(importance_scores={"fc.weight": holder}, **fields)


def both(*specs: spec_pb2.PruningSpec) -> spec_pb2.PruningSpec:
    return spec_pb2.PruningSpec(rules=[rule for one in specs for rule in one.rules])


def masked(**holders: str) -> spec_pb2.PruningSpec:
    return masks(**{name.replace("_", "."): holder for name, holder in holders.items()})


# Specs that are wrong for any tensors: the spec, the field, and other parts of the message.
WRONG_ALONE = [
    pytest.param(spec_pb2.PruningSpec(), "spec.rules", [], id="no rules"),
    pytest.param(
        spec_pb2.PruningSpec(rules=[spec_pb2.Rule()]),
        "spec.rules[0].method",
        ["selection", "custom_masks"],
        id="no method",
    ),
    pytest.param(both(fc(), spec()), "spec.rules[1].selection.tensors", [], id="no tensors"),
    pytest.param(masks(), MASKS, [], id="no masks"),
    pytest.param(fc(fraction=None), f"{AT}.amount", ["fraction", "count"], id="no amount"),
    pytest.param(fc(magnitude=None), f"{AT}.importance", ["magnitude", "random"], id="none"),
    pytest.param(fc(granularity=None), f"{AT}.granularity", ["0"], id="no granularity"),
    pytest.param(fc(granularity=99), f"{AT}.granularity", ["99"], id="granularity 99"),
    pytest.param(fc(granularity=-1), f"{AT}.granularity", ["-1"], id="granularity -1"),
    pytest.param(fc(scope=None), f"{AT}.scope", ["0"], id="no scope"),
    pytest.param(fc(scope=2**31 - 1), f"{AT}.scope", [str(2**31 - 1)], id="scope 2^31-1"),
    pytest.param(fc(fraction=-0.1), f"{AT}.fraction", ["-0.1"], id="fraction -0.1"),
    pytest.param(fc(fraction=1.1), f"{AT}.fraction", ["1.1"], id="fraction 1.1"),
    pytest.param(fc(fraction=NAN), f"{AT}.fraction", ["nan"], id="fraction NaN"),
    pytest.param(fc(fraction=INF), f"{AT}.fraction", ["inf"], id="fraction inf"),
    pytest.param(
        slices(
            "fc.weight",
            scope=spec_pb2.SCOPE_GLOBAL,
            magnitude=spec_pb2.Magnitude(matrix_norm=spec_pb2.MATRIX_NORM_NUCLEAR),
        ),
        f"{AT}.magnitude.matrix_norm",
        [],
        id="global nuclear norm",
    ),
    pytest.param(
        scored("z.nan", random=spec_pb2.Random()), f"{AT}.importance_scores", [], id="random scores"
    ),
    pytest.param(
        slices("fc.weight", magnitude=spec_pb2.Magnitude(p=NAN)),
        f"{AT}.magnitude.p",
        ["NaN"],
        id="p NaN",
    ),
    pytest.param(
        slices("fc.weight", magnitude=spec_pb2.Magnitude()),
        f"{AT}.magnitude.norm",
        ["p", "matrix_norm"],
        id="slices without a norm",
    ),
    *(
        pytest.param(
            slices("cube", magnitude=spec_pb2.Magnitude(matrix_norm=number)),  # type: ignore[arg-type]
            f"{AT}.magnitude.matrix_norm",
            [str(number)],
            id=f"matrix norm {number}",
        )
        for number in (0, 99)
    ),
]

# Specs that do not fit the tensors in the safetensors header.
UNFIT = [
    pytest.param(
        spec("fc.wieght"), f"{AT}.tensors[0]", ["'fc.wieght'", "nearest", "'fc.weight'"], id="typo"
    ),
    pytest.param(spec("*", "cov*"), f"{AT}.tensors[1]", ["'cov*'"], id="glob"),
    pytest.param(spec(""), f"{AT}.tensors[0]", ["''"], id="no name"),
    pytest.param(spec("flags"), f"{AT}.tensors[0]", ["'flags'", "BOOL"], id="bools"),
    pytest.param(spec("step*"), f"{AT}.tensors[0]", ["'step*'", "floating"], id="glob of integers"),
    pytest.param(spec("z.complex"), f"{AT}.tensors[0]", ["'z.complex'"], id="complex"),
    pytest.param(spec("old_orig"), f"{AT}.tensors[0]", ["'old_orig'", "'old'"], id="orig of pair"),
    pytest.param(spec("old_mask"), f"{AT}.tensors[0]", ["'old_mask'", "'old'"], id="mask of pair"),
    pytest.param(
        both(masked(fc_weight="z.two"), spec("z.two")),
        "spec.rules[1].selection.tensors[0]",
        ["'z.two'"],
        id="a tensor that holds a mask",
    ),
    *(
        pytest.param(
            slices("fc.weight", dim=dim), f"{AT}.dim", [str(dim), "'fc.weight'"], id=f"dim {dim}"
        )
        for dim in (2, -3, 2**31 - 1, -(2**31))
    ),
    pytest.param(slices("fc.bias"), f"{AT}.dim", ["'fc.bias'", "[4]"], id="slices of 1-D"),
    pytest.param(slices("scalar"), f"{AT}.dim", ["'scalar'", "[]"], id="slices of 0-D"),
    pytest.param(
        slices("*", random=spec_pb2.Random()), f"{AT}.dim", ["'fc.bias'"], id="slices of all"
    ),
    *(
        pytest.param(
            slices(name, magnitude=NUCLEAR), f"{AT}.magnitude.matrix_norm", parts, id=f"nuc {name}"
        )
        for name, parts in (("fc.weight", ["[4, 3]"]), ("conv.weight", ["[2, 3, 2, 2]"]))
    ),
    *(
        pytest.param(scored(holder), f"{AT}.importance_scores['fc.weight']", parts, id=holder)
        for holder, parts in {
            "z.turned": ["[4, 3]", "[3, 4]"],
            "steps": ["floating", "I64"],
            "nowhere": ["'nowhere'"],
            "z.complex": ["C64"],
        }.items()
    ),
    pytest.param(
        spec("fc.bias", importance_scores={"fc.weight": "z.nan"}),
        f"{AT}.importance_scores['fc.weight']",
        ["does not prune this tensor"],
        id="scores of another tensor",
    ),
    *(
        pytest.param(masked(fc_weight=holder), f"{MASKS}['fc.weight']", parts, id=f"mask {holder}")
        for holder, parts in {
            "z.turned": ["[4, 3]", "[3, 4]"],
            "nowhere": ["'nowhere'"],
            "z.complex": ["C64"],
        }.items()
    ),
    pytest.param(masks(flags="z.half"), f"{MASKS}['flags']", ["BOOL"], id="mask of bools"),
    pytest.param(masks(fcc="z.half"), f"{MASKS}['fcc']", ["'fcc'", "nearest"], id="mask of typo"),
]

# Specs that do not fit the values of the tensors.
UNFIT_VALUES = [
    pytest.param(fc(count=13), f"{AT}.count", ["13", "12", "'fc.weight'"], id="count"),
    pytest.param(fc(count=2**64 - 1), f"{AT}.count", [str(2**64 - 1)], id="count of 2^64-1"),
    pytest.param(spec("old", count=7), f"{AT}.count", ["7", "6", "'old'"], id="count of the rest"),
    pytest.param(
        both(fc(count=8), fc(count=5)),
        "spec.rules[1].selection.count",
        ["5", "4", "'fc.weight'"],
        id="count of what a rule left",
    ),
    pytest.param(
        slices("fc.weight", count=5), f"{AT}.count", ["5", "4", "'fc.weight'"], id="count of slices"
    ),
    pytest.param(
        spec("fc.*", count=17, scope=spec_pb2.SCOPE_GLOBAL), f"{AT}.count", ["17", "16"], id="all"
    ),
    *(
        pytest.param(masked(fc_weight=holder), f"{MASKS}['fc.weight']", parts, id=f"mask {holder}")
        for holder, parts in {
            "z.half": ["0.5", "[0, 1]"],
            "z.two": ["2", "[0, 0]"],
            "z.minus": ["-1", "[0, 0]"],
            "z.nan": ["nan", "[0, 1]"],
        }.items()
    ),
    *(
        pytest.param(
            scored("z.nan", **fields), "data['z.nan']", ["[0, 1]", "in 6 of 12"], id=f"NaN {fields}"
        )
        for fields in ({}, {"scope": spec_pb2.SCOPE_GLOBAL}, SLICES)
    ),
    pytest.param(spec("z.nan"), "data['z.nan']", ["[0, 1]", "in 6 of 12"], id="NaN in a weight"),
]


@pytest.mark.parametrize(("wrong", "field", "parts"), [*WRONG_ALONE, *UNFIT, *UNFIT_VALUES])
def test_a_wrong_spec_is_refused(
    channel: grpc.Channel, wrong: spec_pb2.PruningSpec, field: str, parts: list[str]
) -> None:
    for output in set(pb.Output.values()) - {pb.OUTPUT_SHRUNK}:  # which needs groups first of all
        found = send_file(channel, "Prune", DATA, spec=wrong, output=output)
        check_invalid(found, INVALID_SPEC, field, parts)


@pytest.mark.parametrize(("wrong", "field", "parts"), [*WRONG_ALONE, *UNFIT])
def test_a_wrong_spec_is_refused_before_the_data_is_sent(
    channel: grpc.Channel, wrong: spec_pb2.PruningSpec, field: str, parts: list[str]
) -> None:
    head = DATA[: 8 + int.from_bytes(DATA[:8], "little")]
    first = message("Prune", header=header("Prune", len(DATA), spec=wrong))
    with kept_open([first, message("Prune", data=head)]) as messages:
        found = failure(send, channel, "Prune", messages)
    check_invalid(found, INVALID_SPEC, field, parts)


@pytest.mark.parametrize("rpc", ["Report", "Finalize"])
@pytest.mark.parametrize(("name", "said"), [("fc.wieght", "'fc.weight'"), ("flags", "BOOL")])
def test_an_unknown_name_is_refused_before_the_data_is_sent(
    channel: grpc.Channel, rpc: str, name: str, said: str
) -> None:
    head = DATA[: 8 + int.from_bytes(DATA[:8], "little")]
    first = message(rpc, header=header(rpc, len(DATA), tensors=["*", name]), data=head)
    with kept_open([first]) as messages:
        found = failure(send, channel, rpc, messages)
    check_invalid(found, INVALID_SPEC, "header.tensors[1]", [f"'{name}'", said])


@pytest.mark.parametrize("output", [-1, 7, 99])
def test_an_unknown_output_is_refused(channel: grpc.Channel, output: int) -> None:
    found = send_file(channel, "Prune", DATA, output=output)
    check_invalid(found, "INVALID_REQUEST", "header.output", [str(output)])


ONES = torch.ones(2, 3)
BAD_PAIRS = [
    pytest.param({"w": ONES, "w_orig": ONES, "w_mask": ONES}, "w", [], id="X beside its pair"),
    pytest.param({"w_orig": ONES, "w_mask": ONES.T}, "w_mask", ["[3, 2]", "[2, 3]"], id="shapes"),
    pytest.param({"w_orig": ONES, "w_mask": ONES / 2}, "w_mask", ["0.5", "[0, 0]"], id="0.5"),
    pytest.param({"w_orig": ONES, "w_mask": ONES * NAN}, "w_mask", ["nan", "[0, 0]"], id="NaN"),
    pytest.param({"w_orig": ONES, "w_mask": -ONES.int()}, "w_mask", ["-1", "[0, 0]"], id="-1"),
    pytest.param(
        {"w_orig": ONES, "w_mask": ONES.to(torch.complex64)}, "w_mask", ["C64"], id="complex"
    ),
]


@pytest.mark.parametrize(("model", "name", "parts"), BAD_PAIRS)
def test_a_wrong_pair_is_refused_by_every_rpc(
    channel: grpc.Channel, model: dict[str, torch.Tensor], name: str, parts: list[str]
) -> None:
    data = safetensors.torch.save(
        {key: tensor.clone().contiguous() for key, tensor in model.items()}
    )
    for rpc in RPCS:
        found = send_file(channel, rpc, data)
        check_invalid(found, INVALID_STATE_DICT, f"data['{name}']", parts)


@pytest.mark.parametrize("taken", ["w_orig", "w_mask"])
def test_a_pair_does_not_overwrite_a_tensor(channel: grpc.Channel, taken: str) -> None:
    data = safetensors.torch.save({"w": ONES, taken: ONES.clone()})
    found = send_file(channel, "Prune", data, spec=spec("w"), output=pb.OUTPUT_REPARAMETRIZED)
    check_invalid(found, INVALID_STATE_DICT, f"data['{taken}']", ["'w'"])


@pytest.mark.parametrize("byte", [2, 128, 255])
@pytest.mark.parametrize("place", [0, 40])
def test_a_mask_of_bytes_other_than_0_and_1_is_refused(
    channel: grpc.Channel, byte: int, place: int
) -> None:
    """A BOOL of safetensors has a byte, and the format does not define its other bits."""
    mask = bytes(place) + bytes([byte]) + bytes(49 - place)
    table = {"w_orig": entry("F32", [50], 0, 200), "w_mask": entry("BOOL", [50], 200, 250)}
    found = send_file(channel, "Report", file(table, bytes(200) + mask))
    check_invalid(found, INVALID_STATE_DICT, "data['w_mask']", [str(byte), f"[{place}]"])
    table = {"w": entry("F32", [50], 0, 200), "m": entry("BOOL", [50], 200, 250)}
    found = send_file(channel, "Prune", file(table, bytes(200) + mask), spec=masks(w="m"))
    check_invalid(found, INVALID_SPEC, f"{MASKS}['w']", [str(byte), f"[{place}]"])


@pytest.mark.parametrize("fields", [{}, {"scope": spec_pb2.SCOPE_GLOBAL}, SLICES, {"fraction": 1}])
def test_a_pruned_nan_is_legal(channel: grpc.Channel, fields: dict[str, Any]) -> None:
    pair = {"w_orig": MODEL["z.nan"], "w_mask": HALF_OF_FC, "scores": MODEL["z.nan"].clone()}
    data = safetensors.torch.save(pair)
    # As in torch, the norm of a slice covers all scores, so a NaN among them is never legal.
    for scores in ({},) if fields is SLICES else ({}, {"w": "scores"}):
        wanted = spec("w", importance_scores=scores, **fields)
        assert send_file(channel, "Prune", data, spec=wanted) is None


# gRPC drops some statuses with headers between 8 and 16 KiB, at random.
OFTEN = range(30)


@pytest.mark.parametrize("wrong", ["😀" * 300, "😀" * 299 + "n", "\U000e0001" * 300])
def test_errors_with_long_names_arrive_complete(channel: grpc.Channel, wrong: str) -> None:
    names = [f"{'😀' * 300}{number}" for number in range(4)]
    data = file({name: entry("F32", [0], 0, 0) for name in names})
    for _ in OFTEN:
        found = send_file(channel, "Prune", data, spec=masks(**{wrong: "m"}))
        assert found is not None
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, INVALID_SPEC)
        assert found.fields[0] in found.message


def test_errors_with_long_shapes_arrive_complete(channel: grpc.Channel) -> None:
    shape = [2**62] * 63
    table = {"w_orig": entry("F32", [*shape, 0], 0, 0), "w_mask": entry("F32", [0, *shape], 0, 0)}
    for _ in OFTEN:
        found = send_file(channel, "Report", file(table))
        assert found is not None
        assert (found.code, found.reason) == (grpc.StatusCode.INVALID_ARGUMENT, INVALID_STATE_DICT)
        assert str(2**62) in found.message


NAMES = st.sampled_from([*MODEL, "old", "*", "fc.*", "nothing"])
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "magnitude": st.builds(spec_pb2.Magnitude, p=st.floats())
        | st.builds(spec_pb2.Magnitude, matrix_norm=st.integers(0, 3)),
        "random": st.builds(spec_pb2.Random, seed=st.integers(0, 2**64 - 1)),
        "granularity": st.integers(0, 3),
        "dim": st.integers(-4, 4),
        "scope": st.integers(0, 3),
        "fraction": st.floats(-0.1, 1.1),
        "count": st.integers(0, 5) | st.integers(0, 2**64 - 1),
        "importance_scores": st.dictionaries(NAMES, NAMES, max_size=1),
    },
)
SPECS = st.builds(lambda names, fields: spec(*names, **fields), st.lists(NAMES, max_size=2), FIELDS)


@unhurried
@given(st.lists(SPECS | st.builds(masks, old=NAMES), max_size=3), st.sampled_from(range(5)))
def test_any_spec_is_served_or_refused(
    channel: grpc.Channel, specs: list[spec_pb2.PruningSpec], output: int
) -> None:
    assert is_served(send_file(channel, "Prune", DATA, spec=both(*specs), output=output))


@unhurried
@given(st.text(max_size=12) | st.text("[]*?!-^\\&~|w.", max_size=12))
def test_any_text_as_a_glob_is_served_or_refused(channel: grpc.Channel, pattern: str) -> None:
    assert is_served(send_file(channel, "Report", DATA, tensors=[pattern]))


@pytest.fixture(scope="module")
def confined() -> Iterator[grpc.Channel]:
    with confined_server() as running, grpc.insecure_channel(running.address) as channel:
        yield channel


@pytest.mark.parametrize(
    ("names", "pattern"),
    [
        pytest.param(["w"], "[" * 50_000, id="brackets"),
        pytest.param(["w"], "*a" * 500_000, id="stars"),
        pytest.param([f"{i:b}".zfill(199) for i in range(5000)], "01" * 99, id="similar names"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused_without_hanging(
    confined: grpc.Channel, names: list[str], pattern: str
) -> None:
    data = file({name: entry("F32", [0], 0, 0) for name in names})
    found = send_file(confined, "Report", data, tensors=[pattern])
    check_invalid(found, INVALID_SPEC, "header.tensors[0]", [])
