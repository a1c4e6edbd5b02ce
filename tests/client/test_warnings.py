"""Warnings name what a caller may not have meant, and nothing that they meant."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import secateur
from secateur import cli
from tests.conftest import RunningServer
from tests.reference import distinct

RAILS: Any = secateur.guard_rails


class Net(nn.Module):
    """Layers by name; it is not called."""

    def __init__(self, **layers: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, layer in layers.items():
            self.add_module(name, layer)


def lenet() -> Net:
    return Net(
        conv1=nn.Conv2d(1, 6, 5),
        conv2=nn.Conv2d(6, 16, 5),
        fc1=nn.Linear(256, 60),
        fc2=nn.Linear(60, 10),
    )


def said(
    client: secateur.Client, source: Any, spec: secateur.Spec, **options: Any
) -> dict[str, secateur.ReportWarning]:
    """The warnings of a prune by their codes, notes not among them."""
    warnings = client.prune(source, spec, **options).report.warnings
    assert all(w.message and "\n" not in w.message and len(w.message) < 600 for w in warnings)
    assert all(len(w.tensors) <= 10 for w in warnings)
    found = {w.code: w for w in warnings if w.severity == "warning"}
    assert len(found) == sum(w.severity == "warning" for w in warnings)
    return found


# The ordinary case ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec",
    [
        secateur.global_unstructured("*.weight", 0.5),
        secateur.global_unstructured("*", 0.3),
        secateur.l1_unstructured("conv*.weight", 0.5),
        secateur.l1_unstructured("conv1.weight", 0.5) + secateur.l1_unstructured("fc?.weight", 0.1),
        secateur.ln_structured("*.weight", 0.3, n=2, dim=0),
        secateur.random_unstructured("*.weight", 0.9, seed=1),
        secateur.n_m_structured("fc*.weight"),
        secateur.lamp("*.weight", 0.8),
        secateur.custom_from_mask({"conv1.weight": torch.ones(6, 1, 5, 5)}),
        secateur.l1_unstructured("*.weight", 1.0),
    ],
)
def test_ordinary_prunings_have_no_warning(client: secateur.Client, spec: secateur.Spec) -> None:
    net = lenet()
    assert said(client, net, spec) == {}
    assert said(client, net.state_dict(), spec) == {}


def test_a_note_says_what_zeros_alone_do_not_do(client: secateur.Client) -> None:
    net = lenet()
    result = client.prune(net, secateur.global_unstructured("*.weight", 0.5))
    (note,) = result.report.warnings
    assert (note.code, note.severity, note.tensors) == ("NOT_SMALLER", "note", ())
    assert str(result.report).endswith(f"\nnote: {note.message}")
    assert client.prune(net, secateur.identity("*.weight")).report.warnings == ()
    assert client.report(result.state_dict()).warnings == ()
    assert client.finalize(result.state_dict("reparametrized")).report.warnings == ()


# SMALL_COVERAGE -------------------------------------------------------------------------------


def normed() -> nn.Module:
    layer: nn.Module = nn.utils.parametrizations.weight_norm(nn.Linear(40, 30))
    return layer


MISSING = {
    "lstm": (Net(lstm=nn.LSTM(20, 30), fc=nn.Linear(30, 2)), "*.weight", "lstm.weight_hh_l0"),
    "parametrized": (
        Net(first=normed(), fc=nn.Linear(30, 2)),
        "*.weight",
        "first.parametrizations.weight.original1",
    ),
    "attention": (
        nn.TransformerEncoderLayer(16, 2, 64, 0.0),
        "*.weight",
        "self_attn.in_proj_weight",
    ),
    "within": (
        Net(a=Net(lstm=nn.LSTM(9, 9), fc=nn.Linear(9, 2)), b=nn.Linear(2, 2)),
        "a.*.weight",
        "a.lstm.weight_ih_l0",
    ),
    "by its end": (Net(fc=nn.Linear(3, 3), lstm=nn.LSTM(9, 9)), "*weight", "lstm.weight_ih_l0"),
}


@pytest.mark.parametrize(("net", "glob", "largest"), MISSING.values(), ids=MISSING)
def test_globs_that_miss_layers(
    client: secateur.Client, net: nn.Module, glob: str, largest: str
) -> None:
    found = said(client, net, secateur.global_unstructured(glob, 0.5))
    warning = found.pop("SMALL_COVERAGE")
    assert not found
    assert warning.tensors[0] == largest
    assert repr(largest) in warning.message
    (wider,) = re.findall(r"the glob '(.*?)' matches them too", warning.message)
    assert said(client, net, secateur.l1_unstructured(wider, 0.5)).keys() <= {"NORMS_PRUNED"}


def test_a_tensor_outside_of_modules_is_missed_too(client: secateur.Client) -> None:
    model = {"fc.weight": distinct((4, 4)), "weight_ih_l0": distinct((8, 8))}
    found = said(client, model, secateur.l1_unstructured("*.weight", 0.5))
    assert found["SMALL_COVERAGE"].tensors == ("weight_ih_l0",)


def test_globs_of_a_call_that_keeps_its_result(client: secateur.Client) -> None:
    """Of a module with buffers the parameters alone go to the server, and the globs as they are."""
    net = Net(bn=nn.BatchNorm1d(4), lstm=nn.LSTM(20, 30), fc=nn.Linear(30, 2))
    found = said(client, net, secateur.l1_unstructured("*.weight", 0.5), keep=True)
    assert found.keys() == {"SMALL_COVERAGE", "NORMS_PRUNED"}
    assert found["NORMS_PRUNED"].tensors == ("bn.weight",)


def test_coverage_is_of_weights_and_counted(client: secateur.Client) -> None:
    """16 of 90,016: the names and the numbers that a person needs."""
    model = {"fc.weight": distinct((4, 4)), "lstm.weight_ih_l0": distinct((300, 300))}
    model |= {"fc.bias": distinct((10_000,)), "lstm.bias_ih_l0": distinct((10_000,))}
    message = said(client, model, secateur.l1_unstructured("*.weight", 0.5))["SMALL_COVERAGE"]
    assert "covers 16 of 90,016 weights" in message.message
    assert message.tensors == ("lstm.weight_ih_l0",)


@pytest.mark.parametrize(
    "spec",
    [
        secateur.l1_unstructured("fc.weight", 0.5),  # a name, not a glob
        secateur.l1_unstructured("lstm.weight_ih_l0", 0.5),
        secateur.l1_unstructured("fc.*", 0.5),  # one module
        secateur.l1_unstructured("f*", 0.5),
        secateur.l1_unstructured("fc.*eight", 0.5),
        secateur.l1_unstructured(["*.weight", "lstm.weight*"], 0.5),
        secateur.l1_unstructured("*.weight", 0.5) + secateur.l1_unstructured("lstm.*_l0", 0.5),
        secateur.select("*", 0.5, guard_rails=RAILS(exclude=["lstm.*"])),
        secateur.select("*weight*", 0.5, guard_rails=RAILS(keep_last=True, exclude="lstm.*ih*")),
    ],
)
def test_excluded_tensors_are_not_missed(client: secateur.Client, spec: secateur.Spec) -> None:
    net = Net(fc=nn.Linear(30, 2), lstm=nn.LSTM(20, 30))
    assert "SMALL_COVERAGE" not in said(client, net, spec)


# WHOLLY_ZERO ----------------------------------------------------------------------------------


def uneven() -> dict[str, Tensor]:
    """Two layers, one with filters far smaller than the other's."""
    return {"a.weight": distinct((16, 8, 3, 3)), "b.weight": distinct((8, 16, 3, 3)) / 1000}


def test_a_layer_that_loses_all_filters(client: secateur.Client) -> None:
    spec = secateur.global_structured("*.weight", 0.4, n=2, dim=0)
    warning = said(client, uneven(), spec)["WHOLLY_ZERO"]
    assert warning.tensors == ("b.weight",)
    assert "'b.weight' is zero now (8 of 8 slices of dimension 0)" in warning.message
    assert "keep_at_least" in warning.message
    railed = secateur.select(
        "*.weight", 0.3, granularity="filters", scope="global", guard_rails=RAILS(keep_at_least=1)
    )
    assert said(client, uneven(), railed) == {}


def test_a_norm_that_loses_every_element(client: secateur.Client) -> None:
    spec = secateur.global_unstructured("*.weight", 0.2)
    warning = said(client, with_norms(1e-3), spec)["WHOLLY_ZERO"]
    assert warning.tensors == ("bn.weight", "ln_1.weight")
    assert "WHOLLY_ZERO" not in said(client, with_norms(1e-3), secateur.l1_unstructured("*", 0.5))


def test_many_layers_are_counted(client: secateur.Client) -> None:
    model = {f"{i:02}.weight": distinct((2, 3)) / 1000 for i in range(12)} | {"a": distinct((9, 9))}
    warning = said(client, model, secateur.global_unstructured("*", 72))["WHOLLY_ZERO"]
    assert warning.tensors == tuple(f"{i:02}.weight" for i in range(10))
    assert "'02.weight' and 9 more" in warning.message


@pytest.mark.parametrize(
    ("model", "spec"),
    [
        (uneven(), secateur.l1_unstructured("*.weight", 1.0)),
        (uneven(), secateur.select("*.weight", {"table": {"fractions": {"b*": 1.0}}})),
        (uneven(), secateur.custom_from_mask({"b.weight": torch.zeros(8, 16, 3, 3)})),
        ({"lora_B": torch.zeros(4, 4)}, secateur.random_unstructured("lora_B", 3)),
        (
            {"fc.bias": distinct((3,)) / 1e3, "a": distinct((9, 9))},
            secateur.global_unstructured("*", 0.5),
        ),
    ],
)
def test_tensors_that_were_zero_or_were_meant_to_be(
    client: secateur.Client, model: Mapping[str, Tensor], spec: secateur.Spec
) -> None:
    assert "WHOLLY_ZERO" not in said(client, model, spec)


def test_tensors_that_were_wholly_pruned_before_have_no_warning(client: secateur.Client) -> None:
    spec = secateur.global_structured("*.weight", 8, n=2, dim=0)
    pairs = client.prune(uneven(), spec).state_dict("reparametrized")
    assert "WHOLLY_ZERO" not in said(client, pairs, secateur.l1_unstructured("*", 0.5))


# ZERO_BEFORE ----------------------------------------------------------------------------------

HALVES = [
    secateur.l1_unstructured("fc*.weight", 0.5),
    secateur.global_unstructured("fc*.weight", 0.5),
    secateur.lamp("fc*.weight", 0.5),
    secateur.ln_structured("fc*.weight", 0.5, n=2, dim=0),
]


@pytest.mark.parametrize("spec", HALVES)
def test_zeros_that_are_pruned_again(client: secateur.Client, spec: secateur.Spec) -> None:
    dense = client.prune(lenet(), spec).state_dict()
    again = client.prune(dense, spec).report
    assert again.sparsity == pytest.approx(0.5, abs=0.01)
    for source in (dense, client.upload(dense)):
        warning = said(client, source, spec)["ZERO_BEFORE"]
        assert warning.tensors == ("fc1.weight", "fc2.weight")
        assert 'prior="zeros"' in warning.message
        assert "--prior zeros" in warning.message
        assert said(client, source, spec, prior="zeros") == {}


def few_zeros() -> Tensor:
    """An eighth is zero, as it may be without any pruning."""
    weight = distinct((8, 8))
    weight[0] = 0
    return weight


@pytest.mark.parametrize(
    ("weight", "spec"),
    [
        (few_zeros(), secateur.l1_unstructured("w", 4)),
        (few_zeros(), secateur.global_unstructured("w", 0.1)),
        (few_zeros(), secateur.ln_structured("w", 1, n=2, dim=0)),
        (distinct((8, 8)).relu(), secateur.l1_unstructured("w", 0.9)),
        (distinct((64,)).relu(), secateur.l1_unstructured("w", 0.1)),  # biases begin as zeros
        (distinct((8, 8)).relu(), secateur.random_unstructured("w", 0.1)),
        (distinct((8, 8)).relu(), secateur.identity("w")),
        (distinct((8, 8)).relu(), secateur.ln_structured("w", 1, n=-1, dim=0)),
        (
            distinct((8, 8)),
            secateur.l1_unstructured("w", 0.1, importance_scores={"w": torch.zeros(8, 8)}),
        ),
    ],
)
def test_prunings_of_more_than_zeros(
    client: secateur.Client, weight: Tensor, spec: secateur.Spec
) -> None:
    assert "ZERO_BEFORE" not in said(client, {"w": weight}, spec)


# SCALES_PRUNED --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        *("scales", "weight.absmax", "weight.nested_absmax", "weight.quant_map", "SCB"),
        *("weight_scale_inv", "weight_scale", "weight_scale_2", "input_scale"),
        "weights_scaling_factor",
    ],
)
def test_scales_of_quantized_layers(client: secateur.Client, name: str) -> None:
    model = {"q.qweight": torch.ones(8, 8, dtype=torch.uint8), f"q.{name}": distinct((8, 1)) / 99}
    model |= {"head.weight": distinct((8, 8))}
    for spec in (secateur.global_unstructured("*", 0.2), secateur.l1_unstructured("q.*", 0.5)):
        warning = said(client, model, spec)["SCALES_PRUNED"]
        assert warning.tensors == (f"q.{name}",)
        assert "or use `select` with guard_rails(exclude=...)" in warning.message
    spared = secateur.select("*", 0.5, guard_rails=RAILS(exclude=f"*.{name}"))
    assert said(client, model, spared) == {}
    large = {**model, f"q.{name}": distinct((8, 1)) + 99}  # loses nothing
    assert said(client, large, secateur.global_unstructured("*", 0.2)) == {}


@pytest.mark.parametrize("name", ["upscale.weight", "scaler.weight", "scale_proj", "q.rescale_w"])
def test_other_names_are_not_scales(client: secateur.Client, name: str) -> None:
    assert said(client, {name: distinct((8, 8))}, secateur.l1_unstructured("*", 0.5)) == {}


# NORMS_PRUNED ---------------------------------------------------------------------------------


def with_norms(scale: float) -> Net:
    """A net whose norms have weights of this size."""
    net = Net(conv=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4), ln_1=nn.LayerNorm(4))
    for name in ("bn.weight", "ln_1.weight"):
        nn.init.constant_(net.get_parameter(name), scale)
    return net


def test_norms_that_a_global_rule_takes(client: secateur.Client) -> None:
    small = with_norms(1e-3)
    warning = said(client, small, secateur.global_unstructured("*.weight", 0.2))["NORMS_PRUNED"]
    assert warning.tensors == ("bn.weight", "ln_1.weight")
    assert "or use `select` with guard_rails(exclude=...)" in warning.message
    named = secateur.global_unstructured(["conv.weight", "bn.weight"], 0.2)
    assert said(client, small, named)["NORMS_PRUNED"].tensors == ("bn.weight",)
    rails = RAILS(exclude=["bn.*", "ln_*"])
    spared = secateur.select("*.weight", 0.2, scope="global", guard_rails=rails)
    assert said(client, small, spared) == {}
    assert said(client, with_norms(10.0), secateur.global_unstructured("*.weight", 0.2)) == {}


def test_statistics_of_norms_that_a_glob_takes(client: secateur.Client) -> None:
    """A state_dict has the buffers too, which torch's own functions never prune."""
    model = with_norms(1.0).state_dict()
    warning = said(client, model, secateur.l1_unstructured("*", 0.5))["NORMS_PRUNED"]
    assert {"bn.running_mean", "bn.running_var", "ln_1.weight"} <= set(warning.tensors)
    assert not {"bn.bias", "conv.weight", "conv.bias"} & set(warning.tensors)


def test_norms_that_are_named(client: secateur.Client) -> None:
    net = with_norms(1e-3)
    channels = secateur.group("c", secateur.member("conv.weight"), secateur.member("bn.weight"))
    for spec in (
        secateur.l1_unstructured("bn.weight", 0.5),
        secateur.grouped([channels], 1),
        secateur.select(
            "conv.weight", 1, granularity="filters", scales={"conv.weight": "bn.weight"}
        ),
    ):
        assert said(client, net, spec) == {}


# ROUNDED_TO_NONE, ROUNDED_TO_ALL --------------------------------------------------------------


def attention() -> dict[str, Tensor]:
    """Four query heads of 2 that share one key and one value."""
    shapes = {"q.weight": (8, 8), "k.weight": (2, 8), "v.weight": (2, 8), "o.weight": (8, 8)}
    return {name: distinct(shape, seed=len(name)) for name, shape in shapes.items()}


def heads_of(heads: int, kv_heads: int) -> list[Any]:
    q, k, v, o = attention()
    return secateur.head_groups(q, k, v, o, head_dim=8 // heads, heads=heads, kv_heads=kv_heads)


def test_a_fraction_of_one_unit_is_none_or_all(client: secateur.Client) -> None:
    groups = heads_of(4, 1)
    none = said(client, attention(), secateur.grouped(groups, 0.5))
    assert none.keys() == {"ROUNDED_TO_NONE"}
    assert none["ROUNDED_TO_NONE"].tensors == ("heads of q.weight",)
    assert "so few (1)" in none["ROUNDED_TO_NONE"].message
    whole = said(client, attention(), secateur.grouped(groups, 0.6))
    assert whole.keys() == {"ROUNDED_TO_ALL", "WHOLLY_ZERO"}
    assert "k.weight" in whole["WHOLLY_ZERO"].tensors
    assert said(client, attention(), secateur.grouped(heads_of(8, 2), 0.5)) == {}


def test_a_fraction_of_few_slices(client: secateur.Client) -> None:
    model = {f"{i}.weight": distinct((2, 4)) for i in range(12)}
    table = {"table": {"fractions": {"*": 0.1}}}
    for amount in (0.1, table):
        spec = secateur.select("*.weight", amount, granularity="rows")
        warning = said(client, model, spec)["ROUNDED_TO_NONE"]
        assert len(warning.tensors) == 10
        assert "and 9 more" in warning.message


@pytest.mark.parametrize(
    "spec",
    [
        secateur.identity("*"),
        secateur.l1_unstructured("*", 0.0),
        secateur.l1_unstructured("bias", 0.3),
        secateur.l1_unstructured("w", 4) + secateur.l1_unstructured("w", 0.5),
        secateur.global_unstructured("w", 0.9).at(1, 100),
        secateur.select("w", {"threshold": {"value": 0.0}}),
        secateur.select(["w", "other"], {"table": {"fractions": {"other": 0.5}}}),
    ],
)
def test_rules_that_prune_nothing_on_purpose(client: secateur.Client, spec: secateur.Spec) -> None:
    model = {"w": distinct((2, 2)), "bias": distinct((1,)), "other": distinct((2, 2))}
    found = said(client, model, spec)
    assert not {"ROUNDED_TO_NONE", "ROUNDED_TO_ALL"} & found.keys()


# How warnings are shown -------------------------------------------------------------------------


def test_a_report_shows_its_warnings(client: secateur.Client) -> None:
    model = {"<b>.weight": torch.zeros(4, 4)}
    report = client.prune(model, secateur.l1_unstructured("*.weight", 0.5)).report
    warning, note = report.warnings
    assert str(report).splitlines()[-2:] == [f"warning: {warning.message}", f"note: {note.message}"]
    assert "<p>warning: " in report._repr_html_()
    assert "<b>" not in report._repr_html_()
    plain = report.to_dict()["warnings"][0]
    assert (plain["code"], plain["tensors"]) == ("ZERO_BEFORE", ("<b>.weight",))


def test_commands_say_warnings_on_stderr(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"fc.weight": distinct((8, 8)).relu(), "bias": torch.ones(3)}, source)
    options = ["--server", server.address, "--method", "l1_unstructured", "--amount", "0.25"]
    assert cli.main(["prune", str(source), "-o", str(out), *options]) == 0
    shown = capsys.readouterr()
    (line,) = shown.err.splitlines()
    assert line.startswith("secateur: warning: ")
    assert "--prior zeros" in line
    assert "warning:" not in shown.out
    assert shown.out.splitlines()[-1].startswith("note: ")
    assert cli.main(["prune", str(source), "-o", str(out), *options, "--prior", "zeros"]) == 0
    assert capsys.readouterr().err == ""
