"""The options that make a spec."""

import argparse
import json
from contextlib import suppress
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

from secateur.cli.options import amount, tensors_option
from secateur.client import Client
from secateur.defaults import SOME_AMOUNTS, matrices
from secateur.errors import InvalidSpec
from secateur.grouping import Group
from secateur.model import Source
from secateur.paths import source_path
from secateur.spec import METHODS, Spec
from secateur_proto.enums import values_by_name
from secateur_proto.pruner_pb2 import Prior

# The other methods have arguments that only a spec file can express.
_METHODS = [n for n in METHODS if n not in ("custom_from_mask", "select", "grouped")]
_ARGUMENTS = (
    *("amount", "n", "m", "dim", "rows", "cols", "seed", "importance"),
    *("statistics", "n_m", "power"),
)


def spec_options(command: argparse.ArgumentParser, default: str | None = None) -> None:
    """Adds --method, its arguments, and --spec.

    Args:
        command: The command.
        default: A method; None requires --method or --spec.
    """
    which = command.add_mutually_exclusive_group(required=default is None)
    shown = "" if default is None else f" (default: {default})"
    which.add_argument(
        "--method",
        choices=_METHODS,
        help=f"a function of torch.nn.utils.prune, or another{shown}",
    )
    command.set_defaults(default_method=default)
    which.add_argument(
        "--spec", metavar="FILE", type=Path, help="a spec of several rules: YAML or JSON"
    )
    command.add_argument(
        "--amount", type=amount, help="an int is a number of units, 0.5 or 50%% a fraction"
    )
    tensors_option(command, "default: every floating tensor of 2 or more dimensions")
    command.add_argument(
        "--n", type=_norm, help="structured: 1, 2, inf, fro, nuc or --n=-inf; n_m: elements kept"
    )
    command.add_argument("--m", type=_whole, help="n_m_structured: elements of a group (default 4)")
    command.add_argument("--dim", type=_whole, help="structured: the dimension of the slices")
    command.add_argument("--rows", type=_whole, help="block_structured: rows of a block; 0: all")
    command.add_argument("--cols", type=_whole, help="block_structured: columns of a block; 0: all")
    command.add_argument("--seed", type=_whole, help="random: the same seed prunes the same units")
    command.add_argument(
        "--importance", choices=("l1", "random"), help="global_unstructured: default l1"
    )
    command.add_argument(
        "--statistics", metavar="FILE", help="wanda, ria: what Statistics.save of calibrate wrote"
    )
    command.add_argument(
        "--n-m", metavar="N:M", type=_pattern, help="wanda, ria: keep N of each M inputs, as 2:4"
    )
    command.add_argument("--power", type=float, help="ria: of the inputs (default 0.5)")
    prior_option(command)


def prior_option(command: argparse.ArgumentParser) -> None:
    """Adds --prior."""
    command.add_argument(
        "--prior",
        choices=list(values_by_name(Prior.DESCRIPTOR)),
        default="masks",
        help="what counts as pruned before: what masks prune (default), or also zeros, for a model "
        "that was pruned and stored dense",
    )


def read_spec(options: argparse.Namespace) -> None:
    """Reads the file of --spec, and ends the command if --method and its arguments do not fit.

    Raises:
        InvalidSpec: The file is wrong.
    """
    given = _given(options)
    if options.spec is not None:
        if given or options.tensors:
            name = next(iter(given), "tensors")
            options.wrong_usage(f"--spec has the whole spec: leave out --{name.replace('_', '-')}")
        options.spec = _spec_in(options.spec)
        return
    known = signature(METHODS[options.method]).parameters
    for name in given:
        if name not in known:
            options.wrong_usage(f"--method {options.method} takes no --{name.replace('_', '-')}")
    for name, parameter in known.items():
        if parameter.default is Parameter.empty and name not in (*given, "tensors"):
            options.wrong_usage(f"--method {options.method} needs --{name}")


def read_planned_spec(options: argparse.Namespace) -> None:
    """Completes --amount and --amounts for a plan, and does `read_spec`.

    Without either, default amounts are planned. With --amounts alone, a method that needs one
    amount gets the first.
    """
    if options.method is None and options.spec is None:
        options.method = options.default_method
    is_asked = options.method and "amount" in signature(METHODS[options.method]).parameters
    if is_asked and options.amount is None:
        options.amounts = options.amounts or SOME_AMOUNTS
        options.amount = options.amounts[0]
    read_spec(options)


def spec_of(options: argparse.Namespace, client: Client, source: Source) -> Spec:
    """Makes the spec that the options name, after `read_spec`.

    Raises:
        InvalidSpec: An argument is wrong.
    """
    if options.spec is not None:
        return options.spec  # type: ignore[no-any-return]
    given = _given(options)
    # Of a method with statistics, "*" means what they are of.
    every = ["*"] if "statistics" in given else None
    tensors = options.tensors or every or _matrices(source, client)
    rule = {"method": options.method, "tensors": tensors, **given}
    return Spec.from_dict({"rules": [rule]})


def _matrices(source: Source, client: Client) -> list[str]:
    return matrices(source.prunable() if source.is_here else client.report(source).tensors)


def groups_in(path: Path) -> list[Group]:
    """Reads the groups of all rules of a spec file.

    Raises:
        InvalidSpec: The file is wrong, or has no groups.
    """
    rules = [rule.message.selection for rule in _spec_in(path).rules]
    groups = [Group(group) for rule in rules for group in rule.groups]
    if not groups:
        raise InvalidSpec(f"{path}: no rule has groups; use the method `grouped`")
    return groups


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments of --method that the user gave."""
    given = {n: getattr(options, n) for n in _ARGUMENTS if getattr(options, n) is not None}
    return {"amount": None, **given} if "n_m" in given else given


def _spec_in(path: Path) -> Spec:
    try:
        return Spec.from_dict(_plain_data(path))
    except InvalidSpec as error:
        raise InvalidSpec(f"{path}: {error}") from None


def _plain_data(path: Path) -> Any:
    """The content of a spec file. Errors do not name the file."""
    try:
        text = source_path(path, InvalidSpec).read_text()
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except OSError as error:
        raise InvalidSpec(error.strerror) from None
    except ImportError:
        raise InvalidSpec("YAML needs pip install 'secateur[cli]'") from None
    except ValueError as error:
        raise InvalidSpec(str(error)) from None
    except yaml.YAMLError as error:
        raise InvalidSpec(str(error)) from None


def _whole(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None


def _pattern(text: str) -> tuple[int, ...]:
    try:
        n, m = map(int, text.split(":"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not N:M, such as 2:4") from None
    return n, m


def _norm(text: str) -> float | str:
    if text in ("fro", "nuc"):
        return text
    for kind in (int, float):
        with suppress(ValueError):
            return kind(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number, inf, -inf, fro or nuc")
