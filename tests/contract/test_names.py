"""Names that programs outside this repository use."""

import inspect
import re
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import grpc
import numpy as np
import pytest

import secateur
from secateur_proto import checkpoints_pb2, pruner_pb2
from secateur_server.config import read_config
from tests.conftest import RunningServer

MODEL = {
    "conv1.weight": np.arange(1, 55, dtype=np.float32).reshape(6, 1, 3, 3),
    "fc1.weight": np.arange(1, 13, dtype=np.float32).reshape(3, 4),
}


def test_the_python_names_take_the_arguments_of_the_contract() -> None:
    signatures: dict[Callable[..., Any], list[str]] = {
        secateur.Client: ["address", "token", "tls", "timeout", "channel"],
        secateur.Client.prune: ["self", "source", "spec", "output", "progress", "keep"],
        secateur.Client.upload: ["self", "source"],
        secateur.Client.checkpoint: ["self", "name"],
        secateur.Client.checkpoints: ["self"],
        secateur.Client.download: ["self", "checkpoint", "path"],
        secateur.Client.delete: ["self", "checkpoint"],
        secateur.l1_unstructured: ["tensors", "amount"],
        secateur.random_unstructured: ["tensors", "amount", "seed"],
        secateur.ln_structured: ["tensors", "amount", "n", "dim"],
        secateur.random_structured: ["tensors", "amount", "dim", "seed"],
        secateur.global_unstructured: ["tensors", "amount", "importance"],
        secateur.custom_from_mask: ["masks"],
        secateur.calibrate: ["module", "batches", "gram"],
        secateur.Statistics.save: ["self", "path"],
        secateur.Statistics.load: ["path"],
        secateur.Statistics.from_imatrix: ["path", "names"],
    }
    for function, names in signatures.items():
        assert list(inspect.signature(function).parameters)[: len(names)] == names


def test_a_prune_of_the_contract(client: secateur.Client) -> None:
    spec = secateur.l1_unstructured("conv*.weight", 0.5) + secateur.ln_structured(
        "fc1.weight", 2, n=2, dim=0
    )
    result = client.prune(MODEL, spec)
    assert result.masks["conv1.weight"].dtype == bool
    assert result.masks["conv1.weight"].shape == (6, 1, 3, 3)
    assert result.report.tensors["conv1.weight"].sparsity == 0.5
    assert (result.report.zeros, result.report.total) == (27 + 8, 66)
    assert set(result.state_dict("reparametrized")) == {
        *("conv1.weight_orig", "conv1.weight_mask", "fc1.weight_orig", "fc1.weight_mask")
    }
    final = client.finalize(result.state_dict("reparametrized"))
    assert final.report.sparsity == result.report.sparsity
    assert (final.state_dict()["fc1.weight"] == result.state_dict("dense")["fc1.weight"]).all()


def test_a_report_of_the_contract(client: secateur.Client) -> None:
    report = client.report({"w": np.array([0.0, 1.0])})
    assert (report.sparsity, report.zeros, report.total) == (0.5, 1, 2)
    tensor = report.tensors["w"]
    assert (tensor.sparsity, tensor.zeros, tensor.total) == (0.5, 1, 2)
    assert (tensor.shape, tensor.dtype, tensor.bytes) == ((2,), "F64", 16)


@pytest.mark.parametrize(
    "name",
    [
        *("InvalidSpec", "InvalidStateDict", "ServerBusy", "Unauthenticated"),
        *("CheckpointNotFound", "Unavailable", "DeadlineExceeded"),
    ],
)
def test_every_error_is_a_secateur_error(name: str) -> None:
    assert issubclass(getattr(secateur, name), secateur.SecateurError)


def test_the_rpcs_have_their_names_and_kinds() -> None:
    service = pruner_pb2.DESCRIPTOR.services_by_name["Pruner"]
    assert service.full_name == "secateur.v1.Pruner"
    assert {m.name: (m.client_streaming, m.server_streaming) for m in service.methods} == {
        "Prune": (True, True),
        "Report": (True, False),
        "Plan": (True, False),
        "Finalize": (True, True),
        "GetServerInfo": (False, False),
    }


def test_the_rpcs_of_checkpoints_have_their_names_and_kinds() -> None:
    service = checkpoints_pb2.DESCRIPTOR.services_by_name["Checkpoints"]
    assert service.full_name == "secateur.v1.Checkpoints"
    assert {m.name: (m.client_streaming, m.server_streaming) for m in service.methods} == {
        "Upload": (True, False),
        "QueryUpload": (False, False),
        "Download": (False, True),
        "Get": (False, False),
        "List": (False, False),
        "Delete": (False, False),
    }


def test_checkpoints_of_the_contract(client: secateur.Client, tmp_path: Path) -> None:
    spec = secateur.l1_unstructured("*.weight", 0.5)
    checkpoint = client.upload(MODEL)
    assert checkpoint.name.startswith("checkpoints/")
    kept = client.prune(MODEL, spec, keep=True).checkpoint
    assert isinstance(checkpoint, secateur.Checkpoint)
    assert kept is not None
    assert client.prune(checkpoint, spec).report.sparsity == 0.5
    assert client.report(kept).sparsity == client.finalize(kept).report.sparsity == 0.5
    assert client.checkpoint(kept.name) == kept
    client.download(kept, tmp_path / "kept.safetensors")
    client.download(kept.name, tmp_path / "kept.safetensors")
    for each in (checkpoint, kept):
        assert each in list(client.checkpoints())
        client.delete(each)
    with pytest.raises(secateur.CheckpointNotFound):
        client.checkpoint(kept.name)


def test_the_metrics_have_their_names(server: RunningServer) -> None:
    with urlopen(f"http://{server.metrics_address}/metrics", timeout=300) as answer:
        found = re.findall(r"^# TYPE (\S+)", answer.read().decode(), re.M)
    assert {
        *("grpc_server_started_total", "grpc_server_handled_total"),
        *("grpc_server_handling_seconds", "secateur_build_info"),
        *("secateur_store_bytes", "secateur_store_limit_bytes", "secateur_checkpoints"),
        *("secateur_evictions_total", "secateur_evicted_bytes_total"),
        "secateur_uploads_resumed_total",
    } <= set(found)


def test_every_option_of_the_server_is_an_environment_variable(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    options = {
        "address": "127.0.0.1:1",
        "metrics-address": "127.0.0.1:2",
        "device": "cpu",
        "max-model-bytes": "1GiB",
        "drain-timeout": "5",
        "store-dir": str(tmp_path),
        "store-uri": "s3://bucket/checkpoints",
        "store-max-bytes": "2GiB",
        "store-ttl": "60",
        "work-memory": "3GiB",
        "allow-path": f"/,{tmp_path}",
        "allow-uri": "s3://bucket/models",
        "ray-address": "127.0.0.1:6379",
        "memory-limit": "4GiB",
        "queue-size": "3",
        "idle-timeout": "6",
        "min-throughput": "7KiB",
        "max-connection-age": "7",
        "max-connection-age-grace": "8",
        **dict.fromkeys(("tls-cert", "tls-key", "tls-client-ca"), str(file)),
        **dict.fromkeys(("tokens-file", "metrics-token-file"), str(file)),
        "insecure": "1",
        "log-format": "json",
        "otlp-endpoint": "http://localhost:4317",
        "check": "1",
    }
    names = {name: f"SECATEUR_{name.upper().replace('-', '_')}" for name in options}
    config = read_config([f"--{name}={value}" for name, value in options.items()], {})
    assert read_config([], {names[name]: value for name, value in options.items()}) == config
    assert {field.name for field in fields(config)} == {n.replace("-", "_") for n in options}


def test_a_client_accepts_a_channel_and_leaves_it_open(channel: grpc.Channel) -> None:
    for _ in range(2):
        with secateur.Client(channel=channel) as client:
            assert client.report(MODEL).total == 66


def test_a_client_without_an_address_or_a_channel_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SECATEUR_SERVER", raising=False)
    with pytest.raises(secateur.SecateurError, match="an address, or a channel"):
        secateur.Client()
