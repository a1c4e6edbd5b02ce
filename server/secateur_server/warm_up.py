"""Warm-up: prunes made-up models, so that no caller waits for imports and compilation."""

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from secateur_proto import pruner_pb2 as pb
from secateur_proto import spec_pb2
from secateur_proto.framing import file_header
from secateur_proto.plan_pb2 import Amount
from secateur_proto.report_pb2 import Details
from secateur_server.api.pruner import Pruner
from secateur_server.backends.cores import one_thread
from secateur_server.operate.metrics import Metrics
from secateur_server.runtime.context import RequestContext
from secateur_server.runtime.scheduler import Scheduler
from secateur_server.state_dict.sources import Sources
from secateur_server.storage.protocol import CheckpointStore
from secateur_server.uris.requests import Requests
from secateur_server.uris.scratch import Scratch
from secateur_server.uris.systems import missing
from secateur_server.uris.uris import Uris

# Kernels are compiled for each size of an element, so F16 also covers BF16.
_DTYPES = (("F32", torch.float32), ("F16", torch.float16), ("F64", torch.float64))
# Sides of tensors. Small tensors, large ones, and those of more than a million elements use
# different kernels. As F32 the large model is above ONE_CORE_BYTES, so the server's device prunes
# it.
_SMALL, _LARGE = (64, 64), (520, 1200)
_MAX_BYTES = 1 << 30

_log = logging.getLogger("secateur_server")


def warm_up(device: torch.device, store: CheckpointStore, prefixes: Sequence[str]) -> None:
    """Prunes made-up models by all kinds of rules that have kernels.

    The first call of a process imports numba's compiler, and compiles kernels or loads them from
    numba's cache. Compilation takes seconds, during which a call cannot be cancelled, so every
    kernel is compiled here. These calls are not counted in metrics. Log lines say when it begins,
    and how long it took.

    Args:
        device: Where large models are pruned.
        store: Has the folder for files of calls.
        prefixes: Prefixes of allowed URIs. The libraries that open them are imported.
    """
    begun = time.perf_counter()
    _log.info("warming up; the first start compiles kernels, for a minute or two on a slow machine")
    for prefix in prefixes:
        if problem := missing(prefix):
            _log.warning("URIs under %s cannot be opened: %s", prefix, problem)
    metrics, scheduler = Metrics(device), Scheduler(_MAX_BYTES, 0)
    uris = Uris((), (), Scratch(store.scratch, 0, metrics.fetched), Requests(1.0))
    limits = _MAX_BYTES, _MAX_BYTES
    pruner = Pruner(Sources(store, uris, device, *limits, scheduler, metrics), 1)
    with ThreadPoolExecutor(1, initializer=one_thread) as thread:
        thread.submit(_warm_up, pruner).result()
    pruner.close()
    _log.info("warmed up in %.1f seconds", time.perf_counter() - begun)


def _warm_up(pruner: Pruner) -> None:
    for name, dtype in _DTYPES:
        small, large = (_file(name, dtype, _sides(*sides)) for sides in (_SMALL, _LARGE))
        many = _file(name, dtype, {f"{rule}.{i}": 8 for rule in ("l1", "lamp") for i in range(50)})
        _prune(pruner, large, _RULES)
        _prune(pruner, large, _RULES, prior=pb.PRIOR_ZEROS)
        _prune(pruner, small, _RULES)
        _prune(pruner, small, _RULES, output=pb.OUTPUT_DENSE)
        _prune(pruner, many, [_rule("l1.*"), _LAMP])
        _plan(pruner, small, _L1)
        _plan(pruner, large, _L1)
        _plan(pruner, large, _GLOBAL)
        for details in (None, Details()):
            header = pb.ReportHeader(data_bytes=len(large), details=details)
            to_report = pb.ReportRequest(header=header, data=large)
            pruner.Report(iter([to_report]), RequestContext())
    for side in (_SMALL[0], _LARGE[0]):  # a solver's kernel is compiled for one block, and several
        _prune(pruner, _solved_file(side), _SOLVERS, output=pb.OUTPUT_DENSE)


def _prune(pruner: Pruner, data: bytes, rules: Sequence[spec_pb2.Rule], **fields: Any) -> None:
    spec = spec_pb2.PruningSpec(rules=rules)
    header = pb.PruneHeader(data_bytes=len(data), spec=spec, **{**_MASKS, **fields})
    messages = iter([pb.PruneRequest(header=header, data=data)])
    list(pruner.Prune(messages, RequestContext()))


def _plan(pruner: Pruner, data: bytes, rule: spec_pb2.Rule) -> None:
    spec = spec_pb2.PruningSpec(rules=[rule])
    amounts = [Amount(fraction=0.25), Amount(fraction=0.5)]
    header = pb.PlanHeader(data_bytes=len(data), spec=spec, amounts=amounts)
    pruner.Plan(iter([pb.PlanRequest(header=header, data=data)]), RequestContext())


def _sides(side: int, first_side: int) -> dict[str, int]:
    """The tensors that _RULES prune, with their sides."""
    others = ["rows", "columns", "n_m", "random", "each", "above"]
    others += [f"{name}.{i}" for name in ("g", "lamp", "rails") for i in range(2)]
    return {"l1": first_side, **dict.fromkeys(others, side)}


def _file(name: str, dtype: torch.dtype, sides: Mapping[str, int]) -> bytes:
    """A model of square tensors, each with one zero."""
    parts = [file_header([(tensor, name, (side, side)) for tensor, side in sides.items()])]
    generator = torch.Generator().manual_seed(0)
    for side in sides.values():
        values = torch.randn(side, side, generator=generator).to(dtype)
        values[0, 0] = 0
        parts.append(values.numpy().tobytes())
    return b"".join(parts)


def _solved_file(side: int) -> bytes:
    """A square tensor, and its Gram matrix, which is the identity."""
    size = side * (side + 1) // 2
    header = file_header([("solved", "F32", (side, side)), ("gram", "F32", (size,))])
    values = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    rows, columns = torch.triu_indices(side, side)
    gram = (rows == columns).float()
    return b"".join([header, values.numpy().tobytes(), gram.numpy().tobytes()])


def _solver(**method: Any) -> spec_pb2.Rule:
    gram = spec_pb2.Gram(holder="gram")
    solver = spec_pb2.Solver(tensors=["solved"], grams={"solved": gram}, **method)
    return spec_pb2.Rule(solver=solver)


def _rule(tensors: str, **choices: Any) -> spec_pb2.Rule:
    fields = {
        "granularity": spec_pb2.GRANULARITY_ELEMENT,
        "scope": spec_pb2.SCOPE_PER_TENSOR,
        **choices,
    }
    if "threshold" not in fields:
        fields.setdefault("fraction", 0.5)
    if "random" not in fields:
        fields.setdefault("magnitude", spec_pb2.Magnitude(p=1))
    return spec_pb2.Rule(selection=spec_pb2.Selection(tensors=[tensors], **fields))


_MASKS = {"output": pb.OUTPUT_MASKS}
_SLICES = {"granularity": spec_pb2.GRANULARITY_SLICE, "magnitude": spec_pb2.Magnitude(p=2)}
_N_M = {"granularity": spec_pb2.GRANULARITY_N_M, "pattern": spec_pb2.Pattern(n=2, m=4)}
_L1, _GLOBAL = _rule("l1"), _rule("g.*", scope=spec_pb2.SCOPE_GLOBAL)
_LAMP = _rule("lamp.*", scope=spec_pb2.SCOPE_GLOBAL, allocation=spec_pb2.ALLOCATION_LAMP)
_RAIL = spec_pb2.Rail(keep_at_least=1)
_SOLVERS = (
    _solver(sparsegpt=spec_pb2.SparseGpt(), fraction=0.5),
    _solver(refit=spec_pb2.Refit()),
)
_RULES = (
    _L1,
    _rule("rows", dim=0, **_SLICES),
    _rule("columns", dim=1, **_SLICES),
    _rule("n_m", dim=1, fraction=1.0, **_N_M),
    _rule("random", random=spec_pb2.Random(seed=0)),
    _rule("each", scope=spec_pb2.SCOPE_PER_ROW),
    _GLOBAL,
    _rule("rails.*", scope=spec_pb2.SCOPE_GLOBAL, guard_rails=spec_pb2.GuardRails(rails=[_RAIL])),
    _rule("above", threshold=0.1),
    _LAMP,
)
