"""Nearly valid inputs of the targets. Random bytes would be refused too early."""

import json
import math
from collections.abc import Callable
from typing import Any

from hypothesis import strategies as st

from secateur_proto import checkpoint_pb2, checkpoints_pb2, pruner_pb2, spec_pb2
from secateur_proto.dtypes import DTYPES
from secateur_proto.framing import tensor_bytes
from tests.contract.raw import entry, file

NAMES = st.sampled_from(["w", "w_orig", "w_mask", "v", "__metadata___orig", "../x", "é\0\n", ""])
ODD: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, -1, 0.0, 2**62, 2**63, 2**64, 10**30, "", "\ud800", [], {}, [[]], "F32", "n" * 300]
)
# Changes of bytes: a position in 65536ths, how many bytes are removed, and what is inserted.
EDITS = st.lists(
    st.tuples(st.integers(0, 65535), st.integers(0, 3), st.binary(max_size=3)), max_size=3
)
SHORT = st.text(max_size=3)


def edited(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Applies changes to bytes."""
    for place, removed, inserted in edits:
        at = place * len(data) >> 16
        data = data[:at] + inserted + data[at + removed :]
    return data


@st.composite
def tables(draw: st.DrawFn) -> tuple[dict[str, Any], int]:
    """Draws a valid header, and the number of bytes of its tensors."""
    table: dict[str, Any] = {}
    begin = 0
    for name in draw(st.lists(NAMES, max_size=4, unique=True)):
        dtype = draw(st.sampled_from([*DTYPES, "F32", "F16"]))
        shape = draw(st.lists(st.sampled_from([0, 1, 2, 4, 2**40]), max_size=3))
        if 2**40 in shape:
            shape.append(0)
        size = tensor_bytes(dtype, shape)
        table[name] = entry(dtype, shape, begin, begin + size)
        begin += size
    if draw(st.booleans()):
        table["__metadata__"] = draw(st.dictionaries(SHORT, SHORT, max_size=2))
    return table, begin


@st.composite
def files(draw: st.DrawFn) -> bytes:
    """Draws inputs of targets.safetensors_file."""
    table, size = draw(tables())
    for name in draw(st.lists(st.sampled_from(sorted(table)), max_size=1)) if table else ():
        key = draw(st.sampled_from(sorted(table[name]) or ["k"]))
        table[name] = {**table[name], key: draw(ODD)}
    values = draw(st.binary(min_size=size, max_size=size))
    head = bytes([draw(st.integers(0, 40)), draw(st.integers(0, 7)), 0])
    return head + edited(file(table, values), draw(EDITS))


def _message(kind: Any, **fields: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Makes messages in which each field is set or not."""
    return st.fixed_dictionaries({}, optional=fields).map(lambda values: kind(**values))


_DIGESTS = st.sampled_from(["", "0a" * 32, "0A" * 32, "../" * 21 + "a"])
_FILES = _message(
    checkpoint_pb2.File,
    filename=st.sampled_from(["a", "../a", "/etc/passwd", ".", "..", "a\0", "a\n", "é" * 200]),
    size_bytes=st.sampled_from([0, 1, 2**63, 2**64 - 1]),
    blake3=_DIGESTS,
)
_UPLOADS = _message(
    checkpoints_pb2.UploadFile, file=_FILES, offset=st.sampled_from([0, 1, 2**64 - 1])
)
_HEADERS: tuple[Callable[[], st.SearchStrategy[Any]], ...] = (
    lambda: _message(pruner_pb2.PruneHeader, data_bytes=st.integers(0, 2**64 - 1)),
    lambda: _message(checkpoints_pb2.UploadHeader, files=st.lists(_UPLOADS, max_size=2)),
    lambda: _message(pruner_pb2.ReportHeader, tensors=st.lists(SHORT, max_size=2)),
    lambda: _message(pruner_pb2.FinalizeHeader, checkpoint=SHORT),
)


@st.composite
def calls(draw: st.DrawFn) -> bytes:
    """Draws inputs of targets.messages."""
    from tests.fuzz.targets import KINDS

    which = draw(st.integers(0, len(KINDS) - 1))
    data = st.binary(max_size=200)
    first = draw(_message(KINDS[which], header=_HEADERS[which](), data=data))
    later = draw(st.lists(_message(KINDS[which], data=data) | st.just(first), max_size=3))
    raws = [edited(m.SerializeToString(), draw(EDITS)) for m in (first, *later)]
    return bytes([which]) + b"".join(len(raw).to_bytes(2, "little") + raw for raw in raws)


@st.composite
def indices(draw: st.DrawFn) -> bytes:
    """Draws inputs of targets.index."""
    table: dict[str, Any] = {
        "metadata": {"total_size": 3},
        "weight_map": {"w": "a.safetensors", "v": "a.safetensors", "u": "b.safetensors"},
    }
    if draw(st.booleans()):
        table["weight_map"]["t"] = draw(st.sampled_from(["a.safetensors", "../x", "/a", "a\0"]))
    for key in draw(st.lists(st.sampled_from(["metadata", "weight_map", "more"]), max_size=1)):
        table[key] = draw(ODD | st.dictionaries(SHORT, ODD, max_size=2))
    text = json.dumps(table, ensure_ascii=draw(st.booleans()))
    encoding = draw(st.sampled_from(["utf-8", "utf-16", "utf-32-be"]))
    return edited(text.encode(encoding, "surrogatepass"), draw(EDITS))


_TENSORS = st.sampled_from(["*", "conv.weight", "fc", "half", "empty", "[ch]*", "steps", "fc_orig"])
_HOLDERS = st.sampled_from(["scores", "mask", "fc scores", "packed", "fc_mask", "conv.weight", "x"])
_MAPS = st.dictionaries(_TENSORS, _HOLDERS, max_size=2)
_NORMS = _message(
    spec_pb2.Magnitude, p=st.floats(), matrix_norm=st.sampled_from([0, 1, 2, 77])
) | st.just(spec_pb2.Magnitude(p=1))
_CHOICE = st.sampled_from([0, 0, 1, 2, 3, 4, 77])
_SHARE = st.sampled_from([0.0, 0.0, 0.3, 0.5, 1.0, math.nan, -1.0])
_SMALL = st.sampled_from([0, 0, 1, 2, 3, 2**63])
_MEMBERS = _message(
    spec_pb2.Member,
    tensor=_TENSORS,
    dim=st.sampled_from([0, 0, 1, -1, 5]),
    offset=_SMALL,
    stride=_SMALL,
    units=_SMALL,
    indices=st.just([]) | st.lists(_SMALL, max_size=3),
    unscored=st.booleans(),
)
_GROUPS = _message(
    spec_pb2.Group, name=st.sampled_from(["", "g"]), members=st.lists(_MEMBERS, max_size=3)
)
_RAILS = _message(
    spec_pb2.Rail,
    tensors=st.lists(_TENSORS, max_size=1),
    min_sparsity=_SHARE,
    max_sparsity=_SHARE,
    keep_at_least=_SMALL,
)
_SELECTIONS = _message(
    spec_pb2.Selection,
    tensors=st.lists(_TENSORS, min_size=1, max_size=2),
    magnitude=_NORMS,
    granularity=st.sampled_from([0, 1, 1, 2, 2, 3, 4, 5, 77]),
    dim=st.sampled_from([0, 1, -1, 2, 3, -(2**31)]),
    scope=st.sampled_from([0, 1, 1, 2, 3, 77]),
    count=st.sampled_from([0, 1, 2, 8, 2**63, 2**64 - 1]),
    fraction=st.floats() | st.floats(0, 1),
    threshold=st.floats(),
    bytes=st.sampled_from([0, 20, 2**64 - 1]),
    macs=st.builds(
        lambda target, costs: spec_pb2.Macs(target=target, per_unit=costs),
        st.floats(),
        st.dictionaries(_TENSORS, st.floats(), max_size=2),
    ),
    table=st.lists(st.tuples(_TENSORS, st.floats(0, 1)), max_size=2).map(
        lambda entries: spec_pb2.Table(
            entries=[spec_pb2.TableEntry(tensors=t, fraction=f) for t, f in entries]
        )
    ),
    importance_scores=st.just({}) | _MAPS,
    scales=st.just({}) | st.just({}) | _MAPS,
    of_all=st.booleans(),
    pattern=_message(
        spec_pb2.Pattern, n=st.sampled_from([0, 1, 2]), m=st.sampled_from([0, 2, 4, 2**32 - 1])
    ),
    block=_message(
        spec_pb2.Block,
        shape=st.lists(st.sampled_from([0, 1, 2, 3, 2**63]), max_size=3),
        as_matrix=st.booleans(),
    ),
    groups=st.just([]) | st.lists(_GROUPS, max_size=2),
    combination=_CHOICE,
    normalization=_CHOICE,
    allocation=_CHOICE,
    guard_rails=_message(
        spec_pb2.GuardRails,
        rails=st.lists(_RAILS, max_size=2),
        keep_first=st.booleans(),
        exclude=st.lists(_TENSORS, max_size=1),
    ),
)
_RANDOM = st.integers(0, 2**64 - 1).map(lambda seed: spec_pb2.Random(seed=seed))


@st.composite
def specs(draw: st.DrawFn) -> bytes:
    """Draws inputs of targets.spec."""
    rules = []
    for _ in range(draw(st.integers(1, 3))):
        selection = draw(_SELECTIONS)
        if draw(st.booleans()):
            selection.random.CopyFrom(draw(_RANDOM))
        custom = spec_pb2.CustomMasks(masks=draw(_MAPS))
        is_custom = draw(st.sampled_from([True, False, False]))
        rule = {"custom_masks": custom} if is_custom else {"selection": selection}
        rules.append(spec_pb2.Rule(**rule))
    header = pruner_pb2.PruneHeader(spec=spec_pb2.PruningSpec(rules=rules))
    return edited(header.SerializeToString(), draw(EDITS))


STRATEGIES: dict[str, st.SearchStrategy[bytes]] = {
    "safetensors_file": files(),
    "messages": calls(),
    "index": indices(),
    "spec": specs(),
}
