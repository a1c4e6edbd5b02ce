"""The command `secateur shrink`: writes a smaller transformer to a new Hugging Face folder."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import click

from secateur.architectures.calibrated import Calibrated, calibrated
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
from secateur.calibration.statistics import Statistics
from secateur.cli.group import Command
from secateur.cli.options import Server, server_options
from secateur.cli.output import Printer, print_options
from secateur.cli.places import connected
from secateur.cli.shrink_options import ShrinkOptions, shrink_options
from secateur.client import Client
from secateur.depth import without_layers
from secateur.errors import InvalidSpec, SecateurError
from secateur.files import check_new_folder, save
from secateur.folders import Folder
from secateur.grouping import Group
from secateur.model import Source
from secateur.paths import path_of
from secateur.selections import grouped
from secateur.source import read_source
from secateur.spec import Spec
from secateur.ties import tied


@click.command(
    "shrink",
    cls=Command,
    epilog="AMOUNT: an int is a number of units, 0.3 or 30% a fraction. Each layer loses as many: "
    "the units with the smallest weights, or the lowest scores by the statistics.",
)
@shrink_options
@print_options(has_rows=True)
@server_options("else an embedded server")
def command(options: ShrinkOptions, printer: Printer, server: Server) -> None:
    """Writes a smaller transformer, with its config, to a new Hugging Face folder."""
    options.check()
    out = path_of(options.out)
    check_new_folder(out)
    source = read_source(options.model)
    check_config(_folder(options, source), source)
    macs = _macs(options, source)
    source, statistics = _without_layers(options, source, _statistics(options, source))
    _check_heads(options, transformer_in(_folder(options, source), source)[1])
    if not options.is_sent:
        _write(options, printer, source, macs)
        return
    with connected(server, options.model) as client:
        if options.experts is not None:
            found = _without_experts(options, options.experts, client, source, statistics)
            source, statistics = found
        _cut(options, printer, client, source, macs, statistics)


def _macs(options: ShrinkOptions, source: Source) -> int:
    return transformer_in(_folder(options, source), source)[1].macs


def _folder(options: ShrinkOptions, source: Source) -> Folder:
    if source.folder is None:
        raise SecateurError(f"{options.model}: is not a folder with a model and its {CONFIG}")
    return source.folder


def _statistics(options: ShrinkOptions, source: Source) -> Calibrated | None:
    """The statistics that the option names."""
    if options.statistics is None:
        return None
    path = path_of(options.statistics)
    config, model = transformer_in(_folder(options, source), source)
    return calibrated(Statistics.load(path), config, model, path.name)


def _noted(options: ShrinkOptions, source: Source, note: str) -> Source:
    """The model with another note for its card."""
    folder = _folder(options, source)
    return replace(source, folder=replace(folder, notes=(*folder.notes, note)))


def _without_layers(
    options: ShrinkOptions, source: Source, statistics: Calibrated | None
) -> tuple[Source, Calibrated | None]:
    """The model without the layers that the options name, and the statistics of the others."""
    if options.layers is None and options.drop_layers is None:
        return source, statistics
    folder = _folder(options, source)
    config, model = transformer_in(folder, source)
    removed = options.drop_layers or _least(options.layers or 0, model, statistics)
    smaller = without_layers(source, removed, model.layer(0).removesuffix(".0."))
    smaller = replace(smaller, folder=folder_without_layers(folder, config, model, set(removed)))
    if statistics is None:
        return smaller, None
    if options.layers is not None:
        is_known = statistics.layers is not None
        how = "their influence in" if is_known else "their place, as no influence is in"
        smaller = _noted(options, smaller, f"layers chosen by {how} {statistics.file}")
    return smaller, statistics.without_layers(removed, model)


def _least(count: int, model: Transformer, statistics: Calibrated | None) -> list[int]:
    """So many layers: the least influential, or those before the last one."""
    if not 0 < count < model.layers:
        raise InvalidSpec(f"layers: {count} is outside [1, {model.layers - 1}]")
    found = None if statistics is None else statistics.least_influential(count)
    last = model.layers - 1
    return list(range(last - count, last)) if found is None else found


def _without_experts(
    options: ShrinkOptions,
    amount: float,
    client: Client,
    source: Source,
    statistics: Calibrated | None,
) -> tuple[Source, Calibrated | None]:
    """The model without some experts, and the statistics of the others."""
    folder = _folder(options, source)
    source, fewer = without_experts(client, source, folder, amount, statistics)
    if statistics is not None:
        how = "their outputs in" if statistics.experts else "weights, as no outputs are in"
        source = _noted(options, source, f"experts chosen by {how} {statistics.file}")
    return source, fewer


def _check_heads(options: ShrinkOptions, model: Transformer) -> None:
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


def _cut(
    options: ShrinkOptions,
    printer: Printer,
    client: Client,
    source: Source,
    macs: int,
    statistics: Calibrated | None,
) -> None:
    """Removes units of groups, and writes the folder."""
    rules: list[Spec] = []
    model = transformer_in(_folder(options, source), source)[1]
    for part in ("intermediate", "heads", "kv_heads"):
        if getattr(options, part) is not None:
            groups = groups_of_parts(model, [part])
            scores = {} if statistics is None else statistics.scores(source, groups)
            rules += _rules(options, part, groups, scores)
            if statistics is not None:
                source = _noted(options, source, _chosen(part, groups, scores, statistics))
    if not rules:
        _write(options, printer, source, macs)
        return
    spec = sum(rules[1:], rules[0])
    report = client.prune(source, spec, "shrunk", printer.progress, destination=options.out).report
    notes = (*_folder(options, source).notes, _macs_note(options, macs))
    printer.report(report, {"removed": notes})
    if not printer.json:
        _print_notes(printer, notes)


def _rules(
    options: ShrinkOptions, part: str, groups: Sequence[Group], scores: Mapping[str, Any]
) -> Iterator[Spec]:
    """The rules of a part; each group loses the same fraction, since a config has one size."""
    # The slices of a head are many already.
    align = options.align if part == "intermediate" else 1
    for is_scored in (True, False):
        some = [one for one in groups if (one.name in scores) == is_scored]
        given = scores if is_scored else None
        if some:
            amount = getattr(options, part)
            yield grouped(some, amount, scope="tensor", align=align, importance_scores=given)


def _chosen(
    part: str, groups: Sequence[Group], scores: Mapping[str, Any], statistics: Calibrated
) -> str:
    """Says how the units of a part were chosen."""
    what = {"intermediate": "channels"}.get(part, "heads")
    rest = len(groups) - len(scores)
    if not rest:
        return f"{what} chosen by {statistics.file}"
    return (
        f"{what} of {rest} of {len(groups)} groups chosen by weights, as their inputs are not in "
        f"{statistics.file}"
    )


def _write(options: ShrinkOptions, printer: Printer, source: Source, macs: int) -> None:
    """Writes a model whose tensors the server did not cut."""
    entries = tied({**source.tensors, **source.others}, source.other_names)
    fitted = fitted_folder(_folder(options, source), source.tensors)
    out, file = path_of(options.out), source.torch_file
    save(out, entries, source.metadata, source.index, source.tensors, file, fitted)
    _print_notes(printer, (*fitted.notes, _macs_note(options, macs)))


def _macs_note(options: ShrinkOptions, before: int) -> str:
    """The operations before, and those of the folder that was written."""
    now = _macs(options, read_source(options.out))
    return f"multiply-accumulates of the layers for each token: {before:,} -> {now:,}"


def _print_notes(printer: Printer, notes: Sequence[str]) -> None:
    printer.show({"removed": notes}, "\n".join(notes))
