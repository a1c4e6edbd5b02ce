"""Specs of every choice: the messages that are sent, and the results."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf import text_format
from hypothesis import given
from hypothesis import strategies as st

import secateur
from secateur import InvalidSpec, Spec
from secateur_proto import spec_pb2 as pb
from secateur_proto.enums import plain_name, values_by_name


def message_of(spec: Spec) -> pb.Selection:
    (rule,) = spec.rules
    return rule.message.selection


def parsed(text: str) -> pb.Selection:
    return text_format.Parse(text, pb.Selection())


BASE = 'tensors: "*" magnitude { p: 1 } scope: SCOPE_PER_TENSOR '
ELEMENTS = BASE + "granularity: GRANULARITY_ELEMENT "


@pytest.mark.parametrize(
    ("granularity", "plain", "expected"),
    [
        ("element", "element", "granularity: GRANULARITY_ELEMENT"),
        (secateur.slices(-2), {"slices": {"dim": -2}}, "granularity: GRANULARITY_SLICE dim: -2"),
        (secateur.rows(), "rows", "granularity: GRANULARITY_SLICE"),
        (secateur.filters(), "filters", "granularity: GRANULARITY_SLICE"),
        (
            secateur.n_m(),
            "n_m",
            "granularity: GRANULARITY_N_M dim: 1 pattern { n: 2 m: 4 }",
        ),
        (
            secateur.n_m(1, 8, dim=0),
            {"n_m": {"n": 1, "m": 8, "dim": 0}},
            "granularity: GRANULARITY_N_M pattern { n: 1 m: 8 }",
        ),
        (
            secateur.blocks(4, 0),
            {"blocks": {"rows": 4, "cols": 0}},
            "granularity: GRANULARITY_BLOCK block { shape: [4, 0] as_matrix: true }",
        ),
        (
            secateur.blocks_of((2, 0, 1)),
            {"blocks_of": {"shape": [2, 0, 1]}},
            "granularity: GRANULARITY_BLOCK block { shape: [2, 0, 1] }",
        ),
        (
            secateur.kernels(),
            "kernels",
            "granularity: GRANULARITY_BLOCK block { shape: [1, 1, 0, 0] }",
        ),
        (
            secateur.kernels(dims=3),
            {"kernels": {"dims": 3}},
            "granularity: GRANULARITY_BLOCK block { shape: [1, 1, 0] }",
        ),
        (
            secateur.columns(),
            "columns",
            "granularity: GRANULARITY_BLOCK block { shape: [0, 1] as_matrix: true }",
        ),
        (
            secateur.heads(64),
            {"heads": {"head_dim": 64}},
            "granularity: GRANULARITY_BLOCK block { shape: [64, 0] as_matrix: true }",
        ),
    ],
)
def test_granularities(granularity: Any, plain: Any, expected: str) -> None:
    made = secateur.select("*", 0.5, granularity=granularity)
    assert message_of(made) == parsed(f"{BASE} fraction: 0.5 {expected}")
    assert message_of(secateur.select("*", 0.5, granularity=plain)) == message_of(made)


@pytest.mark.parametrize(
    ("amount", "plain", "expected"),
    [
        (3, 3, "count: 3"),
        (1.0, 1.0, "fraction: 1"),
        (np.int64(3), 3, "count: 3"),
        ("50%", "50 %", "fraction: 0.5"),
        ("33.3%", "33.30%", "fraction: 0.333"),
        (secateur.target_bytes("5GB"), {"target_bytes": {"n": "5 GB"}}, "bytes: 5000000000"),
        (secateur.target_bytes("1.5KiB"), {"target_bytes": {"n": "1536B"}}, "bytes: 1536"),
        (
            secateur.table({"*": "25%"}),
            {"table": {"fractions": {"*": 0.25}}},
            'table { entries { tensors: "*" fraction: 0.25 } }',
        ),
        (secateur.threshold(0.25), {"threshold": {"value": 0.25}}, "threshold: 0.25"),
        (secateur.target_bytes(100), {"target_bytes": {"n": 100}}, "bytes: 100"),
        (
            secateur.target_macs(1e9, {"a": 2, "b": 0.5}),
            {"target_macs": {"target": 1e9, "per_unit": {"a": 2, "b": 0.5}}},
            'macs { target: 1e9 per_unit { key: "a" value: 2 } per_unit { key: "b" value: 0.5 } }',
        ),
        (
            secateur.table({"b*": 0.5, "*": 0}),
            {"table": {"fractions": {"b*": 0.5, "*": 0}}},
            'table { entries { tensors: "b*" fraction: 0.5 } entries { tensors: "*" } }',
        ),
    ],
)
def test_amounts(amount: Any, plain: Any, expected: str) -> None:
    made = secateur.select("*", amount)
    assert message_of(made) == parsed(ELEMENTS + expected)
    assert message_of(secateur.select("*", plain)) == message_of(made)


@pytest.mark.parametrize(
    ("choices", "expected"),
    [
        ({"scope": "global"}, "scope: SCOPE_GLOBAL"),
        ({"scope": "isomorphic"}, "scope: SCOPE_ISOMORPHIC"),
        ({"normalization": "mean"}, "normalization: NORMALIZATION_MEAN"),
        ({"normalization": "norm"}, "normalization: NORMALIZATION_NORM"),
        ({"normalization": "z_score"}, "normalization: NORMALIZATION_Z_SCORE"),
        ({"allocation": "rank"}, "allocation: ALLOCATION_RANK"),
        ({"allocation": "uniform"}, "allocation: ALLOCATION_UNIFORM"),
        ({"allocation": "erk"}, "allocation: ALLOCATION_ERK"),
        ({"allocation": "lamp"}, "allocation: ALLOCATION_LAMP"),
        ({"of_all": True}, "of_all: true"),
        ({"importance": "random"}, "random {}"),
        ({"importance": {"random": {"seed": 5}}}, "random { seed: 5 }"),
        ({"importance": secateur.magnitude("fro")}, "magnitude { matrix_norm: 1 }"),
        ({"importance": {"magnitude": {"p": float("inf")}}}, "magnitude { p: inf }"),
        (
            {"scales": {"conv.weight": "bn.weight"}},
            'scales {key: "conv.weight" value: "bn.weight"}',
        ),
        (
            {
                "guard_rails": secateur.guard_rails(
                    max_sparsity=0.9,
                    keep_last=True,
                    exclude="head.*",
                    per_tensor={"a": secateur.rail(min_sparsity=0.1), "b": {"keep_at_least": 2}},
                )
            },
            """guard_rails {
                rails { tensors: "a" min_sparsity: 0.1 } rails { tensors: "b" keep_at_least: 2 }
                rails { max_sparsity: 0.9 } keep_last: true exclude: "head.*"
            }""",
        ),
        ({"guard_rails": {"max_sparsity": 0}}, "guard_rails { rails { max_sparsity: 0 } }"),
        ({"guard_rails": {"keep_first": True}}, "guard_rails { keep_first: true }"),
    ],
)
def test_other_choices(choices: dict[str, Any], expected: str) -> None:
    message = parsed(ELEMENTS + "fraction: 0.5")
    text_format.Merge(expected, message)  # which takes the place of the defaults
    assert message_of(secateur.select("*", 0.5, **choices)) == message


@pytest.mark.parametrize(
    ("argument", "enum"),
    [("scope", pb.Scope), ("normalization", pb.Normalization), ("allocation", pb.Allocation)],
)
def test_every_value_of_an_enum_has_a_name(argument: str, enum: Any) -> None:
    names = [name.removeprefix("per_") for name in values_by_name(enum.DESCRIPTOR)]
    choices: list[dict[str, Any]] = [{argument: name} for name in names]
    made = [secateur.select("*", 1, **choice) for choice in choices]
    assert [getattr(message_of(spec), argument) for spec in made] == enum.values()[1:]


def test_names_of_values_have_no_prefix() -> None:
    assert values_by_name(pb.MatrixNorm.DESCRIPTOR) == {"frobenius": 1, "nuclear": 2}
    assert plain_name(pb.Granularity.DESCRIPTOR, pb.GRANULARITY_N_M) == "n_m"


def test_groups_are_the_same_in_plain_data() -> None:
    groups = [
        secateur.group(
            "block",
            secateur.member("a", dim=1, offset=2, stride=3, units=4),
            secateur.member("b", indices=[1, 0], units=1, scored=False),
        )
    ]
    plain = [
        {
            "name": "block",
            "members": [
                {"tensor": "a", "dim": 1, "offset": 2, "stride": 3, "units": 4},
                {"tensor": "b", "indices": [1, 0], "units": 1, "scored": False},
            ],
        }
    ]
    made = secateur.grouped(groups, 2, p=2, combination="max", scope="tensor")
    assert message_of(made) == parsed(
        """granularity: GRANULARITY_GROUP magnitude { p: 2 } scope: SCOPE_PER_TENSOR count: 2
        combination: COMBINATION_MAX groups {
            name: "block"
            members { tensor: "a" dim: 1 offset: 2 stride: 3 units: 4 }
            members { tensor: "b" indices: [1, 0] units: 1 unscored: true }
        }"""
    )
    rule = {"method": "grouped", "groups": plain, "amount": 2, "p": 2}
    rule |= {"combination": "max", "scope": "tensor"}
    assert message_of(Spec.from_dict({"rules": [rule]})) == message_of(made)


SELECT = {"method": "select", "tensors": "*", "amount": 0.5}
GROUPED = {"method": "grouped", "amount": 1, "groups": [{"name": "g", "members": []}]}


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ({**SELECT, "granularity": {"blocks_of": {"shape": [2, -1]}}}, r"shape\[1\]: -1 "),
        ({**SELECT, "granularity": {"slices": 3}}, r"granularity\.slices: 3 is not a mapping"),
        ({**SELECT, "granularity": {"slices": {"k": 3}}}, r"granularity\.slices: .*'k'"),
        ({**SELECT, "granularity": {"rows": {}, "columns": {}}}, r"granularity: \{'rows'"),
        ({**SELECT, "granularity": "n:m"}, r"granularity: 'n:m' is none of element, slices"),
        ({**SELECT, "amount": {"target_bytes": {"n": 0.5}}}, r"target_bytes\.n: 0\.5 "),
        ({**SELECT, "amount": {"table": {"fractions": {"a": 2}}}}, r"fractions\['a'\]: 2 "),
        (
            {**SELECT, "amount": {"target_macs": {"target": 1, "per_unit": {"a": "x"}}}},
            "'a'.: 'x' ",
        ),
        ({**SELECT, "amount": 1.5}, r"amount: 1\.5 "),
        ({**SELECT, "amount": "half"}, r"amount: 'half' "),
        ({**SELECT, "amount": True}, r"amount: True "),
        ({**SELECT, "importance": "l3"}, r"importance: 'l3' is none of magnitude, random"),
        ({**SELECT, "scope": "all"}, r"scope: 'all' "),
        ({**SELECT, "normalization": "max"}, r"normalization: 'max' "),
        ({**SELECT, "allocation": ""}, r"allocation: '' "),
        ({**SELECT, "of_all": 1}, r"of_all: 1 "),
        ({**SELECT, "scales": {"a": 1}}, r"scales: \{'a': 1\} "),
        ({**SELECT, "guard_rails": {"max_sparsity": 95}}, r"guard_rails\.max_sparsity: 95 "),
        (
            {**SELECT, "guard_rails": {"per_tensor": {"a": {"keep_at_least": -1}}}},
            r"guard_rails\.per_tensor\['a'\]\.keep_at_least: -1 ",
        ),
        (
            {**GROUPED, "groups": [{"name": "g", "members": [{"tensor": "a", "stride": 0}]}]},
            r"groups\[0\]\.members\[0\]\.stride: 0 ",
        ),
        (
            {**GROUPED, "groups": [{"name": "g", "members": [{"tensor": "a", "indices": []}]}]},
            r"groups\[0\]\.members\[0\]\.indices: ",
        ),
        (
            {
                **GROUPED,
                "groups": [{"name": "g", "members": [{"tensor": "a"}]}],
                "combination": "min",
            },
            r"combination: 'min' ",
        ),
        ({"metod": "lamp", "tensors": "*"}, "metod: is unknown; the nearest is method$"),
        ({"tensors": "*"}, "method: is missing$"),
        ({"method": ["select"]}, r"method: \['select'\] "),
        ({"method": "lamp", "tensors": "*"}, "lamp: 'amount' is missing$"),
        ({"method": "lamp", "amount": 1, "tensor": "*"}, "lamp: 'tensor' is not an argument; "),
        ({"method": "lamp", "amount": 1, "tensors": "*", 3: 4}, "lamp: 3 is not an argument; "),
        ({"method": "ln_structured", "tensors": "*"}, "'amount', 'n', 'dim' is missing$"),
        ({"method": "identity", "tensors": "*", "dim": 1}, "there are tensors$"),
        ({**SELECT, "granularity": {"heads": {}}}, r"granularity\.heads: 'head_dim' is missing"),
        ({**SELECT, "granularity": {"rows": {"n": 1}}}, "'n' is not an argument; there are none"),
        ({**SELECT, "amount": "150%"}, r"amount: 150% is outside \[0, 1\]"),
        ({**SELECT, "amount": "5GB"}, "amount: '5GB' is neither a number nor"),
        ({**SELECT, "amount": {"target_bytes": {"n": "5 apples"}}}, r"target_bytes\.n: '5 apples'"),
        ({**SELECT, "amount": {"target_bytes": {"n": "99999999TB"}}}, r"target_bytes\.n: "),
    ],
)
def test_errors_name_the_wrong_argument(rule: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidSpec, match=rf"^rules\[1\]\..*{said}"):
        Spec.from_dict({"rules": [SELECT, rule]})


MEMBER = {"tensor": "a", "indices": [1]}


@pytest.mark.parametrize(
    ("rule", "field", "said"),
    [
        ({**SELECT, "granularity": {"n_m": {"n": 4}}}, "pattern", "4:4 .* n < m"),
        ({**SELECT, "granularity": {"n_m": {"m": 1025}}}, "pattern", "2:1025 .* 1024"),
        ({**SELECT, "granularity": {"blocks": {"rows": 0, "cols": 0}}}, "block.shape", "not 0"),
        ({**SELECT, "granularity": {"blocks_of": {"shape": []}}}, "block.shape", "not 0"),
        ({**SELECT, "amount": {"threshold": {"value": float("nan")}}}, "threshold", "NaN"),
        (
            {**SELECT, "amount": {"target_macs": {"target": 1, "per_unit": {"a": 0}}}},
            "macs.per_unit['a']",
            r"0\.0 ",
        ),
        (
            {**SELECT, "amount": {"target_macs": {"target": -1, "per_unit": {"a": 1}}}},
            "macs.target",
            r"-1\.0 ",
        ),
        ({**SELECT, "amount": {"table": {"fractions": {}}}}, "table.entries", "at least one"),
        (
            {**SELECT, "guard_rails": {"max_sparsity": 0.1, "min_sparsity": 0.2}},
            "guard_rails.rails[0].min_sparsity",
            r"0\.2 .*0\.1",
        ),
        (GROUPED, "groups[0].members", "at least one"),
        ({**GROUPED, "groups": []}, "groups", "at least one"),
        *(
            (
                {**GROUPED, "groups": [{"name": "g", "members": [{**MEMBER, **beside}]}]},
                "groups[0].members[0].indices",
                "offset and stride",
            )
            for beside in ({"offset": 1}, {"stride": 2})
        ),
        (
            {"method": "global_unstructured", "tensors": "a", "amount": 1, "importance": "random"}
            | {"importance_scores": {"a": np.ones((8, 12))}},
            "importance_scores",
            "random",
        ),
    ],
)
def test_the_server_refuses_what_can_be_sent(
    client: secateur.Client, rule: dict[str, Any], field: str, said: str
) -> None:
    spec = Spec.from_dict({"rules": [SELECT, rule]})
    for call in (client.prune, client.plan):
        with pytest.raises(InvalidSpec, match=said) as raised:
            call(MODEL, spec)
        assert raised.value.field == f"spec.rules[1].selection.{field}"


def test_a_misspelled_list_of_rules_is_named() -> None:
    with pytest.raises(InvalidSpec, match=r"^rule: is unknown; the nearest is rules$"):
        Spec.from_dict({"rule": [SELECT]})


def slices_of(member: pb.Member) -> list[list[int]]:
    """By the protocol: unit i has `stride` slices from offset + i * stride on."""
    starts = [member.offset + unit * member.stride for unit in range(member.units)]
    return [list(range(start, start + member.stride)) for start in starts]


@given(head_dim=st.integers(1, 5), kv_heads=st.integers(1, 4), per_kv=st.integers(1, 4))
def test_a_unit_of_heads_is_a_kv_head_and_its_queries(
    head_dim: int, kv_heads: int, per_kv: int
) -> None:
    heads = kv_heads * per_kv
    (found,) = secateur.head_groups("q", "k", "v", "o", head_dim, heads, kv_heads)
    q, k, v, o = found.message.members
    for unit in range(kv_heads):
        queries = [head for head in range(heads) if head // per_kv == unit]
        rows = [head * head_dim + i for head in queries for i in range(head_dim)]
        assert slices_of(q)[unit] == slices_of(o)[unit] == rows
        own = [unit * head_dim + i for i in range(head_dim)]
        assert slices_of(k)[unit] == slices_of(v)[unit] == own
    assert [(m.tensor, m.dim) for m in (q, k, v, o)] == [("q", 0), ("k", 0), ("v", 0), ("o", 1)]


def test_heads_without_k_and_v() -> None:
    (found,) = secateur.head_groups("q", None, None, "o", 2, 3)
    assert [member.tensor for member in found.message.members] == ["q", "o"]
    with pytest.raises(InvalidSpec, match="kv_heads: 2 does not divide 3"):
        secateur.head_groups("q", "k", "v", "o", 2, 3, 2)


def test_query_heads_are_pruned_where_one_kv_head_is_all_or_nothing(
    client: secateur.Client,
) -> None:
    """Eight query heads of two rows, the first the least important, and one key and value."""
    scale = np.repeat(np.arange(1, 9), 2)[:, None].astype(np.float32)
    model = {"q": np.ones((16, 4), np.float32) * scale, "o": np.ones((4, 16), np.float32)}
    kept = {"k": np.ones((2, 4), np.float32), "v": np.ones((2, 4), np.float32)}
    groups = secateur.query_head_groups("q", "o", head_dim=2, heads=8)
    for amount, heads in ((0.5, 4), (0.6, 5), (3, 3)):
        masks = client.prune({**model, **kept}, secateur.grouped(groups, amount)).masks
        assert masks.keys() == {"q", "o"}
        expected = np.arange(16) >= 2 * heads
        assert (masks["q"] == expected[:, None]).all()
        assert (masks["o"] == expected).all()


def test_the_messages_of_torchs_methods_do_not_change() -> None:
    """A server that is older than the other choices takes them."""
    assert message_of(secateur.l1_unstructured("*", 0.5)) == parsed(
        'tensors: "*" magnitude {} granularity: 1 scope: 1 fraction: 0.5'
    )
    assert message_of(secateur.ln_structured("*", 2, n=2, dim=-1)) == parsed(
        'tensors: "*" magnitude { p: 2 } granularity: 2 dim: -1 scope: 1 count: 2'
    )


RNG = np.random.default_rng(7)
MODEL = {
    "a": RNG.standard_normal((8, 12)).astype(np.float32),
    "b": RNG.standard_normal((4, 8)).astype(np.float32),
}


def test_slices_of_vectors_are_an_error_that_says_how_to_leave_them_out(
    client: secateur.Client,
) -> None:
    model: dict[str, Any] = {**MODEL, "bn.weight": np.ones(4)}
    with pytest.raises(InvalidSpec, match=r"'bn.weight' .*: name only such tensors, as \[n for "):
        client.prune(model, secateur.ln_structured("*", 1, n=2, dim=0))
    matrices = [n for n, t in model.items() if t.ndim > 1]
    assert client.prune(model, secateur.ln_structured(matrices, 1, n=2, dim=0)).masks


def test_n_m_keeps_the_largest_of_each_group(client: secateur.Client) -> None:
    found = client.prune(MODEL, secateur.n_m_structured("a", n=1, m=3)).masks["a"]
    for row, kept in zip(MODEL["a"], found, strict=True):
        for start in range(0, 12, 3):
            largest = np.argmax(np.abs(row[start : start + 3]))
            assert kept[start : start + 3].tolist() == [i == largest for i in range(3)]


def test_blocks_rank_by_their_norm(client: secateur.Client) -> None:
    found = client.prune(MODEL, secateur.block_structured("a", 5, 2, 3, n=2)).masks["a"]
    tiles = MODEL["a"].reshape(4, 2, 4, 3).astype(np.float64)
    norms = np.sqrt((tiles**2).sum((1, 3)))
    pruned = np.argsort(norms, axis=None)[:5]
    expected = np.isin(np.arange(16), pruned, invert=True).reshape(4, 4)
    assert (found.reshape(4, 2, 4, 3) == expected[:, None, :, None]).all()


@pytest.mark.parametrize("method", [secateur.lamp, secateur.erk])
def test_totals_are_met_over_all_tensors(
    method: Callable[..., Spec], client: secateur.Client
) -> None:
    masks = client.prune(MODEL, method("*", 0.3)).masks
    assert sum((~mask).sum() for mask in masks.values()) == round(0.3 * (8 * 12 + 4 * 8))


def test_global_structured_ranks_by_power_means(client: secateur.Client) -> None:
    masks = client.prune(MODEL, secateur.global_structured("*", 5, n=2, dim=0)).masks
    means = [
        (np.sqrt((row.astype(np.float64) ** 2).mean()), name, index)
        for name, tensor in MODEL.items()
        for index, row in enumerate(tensor)
    ]
    pruned = {(name, index) for _, name, index in sorted(means)[:5]}
    for name, mask in masks.items():
        assert [not row.any() for row in mask] == [(name, i) in pruned for i in range(len(mask))]


def test_a_threshold_is_a_comparison(client: secateur.Client) -> None:
    found = client.prune(MODEL, secateur.select("a", secateur.threshold(0.5))).masks["a"]
    assert (found == (np.abs(MODEL["a"]) >= 0.5)).all()


def test_scales_and_scores_rank_in_the_weights_place(client: secateur.Client) -> None:
    scale = np.array([3, -1, 2, -4, 0.5, 6, 7, 8], np.float32)
    ranked = secateur.select("a", 3, granularity="filters", scales={"a": "scale"})
    by_scale = client.prune({**MODEL, "scale": scale}, ranked).masks["a"]
    assert np.flatnonzero(~by_scale.any(1)).tolist() == [1, 2, 4]
    scored = secateur.select("a", 3, granularity="filters", importance_scores={"a": scale})
    assert (client.prune(MODEL, scored).masks["a"] == by_scale).all()
