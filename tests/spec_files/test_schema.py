"""The JSON Schema against the reader of specs, with jsonschema as the validator."""

import inspect
import json
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

import secateur
from secateur import InvalidSpec, Spec
from secateur.spec import METHODS
from tests.conftest import examples
from tests.spec_files.rules import Plain, valid_rules
from tests.test_docs import blocks

SCHEMA = secateur.spec_schema()
VALIDATOR = Draft202012Validator(SCHEMA)
ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "docs/spec.schema.json"

# What a schema cannot know: whether a file exists, and what its statistics are of.
FILES = {"statistics", "masks", "importance_scores", "config", "source"}

# No floats without a fraction: JSON Schema takes 1.0 for an integer, and a spec does not.
VALUES: list[Any] = [
    *(None, True, False, -1, 0, 1, 3, 5000, 1 << 31, 1 << 32, 1 << 64, 0.5, 1.5, -0.5),
    *("", "x", "fro", "50%", "150%", "007.5 %", "5GB", "5 apples", "element", "random", "tensor"),
    *("row", "l1", "owl", "max", "z_score", [], ["x"], [1], [2, 4], [-1], [None], {}, {"x": 1}),
    *({"x": 0.5}, {"x": "y"}, {"x": None}, {"x": {}}, {"random": {}}, {"n_m": {}}, {"rows": {}}),
    *({"threshold": {"value": 1}}, {"random": None}, {"rows": {}, "columns": {}}, [{}], [["x"]]),
]


def is_valid(table: Any) -> bool:
    return bool(VALIDATOR.is_valid(table))


def is_read(table: Any) -> bool:
    try:
        Spec.from_dict(table)
    except InvalidSpec:
        return False
    return True


def test_it_is_a_schema_and_the_published_one() -> None:
    Draft202012Validator.check_schema(SCHEMA)
    assert json.loads(PUBLISHED.read_text()) == SCHEMA, (
        "run `secateur spec schema > docs/spec.schema.json`"
    )


def fields(schema: Any) -> Iterator[tuple[str, Any]]:
    """The fields of all mappings in a schema, but not the conditions on them."""
    if isinstance(schema, dict):
        parts = {key: part for key, part in schema.items() if key != "if"}
        is_field = "type" in parts  # and no condition
        yield from parts.get("properties", {}).items() if is_field else ()
        schema = list(parts.values())
    if isinstance(schema, list):
        for part in schema:
            yield from fields(part)


def test_every_field_is_described() -> None:
    found = list(fields(SCHEMA))
    named = {name for name, _ in found}
    for method in METHODS.values():
        assert inspect.signature(method).parameters.keys() <= named
    for name, schema in found:
        text = schema["description"]
        assert text[0].isupper(), (name, text)
        assert text.endswith("."), (name, text)
        assert "ee `" not in text, (name, text)


def test_enums_are_those_of_the_reader() -> None:
    scopes = SCHEMA["$defs"]["select"]["properties"]["scope"]["enum"]
    assert scopes == ["tensor", "global", "isomorphic", "row"]
    assert SCHEMA["$defs"]["rule"]["properties"]["method"]["enum"] == list(METHODS)


def test_valid_rules_are_valid(files: dict[str, str]) -> None:
    rules = valid_rules(files)
    assert {rule["method"] for rule in rules} == set(METHODS)
    for rule in rules:
        assert is_valid({"rules": [rule]}), rule
        assert is_read({"rules": [rule]}), rule


def places(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values, without those that only a file decides."""
    if path and path[-1] not in FILES:
        yield path
    if isinstance(node, dict | list):
        for key in node if isinstance(node, dict) else range(len(node)):
            yield from places(node[key], (*path, key))


def changed(table: Any, path: tuple[Any, ...], change: Any) -> None:
    """Replaces, removes or adds a value at a path."""
    *outer, last = path
    for key in outer:
        table = table[key]
    kind, value = change
    if kind == "remove" and isinstance(table, dict):
        del table[last]
    elif kind == "add" and isinstance(table, dict):
        table["surplus"] = value
    else:
        table[last] = value


CHANGES = st.tuples(st.sampled_from(["replace", "remove", "add"]), st.sampled_from(VALUES))


@examples(1250)
@given(data=st.data())
def test_what_the_schema_refuses_the_reader_refuses_and_the_reverse(
    files: dict[str, str], data: st.DataObject
) -> None:
    rule: Plain = deepcopy(data.draw(st.sampled_from(valid_rules(files))))
    # In a file `tensors` may be left out. Of statistics a schema knows neither names nor sizes.
    least = 9 if files["statistics"] in str(rule) else 1
    path = data.draw(
        st.sampled_from([p for p in places(rule) if p[0] != "tensors" or len(p) > least])
    )
    change = data.draw(CHANGES)
    assume(path[-1] != "power" or change[1] not in (5000, 1 << 31, 1 << 32, 1 << 64))
    changed(rule, path, deepcopy(change))
    table = {"rules": [rule]}
    assert is_valid(table) == is_read(table), (path, change, rule)


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_names_of_tensors(value: Any) -> None:
    table = {"rules": [{"method": "lamp", "amount": 0.5, "tensors": value}]}
    assert is_valid(table) == is_read(table)


@pytest.mark.parametrize("table", [*VALUES, {"rules": []}, {"rules": [7]}, {"rules": {}}], ids=repr)
def test_what_is_not_a_spec(table: Any) -> None:
    assert not is_valid(table)
    assert not is_read(table)


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda p: p.stem)
def test_recipes_are_valid(path: Path) -> None:
    table = YAML().load(path.read_text())
    assert not list(VALIDATOR.iter_errors(table))
    first = path.read_text().splitlines()[0]
    relative = first.removeprefix("# yaml-language-server: $schema=")
    assert (path.parent / relative).resolve() == PUBLISHED


def test_specs_of_the_documentation_are_valid() -> None:
    found = [text for page in ("specs", "recipes") for text in blocks(f"docs/{page}.md", "yaml")]
    for text in found:
        assert not list(VALIDATOR.iter_errors(YAML().load(text))), text
