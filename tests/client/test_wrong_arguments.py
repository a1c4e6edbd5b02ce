"""Every wrong argument raises a SecateurError.

TypeError is left to calls that no signature takes.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

import secateur
from secateur import cli
from tests.conftest import RunningServer

W = np.arange(1.0, 13, dtype=np.float32).reshape(4, 3)
MODEL = {"w": W, "b": W + 1}
HALF = secateur.l1_unstructured("w", 0.5)
GROUP = secateur.group("g", secateur.member("w"))


class Stack(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(3, 3) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


STATISTICS = secateur.calibrate(Stack(), [torch.ones(2, 2, 3)], gram=True)
RECIPE = Path(__file__).parents[2] / "recipes/lamp-90.yaml"
GPT2 = {"n_embd": 4, "n_layer": 1, "n_head": 2}


def calibrate(**arguments: Any) -> secateur.Statistics:
    """With a valid batch: what a module does with a wrong one, it says itself."""
    return secateur.calibrate(batches=[torch.ones(2, 3)], **arguments)


WRONG: dict[str, Any] = {
    "None": None,
    "True": True,
    "-1": -1,
    "2**64": 1 << 64,
    "2**5000": 1 << 5000,
    "0.5": 0.5,
    "nan": float("nan"),
    "inf": float("inf"),
    "complex": 1j,
    "empty text": "",
    "text": "no such thing",
    "surrogate": "\ud800",
    "null": "a\0b",
    "long text": "x" * 5000,
    "URI": "nothing://x",
    "bytes": b"x",
    "path": Path("/nonexistent/file.safetensors"),
    "directory": Path("."),
    "list": [],
    "list of None": [None],
    "nested list": [[[]]],
    "tuple": (1, "a"),
    "set": {1, 2},
    "map": {},
    "map to None": {"w": None},
    "map of ints": {1: 2},
    "map of arrays": {"w": W},
    "map of texts": {"w": "x"},
    "array": W,
    "array of objects": np.array([None]),
    "tensor": torch.ones(2),
    "meta tensor": torch.ones(2, device="meta"),
    "spec": HALF,
    "group": GROUP,
    "object": object(),
    "function": lambda *_: None,
    "iterator": iter([1]),
}

# Valid calls, from which one argument at a time is made wrong.
FUNCTIONS: dict[Callable[..., Any], dict[str, Any]] = {
    secateur.identity: {"tensors": "w"},
    secateur.l1_unstructured: {"tensors": "w", "amount": 1, "importance_scores": None},
    secateur.random_unstructured: {"tensors": "w", "amount": 1, "seed": 0},
    secateur.ln_structured: {"tensors": "w", "amount": 1, "n": 2, "dim": 0},
    secateur.random_structured: {"tensors": "w", "amount": 1, "dim": 0, "seed": 0},
    secateur.global_unstructured: {"tensors": "w", "amount": 1, "importance": "l1", "seed": 0},
    secateur.custom_from_mask: {"masks": {"w": W}},
    secateur.select: {
        "tensors": "w",
        "amount": 1,
        **dict.fromkeys(("normalization", "allocation", "guard_rails", "scales")),
        **{"importance": "magnitude", "granularity": "element", "scope": "tensor"},
        "of_all": False,
    },
    secateur.grouped: {
        "groups": [GROUP],
        "amount": 1,
        **{"p": 1, "combination": "mean", "normalization": None, "scope": "global"},
        **{"of_all": False, "guard_rails": None, "importance": "magnitude"},
        "importance_scores": None,
    },
    secateur.n_m_structured: {"tensors": "w", "n": 2, "m": 4, "dim": 1},
    secateur.block_structured: {"tensors": "w", "amount": 1, "rows": 1, "cols": 1, "n": 1},
    secateur.global_structured: {"tensors": "w", "amount": 1, "n": 1, "dim": 0},
    secateur.lamp: {"tensors": "w", "amount": 1},
    secateur.erk: {"tensors": "w", "amount": 1},
    secateur.magnitude: {"p": 1},
    secateur.random: {"seed": 0},
    secateur.rows: {},
    secateur.filters: {},
    secateur.columns: {},
    secateur.slices: {"dim": 0},
    secateur.heads: {"head_dim": 1},
    secateur.kernels: {"dims": 4},
    secateur.blocks: {"rows": 1, "cols": 1},
    secateur.blocks_of: {"shape": [1]},
    secateur.n_m: {"n": 2, "m": 4, "dim": 1},
    secateur.threshold: {"value": 1},
    secateur.target_bytes: {"n": 1},
    secateur.target_macs: {"target": 1, "per_unit": {"w": 1}},
    secateur.table: {"fractions": {"w": 1}},
    secateur.rail: {"max_sparsity": None, "min_sparsity": None, "keep_at_least": 0},
    secateur.guard_rails: {
        **{"max_sparsity": None, "min_sparsity": None, "keep_at_least": 0, "keep_first": False},
        **{"keep_last": False, "exclude": (), "per_tensor": None},
    },
    secateur.member: {
        **{"tensor": "w", "dim": 0, "offset": 0, "stride": 1, "units": None, "indices": None},
        **{"scored": True, "masked": True},
    },
    secateur.head_groups: {
        **{"q": "q", "k": "k", "v": "v", "o": "o", "head_dim": 1, "heads": 1},
        "kv_heads": None,
    },
    secateur.query_head_groups: {"q": "q", "o": "o", "head_dim": 1, "heads": 1},
    secateur.is_pruned: {"source": MODEL},
    secateur.compare: {
        **{"a": MODEL, "b": MODEL, "client": None, "labels": None, "details": False},
    },
    secateur.sizes: {"module": torch.nn.Linear(2, 2)},
    secateur.resize: {"module": torch.nn.Linear(2, 2), "sizes": {"weight": [2, 1]}},
    secateur.groups: {
        "module": torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.Linear(4, 2)),
        "example_inputs": torch.ones(1, 2),
    },
    secateur.gain: {
        **{"before": torch.nn.Linear(2, 2), "after": torch.nn.Linear(2, 2)},
        "inputs": torch.ones(1, 2),
    },
    secateur.depth: {"source": {"l.0.w": W, "l.1.w": W}, "layers": [0], "stack": "l", "key": None},
    secateur.transformer_groups: {
        "config": {"model_type": "gpt2", "architectures": ["GPT2Model"], **GPT2},
        **{"parts": ["heads"], "source": None},
    },
    calibrate: {
        **{"module": torch.nn.Linear(3, 4), "gram": False, "layers": None, "mask": None},
        **{"progress": False, "blocks": None, "experts": True},
    },
    secateur.flap: {
        **{"source": {"layers.0.weight": W}, "statistics": STATISTICS, "key": None},
        "groups": [secateur.group("g", secateur.member("layers.0.weight", dim=1))],
    },
    secateur.compensated: {
        "source": {"layers.0.weight": W, "layers.0.bias": W[:, 0].copy()},
        **{"masks": {"layers.0.weight": W > 3}, "statistics": STATISTICS, "key": None},
    },
    secateur.channel_permutation: {
        **{"source": {"layers.0.weight": np.ones((4, 8), np.float32)}, "n": 2, "m": 4, "dim": 1},
        "groups": [secateur.group("g", secateur.member("layers.0.weight", dim=1))],
        **{"importance": "magnitude", "statistics": None, "seed": 0, "key": None},
    },
    secateur.least_influential: {"statistics": STATISTICS, "count": 1, "stack": None},
    secateur.activation: {"statistics": STATISTICS, "p": 1, "power": 1, "relative": False},
    secateur.wanda: {"tensors": "*", "amount": 0.5, "statistics": STATISTICS, "n_m": None},
    secateur.ria: {
        **{"tensors": "*", "amount": 0.5, "statistics": STATISTICS, "n_m": None, "power": 0.5},
    },
    secateur.refit: {"tensors": "*", "statistics": STATISTICS, "damping": 0.1},
    secateur.sparsegpt: {
        **{"tensors": "*", "amount": 0.5, "statistics": STATISTICS, "n_m": None},
        **{"damping": 0.1, "block_size": 128},
    },
    secateur.alps: {
        **{"tensors": "*", "amount": 0.5, "statistics": STATISTICS, "n_m": None},
        "scope": "tensor",
    },
    secateur.Spec.from_dict: {
        "table": {"rules": [{"method": "lamp", "amount": 1, "tensors": "w"}]}
    },
    secateur.read_spec: {"path": RECIPE, "tensors": "w"},
    secateur.spec_schema: {},
    HALF.at: {"step": 1, "steps": 2, "schedule": "cubic"},
}


def problem_of(call: Callable[[], object]) -> str | None:
    """Says why a raised error is wrong: not a SecateurError, or not one line."""
    try:
        call()
    except secateur.SecateurError as error:
        text = str(error)
        return None if text and "\n" not in text else repr(text)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def problems(call: Callable[[Any], object], what: str) -> dict[str, str]:
    """As `problem_of`, for each wrong value."""
    found = {f"{what}: {kind}": problem_of(lambda: call(wrong)) for kind, wrong in WRONG.items()}  # noqa: B023
    return {kind: problem for kind, problem in found.items() if problem}


def problems_of(function: Callable[..., Any], valid: dict[str, Any]) -> dict[str, str]:
    """As `problems`, for each argument of a function beside valid ones."""
    function(**valid)
    found: dict[str, str] = {}
    for name in valid:
        where = f"{function.__name__}({name})"
        found |= problems(lambda wrong: function(**{**valid, name: wrong}), where)  # noqa: B023
    return found


@pytest.mark.parametrize(
    ("function", "valid"), FUNCTIONS.items(), ids=[f.__name__ for f in FUNCTIONS]
)
def test_functions(function: Callable[..., Any], valid: dict[str, Any]) -> None:
    assert problems_of(function, valid) == {}


def test_torchs_own_arguments_are_one_short_line() -> None:
    model = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(20)))
    calls: list[Callable[[], object]] = [
        lambda: secateur.l1_unstructured(model, "weight", 0.5),  # type: ignore[arg-type]
        lambda: secateur.global_unstructured([(model, "weight")], 0.5),  # type: ignore[list-item]
    ]
    for call in calls:
        with pytest.raises(
            secateur.InvalidSpec, match=r"pass the model to client\.prune$"
        ) as raised:
            call()
        assert len(str(raised.value)) < 200
        assert "give names such as 'fc.weight'" in str(raised.value)


@pytest.mark.parametrize(
    ("function", "valid"), FUNCTIONS.items(), ids=[f.__name__ for f in FUNCTIONS]
)
def test_long_values_are_cut(function: Callable[..., Any], valid: dict[str, Any]) -> None:
    long = {"x" * 5000: {"y" * 5000}}
    for name in valid:
        try:
            function(**{**valid, name: long})
        except secateur.SecateurError as error:
            said = str(error)
        else:
            said = ""
        assert "y" * 100 not in said, name


def test_members_of_groups() -> None:
    assert problems(lambda wrong: secateur.group(wrong, secateur.member("w")), "name") == {}
    assert problems(lambda wrong: secateur.group("g", wrong), "member") == {}


def test_every_public_function_is_here() -> None:
    public = [getattr(secateur, name) for name in secateur.__all__]
    functions = {member.__name__ for member in public if inspect.isfunction(member)}
    others = functions - {f.__name__ for f in FUNCTIONS}
    assert others == {"check_spec", "embedded", "export", "group", "load", "reap", "sweep"}


def test_a_client() -> None:
    valid = {"address": "localhost:1", "token": None, "tls": None, "timeout": None}
    valid |= {"channel": None}

    def made(**arguments: Any) -> None:
        secateur.Client(**arguments).close()

    assert problems_of(made, valid) == {}


def methods(client: secateur.Client, path: Path) -> dict[Callable[..., Any], dict[str, Any]]:
    kept = client.upload(MODEL)
    return {
        client.prune: {
            **{"source": MODEL, "spec": HALF, "output": "masks", "progress": False, "keep": False},
            **{"destination": None, "key": None, "prior": "masks", "details": False},
        },
        client.report: {
            **{"source": MODEL, "tensors": None, "progress": False, "key": None, "details": False},
        },
        client.plan: {
            **{"source": MODEL, "spec": HALF, "amounts": None, "progress": False, "key": None},
            "prior": "masks",
        },
        client.sensitivity: {
            **{"source": MODEL, "tensors": None, "amounts": [0.5], "granularity": "element"},
            **{"p": 1, "progress": False, "key": None},
        },
        client.finalize: {
            **{"source": MODEL, "tensors": None, "progress": False, "destination": None},
            **{"key": None, "output": "dense", "groups": (), "prior": "masks"},
            "details": False,
        },
        client.upload: {"source": MODEL, "progress": False, "key": None},
        client.download: {
            **{"checkpoint": kept, "path": path / "m.safetensors", "output": "dense"},
            "progress": False,
        },
        client.checkpoint: {"name": kept.name},
        client.wait_until_ready: {"timeout": 5.0},
        secateur.sweep: {
            **{"client": client, "module": torch.nn.Linear(2, 2), "amounts": [0.5]},
            **{"spec": secateur.l1_unstructured("weight", 0), "evaluate": lambda _: 1.0},
            "progress": False,
        },
    }


def test_methods_of_a_client(
    client: secateur.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where "no such thing" is a path
    found = problems(client.delete, "delete")
    for function, valid in methods(client, tmp_path).items():
        assert valid.keys() == inspect.signature(function).parameters.keys(), function
        found |= problems_of(function, valid)
    assert found == {}


def test_methods_of_results(
    client: secateur.Client, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result, final = client.prune(MODEL, HALF), client.finalize(MODEL)
    path = tmp_path / "out.safetensors"
    found = problems_of(result.save, {"path": path, "form": "dense"})
    found |= problems_of(result.state_dict, {"form": "dense"})
    found |= problems_of(final.save, {"path": path})
    found |= problems(result.apply_to, "apply_to") | problems(final.apply_to, "final.apply_to")
    assert found == {}


def test_files_that_cannot_be_read_or_written(client: secateur.Client, tmp_path: Path) -> None:
    """Each kind of path, by every call that takes one."""
    result, kept = client.prune(MODEL, HALF), client.upload(MODEL)
    folder = tmp_path / "folder.safetensors"
    folder.mkdir()
    os.symlink("loop.safetensors", tmp_path / "loop.safetensors")
    os.symlink("nowhere.safetensors", tmp_path / "broken.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    (tmp_path / "text.safetensors.index.json").write_text("{}")
    os.mkfifo(tmp_path / "pipe.safetensors")
    paths = [folder, *tmp_path.iterdir(), tmp_path / "no/such.safetensors"]
    paths += [tmp_path / "text.safetensors/in.safetensors", tmp_path / f"{'x' * 300}.safetensors"]
    paths += [path.with_suffix(suffix) for path in list(paths) for suffix in (".pt", ".npz", "")]
    calls: list[Callable[[Path], object]] = [
        lambda path: client.prune(path, HALF),
        client.report,
        client.upload,
        secateur.custom_from_mask,
        result.save,
        lambda path: result.save(path, "masks"),
        lambda path: client.download(kept, path),
        lambda path: secateur.Client("localhost:1", tls=path).close(),
    ]
    found = {
        f"call {number}, {path}": problem
        for path in paths
        for number, call in enumerate(calls)
        if (problem := problem_of(lambda: call(path)))  # noqa: B023
    }
    assert found == {}
    client.delete(kept)


COMMANDS = [
    ["prune", "{path}", "-o", "o.safetensors", "--method", "l1_unstructured", "--amount", "1"],
    ["prune", "{model}", "-o", "{path}", "--method", "l1_unstructured", "--amount", "1"],
    ["prune", "{model}", "-o", "o.safetensors", "--spec", "{path}"],
    ["report", "{path}"],
    ["report", "{model}", "--tls-ca", "{path}"],
    ["report", "{model}", "--tls-cert", "{path}", "--tls-key", "{path}"],
    ["report", "{model}", "--server", "{path}"],
    ["report", "{model}", "--tensors", "{path}"],
    ["plan", "{path}"],
    ["sensitivity", "{path}"],
    ["finalize", "{path}", "-o", "o.safetensors"],
    ["finalize", "{model}", "-o", "{path}"],
    ["checkpoints", "put", "{path}"],
    ["checkpoints", "get", "{path}", "-o", "o.safetensors"],
    ["checkpoints", "get", "{kept}", "-o", "{path}"],
    ["checkpoints", "rm", "{path}"],
]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands(
    client: secateur.Client,
    server: RunningServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
) -> None:
    """Each fails with one line, and writes no file."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SECATEUR_SERVER", server.address)
    save_file(MODEL, "model.safetensors")
    kept = client.upload(MODEL)
    Path("folder").mkdir()
    os.mkfifo("pipe.safetensors")
    Path("text.safetensors").write_text("text")
    Path("text.yaml").write_text("{\n\n:")
    Path("binary.json").write_bytes(bytes(range(256)))
    names = ["", " ", "none.safetensors", "no/folder.safetensors", "folder", "pipe.safetensors"]
    names += ["text.safetensors", "text.safetensors/x.pt", "text.yaml", "binary.json", "x" * 300]
    names += ["nothing://x", "checkpoints/none", "checkpoints/", "a\nb"]
    for name in names:
        before = set(tmp_path.rglob("*"))
        given = {"path": name, "model": "model.safetensors", "kept": kept.name}
        try:
            status = cli.main([part.format(**given) for part in command])
        except SystemExit as usage:
            status = 1 if usage.code == 2 else -1
        shown = capsys.readouterr()
        new = set(tmp_path.rglob("*")) - before
        if status == 0:  # a name that a model or a file may have
            assert shown.err == "", name
            for path in new:
                path.unlink()
            continue
        assert (status, shown.out, new) == (1, "", set()), name
        (line,) = shown.err.splitlines()
        assert line.startswith("secateur: "), line
    client.delete(kept)
