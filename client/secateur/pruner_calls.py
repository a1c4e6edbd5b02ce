"""The methods of a client that prune models."""

import os
from typing import Any, overload

from secateur.blocking import run
from secateur.calls.measuring import Patterns
from secateur.grouping import Groups
from secateur.literals import FinalOutput, Masks, Out, Output, Prior
from secateur.measure_calls import MeasureCalls
from secateur.progress import Progress
from secateur.result import FinalizeResult, PruneResult
from secateur.server_info import ServerInfo
from secateur.spec import Spec


class PrunerCalls(MeasureCalls):
    """What `Client` does with models; several arguments are described there."""

    @overload
    def prune(
        self,
        source: Any,
        spec: Spec,
        output: Masks = "masks",
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: Prior = "masks",
        details: bool = False,
    ) -> PruneResult[Masks]: ...

    @overload
    def prune(
        self,
        source: Any,
        spec: Spec,
        output: Out,
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: Prior = "masks",
        details: bool = False,
    ) -> PruneResult[Out]: ...

    def prune(
        self,
        source: Any,
        spec: Spec,
        output: Output = "masks",
        progress: Progress = None,
        keep: bool = False,
        destination: str | os.PathLike[str] | None = None,
        key: str | None = None,
        prior: Prior = "masks",
        details: bool = False,
    ) -> PruneResult[Any]:
        """Prunes a model by a spec.

        Args:
            source: See `Client`. Of a Module the parameters are sent, and not the buffers.
            spec: What to prune.
            output: What the server sends: "masks" (one bit an element), "reparametrized", "dense",
                "packed" (without zeros, compressed), "none" for the report alone, or another one of
                `server_info().outputs`. Rules that update weights, such as `sparsegpt`, need an
                output that has weights.
            progress: See `Client`.
            keep: Whether the server keeps the result, as the result's checkpoint. Data that the
                server already has of the source is not sent again.
            destination: A URI to which the server writes the output, in place of sending it. Of a
                model from a Hugging Face folder also a new folder here, with the folder's other
                files; with "shrunk" config.json has the new sizes. Not for masks alone.
            key: See `Client`.
            prior: What counts as pruned before: what "masks" prune, or also the "zeros" of the
                tensors that the spec names, for a model that was pruned and stored dense.
            details: Whether the report has details: see `report`.
        """
        return run(
            self._calls.prune(
                source, spec, output, progress, keep, destination, key, prior, details
            )
        )

    def finalize(
        self,
        source: Any,
        tensors: Patterns = None,
        progress: Progress = None,
        destination: str | None = None,
        key: str | None = None,
        output: FinalOutput = "dense",
        groups: Groups = (),
        prior: Prior = "masks",
        details: bool = False,
    ) -> FinalizeResult:
        """Makes pruning permanent: each pair X_orig, X_mask becomes X.

        Does what torch.nn.utils.prune.remove does; or, with output="shrunk", also removes the units
        of groups that are wholly pruned.

        Args:
            source: See `Client`.
            tensors: Names and globs of the tensors whose pairs are folded; None is all.
            progress: See `Client`.
            destination: See `prune`.
            key: See `Client`.
            output: "dense", "shrunk", or "packed".
            groups: What `group` returns; with "shrunk" only.
            prior: What counts as pruned in the groups' tensors: see `prune`. With "shrunk" only.
            details: Whether the report has details: see `report`.
        """
        return run(
            self._calls.finalize(
                source, tensors, progress, destination, key, output, groups, prior, details
            )
        )

    def server_info(self) -> ServerInfo:
        """Returns the server's version, features and limits.

        Raises:
            InvalidRequest: The server is older than this method.
        """
        return run(self._calls.server_info())
