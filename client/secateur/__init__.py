"""Prunes neural networks on a server.

    import secateur

    with secateur.embedded() as client:  # or secateur.Client("localhost:50051")
        result = client.prune(model, secateur.global_unstructured("*.weight", 0.5))
        print(result.report)
        result.apply_to(model)

What is pruned and how is a spec: the functions named as those of torch.nn.utils.prune make one,
and `+` puts one behind another. torch is needed for modules and .pt files only.
"""

from secateur.checkpoint import Checkpoint, File
from secateur.client import Client
from secateur.embedded import embedded
from secateur.errors import (
    Aborted,
    Cancelled,
    CheckpointNotFound,
    DataLoss,
    DeadlineExceeded,
    InvalidRequest,
    InvalidSpec,
    InvalidStateDict,
    ModelTooLarge,
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
from secateur.report import Choice, Report, TensorReport
from secateur.result import FinalizeResult, PruneResult
from secateur.source import is_pruned
from secateur.spec import (
    Spec,
    custom_from_mask,
    global_unstructured,
    identity,
    l1_unstructured,
    ln_structured,
    random_structured,
    random_unstructured,
)

__all__ = [
    "Aborted",
    "Cancelled",
    "Checkpoint",
    "CheckpointNotFound",
    "Choice",
    "Client",
    "DataLoss",
    "DeadlineExceeded",
    "File",
    "FinalizeResult",
    "InvalidRequest",
    "InvalidSpec",
    "InvalidStateDict",
    "ModelTooLarge",
    "PermissionDenied",
    "PruneResult",
    "QuotaExceeded",
    "Report",
    "SecateurError",
    "ServerBusy",
    "ServerError",
    "Spec",
    "StoreFull",
    "TensorReport",
    "Unauthenticated",
    "Unavailable",
    "UriError",
    "custom_from_mask",
    "embedded",
    "global_unstructured",
    "identity",
    "is_pruned",
    "l1_unstructured",
    "ln_structured",
    "random_structured",
    "random_unstructured",
]
