"""The values that a spec file may give to each argument of a method, as JSON Schema."""

from typing import Any

from secateur.architectures.parts import PARTS
from secateur.choices import MATRIX_NORMS
from secateur.selections import ALLOCATIONS, COMBINATIONS, NORMALIZATIONS, SCOPES

Schema = dict[str, Any]

_BYTES = r"^\d{1,20}(\.\d{1,20})? ?(|B|[kMGTK]B|[KMGT]iB)$"


def _integer(low: int = 0, high: int = (1 << 64) - 1) -> Schema:
    return {"type": "integer", "minimum": low, "maximum": high}


def _any(*kinds: Schema) -> Schema:
    return {"anyOf": list(kinds)}


def _map(values: Schema) -> Schema:
    return {"type": "object", "additionalProperties": values}


def _list(items: Schema, least: int = 1) -> Schema:
    return {"type": "array", "items": items, "minItems": least}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/$defs/{name}"}


_TEXT: Schema = {"type": "string"}
_NUMBER: Schema = {"type": "number"}
_FLAG: Schema = {"type": "boolean"}
_NAMES = _any(_TEXT, _list(_TEXT))
_NORM = _any(_NUMBER, {"enum": list(MATRIX_NORMS)})
_DIM = _integer(-(1 << 31), (1 << 31) - 1)
_FILE: Schema = {"type": "string", "minLength": 1}
_PAIR = _list(_integer(high=(1 << 32) - 1), 2) | {"maxItems": 2, "examples": [[2, 4]]}

# Definitions that fields refer to.
DEFINITIONS: dict[str, Schema] = {
    "percentage": {
        "type": "string",
        "pattern": r"^0*(100(\.0+)?|\d{1,2}(\.\d{1,20})?) ?%$",
        "examples": ["50%"],
    },
    "fraction": _any({"type": "number", "minimum": 0, "maximum": 1}, _ref("percentage")),
    "units": {
        "description": "An integer is a number of units, 0.5 or 50% a fraction of those unpruned.",
        "examples": [0.5, "50%", 2],
        **_any(_integer(), _ref("fraction")),
    },
}

_FRACTION = _ref("fraction")

# By the names of arguments; FUNCTION.ARGUMENT where functions differ.
FIELDS: dict[str, Schema] = {
    "align": _integer(1, 4096),
    "allocation": {"enum": list(ALLOCATIONS)},
    "alps.amount": _ref("units"),
    "alps.scope": {"enum": ["tensor", "row"]},
    "amount": _ref("amount"),
    "block_size": _integer(1, 4096),
    "cols": _integer(),
    "combination": {"enum": list(COMBINATIONS)},
    "config": _any(_FILE, {"type": "object"}),
    "damping": {"type": "number", "minimum": 0},
    "dim": _DIM,
    "dims": _integer(3, 64),
    "exclude": _NAMES,
    "fractions": _map(_FRACTION),
    "global_unstructured.importance": {"enum": ["l1", "random"]},
    "granularity": _ref("granularity"),
    "groups": _any(_list(_ref("group"), 0), _ref("groups")),
    "guard_rails": _ref("guard_rails"),
    "head_dim": _integer(),
    "importance": _ref("importance"),
    "importance_scores": _FILE,
    "indices": _list(_integer()),
    "keep_at_least": _integer(),
    "keep_first": _FLAG,
    "keep_last": _FLAG,
    "m": _integer(),
    "masked": _FLAG,
    "masks": _FILE,
    "max_sparsity": _FRACTION,
    "members": _list(_ref("member"), 0),
    "min_sparsity": _FRACTION,
    "n": _NORM,
    "n_m": _PAIR,
    "n_m.m": _integer(high=(1 << 32) - 1),
    "n_m.n": _integer(high=(1 << 32) - 1),
    "n_m_structured.m": _integer(high=(1 << 32) - 1),
    "n_m_structured.n": _integer(high=(1 << 32) - 1),
    "name": _TEXT,
    "normalization": {"enum": list(NORMALIZATIONS)},
    "of_all": _FLAG,
    "offset": _integer(),
    "p": _NORM,
    "activation.p": {"type": "number", "exclusiveMinimum": 0},
    "parts": _any({"enum": list(PARTS)}, _list({"enum": list(PARTS)})),
    "per_tensor": _map(_ref("rail")),
    "per_unit": _map(_NUMBER),
    "power": {"type": "number", "minimum": 0},
    "relative": _FLAG,
    "row_dims": _map(_DIM),
    "rows": _integer(),
    "scales": _map(_TEXT),
    "scope": {"enum": list(SCOPES)},
    "scored": _FLAG,
    "seed": _integer(),
    "shape": _list(_integer(), 0),
    "source": _FILE,
    "sparsegpt.amount": _ref("units"),
    "statistics": _FILE,
    "stride": _integer(1),
    "target": _NUMBER,
    "target_bytes.n": _any(_integer(), {"type": "string", "pattern": _BYTES, "examples": ["5GB"]}),
    "tensor": _TEXT,
    "tensors": _NAMES,
    "units": _integer(1),
    "value": _NUMBER,
}

# Descriptions in place of those of Python arguments.
TEXTS: dict[str, str] = {
    "tensors": "Names or globs of the tensors to prune. Without it the command takes --tensors, or "
    "every floating tensor of 2 or more dimensions.",
    "calibrated": "Names or globs of weights that have statistics. A glob means neither biases nor "
    "embeddings.",
    "statistics": "The path of a file that Statistics.save of secateur.calibrate wrote.",
    "importance_scores": "The path of a file with an array for each tensor, or group: "
    ".safetensors, .pt or .npz. Their absolute values rank in place of the weights'.",
    "masks": "The path of a file of masks, where 0 is pruned and 1 is kept: what secateur prune "
    "--output masks wrote, or .safetensors, .pt or .npz.",
    "groups": "Groups, or the function that makes them from a config.json.",
    "config": "The path of a config.json of Hugging Face, or of its folder; or its content.",
    "source": "The path of the model, for the names of its tensors. Default: beside the config.",
    "importance": "How important a unit is: the name of a function, or {name: arguments}.",
    "granularity": "What is pruned as one unit: the name of a function, or {name: arguments}.",
    "members": "The slices of each tensor.",
    "name": "The group's name, for reports, guard rails and errors.",
}
