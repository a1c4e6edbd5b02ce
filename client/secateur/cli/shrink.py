"""The command `secateur shrink`: writes a smaller transformer to a new Hugging Face folder."""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.architectures.experts import without_experts
from secateur.architectures.folder import (
    check_config,
    fitted_folder,
    folder_without_layers,
    transformer_in,
)
from secateur.architectures.parts import groups_of_parts
from secateur.architectures.sizes import check_expressible
from secateur.architectures.transformer import CONFIG, Transformer
from secateur.cli.options import add_command, amount, shown_options
from secateur.cli.printing import show
from secateur.cli.source import connected
from secateur.client import Client
from secateur.depth import without_layers
from secateur.errors import InvalidSpec, SecateurError
from secateur.files import check_new_folder, save
from secateur.folders import Folder
from secateur.model import Source
from secateur.paths import path_of
from secateur.selections import grouped
from secateur.source import read_source
from secateur.spec import Spec
from secateur.ties import tied

# Their options, and the help of each.
_AMOUNTS = {
    "intermediate": "channels of each feed-forward network",
    "heads": "query heads of each layer; where some share a KV head, of those of each KV head",
    "kv_heads": "KV heads of each layer, with all their query heads",
    "experts": "experts of each layer",
}


def add_shrink(commands: Any) -> None:
    """Adds the command."""
    text = "write a smaller transformer, with its config, to a new Hugging Face folder"
    command = add_command(commands, "shrink", text, _shrink, "else an embedded server")
    command.add_argument("model", metavar="FOLDER", help=f"the model, with its {CONFIG}")
    command.add_argument("-o", "--out", metavar="OUT", required=True, help="the folder to make")
    heads = command.add_mutually_exclusive_group()
    for name, units in _AMOUNTS.items():
        holder = heads if "heads" in name else command
        option, text = f"--{name.replace('_', '-')}", f"how many to remove of the {units}"
        holder.add_argument(option, metavar="AMOUNT", type=amount, help=text)
    layers = command.add_mutually_exclusive_group()
    text = "remove so many layers: those before the last one"
    layers.add_argument("--layers", metavar="COUNT", type=int, help=text)
    layers.add_argument(
        "--drop-layers", metavar="LAYER,...", type=_numbers, help="remove these; 0 is the first"
    )
    text = "keep a multiple of this many channels (default: up to 16)"
    command.add_argument("--align", metavar="COUNT", type=int, help=text)
    shown_options(command)
    command.epilog = (
        "AMOUNT: an int is a number of units, 0.3 or 30% a fraction. Each layer loses as many: "
        "the units with the smallest weights."
    )
    command.set_defaults(output="shrunk")


def _numbers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of layers, such as 3,7") from None


def _shrink(options: argparse.Namespace) -> None:
    is_sent = any(getattr(options, name) is not None for name in _AMOUNTS)
    if not is_sent and options.layers is None and options.drop_layers is None:
        options.wrong_usage("an amount is required, such as --intermediate 0.3 or --layers 2")
    for name in _AMOUNTS:
        if getattr(options, name) == 0:
            options.wrong_usage(f"--{name.replace('_', '-')} 0 removes nothing: leave it out")
    if options.align is not None and options.intermediate is None:
        options.wrong_usage("--align is for channels: give --intermediate")
    out = path_of(options.out)
    check_new_folder(out)
    source = read_source(options.model)
    check_config(_folder(options, source), source)
    macs = _macs(options, source)
    source = _without_layers(options, source)
    _check_heads(options, transformer_in(_folder(options, source), source)[1])
    if not is_sent:
        _write(options, source, out, macs)
        return
    with connected(options) as client:
        if options.experts is not None:
            folder = _folder(options, source)
            source = without_experts(client, source, folder, options.experts)
        _cut(options, client, source, out, macs)


def _macs(options: argparse.Namespace, source: Source) -> int:
    return transformer_in(_folder(options, source), source)[1].macs


def _folder(options: argparse.Namespace, source: Source) -> Folder:
    if source.folder is None:
        raise SecateurError(f"{options.model}: is not a folder with a model and its {CONFIG}")
    return source.folder


def _without_layers(options: argparse.Namespace, source: Source) -> Source:
    """The model without the layers that the options name."""
    if options.layers is None and options.drop_layers is None:
        return source
    folder = _folder(options, source)
    config, model = transformer_in(folder, source)
    removed = options.drop_layers
    if removed is None:
        if not 0 < options.layers < model.layers:
            raise InvalidSpec(f"layers: {options.layers} is outside [1, {model.layers - 1}]")
        removed = list(range(model.layers - 1 - options.layers, model.layers - 1))
    smaller = without_layers(source, removed, model.layer(0).removesuffix(".0."))
    return replace(smaller, folder=folder_without_layers(folder, config, model, set(removed)))


def _check_heads(options: argparse.Namespace, model: Transformer) -> None:
    """Refuses, before the model is sent, heads that its config cannot express."""
    keys, shared = model.architecture.keys, model.heads // model.kv_heads
    heads, kv_heads = model.heads, model.kv_heads
    if options.kv_heads is not None or shared == 1:
        given = options.heads if options.kv_heads is None else options.kv_heads
        kv_heads = _kept("heads" if options.kv_heads is None else "kv-heads", given, kv_heads)
        heads = kv_heads * shared
    else:
        heads = kv_heads * _kept("heads", options.heads, shared)
    sizes = {keys.heads: heads, **({keys.kv_heads: kv_heads} if keys.kv_heads else {})}
    check_expressible(
        model, replace(model, config={**model.config, "head_dim": model.head_dim, **sizes})
    )


def _kept(option: str, given: float | None, units: int) -> int:
    """How many units are kept of each group of heads."""
    if given is None:
        return units
    removed = given if isinstance(given, int) else round(given * units)
    if not removed:
        raise InvalidSpec(f"--{option}: {given} of {units} is none; give at least 1, an int")
    return max(1, units - int(removed))


def _cut(options: argparse.Namespace, client: Client, source: Source, out: Path, macs: int) -> None:
    """Removes units of groups, and writes the folder."""
    folder = _folder(options, source)
    rules = list(_rules(options, transformer_in(folder, source)[1]))
    if not rules:
        _write(options, source, out, macs)
        return
    progress = False if options.quiet else None
    spec = sum(rules[1:], rules[0])
    report = client.prune(source, spec, "shrunk", progress, destination=str(out)).report
    notes = (*folder.notes, _macs_note(options, out, macs))
    show(report, options, {"removed": notes})
    if not options.json:
        _print_notes(options, notes)


def _rules(options: argparse.Namespace, model: Transformer) -> Iterator[Spec]:
    """The rules of the options; each group loses the same fraction, since a config has one size."""
    for part in ("intermediate", "heads", "kv_heads"):
        if (given := getattr(options, part)) is not None:
            # The slices of a head are many already.
            align = options.align if part == "intermediate" else 1
            groups = groups_of_parts(model, [part])
            yield grouped(groups, given, scope="tensor", align=align)


def _write(options: argparse.Namespace, source: Source, out: Path, macs: int) -> None:
    """Writes a model whose tensors the server did not cut."""
    entries = tied({**source.tensors, **source.others}, source.other_names)
    fitted = fitted_folder(_folder(options, source), source.tensors)
    save(out, entries, source.metadata, source.index, source.tensors, source.torch_file, fitted)
    _print_notes(options, (*fitted.notes, _macs_note(options, out, macs)))


def _macs_note(options: argparse.Namespace, out: Path, before: int) -> str:
    """The operations before, and those of the folder that was written."""
    now = _macs(options, read_source(out))
    return f"multiply-accumulates of the layers for each token: {before:,} -> {now:,}"


def _print_notes(options: argparse.Namespace, notes: Sequence[str]) -> None:
    if options.json:
        print(json.dumps({"removed": notes}, indent=2))
    elif not options.quiet:
        print("\n".join(notes))
