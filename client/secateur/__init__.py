"""Prunes neural networks on a server.

    import secateur

    with secateur.embedded() as client:  # or secateur.Client("localhost:50051")
        result = client.prune(model, secateur.global_unstructured("*.weight", 0.5))
        print(result.report)
        result.apply_to(model)

A spec says what to prune and how. The functions with the names of torch.nn.utils.prune make specs,
`select` and `grouped` make all others, and `a + b` applies a, then b. torch is needed for modules
and files of torch.save only.
"""

import secateur.grpc_logs  # noqa: F401  # before anything imports grpc
from secateur import aio, callbacks
from secateur.amounts import table, target_bytes, target_macs, threshold
from secateur.architectures.parts import transformer_groups
from secateur.calibration.calibrate import calibrate
from secateur.calibration.layer import LayerStatistics
from secateur.calibration.statistics import Statistics
from secateur.calibration.unit_statistics import UnitStatistics
from secateur.checkpoint import Checkpoint, File
from secateur.choices import (
    activation,
    blocks,
    blocks_of,
    columns,
    filters,
    heads,
    kernels,
    magnitude,
    n_m,
    random,
    rows,
    slices,
)
from secateur.client import Client
from secateur.comparison import Comparison, compare
from secateur.depth import depth
from secateur.details import Histogram, Image, TensorDetails
from secateur.embedded import embedded
from secateur.errors import (
    Aborted,
    Cancelled,
    CheckpointNotFound,
    DataLoss,
    DeadlineExceeded,
    FewInputs,
    InvalidRequest,
    InvalidSpec,
    InvalidStateDict,
    InvalidStatistics,
    ModelTooLarge,
    NotCalibrated,
    NotPruned,
    NotSaved,
    PermissionDenied,
    QuotaExceeded,
    SecateurError,
    ServerBusy,
    ServerError,
    StoreFull,
    Unauthenticated,
    Unavailable,
    UriError,
)
from secateur.gain import Gain, gain
from secateur.grouping import group, head_groups, member, query_head_groups
from secateur.methods import (
    block_structured,
    custom_from_mask,
    erk,
    global_structured,
    global_unstructured,
    identity,
    l1_unstructured,
    lamp,
    ln_structured,
    n_m_structured,
    random_structured,
    random_unstructured,
    ria,
    wanda,
)
from secateur.onnx.exporting import export
from secateur.plan import Plan, PlannedAmount, PlannedTensor, Sensitivity
from secateur.rails import guard_rails, rail
from secateur.report import Bound, Choice, Coverage, Report, ReportWarning, TensorReport, ZeroBlocks
from secateur.resizing.sizes import resize, sizes
from secateur.result import FinalizeResult, PruneResult
from secateur.selections import grouped, select
from secateur.server_info import ServerInfo
from secateur.solving import alps, refit, sparsegpt
from secateur.source import is_pruned, load
from secateur.spec import Spec
from secateur.spec_files.checking import RuleCheck, SpecCheck, check_spec
from secateur.spec_files.reading import read_spec
from secateur.spec_files.schema import spec_schema
from secateur.sweep import Sweep, SweepRow, sweep
from secateur.traced.groups import TracedGroups, groups
from secateur.units.compensation import compensated
from secateur.units.flap import flap
from secateur.units.influence import least_influential
from secateur.units.permutation import ChannelPermutation, PermutedGroup, channel_permutation
from secateur.units.reap import reap
from secateur.versions import VERSION

__version__ = VERSION

__all__ = [
    "Aborted",
    "Bound",
    "Cancelled",
    "ChannelPermutation",
    "Checkpoint",
    "CheckpointNotFound",
    "Choice",
    "Client",
    "Comparison",
    "Coverage",
    "DataLoss",
    "DeadlineExceeded",
    "FewInputs",
    "File",
    "FinalizeResult",
    "Gain",
    "Histogram",
    "Image",
    "InvalidRequest",
    "InvalidSpec",
    "InvalidStateDict",
    "InvalidStatistics",
    "LayerStatistics",
    "ModelTooLarge",
    "NotCalibrated",
    "NotPruned",
    "NotSaved",
    "PermissionDenied",
    "PermutedGroup",
    "Plan",
    "PlannedAmount",
    "PlannedTensor",
    "PruneResult",
    "QuotaExceeded",
    "Report",
    "ReportWarning",
    "RuleCheck",
    "SecateurError",
    "Sensitivity",
    "ServerBusy",
    "ServerError",
    "ServerInfo",
    "Spec",
    "SpecCheck",
    "Statistics",
    "StoreFull",
    "Sweep",
    "SweepRow",
    "TensorDetails",
    "TensorReport",
    "TracedGroups",
    "Unauthenticated",
    "Unavailable",
    "UnitStatistics",
    "UriError",
    "ZeroBlocks",
    "activation",
    "aio",
    "alps",
    "block_structured",
    "blocks",
    "blocks_of",
    "calibrate",
    "callbacks",
    "channel_permutation",
    "check_spec",
    "columns",
    "compare",
    "compensated",
    "custom_from_mask",
    "depth",
    "embedded",
    "erk",
    "export",
    "filters",
    "flap",
    "gain",
    "global_structured",
    "global_unstructured",
    "group",
    "grouped",
    "groups",
    "guard_rails",
    "head_groups",
    "heads",
    "identity",
    "is_pruned",
    "kernels",
    "l1_unstructured",
    "lamp",
    "least_influential",
    "ln_structured",
    "load",
    "magnitude",
    "member",
    "n_m",
    "n_m_structured",
    "query_head_groups",
    "rail",
    "random",
    "random_structured",
    "random_unstructured",
    "read_spec",
    "reap",
    "refit",
    "resize",
    "ria",
    "rows",
    "select",
    "sizes",
    "slices",
    "sparsegpt",
    "spec_schema",
    "sweep",
    "table",
    "target_bytes",
    "target_macs",
    "threshold",
    "transformer_groups",
    "wanda",
]
