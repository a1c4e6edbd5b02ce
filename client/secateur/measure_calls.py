"""The methods of a client that measure models and change none."""

from collections.abc import Sequence
from typing import Any

from secateur.blocking import run
from secateur.calls.measuring import Patterns
from secateur.checkpoint_calls import CheckpointCalls
from secateur.choices import AnyGranularity
from secateur.defaults import SOME_AMOUNTS
from secateur.literals import Prior
from secateur.plan import Plan, Sensitivity
from secateur.progress import Progress
from secateur.report import Report
from secateur.spec import Spec


class MeasureCalls(CheckpointCalls):
    """What `Client` measures; several arguments are described there."""

    def report(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        key: str | None = None,
        details: bool = False,
    ) -> Report:
        """Measures how sparse a model is, and where.

        Args:
            source: See `Client`.
            tensors: Names and globs; None is every floating tensor.
            progress: See `Client`.
            key: See `Client`.
            details: Whether the largest tensors get `TensorReport.details`: histograms, and images
                of the zeros.
        """
        return run(self._calls.report(source, tensors, progress, key, details))

    def plan(
        self,
        source: Any,
        spec: Spec,
        amounts: Sequence[float] | None = None,
        progress: Progress = None,
        key: str | None = None,
        prior: Prior = "masks",
    ) -> Plan:
        """Computes what a prune would do, and prunes nothing.

        Args:
            source: See `Client`.
            spec: Its last rule is planned, after the rules before it; not a custom_from_mask.
            amounts: Ints and floats in place of that rule's own, at most 1000. The server reads the
                weights once for all of them.
            progress: See `Client`.
            key: See `Client`.
            prior: See `prune`.
        """
        return run(self._calls.plan(source, spec, amounts, progress, key, prior))

    def sensitivity(
        self,
        source: Any,
        tensors: Patterns = None,
        amounts: Sequence[float] = SOME_AMOUNTS,
        granularity: AnyGranularity = "element",
        p: float = 1,
        progress: Progress = None,
        key: str | None = None,
    ) -> Sensitivity:
        """Computes how much of its norm each tensor would lose, pruned alone by magnitude.

        Args:
            source: See `Client`.
            tensors: Names and globs; None is every floating tensor of 2 or more dimensions.
            amounts: See `plan`.
            granularity: See `secateur.select`.
            p: The order of the norm that ranks units larger than elements.
            progress: See `Client`.
            key: See `Client`.
        """
        return run(self._calls.sensitivity(source, tensors, amounts, granularity, p, progress, key))
