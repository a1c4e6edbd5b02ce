"""The JSON Schema of spec files, made of the functions that read them and of their docstrings."""

import inspect
import re
from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any

from secateur.amounts import AMOUNTS
from secateur.choices import GRANULARITIES, IMPORTANCES
from secateur.grouping import GROUPS, member, plain_group
from secateur.rails import guard_rails, rail
from secateur.spec import METHODS
from secateur.spec_files.fields import DEFINITIONS, FIELDS, TEXTS, Schema
from secateur.spec_files.reading import is_left_out

Functions = Mapping[str, Callable[..., Any]]

_REFERENCE = re.compile(r"[Ss]ee `(\w+)`[;.]?")


def spec_schema() -> Schema:
    """Returns the JSON Schema of spec files, with which editors complete and check them."""
    methods = {name: _method(name) for name in METHODS}
    choices = {
        "importance": _choice(IMPORTANCES),
        "granularity": _choice(GRANULARITIES),
        "groups": _choice(GROUPS),
        "amount": {"anyOf": [{"$ref": "#/$defs/units"}, *_choice(AMOUNTS)["anyOf"]]},
    }
    parts: Functions = {
        **{"guard_rails": guard_rails, "rail": rail},
        **{"group": plain_group, "member": member},
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A pruning spec of secateur",
        "description": "Rules that say what to prune. They are applied in order, or not at all.",
        "type": "object",
        "properties": {
            "$schema": {"type": "string", "description": "This schema, for editors."},
            "rules": {
                "description": "The rules. A later rule prunes what earlier ones kept.",
                "type": "array",
                "minItems": 1,
                "items": {"$ref": "#/$defs/rule"},
            },
        },
        "required": ["rules"],
        "additionalProperties": False,
        "$defs": {
            "rule": _rule(methods),
            **methods,
            **choices,
            **{name: _arguments(function) for name, function in parts.items()},
            **DEFINITIONS,
        },
    }


def _rule(methods: Mapping[str, Schema]) -> Schema:
    """One rule: its method says which other fields it has."""
    return {
        "type": "object",
        "required": ["method"],
        "properties": {
            "method": {"description": "The function that makes the rule.", "enum": list(methods)}
        },
        "allOf": [
            {
                "if": {"properties": {"method": {"const": name}}, "required": ["method"]},
                "then": {"$ref": f"#/$defs/{name}"},
            }
            for name in methods
        ],
    }


def _method(name: str) -> Schema:
    schema = _arguments(METHODS[name])
    method = {"const": name, "description": schema["description"]}
    required = [field for field in schema.pop("required", []) if not is_left_out(name, field)]
    if "n_m" in schema["properties"]:  # in place of an amount
        required.remove("amount")
        has_pattern = {"required": ["n_m"], "properties": {"n_m": {"type": "array"}}}
        schema["anyOf"] = [{"required": ["amount"]}, has_pattern]
    schema["properties"] = {"method": method, **schema["properties"]}
    return schema | {"required": ["method", *required]}


def _choice(functions: Functions) -> Schema:
    """The name of a function that needs no arguments, or {name: arguments}."""
    made = {name: _arguments(function) for name, function in functions.items()}
    alone = [name for name, schema in made.items() if "required" not in schema]
    names = [{"const": name, "description": made[name]["description"]} for name in alone]
    mapping = {
        "type": "object",
        "properties": made,
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }
    return {"anyOf": [*names, mapping]}


def _arguments(function: Callable[..., Any]) -> Schema:
    """A mapping of the arguments of a function."""
    parameters = signature(function).parameters
    required = [name for name, given in parameters.items() if given.default is Parameter.empty]
    schema = {
        "description": _summary(function),
        "type": "object",
        "properties": {name: _field(function, given) for name, given in parameters.items()},
        "additionalProperties": False,
    }
    return schema | ({"required": required} if required else {})


def _field(function: Callable[..., Any], parameter: Parameter) -> Schema:
    name = parameter.name
    own = f"{function.__name__}.{name}"
    schema = FIELDS[own] if own in FIELDS else FIELDS[name]
    if parameter.default is None:
        schema = {"anyOf": [schema, {"type": "null"}]}
    elif isinstance(parameter.default, str | int | float):
        schema = {**schema, "default": parameter.default}
    is_calibrated = name == "tensors" and "statistics" in signature(function).parameters
    text = TEXTS["calibrated"] if is_calibrated else TEXTS.get(name)
    return {"description": text or _described(function, name), **schema}


def _summary(function: Callable[..., Any]) -> str:
    return inspect.getdoc(function).partition("\n")[0]  # type: ignore[union-attr]


def _described(function: Callable[..., Any], name: str) -> str:
    """The description of an argument in a docstring, with those that it refers to."""
    text = _documented(function)[name]
    if reference := _REFERENCE.search(text):
        other = _described(_KNOWN[reference[1]], name).rstrip(".")
        before, rest = text[: reference.start()], text[reference.end() :]
        other = other[:1].lower() + other[1:] if before else other
        text = before + other + (f";{rest}" if rest else ".")
    return text[:1].upper() + text[1:]


def _documented(function: Callable[..., Any]) -> dict[str, str]:
    """The arguments in the docstring of a function, and their descriptions."""
    _, _, arguments = (inspect.getdoc(function) or "").partition("\nArgs:\n")
    arguments = re.split(r"\n\n", arguments, maxsplit=1)[0]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", arguments, re.M)
    return {name: " ".join(text.split()) for name, text in found}


_KNOWN: dict[str, Callable[..., Any]] = {
    **{**METHODS, **IMPORTANCES, **GRANULARITIES, **AMOUNTS, **GROUPS},
    **{"guard_rails": guard_rails, "rail": rail, "member": member},
}
