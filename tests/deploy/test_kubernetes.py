"""The manifests of Kubernetes match its schemas and the server."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import grpc
import jsonschema
import kubernetes_validate  # type: ignore[import-untyped]
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from secateur_proto.sizes import byte_count
from secateur_server.operate.tokens_file import read_tokens
from tests.conftest import RunningServer
from tests.deploy.options import variables
from tests.deploy.promql import metrics_of, names_in

FOLDER = Path("deploy/kubernetes")
SCHEMA = "raycluster.schema.json"
BASE = sorted(set((FOLDER / "base").glob("*.yaml")) - {FOLDER / "base/kustomization.yaml"})
# The first version with gRPC probes, and the latest that has schemas.
VERSIONS = ("1.27", kubernetes_validate.latest_version())

needs_kubectl = pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def base() -> list[dict[str, Any]]:
    return [found for path in BASE for found in documents(path.read_text())]


def built(name: str) -> list[dict[str, Any]]:
    """Returns the documents that `kubectl apply -k` would send."""
    command = ["kubectl", "kustomize", str(FOLDER / name)]
    return documents(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def of_kind(found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    return next(document for document in found if document["kind"] == kind)


def pod(found: list[dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = of_kind(found, "StatefulSet")["spec"]["template"]["spec"]
    return spec


def check(found: list[dict[str, Any]]) -> None:
    """Validates with Kubernetes' schemas, which have no kinds of operators."""
    own = {"ServiceMonitor": check_monitor, "RayCluster": check_cluster}
    for document in found:
        if document["kind"] in own:
            own[document["kind"]](document, found)
            continue
        for version in VERSIONS:
            kubernetes_validate.validate(document, version, strict=True)


def check_monitor(monitor: dict[str, Any], found: list[dict[str, Any]]) -> None:
    assert monitor["apiVersion"] == "monitoring.coreos.com/v1"
    assert set(monitor["spec"]) == {"selector", "endpoints"}
    (endpoint,) = monitor["spec"]["endpoints"]
    assert set(endpoint) <= {"port", "path", "interval", "authorization"}
    wanted = monitor["spec"]["selector"]["matchLabels"].items()
    labelled = [
        document
        for document in found
        if document["kind"] == "Service"
        and wanted <= document["metadata"].get("labels", {}).items()
    ]
    assert [service["metadata"]["name"] for service in labelled] == ["secateur"]  # the job
    assert endpoint["port"] in {port["name"] for port in labelled[0]["spec"]["ports"]}


def check_cluster(cluster: dict[str, Any], found: list[dict[str, Any]]) -> None:
    jsonschema.validate(cluster, json.loads(Path(__file__).with_name(SCHEMA).read_text()))
    for template in templates(cluster):
        assert template["spec"]["automountServiceAccountToken"] is False
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, **template}
        check([document])


def templates(cluster: dict[str, Any]) -> list[dict[str, Any]]:
    """The pods of a RayCluster: the head's, and those of each group of workers."""
    spec = cluster["spec"]
    return [group["template"] for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"])]


def test_the_manifests_match_the_schemas_of_kubernetes() -> None:
    check(base())
    check(documents((FOLDER / "tls/secrets-example.yaml").read_text()))


@needs_kubectl
@pytest.mark.parametrize("name", ["base", "tls"])
def test_the_output_of_kustomize_matches_the_schemas_of_kubernetes(name: str) -> None:
    found = built(name)
    assert len(found) == len(base())
    check(found)


def test_all_manifests_are_applied() -> None:
    kustomization = yaml.safe_load((FOLDER / "base/kustomization.yaml").read_text())
    assert sorted(kustomization["resources"]) == [path.name for path in BASE]


def test_the_schemas_detect_a_wrong_key() -> None:
    found = of_kind(base(), "StatefulSet")
    found["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["grpcs"] = {}
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found, VERSIONS[-1], strict=True)


def test_a_pod_has_no_privileges() -> None:
    spec = pod(base())
    (server,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"]
    assert spec["securityContext"]["runAsUser"] == 10001
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    assert server["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert server["resources"]["limits"]["memory"] == server["resources"]["requests"]["memory"]


def test_the_grace_period_is_longer_than_the_drain_timeout() -> None:
    drain = float(of_kind(base(), "ConfigMap")["data"]["SECATEUR_DRAIN_TIMEOUT"])
    assert pod(base())["terminationGracePeriodSeconds"] >= drain + 10


def test_the_store_is_a_persistent_volume_of_sufficient_size() -> None:
    (claim,) = of_kind(base(), "StatefulSet")["spec"]["volumeClaimTemplates"]
    (server,) = pod(base())["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in server["volumeMounts"]}
    assert mounts[claim["metadata"]["name"]] == "/var/lib/secateur"
    limit = of_kind(base(), "ConfigMap")["data"]["SECATEUR_STORE_MAX_BYTES"]
    storage = claim["spec"]["resources"]["requests"]["storage"]
    assert 1.1 * byte_count(limit) <= byte_count(f"{storage}B")


def test_the_services_of_the_probes_exist(channel: grpc.Channel) -> None:
    (server,) = pod(base())["containers"]
    asked = {
        probe: server[probe]["grpc"].get("service", "") for probe in server if "Probe" in probe
    }
    assert asked == {"startupProbe": "", "readinessProbe": "", "livenessProbe": "liveness"}
    for service in asked.values():
        request = health_pb2.HealthCheckRequest(service=service)
        answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=300)
        assert answer.status == health_pb2.HealthCheckResponse.SERVING


@needs_kubectl
def test_with_tls_the_server_is_not_insecure_and_probes_use_tls() -> None:
    found = built("tls")
    data = of_kind(found, "ConfigMap")["data"]
    assert "SECATEUR_INSECURE" not in data
    (server,) = pod(found)["containers"]
    mounts = tuple(mount["mountPath"] for mount in server["volumeMounts"])
    for name in ("TLS_CERT", "TLS_KEY", "TOKENS_FILE", "METRICS_TOKEN_FILE"):
        assert data[f"SECATEUR_{name}"].startswith(mounts)
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert "grpc" not in server[probe]
        assert server[probe]["exec"]["command"][:2] == ["python3", "/opt/secateur/healthcheck.py"]


def test_every_variable_is_an_option() -> None:
    files = list(FOLDER.glob("*/configmap.yaml"))
    assert files
    for path in files:
        assert set(yaml.safe_load(path.read_text())["data"]) <= variables()


def test_the_example_of_tokens_can_be_used(tmp_path: Path) -> None:
    _, tokens = documents((FOLDER / "tls/secrets-example.yaml").read_text())
    (tmp_path / "tokens.toml").write_text(tokens["stringData"]["tokens.toml"])
    assert len(read_tokens(tmp_path / "tokens.toml")) == 1


@needs_kubectl
def test_a_ray_cluster_has_a_server_at_its_head() -> None:
    found = built("ray")
    check(found)
    kinds = [document["kind"] for document in found]
    assert not {"StatefulSet", "PodDisruptionBudget"} & set(kinds)
    head, workers = templates(of_kind(found, "RayCluster"))
    ray, server = head["spec"]["containers"]
    selector = of_kind(found, "Service")["spec"]["selector"]
    assert selector.items() <= head["metadata"]["labels"].items()
    (worker,) = workers["spec"]["containers"]
    images = {container["image"] for container in (ray, server, worker)}
    assert len(images) == 1
    assert images.pop().startswith("registry.example.com/")
    shared = {mount["mountPath"] for mount in ray["volumeMounts"]}
    assert shared == {"/tmp", "/dev/shm"} <= {m["mountPath"] for m in server["volumeMounts"]}
    for container in (ray, server, worker):
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


@needs_kubectl
def test_the_schema_of_a_ray_cluster_detects_a_wrong_key() -> None:
    cluster = of_kind(built("ray"), "RayCluster")
    cluster["spec"]["workerGroupSpecs"][0]["maxReplica"] = 1
    with pytest.raises(jsonschema.ValidationError):
        check_cluster(cluster, [])
    del cluster["spec"]["workerGroupSpecs"][0]["maxReplica"]
    templates(cluster)[1]["spec"]["containers"][0]["prots"] = []
    with pytest.raises(kubernetes_validate.ValidationError):
        check_cluster(cluster, [])


@needs_kubectl
def test_nodes_have_the_version_of_ray_that_is_installed() -> None:
    version = of_kind(built("ray"), "RayCluster")["spec"]["rayVersion"]
    assert f"ray=={version}" in Path("constraints.txt").read_text().splitlines()


@needs_kubectl
def test_replicas_share_a_store_and_bound_the_age_of_connections() -> None:
    found = built("replicas")
    check(found)
    assert "StatefulSet" not in [document["kind"] for document in found]
    data = of_kind(found, "ConfigMap")["data"]
    assert data["SECATEUR_STORE_URI"].startswith("s3://")
    assert 0 < float(data["SECATEUR_MAX_CONNECTION_AGE"]) <= 600
    deployment = of_kind(found, "Deployment")
    assert "replicas" not in deployment["spec"], "an apply would reset those of the autoscaler"
    spec = deployment["spec"]["template"]["spec"]
    (server,) = spec["containers"]
    assert server == {
        **pod(base())["containers"][0],
        **{k: server[k] for k in ("image", "envFrom")},
    }
    assert {volume["name"] for volume in spec["volumes"]} == {
        mount["name"] for mount in server["volumeMounts"]
    }


def test_the_autoscalers_metrics_are_those_of_the_adapter_and_a_server(
    server: RunningServer,
) -> None:
    folder = FOLDER / "replicas"
    rules = yaml.safe_load((folder / "adapter-rules.yaml").read_text())["rules"]["custom"]
    (scaler,) = documents((folder / "horizontalpodautoscaler.yaml").read_text())
    wanted = {metric["pods"]["metric"]["name"] for metric in scaler["spec"]["metrics"]}
    assert wanted == {rule["name"]["as"] for rule in rules}
    shown = metrics_of(server)
    for rule in rules:
        query = re.sub("<<.*?>>", "pod", f"{rule['metricsQuery']} or {rule['seriesQuery']}")
        names = names_in(query)
        assert names
        assert all(re.search(rf"^{name} ", shown, re.MULTILINE) for name in names), names
