"""The dtypes of the safetensors format, in one table that the server and the client share."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Dtype:
    """A dtype of the safetensors format.

    Attributes:
        bits: Of one element.
        name: What torch, numpy and ml_dtypes call it; None if none of them stores it as the format
            does.
        kind: How its values are read as numbers. None: tensors are passed on as bytes.
        one: The bits of the number 1, for a dtype that has a `kind`.
        packed: Elements of the format in one element of torch: float4_e2m1fn_x2 holds 2.
    """

    bits: int
    name: str | None
    kind: Literal["floating", "integer", "bool"] | None = None
    one: int = 1
    packed: int = 1

    @property
    def is_prunable(self) -> bool:
        """Whether a rule may name a tensor of this dtype."""
        return self.kind in ("floating", "integer")


DTYPES: Mapping[str, Dtype] = {
    "BOOL": Dtype(8, "bool", "bool"),
    "F4": Dtype(4, "float4_e2m1fn_x2", packed=2),
    "F6_E2M3": Dtype(6, None),
    "F6_E3M2": Dtype(6, None),
    "U8": Dtype(8, "uint8", "integer"),
    "I8": Dtype(8, "int8", "integer"),
    "F8_E5M2": Dtype(8, "float8_e5m2", "floating", one=0x3C),
    "F8_E4M3": Dtype(8, "float8_e4m3fn", "floating", one=0x38),
    "F8_E8M0": Dtype(8, "float8_e8m0fnu"),
    "F8_E4M3FNUZ": Dtype(8, "float8_e4m3fnuz"),
    "F8_E5M2FNUZ": Dtype(8, "float8_e5m2fnuz"),
    "I16": Dtype(16, "int16", "integer"),
    "U16": Dtype(16, "uint16"),
    "F16": Dtype(16, "float16", "floating", one=0x3C00),
    "BF16": Dtype(16, "bfloat16", "floating", one=0x3F80),
    "I32": Dtype(32, "int32", "integer"),
    "U32": Dtype(32, "uint32"),
    "F32": Dtype(32, "float32", "floating", one=0x7F << 23),
    "C64": Dtype(64, "complex64"),
    "F64": Dtype(64, "float64", "floating", one=0x3FF << 52),
    "I64": Dtype(64, "int64", "integer"),
    "U64": Dtype(64, "uint64"),
}
