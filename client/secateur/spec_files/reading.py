"""Reads specs from files: YAML or JSON, as Spec.from_dict takes them."""

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from inspect import signature
from pathlib import Path
from typing import Any

from secateur.errors import InvalidSpec, InvalidStatistics
from secateur.paths import source_path
from secateur.spec import METHODS, Rule, Spec, from_plain, plain_rules
from secateur.spec_files.lines import Lines

# Of a file, so that a few nested aliases do not take all memory.
_MOST_VALUES = 1_000_000


def read_spec(path: str | os.PathLike[str], tensors: str | Sequence[str] | None = None) -> Spec:
    """Reads a spec from a file: YAML, or JSON if its suffix is .json. See docs/recipes.md.

    Args:
        path: The file. Paths in it are relative to the current folder.
        tensors: The names and globs of the rules that have no `tensors`, as most recipes do. The
            command takes every floating tensor of 2 or more dimensions.

    Raises:
        InvalidSpec: The file cannot be read, or is not a spec; the message begins with its line.
        InvalidStatistics: A file of statistics cannot be read.
    """
    return SpecFile.read(path).spec(tensors)


@dataclass(frozen=True)
class SpecFile:
    """The content of a file of a spec.

    Attributes:
        text: As it is in the file, with comments.
        lines: Where its fields are.
        rules: In plain data, by the paths of their fields.
    """

    text: str
    lines: Lines
    rules: Mapping[str, Any]

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> "SpecFile":
        """Reads a file, and not yet its rules; see `read_spec`."""
        file = source_path(path, InvalidSpec)
        try:
            text = file.read_text("utf-8")
        except (IsADirectoryError, UnicodeError) as error:
            what = "is a folder" if file.is_dir() else f"is not text ({error})"
            raise InvalidSpec(f"{file}: {what}; give a spec in YAML or JSON") from None
        except (OSError, ValueError) as error:
            raise InvalidSpec(f"{file}: {getattr(error, 'strerror', None) or error}") from None
        lines = Lines(file, _parsed(file, text))
        with _placed(lines):
            return cls(text, lines, plain_rules(lines.data))

    def nameless(self) -> list[str]:
        """Returns the paths of the rules that do not name the tensors that they need."""
        return [path for path, rule in self.rules.items() if _is_nameless(rule)]

    def spec(self, tensors: str | Sequence[str] | None = None) -> Spec:
        """Returns the spec; see `read_spec`."""
        found: list[Rule] = []
        nameless = self.nameless()
        with _placed(self.lines):
            if nameless and tensors is None:
                raise InvalidSpec(f"{nameless[0]}.tensors: is missing; name the tensors to prune")
            for path, rule in self.rules.items():
                if path in nameless:
                    rule = {**rule, "tensors": tensors}
                made = from_plain(rule, path).rules
                found += (replace(one, place=self._place(path)) for one in made)
        return Spec(tuple(found))

    def _place(self, path: str) -> Callable[[str], str]:
        return lambda field: self.lines.place(path + field)


def _is_nameless(rule: Any) -> bool:
    """Whether a rule leaves out the `tensors` that its method takes."""
    method = rule.get("method") if isinstance(rule, Mapping) and "tensors" not in rule else None
    return isinstance(method, str) and method in METHODS and is_left_out(method, "tensors")


def is_left_out(method: str, argument: str) -> bool:
    """Whether rules of a file may leave out an argument that its method needs."""
    known = signature(METHODS[method]).parameters
    # Statistics are of some weights, which only the file's author knows.
    return argument == "tensors" and argument in known and "statistics" not in known


@contextmanager
def _placed(lines: Lines) -> Iterator[None]:
    """Begins errors with the file, and the line of the field that they name."""
    try:
        yield
    except (InvalidSpec, InvalidStatistics) as error:
        raise type(error)(f"{lines.place(str(error))}: {error}") from None


def _parsed(path: Path, text: str) -> Any:
    if path.suffix != ".json":
        return _parsed_yaml(path, text)
    try:
        return json.loads(text, object_pairs_hook=_mapping)
    except json.JSONDecodeError as error:
        raise InvalidSpec(f"{path}:{error.lineno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # such as an integer of too many digits
        raise InvalidSpec(f"{path}: {error}") from None


def _mapping(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A mapping of JSON. Repeated keys are an error; json itself would take the last one."""
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"found duplicate key {next(k for k in keys if keys.count(k) > 1)!r}")
    return found


def _parsed_yaml(path: Path, text: str) -> Any:
    package = yaml_package(path)
    try:
        data = package.YAML().load(text)
    except package.error.MarkedYAMLError as error:
        raise InvalidSpec(f"{path}:{error.problem_mark.line + 1}: {error.problem}") from None
    except Exception as error:  # ruamel.yaml raises errors of any kind for tags at odd places
        raise InvalidSpec(f"{path}: is not YAML: {error}") from None
    if _expanded(data, {}) > _MOST_VALUES:
        raise InvalidSpec(f"{path}: its aliases expand to more than {_MOST_VALUES:,} values")
    return data


def _expanded(node: Any, known: dict[int, int]) -> int:
    """The number of values in data whose aliases are expanded; `known` has those of its parts."""
    if id(node) in known:
        return known[id(node)]
    if not isinstance(node, dict | list):
        return 1
    known[id(node)] = _MOST_VALUES + 1  # until its parts are counted: an alias to itself is endless
    parts = node.values() if isinstance(node, dict) else node
    known[id(node)] = 1 + sum(_expanded(part, known) for part in parts)
    return known[id(node)]


def yaml_package(path: Path) -> Any:
    """Returns ruamel.yaml, which knows the lines of fields, and YAML 1.2.

    Raises:
        InvalidSpec: It is not installed.
    """
    try:
        import ruamel.yaml
    except ImportError:
        raise InvalidSpec(
            f"{path}: YAML needs pip install 'secateur[cli]'; a spec may also be a .json file"
        ) from None
    return ruamel.yaml
