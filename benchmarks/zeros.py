"""What zeros alone gain: the time of a matrix product whose weight is sparse, in one run.

make gains
"""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from common import medians

SIDE, BATCH = 2048, 128
SPARSITIES = (0.5, 0.8, 0.9, 0.95, 0.99)

Run = Callable[[], Any]


def compare() -> dict[str, list[float]]:
    """The seconds of a dense product, and of each form at each sparsity, in turn."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    weight, inputs = torch.randn(SIDE, SIDE), torch.randn(SIDE, BATCH)
    with tempfile.TemporaryDirectory() as folder:
        forms: dict[str, list[Run]] = {"dense": [_by_torch(weight, inputs)]}
        forms["dense, onnxruntime"] = [_by_onnx(weight, inputs, Path(folder), is_sparse=False)]
        sparse = [_sparse(weight, sparsity) for sparsity in SPARSITIES]
        forms["zeros in a dense tensor"] = [_by_torch(one, inputs) for one in sparse]
        forms["zeros, onnxruntime"] = [
            _by_onnx(one, inputs, Path(folder), is_sparse=False) for one in sparse
        ]
        forms["sparse initializer, onnxruntime"] = [
            _by_onnx(one, inputs, Path(folder), is_sparse=True) for one in sparse
        ]
        forms["CSR, torch"] = [_by_csr(one, inputs) for one in sparse]
        seconds = iter(medians([run for runs in forms.values() for run in runs]))
        return {name: [next(seconds) for _ in runs] for name, runs in forms.items()}


def _sparse(weight: Tensor, sparsity: float) -> Tensor:
    """The weight with zeros at random places."""
    return weight * (torch.rand(weight.shape) >= sparsity)


def _by_torch(weight: Tensor, inputs: Tensor) -> Run:
    return lambda: weight @ inputs


def _by_csr(weight: Tensor, inputs: Tensor) -> Run:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the layout a beta
        csr = weight.to_sparse_csr()
    return lambda: csr @ inputs


def _by_onnx(weight: Tensor, inputs: Tensor, folder: Path, is_sparse: bool) -> Run:
    """A model of one MatMul, with the weight as an initializer."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, inputs.shape)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, (SIDE, BATCH))
    node = helper.make_node("MatMul", ["w", "x"], ["y"])
    dense = [] if is_sparse else [numpy_helper.from_array(weight.numpy(), "w")]
    sparse = [_sparse_initializer(weight)] if is_sparse else []
    graph = helper.make_graph([node], "g", [given], [made], dense, sparse_initializer=sparse)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = folder / "model.onnx"
    onnx.save(model, path)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feeds = {"x": inputs.numpy()}
    return lambda: session.run(None, feeds)


def _sparse_initializer(weight: Tensor) -> Any:
    index = weight.flatten().nonzero().flatten()
    values = numpy_helper.from_array(weight.flatten()[index].numpy(), "w")
    return helper.make_sparse_tensor(
        values, numpy_helper.from_array(index.numpy(), "w_index"), list(weight.shape)
    )


COLUMNS = ("times as fast as dense", *(f"{sparsity:.0%} zeros" for sparsity in SPARSITIES))


def rows(found: dict[str, list[float]]) -> Iterator[Sequence[str]]:
    """The lines of the table."""
    for name in ("zeros in a dense tensor", "CSR, torch"):
        yield (name, *(f"{found['dense'][0] / seconds:.2f}" for seconds in found[name]))
    for name in ("zeros, onnxruntime", "sparse initializer, onnxruntime"):
        dense = found["dense, onnxruntime"][0]
        yield (name, *(f"{dense / seconds:.2f}" for seconds in found[name]))
