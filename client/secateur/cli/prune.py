"""The commands that write a pruned model: prune and finalize."""

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.cli.options import (
    add_model_command,
    out_option,
    output_option,
    shown_options,
    tensors_option,
)
from secateur.cli.printing import show
from secateur.cli.source import opened
from secateur.cli.spec import groups_in, prior_option, read_spec, spec_of, spec_options
from secateur.errors import SecateurError
from secateur.files import check_holds, check_out, check_writable
from secateur.forms import SMALLER, is_made_of_masks, is_model, not_smaller
from secateur.model import Source
from secateur.onnx.files import ONNX_SUFFIX, check_onnx
from secateur.paths import path_of
from secateur.result import PruneResult


def add_prune(commands: Any) -> None:
    """Adds the command prune."""
    text = "decide what to prune, and prune it"
    command = add_model_command(commands, "prune", text, _prune)
    out_option(command, "the file or folder to write; not needed with --keep", is_required=False)
    command.add_argument(
        "--keep", action="store_true", help="keep the result on the server, as a checkpoint"
    )
    spec_options(command)
    output_option(command)
    shown_options(command)


def add_finalize(commands: Any) -> None:
    """Adds the command finalize."""
    finalize = add_model_command(commands, "finalize", "make pruning permanent", _finalize)
    out_option(finalize, "the file or folder to write")
    output_option(finalize, ("dense", "packed", "shrunk"))
    finalize.add_argument(
        "--spec",
        metavar="FILE",
        type=Path,
        help="with --output shrunk: a spec whose groups are cut: YAML or JSON",
    )
    prior_option(finalize)
    tensors_option(finalize, "default: all")
    shown_options(finalize)


def _prune(options: argparse.Namespace) -> None:
    if not options.keep and options.out is None:
        options.wrong_usage("one of the arguments -o/--out --keep is required")
    if options.out is None and options.output != "dense":
        options.wrong_usage("--output is the content of OUT: give -o as well")
    read_spec(options)
    path, uri = _out(options)
    if options.keep and not options.server:
        raise SecateurError("--keep needs a lasting server: give --server, or set SECATEUR_SERVER")
    result = _pruned(options, path, uri)
    kept = {"checkpoint": result.checkpoint.name} if result.checkpoint else {}
    report = result.report
    if options.output in SMALLER:  # the client may have made it of masks
        others = tuple(w for w in report.warnings if w.code != "NOT_SMALLER")
        report = replace(report, warnings=others)
    show(report, options, kept)
    if kept and not options.json:
        print(f"{'' if options.quiet else 'kept as '}{kept['checkpoint']}")


def _pruned(options: argparse.Namespace, path: Path | None, uri: str | None) -> PruneResult:
    """Prunes the model, and writes it to a path, or has it written to a URI."""
    with opened(options) as (client, source):
        if path and is_model(options.output):
            _check_holds(path, source, options.output == "packed")
        spec = spec_of(options, client, source)
        place, path, uri = _placed(options, source, path, uri)
        masks_do = source.is_here and is_made_of_masks(options.output) and not spec.solvers
        is_sent = uri or (path and not masks_do)
        output = options.output if is_sent else "masks"
        if options.out is None:
            output = "none"
        more = {"keep": options.keep, "destination": uri, "prior": options.prior}
        result = client.prune(place, spec, output, _progress(options), **more)
        if path:
            result.save(path, options.output)
    return result


def _finalize(options: argparse.Namespace) -> None:
    if (options.output == "shrunk") != (options.spec is not None):
        options.wrong_usage("--output shrunk and --spec FILE, with the groups, go together")
    groups = [] if options.spec is None else groups_in(options.spec)
    path, uri = _out(options)
    with opened(options) as (client, source):
        if path:
            _check_holds(path, source, options.output == "packed")
        place, path, uri = _placed(options, source, path, uri)
        more = {"output": options.output, "groups": groups, "prior": options.prior}
        final = client.finalize(place, options.tensors, _progress(options), uri, **more)
        if path:
            final.save(path)
    show(final.report, options, {})
    note = not_smaller(options.output, final.report.zeros)
    if note and not options.json and not options.quiet:
        print(note)


def _progress(options: argparse.Namespace) -> bool | None:
    return False if options.quiet else None


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
