"""The tasks: what is done where a file of the model is."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from torch import Tensor

from secateur_server.api.convert.report import encode_tensors, report_of
from secateur_server.backends.protocol import Backend
from secateur_server.cut.choice import Choice
from secateur_server.cut.prior import prune_zeros
from secateur_server.cut.prune import KeptUnits, prune
from secateur_server.outputs import OUTPUTS
from secateur_server.outputs.shrunk import shrunk_files
from secateur_server.report.shrinkage import measure_sent
from secateur_server.report.tensors import measure_tensors
from secateur_server.report.warnings import Change, changes_of
from secateur_server.runtime.context import RequestContext
from secateur_server.spec.rules import Selection
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.shards import Shard
from secateur_server.state_dict.slices import Shrinking
from secateur_server.state_dict.state_dict import StateDict, masks_of
from secateur_server.uris.local import LocalPlace
from secateur_server.uris.multipart import MultipartPlace, Uploaded
from secateur_server.uris.references import Reference
from secateur_server.wire.header import Entry, Header, header_length, parse_header
from secateur_server.wire.mapped import MappedFile, map_header, map_tensors
from secateur_server.wire.tensors import WireTensor
from secateur_server.wire.writer import OutgoingFile

# Mapped files that a process of the cluster keeps for the next task. They take no memory.
KEPT_FILES = 32


@dataclass(frozen=True)
class FileWork:
    """A file, and what is known of the call when a task works on it.

    Attributes:
        reference: The file.
        names: Of the parameters to read; None: all.
        zeros: Of the parameters whose zeros count as pruned.
        rules: The rules that make its masks, resolved, for its tensors alone.
    """

    reference: Reference
    names: tuple[str, ...] | None = None
    zeros: tuple[str, ...] = ()
    rules: tuple[Selection | KeptUnits, ...] = ()

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.reference.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.reference


@dataclass(frozen=True)
class Opened:
    """A file that this process has mapped.

    Attributes:
        file: The file.
        head: Its header.
        base: The offset of the data behind the header.
        tensors: Those that were read.
    """

    file: MappedFile
    head: Header
    base: int
    tensors: dict[str, WireTensor] = field(default_factory=dict)


_opened: OrderedDict[Reference, Opened] = OrderedDict()


def read_head(context: RequestContext, backend: Backend, work: FileWork) -> Header:
    """Reads the header of a file."""
    return _open(context, work.reference).head


def forget_file(context: RequestContext, backend: Backend, work: FileWork) -> None:
    """Removes what this node has fetched of a file."""
    work.reference.forget()
    _opened.pop(work.reference, None)


def measure_file(context: RequestContext, backend: Backend, work: FileWork) -> bytes:
    """Measures the named parameters of a file. Returns them as encode_tensors does."""
    state_dict = read_state_dict(context, work)
    names = state_dict.catalog.prunable if work.names is None else work.names
    measured = measure_tensors(context, {name: state_dict.parameters[name] for name in names})
    encoded = encode_tensors(measured)
    close_file(work.reference)
    return encoded


class Written(NamedTuple):
    """A file that a task has written, the tensors in it, and what the target receives."""

    filename: str
    size: int
    blake3: str
    entries: Sequence[Entry]
    uploaded: Uploaded


Place = LocalPlace | MultipartPlace


@dataclass(frozen=True)
class Part:
    """What a Prune makes of a file.

    Attributes:
        tensors: The measured parameters, as encode_tensors returns them.
        changes: Of these parameters.
        choices: Of each rule.
        masks: The bits of each mask, if the output is masks.
        file: The written file; None if none is written.
    """

    tensors: bytes
    changes: Sequence[Change]
    choices: Sequence[Sequence[Choice]]
    masks: dict[str, Tensor]
    file: Written | None = None


@dataclass(frozen=True)
class PruneWork:
    """A file to prune.

    Attributes:
        work: The file and the rules.
        output: Of the call.
        target: Where the file is written; None: nowhere.
        has_masks: Whether the bits of masks are returned.
        shrinking: What is kept of the file; None: everything.
    """

    work: FileWork
    output: int
    target: Place | None
    has_masks: bool
    shrinking: Shrinking | None = None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return self.work.size

    @property
    def place(self) -> Reference:
        """The file, so that its next task is on the same node."""
        return self.work.reference


def prune_file(context: RequestContext, backend: Backend, asked: PruneWork) -> Part:
    """Prunes a file, measures what is sent of it, and writes it."""
    work = asked.work
    state_dict = read_state_dict(context, work)
    prior = _prior(context, work, state_dict)
    pruned, choices = prune(context, prior, work.rules, {})
    masks = {name: mask.bits for name, mask in masks_of(pruned).items()} if asked.has_masks else {}
    files = _files(context, asked, state_dict, pruned) if asked.target else []
    tensors = encode_tensors(measure_sent(context, pruned, asked.shrinking))
    report = report_of(context, tensors, pruned, state_dict.catalog, "")
    changes = changes_of(context, report, state_dict.catalog, prior, pruned)
    part = Part(tensors, changes, [list(of_rule) for of_rule in choices], masks)
    if asked.target:
        part = replace(part, file=write_file(context, asked.target, *files))
    close_file(work.reference)
    return part


def _files(
    context: RequestContext,
    asked: PruneWork,
    state_dict: StateDict,
    pruned: Mapping[str, Parameter],
) -> list[OutgoingFile]:
    if asked.shrinking is not None:
        return shrunk_files(context, state_dict, pruned, asked.shrinking)
    return OUTPUTS[asked.output].files(context, state_dict, pruned, [])


def write_file(context: RequestContext, place: Place, file: OutgoingFile) -> Written:
    """Writes a file to its place."""
    begin = bytes(next(iter(file.parts())))
    length = header_length(context, begin[:8], file.size)
    head = parse_header(context, begin[8 : 8 + length], file.size - 8 - length)
    uploaded = place.write(context, file)
    return Written(file.filename, file.size, file.blake3, head.entries, uploaded)


def read_state_dict(context: RequestContext, work: FileWork) -> StateDict:
    """Makes a state_dict of a file, with the parameters to read."""
    opened = _open(context, work.reference)
    described = Shard(opened.file.filename, opened.head.entries, opened.head.metadata)
    state_dict = StateDict([described], {}, is_mapped=True)
    wanted = None if work.names is None else state_dict.files_of(work.names)
    entries = [e for e in opened.head.entries if wanted is None or e.name in wanted]
    missing = [entry for entry in entries if entry.name not in opened.tensors]
    opened.tensors.update(map_tensors(context, opened.file, missing, opened.base))
    state_dict.fill(context, {e.name: opened.tensors[e.name] for e in entries}, {}, {})
    return state_dict


def _open(context: RequestContext, reference: Reference) -> Opened:
    for other in [kept for kept in _opened if not kept.exists()]:
        del _opened[other]  # its mapping would keep its disk space
    if reference not in _opened:
        file = reference.open(context)
        _opened[reference] = Opened(file, *map_header(context, file))
        forget(_opened, KEPT_FILES)
    _opened.move_to_end(reference)
    return _opened[reference]


def close_file(reference: Reference) -> None:
    """Forgets a file after the last task on it. Raises UriChanged if it has changed."""
    _opened.pop(reference).file.check_unchanged()


def state_before(context: RequestContext, work: FileWork) -> dict[str, Parameter]:
    """Returns the parameters to read of a file, after the rules of the work."""
    prior = _prior(context, work, read_state_dict(context, work))
    return {**prior, **prune(context, prior, work.rules, {})[0]}


def _prior(context: RequestContext, work: FileWork, state_dict: StateDict) -> dict[str, Parameter]:
    """The parameters before the first rule."""
    return prune_zeros(context, state_dict.parameters, work.zeros)


def forget(kept: OrderedDict[Any, Any], most: int) -> None:
    """Forgets what has not been used for the longest time."""
    while len(kept) > most:
        kept.popitem(last=False)
