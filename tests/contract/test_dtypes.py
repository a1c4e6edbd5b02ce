"""The table of dtypes, compared with the installed torch and safetensors."""

import json
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from torch import Tensor

from secateur.errors import InvalidStateDict, SecateurError
from secateur.tensors import LocalTensor, from_value, to_value
from secateur_proto.dtypes import DTYPES
from secateur_proto.framing import tensor_bytes
from secateur_server.backends.dtypes import FP8, PRUNABLE, TORCH_DTYPES
from secateur_server.backends.keys import BITS, ranked_as
from tests.reference import same_bits

DTYPES_OF_TORCH = sorted({v for v in vars(torch).values() if isinstance(v, torch.dtype)}, key=str)
every_dtype_of_torch = pytest.mark.parametrize("dtype", DTYPES_OF_TORCH, ids=str)
FLOATING = [wire for wire, dtype in DTYPES.items() if dtype.kind == "floating"]


def any_bytes(dtype: torch.dtype) -> Tensor:
    return torch.arange(6 * dtype.itemsize, dtype=torch.uint8).view(dtype).reshape(2, 3)


def as_safetensors_writes(tensor: Tensor) -> dict[str, Any] | None:
    """Returns the entry of a tensor in a safetensors header, or None if the library refuses it."""
    try:
        written = safetensors.torch.save({"x": tensor})
    except KeyError:
        return None
    header: dict[str, dict[str, Any]] = json.loads(
        written[8 : 8 + int.from_bytes(written[:8], "little")]
    )
    return header["x"]


@every_dtype_of_torch
def test_a_tensor_is_described_as_in_safetensors(dtype: torch.dtype) -> None:
    tensor = any_bytes(dtype)
    expected = as_safetensors_writes(tensor)
    if expected is None:
        with pytest.raises(InvalidStateDict, match=f"x: dtype {str(dtype)[6:]} "):
            from_value("x", tensor)
        return
    local = from_value("x", tensor)
    assert (local.dtype, list(local.shape)) == (expected["dtype"], expected["shape"])
    assert tensor_bytes(local.dtype, local.shape) == tensor.nbytes
    assert same_bits(to_value("x", local, as_torch=True), tensor)


def test_safetensors_writes_every_dtype_of_torch_in_the_table() -> None:
    """Else the test above might compare only dtypes that both refuse."""
    written = [as_safetensors_writes(any_bytes(dtype)) for dtype in DTYPES_OF_TORCH]
    assert {entry["dtype"] for entry in written if entry} == {
        wire for wire, dtype in DTYPES.items() if dtype.name
    }


@pytest.mark.parametrize("name", sorted({np.dtype(code).name for code in "?bBhHiIlLqQefdFD"}))
def test_an_array_is_described_as_in_safetensors(name: str) -> None:
    array = np.arange(6).reshape(2, 3).astype(name)
    try:
        read = safetensors.deserialize(safetensors.numpy.save({"x": array}))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:
        with pytest.raises(InvalidStateDict, match=f"x: dtype {name} "):
            from_value("x", array)
        return
    local, ((_, expected),) = from_value("x", array), read
    assert (local.dtype, list(local.shape)) == (expected["dtype"], expected["shape"])
    found = to_value("x", local, as_torch=False)
    assert found.dtype == array.dtype
    assert found.tobytes() == array.tobytes()


@pytest.mark.parametrize("wire", FLOATING)
def test_the_bits_of_1_are_those_of_torch(wire: str) -> None:
    one = torch.ones((), dtype=TORCH_DTYPES[wire])
    bits = bytes(one.view(1).view(torch.uint8).tolist())
    assert int.from_bytes(bits, "little") == DTYPES[wire].one


@pytest.mark.parametrize("dtype", PRUNABLE, ids=str)
def test_every_prunable_dtype_has_a_dtype_to_compare_in(dtype: torch.dtype) -> None:
    assert (dtype in BITS) == dtype.is_floating_point
    assert ranked_as(dtype) in set(BITS) - set(FP8)


@pytest.mark.parametrize(
    ("wire", "shape", "as_torch"),
    [
        ("F6_E2M3", (4,), True),
        ("F6_E3M2", (2, 4), False),
        ("F4", (2, 3), True),  # torch packs two of a row into a byte
        ("F4", (2, 4), False),  # ml_dtypes has a byte for each
    ],
)
def test_a_dtype_that_only_files_can_have_is_an_error(
    wire: str, shape: tuple[int, ...], as_torch: bool
) -> None:
    data = np.zeros(tensor_bytes(wire, shape), np.uint8)
    with pytest.raises(SecateurError, match=rf"^x: .* {wire} of shape .*\.safetensors$"):
        to_value("x", LocalTensor(wire, shape, lambda: data), as_torch)
