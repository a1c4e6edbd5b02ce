"""Modules of all sorts, and that they are left as they were."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn import Module
from torch.nn.utils import parametrizations, prune

import secateur
from tests.calibration.naive import assert_close, assert_sums, rows_of

X, Y = torch.randn(2, 5, 8), torch.randn(2, 3, 8)


def attention(module: nn.MultiheadAttention, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The input of out_proj, [batch, tokens, channels], head by head."""
    weights = module.in_proj_weight.detach().chunk(3)
    queries, keys, values = (x @ w.T for x, w in zip((q, k, v), weights, strict=True))
    size, heads = module.head_dim, []
    for begin in range(0, module.embed_dim, size):
        one, two, three = (x[..., begin : begin + size] for x in (queries, keys, values))
        heads.append((one @ two.mT / size**0.5).softmax(-1) @ three)
    return torch.cat(heads, -1)


@pytest.mark.parametrize("is_batch_first", [True, False])
@pytest.mark.parametrize("has_weights", [True, False])
def test_self_attention(is_batch_first: bool, has_weights: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=is_batch_first)
    x = X if is_batch_first else X.transpose(0, 1)
    batch = {"query": x, "key": x, "value": x, "need_weights": has_weights}
    found = secateur.calibrate(module, [batch], gram=True)
    assert list(found) == ["in_proj_weight", "out_proj.weight"]
    assert_sums(found["in_proj_weight"], rows_of(x))
    expected = rows_of(attention(module, X, X, X))
    assert found["out_proj.weight"].count == 10
    torch.testing.assert_close(
        torch.tensor(found["out_proj.weight"].sum_squares),
        torch.tensor(expected).double().square().sum(0),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("is_batch_first", [True, False])
def test_a_mask_for_attention(is_batch_first: bool) -> None:
    module = nn.MultiheadAttention(8, 2, batch_first=is_batch_first)
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 0, 0, 0]]).bool()
    x, given = (X, mask) if is_batch_first else (X.transpose(0, 1), mask.T)
    found = secateur.calibrate(module, [(x, x, x)], mask=lambda batch: given)
    assert_sums(found["in_proj_weight"], rows_of(X[mask]))
    expected = attention(module, X, X, X)[mask].double().square().sum(0)
    squares = torch.tensor(found["out_proj.weight"].sum_squares)
    torch.testing.assert_close(squares, expected, rtol=1e-5, atol=1e-6)


def test_attention_to_other_tokens() -> None:
    packed = nn.MultiheadAttention(8, 2, batch_first=True)
    found = secateur.calibrate(packed, [(X, Y, Y)])
    assert_sums(found["in_proj_weight"], [*rows_of(X), *rows_of(Y)])
    assert found["out_proj.weight"].count == 10
    keys = torch.randn(2, 3, 4)
    separate = nn.MultiheadAttention(8, 2, kdim=4, batch_first=True)
    found = secateur.calibrate(separate, [(X, keys, Y)])
    assert list(found) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"]
    for name, value in zip(found, (X, keys, Y), strict=False):
        assert_sums(found[name], rows_of(value))


def test_a_transformer_of_torch_whose_fast_path_calls_no_layer() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    module = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    before = torch.backends.mha.get_fastpath_enabled()
    found = secateur.calibrate(module, [X])
    assert torch.backends.mha.get_fastpath_enabled() == before
    assert {name: layer.count for name, layer in found.items()} == {
        f"layers.{index}.{name}": 10
        for index in range(2)
        for name in (
            "self_attn.in_proj_weight",
            "self_attn.out_proj.weight",
            "linear1.weight",
            "linear2.weight",
        )
    }


def test_only_some_layers_of_a_transformer() -> None:
    module = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    found = secateur.calibrate(module, [X], layers="linear*")
    assert list(found) == ["linear1.weight", "linear2.weight"]


def test_several_threads() -> None:
    # In float64: float32 modules round differently when other threads compute beside them.
    modules = [nn.MultiheadAttention(8, 2, batch_first=True).double() for _ in range(4)]
    inputs = (X.double(),) * 3
    expected = [secateur.calibrate(module, [inputs]) for module in modules]
    linear = nn.functional.linear
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda module: secateur.calibrate(module, [inputs] * 5), modules))
    for one, module, same in zip(found, modules, expected, strict=True):
        assert_close(one, secateur.calibrate(module, [inputs] * 5))
        assert one["in_proj_weight"].count == 5 * same["in_proj_weight"].count
    assert nn.functional.linear is linear
    assert torch.backends.mha.get_fastpath_enabled()


NET = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(4, 2))
EXPECTED = secateur.calibrate(NET, [X], gram=True)


class HasModule(Module):
    """Its own layers have the names that wrappers add."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)  # type: ignore[no-any-return]


def test_names_are_those_of_the_module_without_wrappers() -> None:
    parallel = nn.DataParallel(NET)
    for wrapped in (parallel, *(torch.compile(net, backend="eager") for net in (NET, parallel))):
        assert secateur.calibrate(wrapped, [X], gram=True) == EXPECTED
    assert list(secateur.calibrate(nn.DataParallel(HasModule()), [X])) == ["module.weight"]


@pytest.mark.parametrize("has_run", [False, True])
def test_compiled_parts(has_run: bool) -> None:
    module = copy.deepcopy(NET)
    module[0] = torch.compile(module[0], backend="eager")  # type: ignore[assignment]
    module[3].compile(backend="eager")
    if has_run:
        module.eval()(X)
    assert secateur.calibrate(module, [X], gram=True) == EXPECTED


def test_pruned_and_parametrized_weights() -> None:
    module = copy.deepcopy(NET)
    prune.l1_unstructured(module[0], "weight", 0.5)  # type: ignore[no-untyped-call]
    parametrizations.weight_norm(module[3])
    assert list(secateur.calibrate(module, [X])) == ["0.weight", "3.weight"]


def test_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        found = secateur.calibrate(NET, [X], gram=True)
        second = NET[2].eval()(NET[0](X))
    NET[2].train()
    assert found["0.weight"] == EXPECTED["0.weight"]
    assert_sums(found["3.weight"], rows_of(second.double()))


class Fails(Module):
    """Its forward fails on a short batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        if len(self.layer(x)) < 2:
            raise KeyError("short")
        return x


def test_the_error_of_a_model_has_a_note_with_the_batch() -> None:
    module = Fails().train()
    with pytest.raises(KeyError, match="short") as caught:
        secateur.calibrate(module, [X, X, X[:1]])
    said = (
        "secateur.calibrate ran the module on batch 2, a Tensor; a batch is what forward takes: a "
        "tensor, a tuple of arguments, or a mapping of keywords"
    )
    assert caught.value.__notes__ == [said]
    assert module.training
    assert not module.layer._forward_pre_hooks


def test_the_note_says_what_a_wrong_batch_holds() -> None:
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, X[:, 0]), batch_size=4)
    with pytest.raises(TypeError) as caught:
        secateur.calibrate(Fails(), loader)
    (note,) = caught.value.__notes__
    assert "batch 0, a list of 2: Tensor, Tensor; a batch is what forward takes" in note
    assert note.endswith("; leave out labels: (inputs for inputs, labels in loader)")
    with pytest.raises(TypeError) as caught:
        secateur.calibrate(Fails(), [{"image": X}])
    assert "batch 0, a dict with 'image';" in caught.value.__notes__[0]


def test_a_module_is_left_as_it_was() -> None:
    module = copy.deepcopy(NET).train()
    module[0].eval()
    state = copy.deepcopy(module.state_dict())
    linear = nn.functional.linear
    seen: list[bool] = []
    module[1].register_forward_hook(
        lambda part, args, out: seen.append(part.training or torch.is_grad_enabled())
    )
    assert secateur.calibrate(module, [X], gram=True) == EXPECTED
    assert seen == [False]
    assert [part.training for part in module] == [False, True, True, True]
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert not any(part._forward_pre_hooks for part in module)
    assert nn.functional.linear is linear
    assert all(p.requires_grad for p in module.parameters())


def test_the_input_may_be_a_keyword_and_may_be_changed_in_place() -> None:
    class Keyword(Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 2)
            self.embed = nn.Embedding(3, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(input=x) + self.layer(self.embed(input=torch.tensor([2])))  # type: ignore[no-any-return]

    module = Keyword()
    found = secateur.calibrate(module, [X])
    assert_sums(found["layer.weight"], [*rows_of(X), *rows_of(module.embed.weight[2])])
    assert found["embed.weight"].sum_squares.tolist() == [0, 0, 1]


@pytest.mark.parametrize(
    ("layers", "names"),
    [
        ("0.weight", ["0.weight"]),
        ("3", ["3.weight"]),
        (["0", "*"], ["0.weight", "3.weight"]),
        ("[12345].*", ["3.weight"]),
    ],
)
def test_layers_by_names_and_globs(layers: Any, names: list[str]) -> None:
    found = secateur.calibrate(NET, [X], gram=True, layers=layers)
    assert list(found) == names
    assert all(found[name] == EXPECTED[name] for name in names)


def test_a_layer_that_never_runs() -> None:
    class Unused(Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.unused = nn.Linear(8, 2), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)  # type: ignore[no-any-return]

    with pytest.warns(secateur.NotCalibrated, match="^no input reached unused.weight: ") as caught:
        found = secateur.calibrate(Unused(), [X], gram=True)
    assert list(found) == ["used.weight"]
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"module": 3}, secateur.InvalidStateDict, "a torch.nn.Module is needed, not int"),
        ({"module": nn.ReLU()}, secateur.InvalidSpec, "module: has no Linear, convolution"),
        ({"batches": X}, secateur.InvalidSpec, r"batches: Tensor is not .*; give one batch as \["),
        ({"batches": {"x": X}}, secateur.InvalidSpec, "batches: dict is not a list of batches; "),
        ({"batches": 3}, secateur.InvalidSpec, "batches: int is not a list of batches$"),
        ({"batches": []}, secateur.InvalidSpec, "batches: has no batch"),
        ({"gram": 1}, secateur.InvalidSpec, "gram: 1 is neither True nor False"),
        ({"layers": "fc"}, secateur.InvalidSpec, "layers: 'fc' names no weight .* '0.weight'"),
        ({"layers": []}, secateur.InvalidSpec, "layers: .* is not a name, a glob, or a list"),
        ({"progress": 3}, secateur.SecateurError, "progress: 3 is not True"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    given: dict[str, Any] = {"module": NET, "batches": [X]} | arguments
    with pytest.raises(error, match=f"^{message}"):
        secateur.calibrate(**given)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_a_script_module_has_no_layers() -> None:
    module = torch.jit.script(nn.Linear(8, 2))
    with pytest.raises(secateur.InvalidSpec, match="those in a ScriptModule are not seen"):
        secateur.calibrate(module, [X])


def test_progress() -> None:
    seen: list[tuple[int, int]] = []
    secateur.calibrate(NET, [X, X], progress=lambda *shown: seen.append(shown))
    assert seen == [(1, 2), (2, 2)]

    def generated() -> Iterator[Tensor]:
        yield from (X, X)

    secateur.calibrate(NET, generated(), progress=lambda *shown: seen.append(shown))
    assert seen[2:] == [(1, 0), (2, 0)]
    assert_close(
        secateur.calibrate(NET, generated(), progress=True), secateur.calibrate(NET, [X, X])
    )


def test_distributed_data_parallel(tmp_path: Path) -> None:
    store = f"file://{tmp_path / 'store'}"
    distributed.init_process_group("gloo", init_method=store, rank=0, world_size=1)
    try:
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(NET))
        assert secateur.calibrate(wrapped, [X], gram=True) == EXPECTED
    finally:
        distributed.destroy_process_group()
