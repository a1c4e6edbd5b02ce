"""The command secateur: prune, report and finalize files."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from secateur.client import Client
from secateur.embedded import embedded
from secateur.errors import InvalidSpec, SecateurError
from secateur.files import check_writable
from secateur.source import Source, read_source
from secateur.spec import METHODS, Spec


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command. Returns the exit status: 0, or 1 with a line on stderr; usage exits 2."""
    options = _parser().parse_args(arguments)
    try:
        options.run(options)
        sys.stdout.flush()
    except SecateurError as error:
        print(f"secateur: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("secateur: interrupted", file=sys.stderr)
        return 1
    return 0


def _prune(options: argparse.Namespace) -> None:
    check_writable(options.out)
    model = read_source(options.model)
    spec = _spec(options, model)
    with _client(options) as client:
        result = client.prune(model, spec)
        result.save(options.out, options.output)
    print(result.report)


def _report(options: argparse.Namespace) -> None:
    with _client(options) as client:
        report = client.report(options.model, options.tensors)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)


def _finalize(options: argparse.Namespace) -> None:
    check_writable(options.out)
    with _client(options) as client:
        final = client.finalize(options.model, options.tensors)
        final.save(options.out)
    print(final.report)


def _client(options: argparse.Namespace) -> AbstractContextManager[Client]:
    return Client(options.server) if options.server else embedded()


def _spec(options: argparse.Namespace, model: Source) -> Spec:
    choices = {
        name: getattr(options, name)
        for name in ("amount", "n", "dim", "seed", "importance")
        if getattr(options, name) is not None
    }
    if options.spec is not None:
        if choices or options.tensors:
            raise InvalidSpec("--spec has the whole spec; --method's options do not go with it")
        try:
            return Spec.from_dict(_read_spec(options.spec))
        except InvalidSpec as error:
            raise InvalidSpec(f"{options.spec}: {error}") from None
    tensors = options.tensors or _matrices(model)
    return Spec.from_dict({"rules": [{"method": options.method, "tensors": tensors, **choices}]})


def _matrices(model: Source) -> list[str]:
    """What is pruned where nothing is named: weights, but not biases and norms."""
    prunable = model.prunable()
    names = [name for name, tensor in prunable.items() if len(tensor.shape) >= 2]
    if not names:
        raise InvalidSpec(
            "no floating tensor has 2 or more dimensions; name some with --tensors; "
            f"there are: {', '.join(list(prunable)[:5]) or 'none'}"
        )
    return names


def _read_spec(path: Path) -> Any:
    """The plain data of a spec file.  Errors: InvalidSpec, which does not name the file."""
    try:
        text = path.read_text()
        if path.suffix == ".json":
            return json.loads(text)
        import yaml

        return yaml.safe_load(text)
    except OSError as error:
        raise InvalidSpec(error.strerror) from None
    except ImportError:
        raise InvalidSpec("YAML needs pip install 'secateur[cli]'") from None
    except ValueError as error:
        raise InvalidSpec(_one_line(error)) from None
    except yaml.YAMLError as error:
        raise InvalidSpec(_one_line(error)) from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="secateur",
        description="Prunes neural networks: what torch.nn.utils.prune does, on a server.",
        epilog="IN and OUT are .safetensors, .pt or .pth files.",
    )
    parser.add_argument("--version", action="version", version=f"secateur {version('secateur')}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _prune_options(_command(commands, "prune", "decide what to prune, and prune it", _prune))
    report = _command(commands, "report", "show how sparse a model is, and where", _report)
    _tensors_option(report, "default: every floating tensor")
    report.add_argument("--json", action="store_true", help="print JSON, not a table")
    finalize = _command(commands, "finalize", "make pruning permanent", _finalize)
    _out_option(finalize)
    _tensors_option(finalize, "default: all")
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("model", metavar="IN", type=Path, help="the model")
    command.add_argument(
        "--server",
        metavar="ADDRESS",
        default=os.environ.get("SECATEUR_SERVER"),
        help="HOST:PORT of a server (default: $SECATEUR_SERVER, else an embedded server)",
    )
    return command


def _prune_options(command: argparse.ArgumentParser) -> None:
    _out_option(command)
    which = command.add_mutually_exclusive_group(required=True)
    methods = [name for name in METHODS if name != "custom_from_mask"]
    which.add_argument("--method", choices=methods, help="a method of torch.nn.utils.prune")
    which.add_argument(
        "--spec", metavar="FILE", type=Path, help="a spec of several rules, YAML or JSON"
    )
    command.add_argument(
        "--amount", type=_number, help="how much: an int is a number, 0.5 a fraction"
    )
    _tensors_option(command, "default: every floating tensor of 2 or more dimensions")
    command.add_argument("--n", type=_norm, help="ln_structured: 1, 2, inf, fro, nuc; --n=-inf")
    command.add_argument("--dim", type=int, help="structured: the dimension of the slices")
    command.add_argument("--seed", type=int, help="random: the same seed prunes the same")
    command.add_argument(
        "--importance", choices=("l1", "random"), help="global_unstructured: default l1"
    )
    command.add_argument(
        "--output",
        choices=("dense", "reparametrized", "masks"),
        default="dense",
        help="what OUT holds: tensors with zeros (default), X_orig and X_mask, or bits",
    )


def _out_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "-o", "--out", metavar="OUT", type=Path, required=True, help="the file to write"
    )


def _tensors_option(command: argparse.ArgumentParser, default: str) -> None:
    command.add_argument(
        "--tensors", metavar="GLOB", action="append", help=f"name or glob, may repeat; {default}"
    )


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _norm(text: str) -> float | str:
    return text if text in ("fro", "nuc") else float(text)


if __name__ == "__main__":
    sys.exit(main())
