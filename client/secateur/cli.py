"""The command secateur: prune, report and finalize files, and what a server keeps."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from secateur.checkpoint import place_of
from secateur.cli_checkpoints import add_checkpoints, is_checkpoint, source_of
from secateur.cli_server import client_of, server_options
from secateur.client import Client
from secateur.embedded import embedded
from secateur.errors import InvalidSpec, SecateurError
from secateur.files import check_writable
from secateur.source import read_source
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


def run() -> NoReturn:
    """The command's process: ends at once when the command has.

    Threads of gRPC and torch may still be at work when the interpreter is taken down, and have been
    seen to abort the process then: a command that did its work would have failed.
    """
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _prune(options: argparse.Namespace) -> None:
    if not options.keep and options.out is None:
        options.wrong_usage("one of the arguments -o/--out --keep is required")
    path, uri = _out(options)
    if options.keep and not options.server:
        raise SecateurError("--keep needs a server that stays: --server or SECATEUR_SERVER")
    with _client(options) as client:
        source = source_of(client, options.model)
        spec = _spec(options, client, source)
        output = options.output if uri or (path and place_of(source)) else "masks"
        if options.out is None:
            output = "none"
        result = client.prune(source, spec, output, keep=options.keep, destination=uri)
        if path:
            result.save(path, options.output)
    print(result.report)
    if result.checkpoint:
        print(f"kept as {result.checkpoint.name}")


def _report(options: argparse.Namespace) -> None:
    with _client(options) as client:
        report = client.report(source_of(client, options.model), options.tensors)
    print(json.dumps(report.to_dict(), indent=2) if options.json else report)


def _finalize(options: argparse.Namespace) -> None:
    path, uri = _out(options)
    with _client(options) as client:
        source = source_of(client, options.model)
        final = client.finalize(source, options.tensors, destination=uri)
        if path:
            final.save(path)
    print(final.report)


def _client(options: argparse.Namespace) -> AbstractContextManager[Client]:
    if is_checkpoint(options.model) and not options.server:
        raise SecateurError(
            f"{options.model}: there is no such file; if it is a checkpoint, name its server with "
            "--server or SECATEUR_SERVER"
        )
    return client_of(options) if options.server else embedded()


def _out(options: argparse.Namespace) -> tuple[Path | None, str | None]:
    """Where the result goes: to a file here, or to a URI.  Errors: SecateurError."""
    if options.out is None:
        return None, None
    if "://" in options.out:
        return None, options.out
    path = Path(options.out)
    check_writable(path)
    return path, None


def _spec(options: argparse.Namespace, client: Client, source: Any) -> Spec:
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
    tensors = options.tensors or _matrices(client, source)
    return Spec.from_dict({"rules": [{"method": options.method, "tensors": tensors, **choices}]})


def _matrices(client: Client, source: Any) -> list[str]:
    """What is pruned where nothing is named: weights, but not biases and norms."""
    if place_of(source):  # only the server knows
        shapes = {name: t.shape for name, t in client.report(source).tensors.items()}
    else:
        shapes = {name: t.shape for name, t in read_source(source).prunable().items()}
    names = [name for name, shape in shapes.items() if len(shape) >= 2]
    if not names:
        raise InvalidSpec(
            "no floating tensor has 2 or more dimensions; name some with --tensors; "
            f"there are: {', '.join(list(shapes)[:5]) or 'none'}"
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
        epilog="IN and OUT are .safetensors, .pt or .pth files, folders with a model in shards, or "
        "URIs (file:///..., s3://...) that the server opens. IN may also be a checkpoint, as "
        "`secateur checkpoints ls` names it.",
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
    add_checkpoints(commands)
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(run=run)
    command.add_argument("model", metavar="IN", help="the model")
    server_options(command, "else an embedded server")
    return command


def _prune_options(command: argparse.ArgumentParser) -> None:
    command.set_defaults(wrong_usage=command.error)
    _out_option(command, is_required=False)
    command.add_argument(
        "--keep", action="store_true", help="keep the result on the server, as a checkpoint"
    )
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


def _out_option(command: argparse.ArgumentParser, is_required: bool = True) -> None:
    text = "the file to write" if is_required else "the file to write; not needed with --keep"
    command.add_argument("-o", "--out", metavar="OUT", required=is_required, help=text)


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
    run()
