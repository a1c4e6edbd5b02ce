"""Programs in other languages prune real weights, with nothing but the .proto files."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import Module

import secateur.cli
from tests.conftest import RunningServer
from tests.reference import all_l1, assert_same_tensors, by_torch, masks_of, place

HERE = Path(__file__).parent
# Compilers of C++ and Go take 10 seconds for the client. Its tests are those of the client in Node.
LANGUAGES = (
    "node",
    pytest.param("cpp", marks=pytest.mark.slow),
    pytest.param("go", marks=pytest.mark.slow),
)

# The magnitudes around this threshold are distinct, so torch has no ties to break.
FRACTION = 0.5


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds a lock, because the workers of pytest-xdist share the built programs."""
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the programs, which all workers of a run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "languages"
    folder.mkdir(exist_ok=True)
    return folder


def need(*programs: str) -> None:
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"no {program}: make system")


def check(*command: str | Path, cwd: Path | None = None) -> None:
    ended = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def build_node(folder: Path) -> list[str]:
    """Builds the program, and returns the command that runs it."""
    need("node", "npm")
    folder.mkdir(exist_ok=True)
    if not (folder / "node_modules").exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / "node" / name, folder)
        check("npm", "ci", "--ignore-scripts", cwd=folder)
    return ["env", f"NODE_PATH={folder / 'node_modules'}", "node", str(HERE / "node/client.js")]


def build_cpp(folder: Path) -> list[str]:
    """Builds the program, and returns the command that runs it."""
    need("make", "g++", "pkg-config", "protoc", "grpc_cpp_plugin")
    if subprocess.run(["pkg-config", "grpc++", "protobuf"]).returncode != 0:
        pytest.skip("no libgrpc++-dev, libprotobuf-dev: make system")
    check("make", "-j2", "-C", HERE / "cpp", f"OUT={folder}")
    return [str(folder / "client")]


def build_go(folder: Path) -> list[str]:
    """Runs the commands of the document for Debian, and returns the command of the program."""
    need("go", "protoc", "protoc-gen-go")
    sources = folder / "src/example.com/prune"
    if not sources.exists():
        shutil.copytree("protos", sources / "protos")
        shutil.copy("examples/prune.go", sources)
        commands = "".join(excerpts_of("bash", "docs/go.md"))
        path = f"GOPATH={folder}:/usr/share/gocode"
        check("env", path, f"GOCACHE={folder / 'cache'}", "bash", "-ec", commands, cwd=sources)
    return [str(sources / "prune")]


@pytest.fixture(scope="session", params=LANGUAGES)
def program(request: pytest.FixtureRequest, built: Path) -> list[str]:
    """The command that runs a program. The first test that needs it builds it."""
    build = {"node": build_node, "cpp": build_cpp, "go": build_go}[request.param]
    with locked(built):
        return build(built / request.param)


@pytest.fixture(scope="session")
def tensors(crepe: Path) -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = torch.load(crepe, weights_only=True)
    return loaded


@pytest.fixture(scope="session")
def theirs(tensors: dict[str, Tensor]) -> Module:
    """A module with the convolutions, pruned by torch.nn.utils.prune.global_unstructured."""
    weights = {name: tensor for name, tensor in tensors.items() if tensor.dim() == 4}
    return by_torch(weights, all_l1(list(weights), FRACTION))


@pytest.fixture
def model(tensors: dict[str, Tensor], tmp_path: Path) -> Path:
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def run(
    program: list[str], address: str, model: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program, which writes the answer to `result` beside the model."""
    rest = [address, str(model), str(FRACTION), str(model.with_name("result"))]
    command = [*program, "--tensors", "conv?.weight", *options, *rest]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def pruned(program: list[str], server: RunningServer, model: Path, output: str) -> Path:
    """Prunes half of the weights with a program, and returns the file that it wrote."""
    ended = run(program, server.address, model, "--output", output)
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"zeros": 196_608, "total": 393_216}
    return model.with_name("result")


def test_the_masks_are_those_of_torch(
    program: list[str], server: RunningServer, model: Path, theirs: Module
) -> None:
    masks = load_file(pruned(program, server, model, "masks"))
    assert masks.keys() == masks_of(theirs).keys()
    for name, mask in masks_of(theirs).items():
        packed = np.packbits(mask.numpy(), bitorder="little")
        assert masks[name].numpy().tobytes() == packed.tobytes(), name


def test_the_dense_file_is_that_of_torch(
    program: list[str],
    server: RunningServer,
    model: Path,
    theirs: Module,
    tensors: dict[str, Tensor],
) -> None:
    weights = {name: getattr(*place(theirs, name)) for name in masks_of(theirs)}
    assert_same_tensors(load_file(pruned(program, server, model, "dense")), {**tensors, **weights})


def test_a_report_above_the_default_message_limit_arrives(
    program: list[str], server: RunningServer, tmp_path: Path
) -> None:
    """It is one message of more than 4 MiB, gRPC's default limit."""
    model = tmp_path / "model.safetensors"
    save_file({f"{i:01000}": torch.ones(1) for i in range(3_000)}, model)  # long names
    ended = run(program, server.address, model, "--tensors", "*")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == {"zeros": 1_500, "total": 3_000}


def check_failed(ended: subprocess.CompletedProcess[str], model: Path, *says: str) -> None:
    assert (ended.returncode, ended.stdout) == (1, "")
    assert [part for part in says if part not in ended.stderr] == [], ended.stderr
    assert list(model.parent.iterdir()) == [model]


def test_an_unknown_tensor_is_an_error_with_its_name(
    program: list[str], server: RunningServer, model: Path
) -> None:
    ended = run(program, server.address, model, "--tensors", "conv7.weight")
    check_failed(ended, model, "INVALID_ARGUMENT: ", "conv7.weight", "spec.rules[0].selection")


def test_a_short_deadline_ends_the_call(
    program: list[str], server: RunningServer, model: Path
) -> None:
    ended = run(program, server.address, model, "--deadline", "0.001")
    check_failed(ended, model, "DEADLINE_EXCEEDED: ")


@dataclass
class RefusingHandler(grpc.GenericRpcHandler):
    """Refuses every call, and records its metadata and deadline."""

    seen: list[tuple[str, dict[str, Any], float]] = field(default_factory=list)

    def service(self, details: grpc.HandlerCallDetails) -> Any:
        def refuse(_: object, context: grpc.ServicerContext) -> None:
            metadata = dict(context.invocation_metadata())
            self.seen.append((details.method, metadata, context.time_remaining()))
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "who are you?")

        return grpc.stream_stream_rpc_method_handler(refuse)


def test_a_call_has_the_token_and_the_deadline(program: list[str], model: Path) -> None:
    handler = RefusingHandler()
    server = grpc.server(ThreadPoolExecutor(1), handlers=[handler])
    address = f"127.0.0.1:{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    ended = run(program, address, model, "--token", "sesame", "--deadline", "50")
    server.stop(None).wait()
    check_failed(ended, model, "UNAUTHENTICATED: who are you?")
    ((method, metadata, remaining),) = handler.seen
    assert method == "/secateur.v1.Pruner/Prune"
    assert metadata["authorization"] == "Bearer sesame"
    assert 0 < remaining <= 50


def test_the_example_in_node_reads_packed_files(
    built: Path, model: Path, tensors: dict[str, Tensor]
) -> None:
    with locked(built):
        build_node(built / "node")
    weights = {name: torch.where(t.abs() < 0.05, t * 0, t) for name, t in tensors.items()}
    weights |= {"half": weights["conv1.weight"].bfloat16(), "step": torch.tensor(3)}
    save_file(weights, model)
    packed = model.with_name("packed.safetensors")
    secateur.cli.main(["pack", str(model), "-o", str(packed)])
    environment = {**os.environ, "NODE_PATH": str(built / "node/node_modules")}
    command = ["node", "examples/read_packed.js", str(packed)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    found = {name: rest for name, *rest in map(json.loads, ended.stdout.splitlines())}
    dtypes = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}
    assert found == {
        name: [dtypes[tensor.dtype], list(tensor.shape), digest_of(tensor)]
        for name, tensor in weights.items()
    }


def test_the_example_in_node_prunes_by_statistics(
    built: Path, server: RunningServer, client: secateur.Client, tmp_path: Path
) -> None:
    """With the bits of the Python client. Keys and values share a Gram matrix."""
    with locked(built):
        build_node(built / "node")
    torch.manual_seed(0)
    net = torch.nn.MultiheadAttention(16, 2, kdim=8, vdim=8, batch_first=True)
    memory = torch.randn(8, 7, 8)
    batch = torch.randn(8, 5, 16), memory, memory
    statistics = secateur.calibrate(net, [batch], gram=True, progress=False)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    statistics.save(tmp_path / "statistics.safetensors")
    files = [str(tmp_path / name) for name in ("model.safetensors", "statistics.safetensors")]
    out = tmp_path / "out.safetensors"
    environment = {**os.environ, "NODE_PATH": str(built / "node/node_modules")}
    command = ["node", "examples/calibrated.js", server.address, *files, "0.5", str(out)]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    spec = secateur.wanda("*", 0.5, statistics) + secateur.refit("*", statistics)
    expected = client.prune(net, spec, output="dense", progress=False).state_dict("dense")
    found = load_file(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def digest_of(tensor: Tensor) -> str:
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(data.tobytes()).hexdigest()


def excerpts_of(language: str, path: str = "docs/languages.md") -> list[str]:
    text = Path(path).read_text()
    found = re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found
    return found


def test_the_excerpts_of_the_documents_are_in_the_programs() -> None:
    program = (HERE / "cpp/client.cc").read_text()
    assert [excerpt for excerpt in excerpts_of("cpp") if excerpt not in program] == []
    program = Path("examples/prune.go").read_text()
    assert [part for part in excerpts_of("go", "docs/go.md") if part not in program] == []


def test_the_javascript_of_the_document_runs(
    built: Path, server: RunningServer, model: Path, tensors: dict[str, Tensor]
) -> None:
    with locked(built):
        build_node(built / "node")
    folder = model.parent
    (folder / "prune.js").write_text("".join(excerpts_of("js")))
    shutil.copytree("protos/secateur", folder / "protos/secateur")
    (folder / "node_modules").symlink_to(built / "node/node_modules")
    command = ["node", "prune.js", server.address, model.name, str(FRACTION), "result"]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    weights = {name: tensor for name, tensor in tensors.items() if name.endswith(".weight")}
    total = sum(tensor.numel() for tensor in weights.values())
    assert ended.stdout == f"{total // 2} of {total} are pruned\n"
    expected = masks_of(by_torch(weights, all_l1(list(weights), FRACTION)))
    masks = load_file(folder / "result")
    assert masks.keys() == expected.keys()
    for name, mask in expected.items():
        packed = np.packbits(mask.numpy(), bitorder="little")
        assert masks[name].numpy().tobytes() == packed.tobytes(), name
    command[2] = "127.0.0.1:1"
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 1
    assert ended.stderr.startswith("UNAVAILABLE: ")


def test_the_lock_file_does_not_name_a_registry() -> None:
    lock = json.loads((HERE / "node/package-lock.json").read_text())
    assert len(lock["packages"]) > 2
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
