"""Prune: each file is pruned, measured and written by a task."""

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import chain

from secateur_proto import pruner_pb2 as pb
from secateur_proto.report_pb2 import SparsityReport
from secateur_server.api.answers import Made, written
from secateur_server.api.convert.checkpoint import file_message
from secateur_server.api.convert.report import report_of
from secateur_server.api.rules import groups_of
from secateur_server.api.shards.decide import Applied, after_rules, works_of
from secateur_server.api.shards.groups import Shrunk, shrink
from secateur_server.api.shards.model import DividedModel, NotDivisible, divided_model, worked
from secateur_server.api.shards.rules import DividedRule, divided_rules
from secateur_server.api.shards.work import FileWork, Part, Place, PruneWork, prune_file
from secateur_server.api.shards.write import SharedTarget, put_in_place, targets_of
from secateur_server.backends.masks import Mask
from secateur_server.cut.choice import Choice
from secateur_server.cut.drivers import Cluster
from secateur_server.outputs import OUTPUTS
from secateur_server.report.warnings import NOT_SMALLER, warnings_of
from secateur_server.spec.resolve import resolve
from secateur_server.spec.rules import Rule, Selection
from secateur_server.state_dict.sources import Call, Sources
from secateur_server.state_dict.state_dict import packed_masks
from secateur_server.wire.writer import OutgoingFile, digest_of


def prune_files(
    sources: Sources,
    cluster: Cluster,
    call: Call[pb.PruneHeader],
    asked: Sequence[Rule],
    held: ExitStack,
) -> Made:
    """Makes the answer of a call of Prune, as prune_call does.

    Raises:
        NotDivisible: The server must do the work.
    """
    context = call.context
    _check_divisible(call.header)
    model = held.enter_context(divided_model(sources, cluster, call))
    pruning = _decided(call, model, asked)
    with _targets(sources, call, model) as targets:
        parts = _worked(pruning, targets)
        files = _masks(pruning, parts)
        report = _report(pruning, parts)
        if targets:
            places = [part.file for part in parts if part.file]
            files = put_in_place(context, model, targets, places)
    report.output_blake3 = digest_of(files)
    sources.metrics.reported(context, report)
    count = sum(change.pruned for part in parts for change in part.changes)
    sources.metrics.pruned(context, count, report.sparsity)
    result = pb.PruneResult(report=report)
    if targets:
        result.files.extend(map(file_message, files))
        return result, [], model.check_unchanged
    return written(sources, call, result, files, model.check_unchanged)


def _check_divisible(header: pb.PruneHeader) -> None:
    """Raises NotDivisible for what tasks do not do: weights would pass through the server."""
    output = OUTPUTS[header.output]
    is_sent = output.has_weights and output.has_data and not header.destination_uri
    if header.keep or header.HasField("details") or is_sent:
        raise NotDivisible


@dataclass(frozen=True)
class _Pruning:
    """A Prune whose amounts are all known for each file.

    Attributes:
        call: The call.
        model: The model.
        asked: The rules of the request.
        divided: The same rules, resolved.
        works: Each file with its rules.
        applied: What became of each rule.
        shrunk: What a shrunk model keeps; None for other outputs.
    """

    call: Call[pb.PruneHeader]
    model: DividedModel
    asked: Sequence[Rule]
    divided: Sequence[DividedRule]
    works: Sequence[FileWork]
    applied: Sequence[Applied]
    shrunk: Shrunk | None

    @property
    def rules(self) -> list[Selection]:
        """The resolved rules."""
        return [one.rule for one in self.divided]


def _decided(call: Call[pb.PruneHeader], model: DividedModel, asked: Sequence[Rule]) -> _Pruning:
    """Decides the amounts of all rules."""
    context, header = call.context, call.header
    rules = resolve(context, asked, model.catalog)
    if header.output == pb.OUTPUT_REPARAMETRIZED:
        _check_names(rules, model)
    divided = divided_rules(context, rules, model)
    is_whole = bool(header.destination_uri) and OUTPUTS[header.output].needs_all_tensors
    works = works_of(model, rules, header.prior, is_whole)
    works, applied = after_rules(context, model, works, divided)
    shrunk = None
    if OUTPUTS[header.output].needs_groups:
        shrunk = shrink(context, model, works, groups_of(context, rules, model.catalog))
    return _Pruning(call, model, asked, divided, works, applied, shrunk)


def _check_names(rules: Sequence[Rule], model: DividedModel) -> None:
    """Raises NotDivisible if a pair would have a name of a tensor: the server finds where."""
    stored, pairs = model.catalog.stored, model.catalog.pairs
    new = {name for rule in rules for name in rule.names()} - pairs.keys()
    if any(f"{name}_orig" in stored or f"{name}_mask" in stored for name in new):
        raise NotDivisible


@contextmanager
def _targets(
    sources: Sources, call: Call[pb.PruneHeader], model: DividedModel
) -> Iterator[Sequence[SharedTarget]]:
    """Opens the targets of weights; none if the output has none."""
    if not call.header.destination_uri or not OUTPUTS[call.header.output].has_weights:
        yield []
        return
    with targets_of(sources, call, model) as targets:
        yield targets


def _worked(pruning: _Pruning, targets: Sequence[SharedTarget]) -> list[Part]:
    """Prunes all files, and writes them to the targets, if there are any."""
    header, model = pruning.call.header, pruning.model
    output = OUTPUTS[header.output]
    has_masks = output.has_data and not output.has_weights
    works = pruning.works
    places: Sequence[Place | None] = [None] * len(works)
    if targets:
        places = [target.place() for target in targets[: len(works)]]
    kept = pruning.shrunk.files if pruning.shrunk else [None] * len(works)
    pieces = [
        PruneWork(work, header.output, place, has_masks, shrinking)
        for work, place, shrinking in zip(works, places, kept, strict=True)
    ]
    return worked(pruning.call.context, model.cluster, "write", prune_file, pieces)


def _masks(pruning: _Pruning, parts: Sequence[Part]) -> list[OutgoingFile]:
    """The file of masks, if the output is masks."""
    output = OUTPUTS[pruning.call.header.output]
    if output.has_weights or not output.has_data:
        return []
    shapes = pruning.model.catalog.prunable
    masks = {
        name: Mask(bits, math.prod(shapes[name]))
        for part in parts
        for name, bits in part.masks.items()
    }
    return [packed_masks(pruning.call.context, masks)]


def _report(pruning: _Pruning, parts: Sequence[Part]) -> SparsityReport:
    """Puts the report together."""
    context, catalog = pruning.call.context, pruning.model.catalog
    changes = [change for part in parts for change in part.changes]
    names = [change.name for change in changes]
    encoded = b"".join(part.tensors for part in parts)
    choices = list(_choices(pruning, parts))
    report = report_of(context, encoded, names, catalog, "", choices=choices)
    if pruning.shrunk:
        pruning.shrunk.add_to(context, report, pruning.model)
    warnings = warnings_of(context, report, pruning.asked, pruning.rules, catalog, changes)
    if pruning.call.header.output == pb.OUTPUT_PACKED:
        warnings = [warning for warning in warnings if warning.code != NOT_SMALLER]
    report.warnings.extend(warnings)
    return report


def _choices(pruning: _Pruning, parts: Sequence[Part]) -> Iterator[Sequence[Choice]]:
    """The choices of each rule."""
    left = [iter(part.choices) for part in parts]
    for one, (lengths, decided) in zip(pruning.divided, pruning.applied, strict=True):
        of_rules = (
            next(of_file) for of_file, n in zip(left, lengths, strict=True) for _ in range(n)
        )
        found = chain.from_iterable(of_rules)
        yield one.choices(pruning.call.context, found, decided)
