"""Rules that update weights: the command and the client's own checks of them."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import secateur
from secateur import cli
from secateur.calibration.statistics import Statistics
from tests.conftest import RunningServer


@pytest.fixture(scope="module")
def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.fixture(scope="module")
def statistics(module: nn.Module) -> Statistics:
    return secateur.calibrate(module, [torch.randn(40, 8)], gram=True)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("output", ["dense", "reparametrized", "packed"])
def test_the_command_writes_the_updated_weights(
    module: nn.Module,
    statistics: Statistics,
    server: RunningServer,
    client: secateur.Client,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    suffix: str,
    output: Any,
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    source, out, file = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}", tmp_path / "s"
    out = out.with_suffix(".safetensors") if output == "packed" else out
    save = save_file if suffix == ".safetensors" else torch.save
    save(module.state_dict(), source)
    statistics.save(file)
    arguments = ["--method", "sparsegpt", "--amount", "0.5", "--statistics", str(file), "--quiet"]
    assert cli.main(["prune", str(source), "-o", str(out), "--output", output, *arguments]) == 0
    spec = secateur.sparsegpt("*", 0.5, statistics)
    expected = client.prune(module, spec, "dense").state_dict("dense")
    found = client.finalize(out).state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(
        found["0.weight"], module.state_dict()["0.weight"] * (found["0.weight"] != 0)
    )


def test_a_folder_too(
    module: nn.Module, statistics: Statistics, server: RunningServer, tmp_path: Path
) -> None:
    (tmp_path / "in").mkdir()
    save_file(module.state_dict(), tmp_path / "in" / "model.safetensors")
    (tmp_path / "in" / "config.json").write_text("{}")
    file = tmp_path / "statistics.safetensors"
    statistics.save(file)
    arguments = ["--method", "alps", "--n-m", "2:4", "--statistics", str(file), "--quiet"]
    out = ["-o", str(tmp_path / "out"), "--server", server.address]
    assert cli.main(["prune", str(tmp_path / "in"), *out, *arguments]) == 0
    assert (load_file(tmp_path / "out" / "model.safetensors")["0.weight"] != 0).sum() == 64


def test_results_without_weights_are_refused(
    module: nn.Module, statistics: Statistics, client: secateur.Client
) -> None:
    spec = secateur.wanda("*", 0.5, statistics) + secateur.refit("*", statistics)
    assert spec.solvers == ("refit",)
    said = "output: 'masks' has no weights, and refit updates them; use one of .*dense"
    with pytest.raises(secateur.InvalidSpec, match=said):
        client.prune(module, spec)
    with pytest.raises(secateur.InvalidSpec, match="keep: cannot be used with refit"):
        client.prune(module, spec, "dense", keep=True)
    report = client.prune(module, spec, "none").report
    assert report.sparsity == 0.5


def test_pruning_solvers_have_no_steps(statistics: Statistics) -> None:
    half = secateur.wanda("*", 0.5, statistics)
    spec = half.at(1, 2, "linear") + secateur.refit("*", statistics)
    assert (half + secateur.refit("*", statistics)).at(1, 2, "linear") == spec
    for method in (secateur.sparsegpt, secateur.alps):
        said = rf"rules\[1\]: {method.__name__} has no steps; prune by wanda"
        with pytest.raises(secateur.InvalidSpec, match=said):
            (half + method("*", 0.5, statistics)).at(1, 2)


def test_globs_mean_weights_with_gram_matrices() -> None:
    module = nn.Sequential(nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 8, 1))
    found = secateur.calibrate(module, [torch.randn(4, 4, 8, 8)], gram=True)
    assert secateur.refit("*", found) == secateur.refit("1.weight", found)
    for tensors in ("0.*", "0.weight", ["*", "0.weight"]):
        with pytest.raises(secateur.InvalidStatistics, match=r"0\.weight: .* no gram"):
            secateur.refit(tensors, found)


def test_too_few_inputs_are_a_warning(
    module: nn.Module,
    tmp_path: Path,
    server: RunningServer,
    capsys: pytest.CaptureFixture[str],
) -> None:
    few = secateur.calibrate(module, [torch.randn(9, 8)], gram=True)
    said = "2.weight: too few inputs: 9 of 16 channels, so that"
    with pytest.warns(secateur.FewInputs, match=said) as warned:
        secateur.sparsegpt("*", 0.5, few)
    assert [warning.filename for warning in warned] == [__file__]
    file, source = tmp_path / "few.safetensors", tmp_path / "in.safetensors"
    few.save(file)
    save_file(module.state_dict(), source)
    arguments = ["--method", "alps", "--amount", "0.5", "--statistics", str(file), "--quiet"]
    out = ["-o", str(tmp_path / "out.safetensors"), "--server", server.address]
    assert cli.main(["prune", str(source), *out, *arguments]) == 0
    assert f"secateur: warning: {said}" in capsys.readouterr().err


def test_a_refit_of_what_nothing_prunes_is_a_warning(
    module: nn.Module, statistics: Statistics, client: secateur.Client
) -> None:
    def codes(spec: secateur.Spec, prior: Any = "masks") -> list[str]:
        report = client.prune(dense, spec, "dense", prior=prior).report
        return [warning.code for warning in report.warnings if warning.code != "NOT_SMALLER"]

    first, refit = secateur.wanda("0.weight", 0.5, statistics), secateur.refit("*", statistics)
    dense = client.prune(module, first).state_dict("dense")
    assert codes(refit) == ["NOTHING_TO_REFIT"]
    assert codes(refit, "zeros") == codes(first + refit) == []
    assert codes(first + secateur.refit("2.weight", statistics)) == ["NOTHING_TO_REFIT"]
