"""The options that make a spec."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import click

from secateur.cli.options import (
    Decorator,
    Function,
    amount,
    at_most_one,
    gathered,
    option_name,
    tensors_option,
)
from secateur.client import Client
from secateur.defaults import SOME_AMOUNTS, matrices
from secateur.errors import InvalidSpec
from secateur.grouping import Group
from secateur.literals import Prior
from secateur.model import Source
from secateur.spec import METHODS, Spec
from secateur.spec_files.reading import SpecFile, read_spec
from secateur_proto import pruner_pb2 as pb
from secateur_proto.enums import values_by_name

Maker = Callable[[Client, Source], Spec]

# The other methods have arguments that only a spec file can express.
_METHODS = [n for n in METHODS if n not in ("custom_from_mask", "select", "grouped")]


def _pattern(text: str) -> tuple[int, ...]:
    try:
        n, m = map(int, text.split(":"))
    except ValueError:
        raise click.BadParameter(f"{text!r} is not N:M, such as 2:4") from None
    return n, m


def _norm(text: str) -> float | str:
    if text in ("fro", "nuc"):
        return text
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise click.BadParameter(f"{text!r} is not a number, inf, -inf, fro or nuc")


# The arguments of methods, by name: how help shows the value, its type, and what it is.
_ARGUMENTS: Mapping[str, tuple[str, Any, str]] = {
    "amount": ("AMOUNT", amount, "an int is a number of units, 0.5 or 50% a fraction"),
    "n": ("NORM", _norm, "structured: 1, 2, inf, -inf, fro or nuc; n_m: elements kept"),
    "m": ("COUNT", int, "n_m_structured: elements of a group (default 4)"),
    "dim": ("DIM", int, "structured: the dimension of the slices"),
    "rows": ("COUNT", int, "block_structured: rows of a block; 0: all"),
    "cols": ("COUNT", int, "block_structured: columns of a block; 0: all"),
    "seed": ("SEED", int, "random: the same seed prunes the same units"),
    "importance": ("l1|random", click.Choice(["l1", "random"]), "global_unstructured: default l1"),
    "statistics": ("FILE", click.Path(), "wanda, ria, solvers: what Statistics.save wrote"),
    "n_m": ("N:M", _pattern, "wanda, ria, solvers: keep N of each M inputs, as 2:4"),
    "power": ("POWER", float, "ria: of the inputs (default 0.5)"),
}


@dataclass(frozen=True)
class SpecOptions:
    """The options that make a spec; see `spec_options`."""

    method: str | None
    spec: str | None
    amount: float | None
    tensors: tuple[str, ...]
    n: float | str | None
    m: int | None
    dim: int | None
    rows: int | None
    cols: int | None
    seed: int | None
    importance: str | None
    statistics: str | None
    n_m: tuple[int, ...] | None
    power: float | None
    prior: Prior

    def maker(self) -> Maker:
        """Returns what makes the spec of a model, once the options are found to fit.

        Raises:
            click.UsageError: --method and its arguments do not fit.
            InvalidSpec: The file of --spec is wrong.
        """
        at_most_one(method=self.method, spec=self.spec)
        if self.spec is None:
            self._check_method()
            return self._made
        for name in self._given():
            raise click.UsageError(f"--spec has the whole spec: leave out {option_name(name)}")
        return file_maker(self.spec, self.tensors)

    def beside(self, source: Source) -> Source:
        """Returns the model with the text of the file of --spec, for a copy of its folder."""
        if self.spec is None or source.folder is None:
            return source
        file = SpecFile.read(self.spec)
        changed = {**source.folder.changed, f"recipe{file.lines.path.suffix}": file.text}
        return replace(source, folder=replace(source.folder, changed=changed))

    def _check_method(self) -> None:
        if self.method is None:
            raise click.UsageError("--method or --spec is required")
        known, given = signature(METHODS[self.method]).parameters, self._given()
        for name in given:
            if name not in known:
                raise click.UsageError(f"--method {self.method} takes no {option_name(name)}")
        for name, parameter in known.items():
            if parameter.default is Parameter.empty and name not in (*given, "tensors"):
                raise click.UsageError(f"--method {self.method} needs {option_name(name)}")

    def _made(self, client: Client, source: Source) -> Spec:
        given = self._given()
        # Of a method with statistics, "*" means what they are of.
        every = ["*"] if "statistics" in given else None
        tensors = list(self.tensors) or every or _matrices(source, client)
        rule = {"method": self.method, "tensors": tensors, **given}
        return Spec.from_dict({"rules": [rule]})

    def _given(self) -> dict[str, Any]:
        """The arguments of --method that the user gave."""
        given = {n: getattr(self, n) for n in _ARGUMENTS if getattr(self, n) is not None}
        return {"amount": None, **given} if "n_m" in given else given


def _matrices(source: Source, client: Client) -> list[str]:
    return matrices(source.prunable() if source.is_here else client.report(source).tensors)


def file_maker(path: str, tensors: Sequence[str]) -> Maker:
    """Returns what makes the spec of a file for a model.

    Args:
        path: The file.
        tensors: --tensors, for rules that name none; empty is the default.

    Raises:
        click.UsageError: --tensors is given, and all rules name their tensors.
        InvalidSpec: The file is wrong.
    """
    file = SpecFile.read(path)
    if file.nameless():
        return lambda client, source: file.spec(list(tensors) or _matrices(source, client))
    if tensors:
        raise click.UsageError(f"--tensors: the rules of {path} name theirs; leave it out")
    spec = file.spec()
    return lambda client, source: spec


def planned(
    options: SpecOptions, amounts: Sequence[float] | None, default: str
) -> tuple[SpecOptions, Sequence[float] | None]:
    """Completes --amount and --amounts for a plan.

    Without either, default amounts are planned. With --amounts alone, a method that needs one
    amount gets the first.

    Args:
        options: The options.
        amounts: --amounts.
        default: The method if neither --method nor --spec is given.
    """
    if options.method is None and options.spec is None:
        options = replace(options, method=default)
    is_asked = options.method and "amount" in signature(METHODS[options.method]).parameters
    if is_asked and options.amount is None:
        amounts = amounts or SOME_AMOUNTS
        options = replace(options, amount=amounts[0])
    return options, amounts


def spec_options(default: str | None = None) -> Decorator[Any]:
    """Adds --method, its arguments, and --spec; the command gets `SpecOptions`.

    Args:
        default: A method; None requires --method or --spec.
    """
    shown = "" if default is None else f" (default: {default})"
    return gathered(
        SpecOptions,
        "spec",
        click.option(
            "--method",
            type=click.Choice(_METHODS),
            metavar="METHOD",
            help=f"a function of torch.nn.utils.prune, or another{shown}: {', '.join(_METHODS)}",
        ),
        click.option(
            "--spec",
            metavar="FILE",
            type=click.Path(),
            help="a spec in a file, YAML or JSON; --tensors is for its rules that name none",
        ),
        tensors_option("default: every floating tensor of 2 or more dimensions"),
        *(
            click.option(option_name(name), metavar=metavar, type=kind, help=text)
            for name, (metavar, kind, text) in _ARGUMENTS.items()
        ),
        prior_option,
    )


def prior_option(function: Function) -> Function:
    """Adds --prior."""
    return click.option(
        "--prior",
        type=click.Choice(list(values_by_name(pb.Prior.DESCRIPTOR))),
        default="masks",
        help="what counts as pruned before: what masks prune (default), or also zeros, for a model "
        "that was pruned and stored dense",
    )(function)


def groups_in(path: Path) -> list[Group]:
    """Reads the groups of all rules of a spec file.

    Raises:
        InvalidSpec: The file is wrong, or has no groups.
    """
    rules = [rule.message.selection for rule in read_spec(path).rules]
    groups = [Group(group) for rule in rules for group in rule.groups]
    if not groups:
        raise InvalidSpec(f"{path}: no rule has groups; use the method `grouped`")
    return groups
