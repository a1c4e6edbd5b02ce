"""Shrunk models: against deleting the slices of wholly pruned units, one by one."""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur
from secateur.grouping import Group
from secateur.shrinkage import Shrinkage
from secateur_server.backends import backend_for
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict import slices
from secateur_server.state_dict.parameter import Parameter
from tests.client.sharded import read_shards, write_shards
from tests.conftest import examples
from tests.masks import packed, unpacked
from tests.reference import assert_same_tensors
from tests.storage.stored import kept

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn)


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """A model, and groups of it that name each slice once: as `name` and `members`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tensors: dict[str, Tensor] = {"other": torch.ones(2, 3), "count": torch.tensor(5)}
    groups: list[dict[str, Any]] = []
    for number in range(draw(st.integers(1, 3))):
        units, members = draw(st.integers(1, 6)), []
        for place in range(draw(st.integers(1, 4))):
            name, is_masked = f"t{number}.{place}", place == 0 or draw(st.booleans())
            shape = draw(st.lists(st.integers(1, 4), max_size=2))
            dim = draw(st.integers(0, len(shape)))
            stride, offset = draw(st.integers(1, 3)), draw(st.integers(0, 2))
            shape.insert(dim, offset + units * stride + draw(st.integers(0, 2)))
            dtype = draw(st.sampled_from(DTYPES if is_masked else [*DTYPES, torch.int64]))
            tensors[name] = (torch.randn(shape, generator=generator) * 8).to(dtype)
            at: dict[str, Any] = {"tensor": name, "dim": dim, "units": units}
            if draw(st.booleans()):
                order = torch.randperm(shape[dim], generator=generator).tolist()
                at["indices"] = order[: units * stride]
            else:
                at |= {"offset": offset, "stride": stride}
            members.append({**at, "masked": is_masked})
        groups.append({"name": f"g{number}", "members": members})
    if draw(st.booleans()) and "t1.0" in tensors and tensors["t1.0"].dim() > 1:
        first: dict[str, Any] = groups[0]
        second: dict[str, Any] = groups[1]
        free = next(d for d in range(tensors["t1.0"].dim()) if d != second["members"][0]["dim"])
        units, size = first["members"][0]["units"], tensors["t1.0"].shape[free]
        if size >= units:  # a tensor that two groups cut
            first["members"].append({"tensor": "t1.0", "dim": free, "units": units, "masked": True})
    return tensors, groups


def slices_of(member: Mapping[str, Any], unit: int) -> list[int]:
    if "indices" in member:
        each = len(member["indices"]) // member["units"]
        return list(member["indices"][unit * each : (unit + 1) * each])
    first = member.get("offset", 0) + unit * member.get("stride", 1)
    return list(range(first, first + member.get("stride", 1)))


def shrunk_by_definition(
    tensors: Mapping[str, Tensor], masks: Mapping[str, Tensor], groups: Sequence[dict[str, Any]]
) -> tuple[dict[str, Tensor], list[list[int]]]:
    """Deletes the slices of each unit whose elements are all pruned.

    Returns: The smaller tensors, and the kept units of each group.
    """
    gone: dict[tuple[str, int], set[int]] = {}
    kept: list[list[int]] = []
    for group in groups:
        masked = [member for member in group["members"] if member["masked"]]
        alive = [
            unit
            for unit in range(masked[0]["units"])
            if any(
                bool(masks[m["tensor"]].select(m["dim"], s).any())
                for m in masked
                for s in slices_of(m, unit)
            )
        ] or [0]
        kept.append(alive)
        for member in group["members"]:
            removed = gone.setdefault((member["tensor"], member["dim"]), set())
            for unit in set(range(member["units"])) - set(alive):
                removed.update(slices_of(member, unit))
    smaller = {}
    for name, tensor in tensors.items():
        values = tensor
        if name in masks:
            values = values.to(torch.float64) * masks[name]
        for dim in range(tensor.dim()):
            removed = gone.get((name, dim), set())
            stay = [i for i in range(tensor.shape[dim]) if i not in removed]
            values = values.index_select(dim, torch.tensor(stay))
        smaller[name] = values.to(tensor.dtype)
    return smaller, kept


def shrinkage_of(result: secateur.PruneResult | secateur.FinalizeResult) -> Shrinkage:
    assert result.report.shrinkage is not None
    return result.report.shrinkage


def groups_of(groups: Sequence[dict[str, Any]]) -> list[Group]:
    return [
        secateur.group(g["name"], *(secateur.member(**member) for member in g["members"]))
        for g in groups
    ]


def assert_shrunk(
    result: secateur.PruneResult, expected: Mapping[str, Tensor], kept: Sequence[list[int]]
) -> None:
    assert_same_tensors(result.state_dict("shrunk"), dict(expected))
    shrinkage = shrinkage_of(result)
    assert [list(group.kept) for group in shrinkage.groups.values()] == kept
    for name, tensor in shrinkage.tensors.items():
        assert tensor.shape == tuple(expected[name].shape)
        assert tensor.bytes == expected[name].nbytes
    assert shrinkage.bytes == sum(tensor.nbytes for tensor in expected.values())
    assert shrinkage.parameters == sum(tensor.numel() for tensor in expected.values())
    for name, of_tensor in result.report.tensors.items():
        values = expected[name].to(torch.float64)
        assert of_tensor.shape == tuple(values.shape)
        assert of_tensor.zeros == int((values == 0).sum())
        assert of_tensor.bytes == expected[name].nbytes


@examples(50)
@given(models(), st.floats(0, 1), st.sampled_from(["tensor", "global"]), st.booleans())
def test_units_are_deleted(
    client: secateur.Client,
    model: tuple[dict[str, Tensor], list[dict[str, Any]]],
    fraction: float,
    scope: Any,
    has_elements: bool,
) -> None:
    tensors, described = model
    spec = secateur.grouped(groups_of(described), fraction, scope=scope, align=1)
    if has_elements:  # zeros within the units that are kept, and of unmasked members
        spec = secateur.l1_unstructured("t*", 0.4) + spec
    masks = client.prune(tensors, spec).masks
    result = client.prune(tensors, spec, output="shrunk")
    assert_shrunk(result, *shrunk_by_definition(tensors, masks, described))


@pytest.fixture(scope="module")
def small_pieces() -> Iterator[None]:
    """Pieces of few elements, so that tensors have many."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(backend_for(torch.device("cpu"))), "piece", 16)
        yield


@examples(100)
@given(st.data())
def test_tensors_are_cut_in_pieces(small_pieces: None, data: st.DataObject) -> None:
    shape = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    dtype = data.draw(st.sampled_from(DTYPES))
    weight = torch.arange(1, math.prod(shape) + 1).to(torch.float64).view(shape).to(dtype)
    kept = {
        dim: torch.tensor(sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))))
        for dim, size in enumerate(shape)
        if data.draw(st.booleans())
    }
    bits = data.draw(st.lists(st.booleans(), min_size=weight.numel(), max_size=weight.numel()))
    flags = torch.tensor(bits).view(shape)
    whole, masked = weight.to(torch.float64), weight.to(torch.float64) * flags
    for dim, index in kept.items():
        whole, masked = whole.index_select(dim, index), masked.index_select(dim, index)
        flags = flags.index_select(dim, index)
    mask = packed(torch.tensor(bits).view(shape))
    plain = torch.cat(list(slices.smaller_parts(weight, None, kept))).view(whole.shape)
    assert torch.equal(plain.to(torch.float64), whole)
    folded = torch.cat(list(slices.smaller_parts(weight, mask, kept))).view(whole.shape)
    assert torch.equal(folded.to(torch.float64), masked)
    shrinking = slices.Shrinking([], {"w": kept}, {"w"})  # kept elements are removed too
    parameter = Parameter(weight, mask)
    smaller = slices.smaller_parameter(RequestContext(), "w", parameter, shrinking)
    assert torch.equal(smaller.weight.to(torch.float64), whole)
    assert torch.equal(unpacked(smaller), flags)
    assert slices.smaller_shape(shape, kept) == tuple(whole.shape)


ACTIVATIONS = (
    torch.nn.ReLU(),
    torch.nn.GELU(),
    torch.nn.SiLU(),
    torch.nn.Tanh(),
    torch.nn.Sigmoid(),
    torch.nn.Softplus(),
)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_a_shrunk_model_computes_what_the_masked_one_does(
    client: secateur.Client, activation: torch.nn.Module
) -> None:
    torch.manual_seed(0)

    def network(width: int) -> torch.nn.Sequential:
        return torch.nn.Sequential(
            torch.nn.Conv2d(3, width, 3),
            torch.nn.BatchNorm2d(width),
            activation,
            torch.nn.Flatten(),
            torch.nn.Linear(16 * width, 5),
        ).double()

    masked = network(8)
    masked(torch.randn(4, 3, 6, 6, dtype=torch.float64))  # running statistics other than 0 and 1
    masked.eval()
    members = [secateur.member(name) for name in ("0.weight", "0.bias", "1.weight", "1.bias")]
    members += [secateur.member(f"1.running_{of}", masked=False) for of in ("mean", "var")]
    members.append(secateur.member("4.weight", 1, stride=16))
    spec = secateur.grouped([secateur.group("channels", *members)], 5, align=1)
    result = client.prune(masked, spec, output="shrunk")
    smaller = network(3).eval()
    smaller.load_state_dict(result.state_dict("shrunk"))
    client.prune(masked, spec).apply_to(masked)
    inputs = torch.randn(7, 3, 6, 6, dtype=torch.float64)
    torch.testing.assert_close(smaller(inputs), masked(inputs), rtol=1e-12, atol=1e-12)


TENSORS = {
    "a": torch.arange(1, 25, dtype=torch.float32).view(6, 4),
    "b": torch.arange(1, 7, dtype=torch.float32),
    "c": torch.arange(1, 37, dtype=torch.float32).view(6, 6),
    "mean": torch.arange(6, dtype=torch.float32),
}
DESCRIBED: list[dict[str, Any]] = [
    {
        "name": "g",
        "members": [
            {"tensor": "a", "dim": 0, "units": 6, "masked": True},
            {"tensor": "b", "dim": 0, "units": 6, "masked": True},
            {"tensor": "c", "dim": 1, "units": 6, "masked": True},
            {"tensor": "mean", "dim": 0, "units": 6, "masked": False},
        ],
    }
]
GROUPS = groups_of(DESCRIBED)
HALF = secateur.grouped(GROUPS, 0.5, align=1)
ONE = secateur.l1_unstructured("a", 1)


def test_every_source_is_shrunk_alike(tmp_path: Path) -> None:
    tensors = {**TENSORS, "classifier.weight": torch.ones(2, 9)}  # which shards tie
    (tmp_path / "files").mkdir()
    index = write_shards(tmp_path / "files" / "in", tensors)
    file = tmp_path / "files" / "in.safetensors"
    save_file(tensors, file)
    out = tmp_path / "files" / "out.safetensors"
    with kept(tmp_path / "store", "--allow-path", str(tmp_path / "files")) as store:
        masks = store.client.prune(tensors, HALF).masks
        expected, _ = shrunk_by_definition(tensors, masks, DESCRIBED)

        def shrunk(source: Any, **options: Any) -> secateur.PruneResult:
            return store.client.prune(source, HALF, output="shrunk", **options)

        for source in (tensors, file, file.as_uri(), index, store.client.upload(file)):
            found = shrunk(source).state_dict("shrunk")
            found.pop("decoder.weight", None)  # the other name in shards
            assert_same_tensors(found, expected)
        shrunk(file.as_uri(), destination=out.as_uri())
        assert_same_tensors(load_file(out), expected)
        (tmp_path / "files" / "out").mkdir()
        shrunk(index.as_uri(), destination=(tmp_path / "files" / "out" / index.name).as_uri())
        assert_same_tensors(read_shards(tmp_path / "files" / "out"), expected)
        checkpoint = shrunk(tensors, keep=True).checkpoint
        assert checkpoint is not None
        final = store.client.finalize(checkpoint, output="shrunk", groups=GROUPS)
        assert_same_tensors(final.state_dict(), expected)
        shards = store.client.prune(store.client.upload(index), HALF, keep=True).checkpoint
        final = store.client.finalize(shards, output="shrunk", groups=GROUPS)
        assert_same_tensors({n: final.state_dict()[n] for n in expected}, expected)
        assert final.report.total == sum(tensor.numel() for tensor in expected.values())


def test_buffers_that_a_group_names_are_sent(client: secateur.Client) -> None:
    norm = torch.nn.BatchNorm1d(4)
    norm.weight.data = torch.tensor([4.0, 1, 2, 3])
    norm.running_mean = torch.arange(4.0)
    members = [secateur.member("weight"), secateur.member("bias", scored=False)]
    members.append(secateur.member("running_mean", masked=False))
    spec = secateur.grouped([secateur.group("g", *members)], 2, align=1)
    found = client.prune(norm, spec, output="shrunk").state_dict("shrunk")
    assert list(found) == list(norm.state_dict())
    assert (found["weight"].tolist(), found["running_mean"].tolist()) == ([4, 3], [0, 3])
    assert found["running_var"].tolist() == [1, 1, 1, 1]  # no group names it
    assert client.prune(norm, spec).masks.keys() == {"weight", "bias"}


def test_parts_of_units_are_not_removed(client: secateur.Client) -> None:
    spec = secateur.ln_structured("a", 2, 1, 0)
    pruned = client.prune(TENSORS, spec, output="reparametrized").state_dict("reparametrized")
    final = client.finalize(pruned, output="shrunk", groups=GROUPS)
    assert_same_tensors(final.state_dict(), client.finalize(pruned).state_dict())
    (uncut,) = shrinkage_of(final).uncut
    assert (uncut.tensor, uncut.dim, uncut.slices) == ("a", 0, 2)
    assert uncut.reason == "group 'g': 'b', 'c' have unpruned elements in the same units"


def test_a_model_of_which_nothing_can_be_removed_carries_a_warning(
    client: secateur.Client,
) -> None:
    pruned = client.prune(TENSORS, secateur.ln_structured("a", 2, 1, 0), output="reparametrized")
    final = client.finalize(pruned.state_dict("reparametrized"), output="shrunk", groups=GROUPS)
    (warning,) = final.report.warnings
    assert (warning.code, warning.tensors) == ("NOT_SHRUNK", ("g",))
    half = client.prune(TENSORS, HALF, output="reparametrized").state_dict("reparametrized")
    assert client.finalize(half, output="shrunk", groups=GROUPS).report.warnings == ()


def test_slices_that_no_group_names_are_listed(client: secateur.Client) -> None:
    spec = secateur.ln_structured("c", 1, 1, 0) + HALF
    result = client.prune(TENSORS, spec, output="shrunk")
    (uncut,) = shrinkage_of(result).uncut
    assert (uncut.tensor, uncut.dim, uncut.slices) == ("c", 0, 1)
    assert uncut.reason == "no group names slices along this dimension"
    assert str(uncut) in str(result.report)


def test_reasons_of_a_tensor_that_a_group_names_twice(client: secateur.Client) -> None:
    """As rows of queries and keys in one tensor: the first are zero, and the last are not."""
    tensors = {"qk": torch.arange(1.0, 9).view(4, 2), "v": torch.ones(2, 2)}
    members = secateur.member("qk", units=2), secateur.member("qk", offset=2), secateur.member("v")
    groups = [secateur.group("g", *members)]
    spec = secateur.ln_structured("qk", 1, 1, 0) + secateur.grouped(groups, 0)
    (uncut,) = shrinkage_of(client.prune(tensors, spec, output="shrunk")).uncut
    assert uncut.reason == "group 'g': 'qk', 'v' have unpruned elements in the same units"


def test_zeros_of_a_dense_file_are_removed_if_they_count_as_pruned(client: secateur.Client) -> None:
    dense = client.prune(TENSORS, HALF, output="dense").state_dict()
    whole = client.finalize(dense, output="shrunk", groups=GROUPS)
    assert shrinkage_of(whole).bytes == shrinkage_of(whole).bytes_before
    final = client.finalize(dense, output="shrunk", groups=GROUPS, prior="zeros")
    expected = client.prune(TENSORS, HALF, output="shrunk")
    assert_same_tensors(final.state_dict(), expected.state_dict("shrunk"))


def test_a_group_keeps_a_unit(client: secateur.Client) -> None:
    result = client.prune(TENSORS, secateur.grouped(GROUPS, 1.0), output="shrunk")
    assert shrinkage_of(result).groups["g"].kept == (0,)
    assert result.state_dict("shrunk")["a"].tolist() == [[0, 0, 0, 0]]
    reasons = {uncut.reason for uncut in shrinkage_of(result).uncut if uncut.tensor == "a"}
    assert "group 'g': a group keeps at least one unit" in reasons


def test_a_group_of_several_rules_is_cut_once(client: secateur.Client) -> None:
    twice = HALF + secateur.grouped(GROUPS, 1, align=1)
    result = client.prune(TENSORS, twice, output="shrunk")
    assert [len(group.kept) for group in shrinkage_of(result).groups.values()] == [2]
    masks = client.prune(TENSORS, twice).masks
    assert_shrunk(result, *shrunk_by_definition(TENSORS, masks, DESCRIBED))


def test_other_rules_prune_unmasked_members(client: secateur.Client) -> None:
    """As many of its elements are pruned as are removed, and they are others."""
    tensors = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([4.0, 3.0])}
    members = secateur.member("a"), secateur.member("b", masked=False)
    spec = secateur.grouped([secateur.group("g", *members)], 1) + secateur.l1_unstructured("b", 1)
    result = client.prune(tensors, spec, output="shrunk")
    expected = {"a": torch.tensor([2.0]), "b": torch.tensor([0.0])}
    assert_same_tensors(result.state_dict("shrunk"), expected)
    assert (result.report.tensors["b"].zeros, result.report.tensors["b"].pruned) == (1, 1)


def test_an_unmasked_member_has_any_name_of_a_tied_tensor(client: secateur.Client) -> None:
    flags = torch.tensor([True, False, True])  # of a dtype that cannot be pruned
    tensors = {"a": torch.tensor([1.0, 3.0, 2.0]), "flags": flags, "same": flags}
    members = secateur.member("a"), secateur.member("same", masked=False)
    spec = secateur.grouped([secateur.group("g", *members)], 1, align=1)
    found = client.prune(tensors, spec, output="shrunk").state_dict("shrunk")
    assert found["same"] is found["flags"]
    assert found["same"].tolist() == [False, True]


def test_two_groups_of_one_name_are_refused(client: secateur.Client) -> None:
    groups = [secateur.group("g", secateur.member(name)) for name in ("b", "c")]
    spec = secateur.grouped(groups[:1], 1) + secateur.grouped(groups[1:], 2)
    assert client.prune(TENSORS, spec).report.zeros
    with pytest.raises(secateur.InvalidSpec) as error:
        client.prune(TENSORS, spec, output="shrunk")
    field = "spec.rules[1].selection.groups[0].name"
    assert str(error.value) == f"{field}: groups with other slices are named 'g'; rename one"


def test_a_result_that_is_not_smaller_carries_a_warning(client: secateur.Client) -> None:
    result = client.prune(TENSORS, secateur.grouped(GROUPS, 0), output="shrunk")
    (warning,) = result.report.warnings
    assert (warning.code, warning.tensors) == ("NOT_SHRUNK", ("g",))
    smaller = client.prune(TENSORS, HALF, output="shrunk")
    assert smaller.report.warnings == ()


CUT = {"masked": False}
WRONG: dict[str, tuple[list[dict[str, Any]], str, str]] = {
    "twice in a group": (
        [{**DESCRIBED[0], "members": [*DESCRIBED[0]["members"], {"tensor": "a", "units": 6}]}],
        "spec.rules[0].selection.groups[0].members[4]",
        "slice 0 along dimension 0 of 'a' is in group 'g', and in "
        "spec.rules[0].selection.groups[0].members[0] of group 'g'",
    ),
    "in two groups": (
        [*DESCRIBED, {"name": "h", "members": [{"tensor": "c", "dim": -1, "offset": 5}]}],
        "spec.rules[0].selection.groups[1].members[0]",
        "slice 5 along dimension 1 of 'c' is in group 'h', and in "
        "spec.rules[0].selection.groups[0].members[2] of group 'g'",
    ),
    "lengths": (
        [
            {
                "name": "g",
                "members": [{"tensor": "a"}, {"tensor": "mean", "units": 5, "masked": False}],
            }
        ],
        "spec.rules[0].selection.groups[0].members[1].units",
        "'mean' has 5 units, 'a' of the same group 6",
    ),
    "an unmasked tensor that is not there": (
        [{"name": "g", "members": [{"tensor": "a"}, {"tensor": "no", **CUT}]}],
        "spec.rules[0].selection.groups[0].members[1].tensor",
        "'no' matches no floating tensor",
    ),
    "no masked member": (
        [{"name": "g", "members": [{"tensor": "mean", **CUT}]}],
        "spec.rules[0].selection.groups[0].members",
        "all are unscored or unmasked; at least one must be scored",
    ),
}


@pytest.mark.parametrize(("described", "field", "text"), WRONG.values(), ids=WRONG)
def test_groups_that_disagree_are_refused(
    client: secateur.Client, described: list[dict[str, Any]], field: str, text: str
) -> None:
    groups = groups_of(described)
    with pytest.raises(secateur.InvalidSpec) as error:
        client.prune(TENSORS, secateur.grouped(groups, 1), output="shrunk")
    assert str(error.value).startswith(f"{field}: {text}")
    with pytest.raises(secateur.InvalidSpec) as error:
        client.finalize(TENSORS, output="shrunk", groups=groups)
    assert str(error.value).startswith(f"{field.replace('spec.rules[0].selection', 'header')}: ")


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda c: c.prune(TENSORS, ONE, output="shrunk"), "spec.rules: have no groups, whose"),
        (lambda c: c.finalize(TENSORS, output="shrunk"), "header.groups: is empty"),
        (lambda c: c.finalize(TENSORS, groups=GROUPS), "header.groups: needs OUTPUT_SHRUNK"),
        (lambda c: c.finalize(TENSORS, output="masks"), "header.output: 1 is not an output of"),
        (lambda c: c.finalize(TENSORS, prior="zeros"), "header.prior: needs OUTPUT_SHRUNK"),
        (lambda c: c.finalize(TENSORS, "a", output="shrunk", groups=GROUPS), "header.tensors: "),
    ],
)  # fmt: skip
def test_calls_that_contradict_themselves_are_refused(
    client: secateur.Client, call: Any, text: str
) -> None:
    with pytest.raises((secateur.InvalidRequest, secateur.InvalidSpec)) as error:
        call(client)
    assert str(error.value).startswith(text)


def test_a_shrunk_result_is_shrunk_unless_another_form_is_named(
    client: secateur.Client, tmp_path: Path
) -> None:
    result = client.prune(TENSORS, HALF, output="shrunk")
    assert_same_tensors(result.state_dict(), result.state_dict("shrunk"))
    result.save(tmp_path / "small.safetensors")
    assert_same_tensors(load_file(tmp_path / "small.safetensors"), result.state_dict("shrunk"))
    assert repr(result) == "PruneResult(72 -> 36 parameters, output='shrunk')"
    with pytest.raises(secateur.SecateurError, match=r"use result\.shrink\(module\), or"):
        result.apply_to(torch.nn.Linear(1, 1))  # type: ignore[misc]


def test_the_client_makes_no_shrunk_form_of_masks(client: secateur.Client) -> None:
    with pytest.raises(secateur.SecateurError, match="form='shrunk': only the server"):
        client.prune(TENSORS, HALF).state_dict("shrunk")
    with pytest.raises(secateur.SecateurError, match="has no masks"):
        _ = client.prune(TENSORS, HALF, output="shrunk").masks  # type: ignore[misc]
