"""Files of torch.save: the state_dict is found, and all other content is kept."""

import re
import warnings
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.utils import prune

import secateur
from tests.client.test_cli import failure, run
from tests.conftest import RunningServer

HALF = secateur.l1_unstructured("0.weight", 0.5)
TORCH_SUFFIXES = ["pt", "pth", "bin", "ckpt", "tar", "pt.tar", "pth.tar"]

Layout = Callable[[Any], Any]


def module() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(6, 4), torch.nn.BatchNorm1d(4))


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A module after one step of Adam, whose state then holds tensors by name."""
    model = module()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    model(torch.ones(2, 6).cumsum(0)).sum().backward()
    optimizer.step()
    return model, optimizer


def pruned(state_dict: Any) -> Any:
    """The state_dict after torch.nn.utils.prune has pruned half of its first weight."""
    model = module()
    model.load_state_dict(state_dict)
    prune.l1_unstructured(model[0], "weight", 0.5)  # type: ignore[no-untyped-call, index]
    prune.remove(model[0], "weight")  # type: ignore[no-untyped-call, index]
    return OrderedDict((name, model.state_dict()[name]) for name in state_dict)


def lightning(state_dict: Any) -> Any:
    """As Lightning writes one: metrics by name, lists of states, hyperparameters."""
    _, optimizer = trained()
    best = {"best_k_models": {"epoch=2.ckpt": torch.tensor(0.3)}, "best_model_path": ""}
    return {
        **{"epoch": 3, "global_step": 12, "pytorch-lightning_version": "2.5.0"},
        **{"state_dict": state_dict, "loops": {"fit_loop": {"state_dict": {}}}},
        **{"callbacks": {"ModelCheckpoint": best}, "optimizer_states": [optimizer.state_dict()]},
        "hyper_parameters": OrderedDict(lr=0.1, layers=(6, 4)),
        "rng": {"torch": torch.get_rng_state()},
    }


def under(name: str) -> Layout:
    return lambda state_dict: {name: state_dict, "epoch": 3}


LAYOUTS: dict[str, Layout] = {
    "flat": lambda sd: sd,
    **{
        name: under(name)
        for name in ("state_dict", "model", "model_state_dict", "model_state", "net", "weights_v2")
    },
    "optimizer": lambda sd: {"model": sd, "optimizer": trained()[1].state_dict(), "epoch": 3},
    "named optimizer": lambda sd: {
        "model": sd,
        "optimizer": {"state": {"0.weight": {"exp_avg": torch.ones(4, 6)}}, "param_groups": []},
    },
    "deep": lambda sd: OrderedDict(run=OrderedDict(last={"module": sd, "step": 7}), seed=1),
    "a key with dots": lambda sd: {"v1.0": {"model.ema": sd}, 7: "a key that is not text"},
    "lightning": lightning,
}


def assert_same(found: Any, expected: Any) -> None:
    """Equal values of equal types in the same order, attributes such as _metadata among them."""
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif isinstance(expected, dict):
        assert list(found) == list(expected)
        for name, value in expected.items():
            assert_same(found[name], value)
        assert getattr(found, "__dict__", {}) == getattr(expected, "__dict__", {})
    elif isinstance(expected, list | tuple):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert found == expected


def expected_of(layout: Layout, state_dict: Any) -> Any:
    """The file with the state_dict as torch prunes it, and the attributes of the old one."""
    values = pruned(state_dict)
    values._metadata = state_dict._metadata
    return layout(values)


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_state_dict_is_found_and_the_rest_is_kept(
    client: secateur.Client, tmp_path: Path, name: str
) -> None:
    layout, (model, _) = LAYOUTS[name], trained()
    path, out = tmp_path / "in.ckpt", tmp_path / "out.ckpt"
    torch.save(layout(model.state_dict()), path)
    result = client.prune(path, HALF)
    result.save(out)
    assert_same(torch.load(out, weights_only=True), expected_of(layout, model.state_dict()))
    result.save(out, "reparametrized")
    final = client.finalize(out)
    final.save(out)
    assert_same(
        sorted_tensors(torch.load(out, weights_only=True)),
        sorted_tensors(expected_of(layout, model.state_dict())),
    )


def sorted_tensors(content: Any) -> Any:
    """Mappings of tensors in the order of their names."""
    if isinstance(content, dict) and all(isinstance(v, torch.Tensor) for v in content.values()):
        return dict(sorted(content.items()))
    if isinstance(content, dict):
        return {name: sorted_tensors(value) for name, value in content.items()}
    return content


@pytest.mark.parametrize("suffix", TORCH_SUFFIXES)
def test_every_suffix_of_torch_is_read_and_written(
    client: secateur.Client, tmp_path: Path, suffix: str
) -> None:
    path, out = tmp_path / f"in.{suffix}", tmp_path / f"out.{suffix}"
    torch.save({"net": module().state_dict(), "epoch": 3}, path)
    client.prune(path, HALF).save(out)
    found = torch.load(out, weights_only=True)
    assert found["epoch"] == 3
    module().load_state_dict(found["net"], strict=True)


SD = {"w": torch.arange(1.0, 5)}
EMA: dict[str, Any] = {"model": SD, "ema": {"w": SD["w"] + 1}, "epoch": 3}
NESTED = {"encoder": {"weight": SD["w"]}, "decoder": {"weight": SD["w"] + 1}}


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(EMA, ["model (a mapping of 1 tensors)", "ema (", "--key", "key="], id="ema"),
        pytest.param(NESTED, ["encoder (", "decoder (", "--key", "key="], id="nested"),
        pytest.param({"a": NESTED}, ["a.encoder (", "a.decoder (", "--key"], id="nested deeper"),
        pytest.param(
            {"epoch": 3, "w": SD["w"]},
            ["epoch (of type int)", "w (a tensor of shape [4])", "--key", "torch.save("],
            id="tensors beside others",
        ),
        pytest.param({"models": [SD]}, ["models (of type list)", "torch.save("], id="in a list"),
        pytest.param({"rng": {"torch": torch.get_rng_state()}}, ["rng (", "--key"], id="bytes"),
        pytest.param({str(i): i for i in range(99)}, ["and 91 more"], id="many"),
        pytest.param([SD], ["list", "torch.save(model.state_dict()"], id="list"),
        pytest.param(module(), ["torch.nn", "torch.save(model.state_dict()"], id="module"),
    ],
)
def test_the_error_for_a_file_without_a_single_state_dict_lists_its_content(
    client: secateur.Client, tmp_path: Path, content: Any, said: list[str]
) -> None:
    path = tmp_path / "model.pt"
    torch.save(content, path)
    with pytest.raises(secateur.InvalidStateDict) as error:
        client.report(path)
    assert "\n" not in str(error.value)
    assert not [part for part in [str(path), *said] if part not in str(error.value)], error.value


def test_a_mapping_that_contains_itself_is_refused(client: secateur.Client, tmp_path: Path) -> None:
    content: dict[str, Any] = {"epoch": 3}
    content["self"] = content
    torch.save(content, tmp_path / "model.pt")
    with pytest.raises(secateur.InvalidStateDict, match="epoch"):
        client.report(tmp_path / "model.pt")


@pytest.mark.parametrize("suffix", ["pt", "ckpt"])
def test_a_torchscript_file_is_refused_with_advice(
    client: secateur.Client, tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"model.{suffix}"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.script(torch.nn.Linear(3, 2)), path)
    with pytest.raises(secateur.InvalidStateDict, match=r"TorchScript.*state_dict\(\)"):
        client.report(path)


@pytest.mark.parametrize("key", ["ema", "encoder.part"])
def test_a_key_chooses_and_the_other_is_kept_as_it_was(
    client: secateur.Client, tmp_path: Path, key: str
) -> None:
    content = {**EMA, "encoder": {"part": {"w": SD["w"] + 2}, "layers": 2}}
    path, out = tmp_path / "in.pt", tmp_path / "out.pt"
    torch.save(content, path)
    spec = secateur.l1_unstructured("w", 2)
    client.prune(path, spec, key=key).save(out)
    found = torch.load(out, weights_only=True)
    here = found["ema"] if key == "ema" else found["encoder"]["part"]
    was = content["ema"] if key == "ema" else content["encoder"]["part"]
    assert here["w"].tolist() == [0, 0, *was["w"].tolist()[2:]]
    here["w"] = was["w"]
    assert_same(found, content)


def test_every_method_takes_a_key(client: secateur.Client, tmp_path: Path) -> None:
    path = tmp_path / "in.pt"
    weight = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    torch.save({"model": SD, "ema": {"w": weight}}, path)
    spec = secateur.l1_unstructured("w", 0.5)
    assert client.report(path, key="ema").zeros == 3
    assert client.prune(path, spec, key="ema").masks["w"].shape == weight.shape
    assert client.prune(path, spec, keep=True, key="ema").masks["w"].shape == weight.shape
    assert client.plan(path, spec, key="ema").amounts[0].total == 4
    assert client.sensitivity(path, key="ema").norm_removed.keys() == {"w"}
    assert client.finalize(path, key="ema").state_dict()["w"].shape == weight.shape
    assert client.report(client.upload(path, key="ema")).zeros == 3
    assert not secateur.is_pruned(path, key="ema")


def test_every_command_takes_a_key(
    server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    path, out = tmp_path / "in.pth.tar", tmp_path / "out.pth.tar"
    torch.save(EMA, path)
    key, half = ("--key", "ema"), ("--method", "l1_unstructured", "--amount", "2", "--tensors", "w")
    assert "--key PATH" in failure(capsys, "report", path)
    for command in ("report", "sensitivity", "plan"):
        more = half if command == "plan" else half[-2:]
        assert run(command, path, *key, *more) == 0
    assert run("checkpoints", "put", path, *key) == 0
    assert run("prune", path, "-o", out, "--output", "reparametrized", *key, *half) == 0
    assert run("finalize", out, "-o", out, *key) == 0
    found = torch.load(out, weights_only=True)
    assert found["ema"]["w"].tolist() == [0, 0, 4, 5]
    assert found["epoch"] == 3


@pytest.mark.parametrize(
    ("source", "key", "said"),
    [
        ("in.pt", "model.w", "'model.w' is a tensor of shape [4], not a state_dict"),
        ("in.pt", "epoch", "'epoch' is of type int"),
        ("in.pt", "nothing", "has no key 'nothing'; it holds model (a mapping of 1 tensors)"),
        ("in.pt", "", "has no key ''"),
        ("in.pt", 5, "key=5: a dotted path is text, not int"),
        ("in.pt", "parts", "parts.one (a mapping of 1 tensors)"),
        ("flat.pt", "model", "has no key 'model'; it holds w (a tensor of shape [4])"),
        ("in.safetensors", "model", "only a torch file has keys"),
        (SD, "model", "only a local torch file has keys, not dict"),
        (torch.nn.Linear(2, 2), "model", "not Linear"),
        ("file:///in.pt", "model", "not a model on the server"),
    ],
)
def test_a_key_that_names_no_state_dict_is_refused(
    client: secateur.Client, tmp_path: Path, source: Any, key: Any, said: str
) -> None:
    torch.save({**EMA, "parts": {"one": SD}}, tmp_path / "in.pt")
    torch.save(SD, tmp_path / "flat.pt")
    is_name = isinstance(source, str) and "://" not in source
    with pytest.raises(secateur.InvalidStateDict, match=re.escape(said)):
        client.report(tmp_path / source if is_name else source, key=key)


def test_entries_that_safetensors_cannot_hold_are_named(
    client: secateur.Client, tmp_path: Path
) -> None:
    path, out = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    torch.save({"run": {"net": SD, "step": 7}, "optimizer": {"state": {}}}, path)
    result = client.prune(path, secateur.l1_unstructured("w", 2))
    for save in (result.save, client.finalize(path).save):
        with pytest.warns(secateur.NotSaved, match=r"out.safetensors: without optimizer, run.step"):
            save(out)
    assert load_file(out).keys() == {"w"}
    result.save(tmp_path / "masks.safetensors", "masks")  # masks are not the model: no warning


def test_the_command_names_it_in_one_line(
    server: RunningServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, out = tmp_path / "in.ckpt", tmp_path / "out.safetensors"
    torch.save({"net": SD, "epoch": 7}, path)
    more = ("--server", server.address)
    assert run("finalize", path, "-o", out, *more) == 0
    said = capsys.readouterr().err
    assert said.startswith(f"secateur: warning: {out}: without epoch;")
    assert said.count("\n") == 1
    assert run("finalize", path, "-o", tmp_path / "out.pt", *more) == 0
    assert capsys.readouterr().err == ""
