"""Rules by activations: what the client sends of statistics, and what it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from secateur import InvalidSpec, LayerStatistics, Statistics, cli
from secateur.spec import INPUTS, OUTPUTS, SCORES
from secateur_proto import spec_pb2 as pb
from tests.conftest import RunningServer

NAMES = ["conv.weight", "h.0.fc.weight", "h.1.fc.weight", "embed.weight", "h.0.mix.weight"]


def layer(inputs: int, input_dim: int = 1, is_table: bool = False) -> LayerStatistics:
    squares = np.arange(1.0, inputs + 1) ** 2
    return LayerStatistics(4, squares, squares if is_table else None, input_dim=input_dim)


@pytest.fixture(scope="module")
def statistics() -> Statistics:
    """Of a model with a table of embeddings and a Conv1D of transformers."""
    kinds = [(4, 1, False), (6, 1, False), (6, 1, False), (10, 0, True), (6, 0, False)]
    return Statistics({name: layer(*kind) for name, kind in zip(NAMES, kinds, strict=True)})


@pytest.fixture(scope="module")
def model() -> dict[str, torch.Tensor]:
    numbers = torch.Generator().manual_seed(0)
    shapes = {
        "conv.weight": (8, 2, 3, 3),
        "conv.bias": (8,),
        "h.0.fc.weight": (5, 6),
        "h.1.fc.weight": (5, 6),
        "norm.weight": (6,),
        "embed.weight": (10, 6),
        "h.0.mix.weight": (6, 9),
    }
    return {name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()}


def test_globs_mean_calibrated_weights_but_no_embeddings(statistics: Statistics) -> None:
    given = ["h.?.fc.*", "conv.weight", "*fc*"]
    (rule,) = secateur.wanda(given, 0.5, statistics).rules
    chosen = ["h.0.fc.weight", "h.1.fc.weight", "conv.weight"]
    assert list(rule.message.selection.tensors) == chosen
    (rule,) = secateur.select("*", 0.5, secateur.activation(statistics)).rules
    assert "embed.weight" not in rule.message.selection.tensors


def test_rows_are_outputs(statistics: Statistics) -> None:
    (rule,) = secateur.wanda("*", 0.5, statistics).rules
    assert list(rule.message.selection.row_dims) == [pb.RowDim(tensors="h.0.mix.weight", dim=1)]
    by = secateur.activation(statistics)
    given: list[dict[str, Any]] = [{"scope": "tensor"}, {"scope": "row", "row_dims": {}}]
    for choices in given:
        (rule,) = secateur.select("*", 0.5, by, **choices).rules
        assert not rule.message.selection.row_dims


def test_rules_send_the_factors_of_their_weights(statistics: Statistics) -> None:
    spec = secateur.select(
        ["h.*", "embed.weight"], 0.5, secateur.activation(statistics, 2, 3), scope="global"
    )
    (rule,) = spec.rules
    chosen = ["h.0.fc.weight", "h.1.fc.weight", "h.0.mix.weight", "embed.weight"]
    assert list(rule.message.selection.tensors) == chosen
    assert rule.message.selection.activation.p == 2
    assert rule.arrays[SCORES] == {}
    assert list(rule.arrays[INPUTS]) == chosen[:2]
    assert list(rule.arrays[OUTPUTS]) == chosen[2:]
    factors = rule.arrays[INPUTS]["h.0.fc.weight"]
    assert factors.dtype == np.float32
    np.testing.assert_allclose(factors, (np.arange(1, 7) / 2) ** 3)


def test_a_spec_of_plain_data_reads_a_file(statistics: Statistics, tmp_path: Path) -> None:
    path = tmp_path / "statistics.safetensors"
    statistics.save(path)
    for place in (path, str(path)):
        plain = {
            "rules": [
                {"method": "wanda", "tensors": "conv*", "amount": 0.5, "statistics": place},
                {
                    "method": "select",
                    "tensors": "*fc*",
                    "amount": "40%",
                    "importance": {"activation": {"statistics": place, "p": 2, "relative": True}},
                    "scope": "row",
                    "allocation": "owl",
                },
                {"method": "ria", "tensors": "*fc*", "amount": None, "statistics": place}
                | {"n_m": [1, 3], "power": 1},
            ]
        }
        found = secateur.Spec.from_dict(plain)
        expected = (
            secateur.wanda("conv*", 0.5, statistics)
            + secateur.select(
                "*fc*",
                0.4,
                secateur.activation(statistics, 2, relative=True),
                scope="row",
                allocation="owl",
            )
            + secateur.ria("*fc*", None, statistics, n_m=(1, 3), power=1)
        )
        assert repr(found) == repr(expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"tensors": "norm.weight"},
            "tensors: 'norm.weight' has no statistics; calibrate its layer",
        ),
        (
            {"tensors": "*.bias"},
            "tensors: '*.bias' matches no weight with statistics; calibrated are conv.weight, "
            "h.0.fc.weight, h.1.fc.weight",
        ),
        ({"amount": None}, "amount: None is for n_m only; give a fraction or a count"),
        ({"n_m": (2, 4)}, "amount: 0.5 is given beside n_m=(2, 4); give amount=None or no n_m"),
        ({"amount": None, "n_m": 2}, "n_m: 2 is not a list of ints"),
        ({"amount": None, "n_m": (2, 4, 8)}, "n_m: (2, 4, 8) is not a pair such as (2, 4)"),
        ({"statistics": {}}, "statistics: {} is not what secateur.calibrate returns, or the path"),
        ({"power": -1}, "power: -1 is not 0 or more, and finite"),
        ({"power": "x"}, "power: 'x' is not a number"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(
    statistics: Statistics, change: dict[str, Any], message: str
) -> None:
    given = {"tensors": "*fc*", "amount": 0.5, "statistics": statistics, **change}
    with pytest.raises(InvalidSpec, match=re.escape(message)):
        secateur.ria(**given)


@pytest.mark.parametrize("p", [0, -1, float("inf"), float("nan")])
def test_an_exponent_is_above_0(statistics: Statistics, p: float) -> None:
    with pytest.raises(InvalidSpec, match=f"p: {p} is not above 0, and finite"):
        secateur.activation(statistics, p)


def test_a_file_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(secateur.SecateurError, match="nowhere"):
        secateur.wanda("*", 0.5, tmp_path / "nowhere.safetensors")


def scores_of(name: str, weight: torch.Tensor, statistics: Statistics) -> torch.Tensor:
    """Wanda's scores, with the factors along the dimension of the inputs."""
    rms = torch.from_numpy(statistics[name].rms).float()
    if name == "conv.weight":  # two groups of two channels
        rms = rms.view(2, 1, 2).expand(2, 4, 2).reshape(8, 2)
        return weight.abs() * rms[:, :, None, None]
    return weight.abs() * (rms if statistics[name].input_dim else rms[:, None])


def test_wanda_prunes_the_lowest_of_each_row(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    masks = client.prune(model, secateur.wanda(["conv*", "*fc*"], 0.5, statistics)).masks
    assert sorted(masks) == sorted(NAMES[:3])
    for name, mask in masks.items():
        scores = scores_of(name, model[name], statistics).flatten(1)
        count = round(scores.shape[1] / 2)
        expected = torch.ones_like(scores, dtype=torch.bool)
        expected.scatter_(1, scores.sort(dim=1, stable=True).indices[:, :count], False)
        assert torch.equal(torch.as_tensor(mask), expected.view(mask.shape)), name


def test_n_m_lies_along_the_inputs_of_each_layer(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    masks = client.prune(model, secateur.wanda("h.*", None, statistics, n_m=(1, 3))).masks
    for name, mask in masks.items():
        kept, scores = torch.as_tensor(mask), scores_of(name, model[name], statistics)
        if statistics[name].input_dim == 0:
            kept, scores = kept.T, scores.T
        groups = kept.reshape(-1, 3)
        assert (groups.sum(1) == 1).all()
        assert torch.equal(groups.byte().argmax(1), scores.reshape(-1, 3).argmax(1)), name


def test_whole_tensors_are_ranked_along_their_own_inputs(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    spec = secateur.select("*", 0.4, secateur.activation(statistics), scope="global")
    masks = client.prune(model, spec).masks
    assert "embed.weight" not in masks
    scores = {name: scores_of(name, model[name], statistics) for name in masks}
    every = torch.cat([scores[name].flatten() for name in masks])
    cut = every.sort().values[round(0.4 * len(every)) - 1]
    for name, mask in masks.items():
        assert torch.equal(torch.as_tensor(mask), scores[name] > cut), name


def test_members_of_groups_without_statistics_do_not_count(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    group = secateur.group(
        "channels",
        secateur.member("conv.weight"),
        secateur.member("conv.bias"),
    )
    by = secateur.activation(statistics)
    spec = secateur.grouped([group], 3, importance=by)
    masks = client.prune(model, spec).masks
    means = scores_of("conv.weight", model["conv.weight"], statistics).flatten(1).mean(1)
    pruned = set(means.argsort()[:3].tolist())
    assert set((~torch.as_tensor(masks["conv.bias"])).nonzero().flatten().tolist()) == pruned
    assert not group.members[1].message.unscored  # the caller's group is not changed
    lonely = secateur.group("lonely", secateur.member("conv.bias"), secateur.member("norm.weight"))
    message = "groups: no member of 'lonely' has statistics (conv.bias, norm.weight)"
    with pytest.raises(InvalidSpec, match=re.escape(message)):
        secateur.grouped([lonely], 1, importance=by)


def test_excluded_weights_may_have_factors(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    spec = secateur.select(
        ["conv*", "*fc*"],
        0.5,
        secateur.activation(statistics),
        scope="row",
        guard_rails={"exclude": ["h.1.*"], "keep_first": True},
    )
    assert list(client.prune(model, spec).masks) == ["h.0.fc.weight"]


def test_factors_that_do_not_fit_are_named(client: secateur.Client, statistics: Statistics) -> None:
    weights = {"h.0.fc.weight": np.ones((3, 7), np.float32)}
    message = (
        "spec.rules[0].selection.activation.inputs['h.0.fc.weight']: has shape [6]; send 7 "
        "factors, one for each input, or 2 dimensions, each 1 or as in [3, 7]"
    )
    with pytest.raises(InvalidSpec, match=re.escape(message)):
        client.prune(weights, secateur.wanda("h.0.fc.weight", 0.5, statistics))


def test_a_linear_layer_has_no_groups(client: secateur.Client, statistics: Statistics) -> None:
    weights = {"h.0.fc.weight": np.ones((4, 3), np.float32)}
    with pytest.raises(InvalidSpec, match=re.escape("has shape [6]; send 3 factors")):
        client.prune(weights, secateur.wanda("h.0.fc.weight", 0.5, statistics))


def test_a_spec_of_plain_data_needs_no_amount_with_n_m(
    statistics: Statistics, tmp_path: Path
) -> None:
    path = str(tmp_path / "statistics.safetensors")
    statistics.save(path)
    rule = {"method": "wanda", "tensors": "*fc*", "n_m": [2, 4], "statistics": path}
    spec = secateur.Spec.from_dict({"rules": [rule]})
    assert spec == secateur.wanda("*fc*", None, statistics, n_m=(2, 4))
    with pytest.raises(InvalidSpec, match=re.escape("n_m: '2:4' is not a pair such as (2, 4)")):
        secateur.Spec.from_dict({"rules": [{**rule, "n_m": "2:4"}]})


def test_statistics_of_other_weights_are_refused(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    other = {f"net.{name}": values for name, values in model.items()}
    said = (
        "rules[1]: the statistics are of h.0.fc.weight, h.1.fc.weight, which the model does not "
        "have; the nearest is net.h.0.fc.weight; prune the module that was calibrated"
    )
    spec = secateur.l1_unstructured("*", 0.5) + secateur.wanda("*fc*", 0.5, statistics)
    with pytest.raises(InvalidSpec, match=re.escape(said)):
        client.prune(other, spec)
    wrapped = {f"module.{name}": values for name, values in model.items()}
    for known in (model, wrapped):
        assert client.prune(known, secateur.wanda("*fc*", 0.5, statistics)).report.zeros == 30
    every = secateur.select(NAMES, 0.5, secateur.activation(statistics))
    with pytest.raises(
        InvalidSpec, match=r"rules\[0\]: the statistics are of .* and 2 more, which"
    ):
        client.plan({"w": np.ones((2, 2))}, every, [0.5])


def test_specs_are_equal_if_their_arrays_are(statistics: Statistics) -> None:
    spec = secateur.wanda("*", 0.5, statistics)
    assert spec == secateur.wanda("*", 0.5, statistics)
    assert spec != secateur.wanda("*", 0.5, statistics + statistics + Statistics({"w": layer(2)}))
    squared = secateur.select("*", 0.5, secateur.activation(statistics, power=2), scope="row")
    assert spec != squared
    scores = {"w": torch.ones(2, 2, dtype=torch.bfloat16)}
    one, other = ({"w": scores["w"] * value} for value in (1, 2))
    made = [
        secateur.l1_unstructured("w", 1, importance_scores=given) for given in (scores, one, other)
    ]
    assert made[0] == made[1] != made[2]


def test_scores_and_scales_contradict_factors(
    client: secateur.Client, model: dict[str, torch.Tensor], statistics: Statistics
) -> None:
    name = "h.0.fc.weight"
    given: list[dict[str, Any]] = [
        {"importance_scores": {name: np.ones((5, 6), np.float32)}},
        {"scales": {name: "norm.weight"}},
    ]
    for more in given:
        (field,) = more
        spec = secateur.select(name, 0.5, secateur.activation(statistics), **more)
        with pytest.raises(InvalidSpec, match=rf"selection\.{field}: cannot be used with activ"):
            client.prune(model, spec)


def test_a_tied_weight_may_have_any_of_its_names(client: secateur.Client) -> None:
    first, second = nn.Linear(6, 5, bias=False), nn.Linear(6, 5, bias=False)
    second.weight = first.weight
    module = nn.ModuleDict({"a": first, "b": second})
    known = Statistics({"b.weight": layer(6)})
    masks = client.prune(module, secateur.wanda("b.weight", 0.5, known)).masks
    scores = first.weight.detach().abs() * torch.from_numpy(known["b.weight"].rms).float()
    lowest = scores.argsort(1)[:, :3]
    for mask in masks.values():
        assert not torch.as_tensor(mask).gather(1, lowest).any()


def test_the_command_prunes_by_a_file_of_statistics(
    model: dict[str, torch.Tensor],
    statistics: Statistics,
    server: RunningServer,
    client: secateur.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    source, out, file = (tmp_path / f"{name}.safetensors" for name in ("in", "out", "statistics"))
    save_file(model, source)
    Statistics({name: statistics[name] for name in NAMES[:4]}).save(file)

    def run(*arguments: object) -> int:
        return cli.main(["prune", str(source), "-o", str(out), *map(str, arguments)])

    assert run("--method", "wanda", "--amount", "0.5", "--statistics", file, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    assert sorted(report["tensors"]) == sorted(NAMES[:3])
    expected = client.prune(model, secateur.wanda(NAMES[:3], 0.5, statistics), "dense")
    found = load_file(out)
    assert all(torch.equal(found[name], expected.state_dict()[name]) for name in NAMES[:3])
    more = ("--n-m", "1:3", "--power", "1", "--tensors", "h.*", "--quiet")
    assert run("--method", "ria", "--statistics", file, *more) == 0
    assert (load_file(out)["h.0.fc.weight"] != 0).sum() == 10
    for wrong, message in (
        (("--method", "wanda", "--amount", "0.5"), "--method wanda needs --statistics"),
        (("--method", "wanda", "--statistics", file), "--method wanda needs --amount"),
        (("--method", "lamp", "--amount", "1", "--n-m", "2:4"), "--method lamp takes no --n-m"),
        (("--method", "wanda", "--n-m", "two"), "'two' is not N:M, such as 2:4"),
    ):
        with pytest.raises(SystemExit, match="2"):
            run(*wrong)
        assert message in capsys.readouterr().err


def test_layers_with_the_same_input_share_their_factors() -> None:
    torch.manual_seed(0)
    net = torch.nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
    memory = torch.randn(2, 7, 8)
    statistics = secateur.calibrate(net, [(torch.randn(2, 5, 16), memory, memory)], progress=False)
    message, arrays = secateur.wanda("[kv]_proj_weight", 0.5, statistics).encode(())
    inputs = message.rules[0].selection.activation.inputs
    assert inputs["k_proj_weight"] == inputs["v_proj_weight"]
    assert len(arrays) == 1
