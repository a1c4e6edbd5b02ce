"""The command secateur: prunes, reports, plans and finalizes files, and manages checkpoints."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn, Protocol

from secateur import __version__
from secateur.cli_checkpoints import add_checkpoints
from secateur.cli_export import add_export
from secateur.cli_options import (
    add_command,
    amounts_option,
    json_option,
    key_option,
    out_option,
    output_option,
    shown_options,
    tensors_option,
)
from secateur.cli_pack import add_pack
from secateur.cli_parser import Parser, parse
from secateur.cli_shrink import add_shrink
from secateur.cli_source import opened
from secateur.cli_spec import read_planned_spec, read_spec, spec_of, spec_options
from secateur.errors import NotSaved, SecateurError
from secateur.files import check_holds, check_out, check_writable
from secateur.forms import SMALLER, is_model, not_smaller
from secateur.model import Source
from secateur.onnx_files import ONNX_SUFFIX, check_onnx
from secateur.paths import path_of
from secateur.report import Report

# Bytes of a file that torch prunes faster than numba's kernels are loaded, which takes 0.5 s.
SMALL_BYTES = 4 << 20


def main(arguments: Sequence[str] | None = None, owns_process: bool = False) -> int:
    """Runs the command.

    Args:
        arguments: The command line; None is that of the process.
        owns_process: Whether the process does nothing else, so that its environment may change.

    Returns:
        The exit status: 0, or 1 with a line on stderr. Wrong usage exits with 2.
    """
    try:
        options = parse(_parser(), arguments)
        if owns_process:
            _skip_kernels(options)
        with _warnings_in_lines():
            options.run(options)
        print(end="", flush=True)
    except SecateurError as error:
        return _failed(str(error))
    except BrokenPipeError:  # the reader of a pipe has closed it
        _drop_output()
        return 1
    except OSError as error:  # such as a full disk
        _drop_output()
        return _failed(f"{error.filename or 'standard output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return _failed("interrupted")
    return 0


def _failed(reason: str) -> int:
    print(f"secateur: {reason}", file=sys.stderr)
    return 1


def _drop_output() -> None:
    """Discards standard output, and the content of its buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _warnings_in_lines() -> Iterator[None]:
    """Prints each NotSaved warning as one line on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", NotSaved)
        others = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *at: Any, **more: Any) -> None:
            if issubclass(category, NotSaved):
                print(f"secateur: warning: {message}", file=sys.stderr)
            else:
                others(message, category, *at, **more)

        warnings.showwarning = show
        yield


def run() -> NoReturn:
    """Runs the command, and ends the process without the interpreter's shutdown.

    During the shutdown, threads of gRPC and torch may still run, and sometimes abort the process: a
    successful command would fail.
    """
    status = main(owns_process=True)
    with suppress(OSError):  # the command reported it already
        print(end="", flush=True)
    os._exit(status)


def _skip_kernels(options: argparse.Namespace) -> None:
    """Lets an embedded server prune a small file with torch alone, which gives the same bits."""
    model = Path(getattr(options, "model", ""))
    with suppress(OSError, ValueError):  # the command reports a wrong path
        if not options.server and model.is_file() and model.stat().st_size <= SMALL_BYTES:
            os.environ.setdefault("NUMBA_DISABLE_JIT", "1")


def _prune(options: argparse.Namespace) -> None:
    if not options.keep and options.out is None:
        options.wrong_usage("one of the arguments -o/--out --keep is required")
    read_spec(options)
    path, uri = _out(options)
    if options.keep and not options.server:
        raise SecateurError("--keep needs a lasting server: give --server, or set SECATEUR_SERVER")
    with opened(options) as (client, source):
        if path and is_model(options.output):
            _check_holds(path, source, options.output == "packed")
        spec = spec_of(options, client, source)
        place, path, uri = _placed(options, source, path, uri)
        output = options.output if uri or (path and not source.is_here) else "masks"
        if options.out is None:
            output = "none"
        result = client.prune(
            place,
            spec,
            output,
            _progress(options),
            keep=options.keep,
            destination=uri,
            prior=options.prior,
        )
        if path:
            result.save(path, options.output)
    kept = {"checkpoint": result.checkpoint.name} if result.checkpoint else {}
    _show(result.report, options, kept)
    if kept and not options.json:
        print(f"{'' if options.quiet else 'kept as '}{kept['checkpoint']}")


def _progress(options: argparse.Namespace) -> bool | None:
    return False if options.quiet else None


def _show(report: Report, options: argparse.Namespace, more: dict[str, Any]) -> None:
    """Prints the report of a command that writes a file; warnings are lines on stderr."""
    if options.output in SMALLER:  # the client may have made it of masks
        kept = tuple(w for w in report.warnings if w.code != "NOT_SMALLER")
        report = replace(report, warnings=kept)
    notes = []
    for warning in report.warnings:
        if warning.severity == "note":
            notes.append(warning)
        else:
            print(f"secateur: {warning}", file=sys.stderr)
    if options.json:
        print(json.dumps({**report.to_dict(), **more}, indent=2))
    elif not options.quiet:
        print(replace(report, warnings=tuple(notes)))


def _report(options: argparse.Namespace) -> None:
    with opened(options) as (client, source):
        report = client.report(source, options.tensors)
    _print(report, options)
    if not report.tensors:
        print(
            f"secateur: warning: {options.model} has no floating-point tensors, and a report "
            "measures no others",
            file=sys.stderr,
        )


def _plan(options: argparse.Namespace) -> None:
    read_planned_spec(options)
    with opened(options) as (client, source):
        spec = spec_of(options, client, source)
        plan = client.plan(source, spec, options.amounts, prior=options.prior)
    _print(plan, options)


def _sensitivity(options: argparse.Namespace) -> None:
    given = {} if options.amounts is None else {"amounts": options.amounts}
    with opened(options) as (client, source):
        sensitivity = client.sensitivity(source, options.tensors, **given)
    _print(sensitivity, options)


class _Printed(Protocol):
    """An answer that is printed as a table, its `str`, or as JSON."""

    def to_dict(self) -> dict[str, Any]: ...


def _print(found: _Printed, options: argparse.Namespace) -> None:
    print(json.dumps(found.to_dict(), indent=2) if options.json else found)


def _finalize(options: argparse.Namespace) -> None:
    path, uri = _out(options)
    with opened(options) as (client, source):
        if path:
            _check_holds(path, source)
        place, path, uri = _placed(options, source, path, uri)
        final = client.finalize(place, options.tensors, _progress(options), uri)
        if path:
            final.save(path)
    _show(final.report, options, {})
    note = not_smaller(options.output, final.report.zeros)
    if note and not options.json and not options.quiet:
        print(note)


def _placed(
    options: argparse.Namespace, source: Source, path: Path | None, uri: str | None
) -> tuple[Source | str, Path | None, str | None]:
    """The source, and the path or URI of the result, as the call has them."""
    # An embedded server reads and writes single .safetensors files itself, so that nothing is
    # copied through a connection.
    model = Path(options.model)
    is_embedded = not options.server and is_model(options.output)
    if path is None or not is_embedded or not source.paths or path.is_dir():
        return source, path, uri
    if not model.is_file() or {model.suffix, path.suffix} != {".safetensors"}:
        return source, path, uri
    return model.absolute().as_uri(), None, path.absolute().as_uri()


def _check_holds(path: Path, source: Source, is_packed: bool = False) -> None:
    check_holds(path, source.others, source.index, source.folder, is_packed)


def _out(options: argparse.Namespace) -> tuple[Path | None, str | None]:
    """The local path, or the URI, of the result, once it is found to be writable."""
    if options.out is None:
        return None, None
    if "://" in options.out:
        return None, options.out
    path, model = path_of(options.out), path_of(options.model)
    if path.suffix == ONNX_SUFFIX and not path.is_dir():
        check_onnx(path, model, options.output)
    if is_model(options.output):
        check_out(path, model)
    else:
        check_writable(path)
    return path, None


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="secateur",
        description="Prunes neural networks on a server, as torch.nn.utils.prune does.",
        epilog="IN and OUT are files (.safetensors; .pt, .pth, .bin, .ckpt or .tar of torch.save; "
        ".onnx), "
        "folders with one model, or URIs (file:///..., s3://...) that the server opens. IN "
        "may also be a checkpoint, as `secateur checkpoints ls` names it.",
    )
    parser.add_argument("--version", action="version", version=f"secateur {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _prune_options(_command(commands, "prune", "decide what to prune, and prune it", _prune))
    report = _command(commands, "report", "show how sparse a model is, and where", _report)
    tensors_option(report, "default: every floating tensor")
    json_option(report)
    plan = _command(commands, "plan", "show what a prune by many amounts would do", _plan)
    spec_options(plan, "global_unstructured")
    amounts_option(plan, "default: --amount, that of the spec's last rule, or 0.1 to 0.9")
    json_option(plan)
    text = "show how much of its norm each tensor would lose by many amounts"
    sensitivity = _command(commands, "sensitivity", text, _sensitivity)
    tensors_option(sensitivity, "default: every floating tensor of 2 or more dimensions")
    amounts_option(sensitivity, "default: 0.1 to 0.9")
    json_option(sensitivity)
    finalize = _command(commands, "finalize", "make pruning permanent", _finalize)
    out_option(finalize, "the file or folder to write")
    finalize.set_defaults(output="dense")
    tensors_option(finalize, "default: all")
    shown_options(finalize)
    add_export(commands)
    add_pack(commands)
    add_shrink(commands, _show)
    add_checkpoints(commands)
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    command = add_command(commands, name, text, run, "else an embedded server")
    command.add_argument("model", metavar="IN", help="the model")
    key_option(command)
    return command


def _prune_options(command: argparse.ArgumentParser) -> None:
    out_option(command, "the file or folder to write; not needed with --keep", is_required=False)
    command.add_argument(
        "--keep", action="store_true", help="keep the result on the server, as a checkpoint"
    )
    spec_options(command)
    output_option(command)
    shown_options(command)


if __name__ == "__main__":
    run()
