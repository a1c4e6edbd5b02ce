"""What each output does."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from secateur_server.granularity.group import Group
from secateur_server.runtime.context import RequestContext
from secateur_server.state_dict.catalog import Catalog
from secateur_server.state_dict.parameter import Parameter
from secateur_server.state_dict.state_dict import StateDict
from secateur_server.wire.writer import OutgoingFile


class Output(Protocol):
    """A form of a result. A kind inherits what it does not define itself."""

    @property
    def has_data(self) -> bool:
        """Whether files are sent with the report."""
        return True

    @property
    def needs_all_tensors(self) -> bool:
        """Whether the output has tensors that the spec does not name, so that all are read."""
        return True

    @property
    def needs_groups(self) -> bool:
        """Whether a call must have groups."""
        return False

    @property
    def has_weights(self) -> bool:
        """Whether files have weights, so that updated ones reach the caller."""
        return True

    def is_stored(self, catalog: Catalog) -> bool:
        """Whether the files of a checkpoint without masks have this form already.

        Args:
            catalog: Of the checkpoint.
        """
        return False

    def files(
        self,
        context: RequestContext,
        state_dict: StateDict,
        pruned: Mapping[str, Parameter],
        groups: Sequence[Group],
    ) -> list[OutgoingFile]:
        """Makes the files to send.

        Args:
            context: The request.
            state_dict: As it came. Its parameters become the pruned ones.
            pruned: The parameters that the spec names, with their new masks.
            groups: Those of the spec, as distinct_groups returns them; only if `needs_groups`.

        Returns:
            The files in the order in which they are sent.

        Raises:
            InvalidStateDict: A tensor has a name that the output needs.
        """
        raise NotImplementedError


class PlannedOutput(Output, Protocol):
    """An output whose size is known before it is made, so that a Plan has it."""

    def size(self, state_dict: StateDict, pruned: Sequence[str]) -> int:
        """Predicts the size of all files.

        Args:
            state_dict: Without data, and with masks for all that is pruned.
            pruned: The names of the parameters that the spec names.

        Returns:
            Bytes; 0 if `files` would raise.
        """
        raise NotImplementedError
