"""The results of `prune` and `finalize`."""

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Generic

from secateur.architectures.folder import fitted_folder
from secateur.calls.transfer import Received
from secateur.checkpoint import Checkpoint
from secateur.cycles import no_search_for_cycles
from secateur.display.notebook import html_of, paragraphs
from secateur.errors import InvalidStateDict, SecateurError
from secateur.files import is_file, save
from secateur.forms import FORMS, Tensors, form_of, has_tensors_of, not_smaller
from secateur.literals import Form, Masked, Of, Shrunk
from secateur.model import Mask, Source
from secateur.paths import path_of
from secateur.report import Report
from secateur.report_decoding import Extent, decode_extents, decode_report
from secateur.resizing.sizes import shrink
from secateur.tensors import torch_for
from secateur.ties import tied, values_of
from secateur_proto import spec_pb2 as pb
from secateur_proto.report_pb2 import SparsityReport


class _Result(Generic[Of]):
    """A model that a server sent back, and its source."""

    def __init__(
        self,
        report: Report,
        source: Source,
        received: Received,
        destination: str | None,
        output: str,
        groups: Sequence[pb.Group],
        example_inputs: Any,
    ) -> None:
        self.report = report
        self._output = output
        self._source = source
        self._answer = received
        self._destination = destination
        self._groups = groups
        self._example_inputs = example_inputs

    @no_search_for_cycles()
    def shrink(self: "_Result[Shrunk]", module: Any, example_inputs: Any = None) -> Any:
        """Returns a smaller copy of a torch.nn.Module, with the shrunk tensors in its layers.

        torch's masks are removed; hooks, flags and tied parameters are kept. See secateur.resize.

        Args:
            module: The one that was pruned, which is unchanged, or one with the same tensors.
            example_inputs: A tensor, a tuple of arguments, or a mapping of keywords, on which the
                copy must compute what the masked module computes. None are those with which
                secateur.groups traced the groups; if it did not, only sizes are checked.

        Raises:
            InvalidStateDict: A layer does not fit, or computes something else; it is named.
            SecateurError: The result is not of output="shrunk".
        """
        shrinkage = self.report.shrinkage
        if shrinkage is None:
            raise SecateurError("shrink: nothing was removed; ask for output='shrunk'")
        torch_for("shrink")
        entries = values_of(self._model_entries(), as_torch=True)
        inputs = self._example_inputs if example_inputs is None else example_inputs
        return shrink(module, entries, self._groups, shrinkage, inputs)

    def _model_entries(self) -> Mapping[str, Any]:
        raise NotImplementedError

    @property
    def _received(self) -> Tensors:
        """The tensors that were sent, unless the server wrote them to a URI."""
        if self._destination:
            raise SecateurError(f"the result is at {self._destination}, and was not sent")
        return self._answer.tensors

    def __str__(self) -> str:
        """Returns the repr, and on a second line that the result is not smaller, if so."""
        return "\n".join(filter(None, (repr(self), not_smaller(self._output, self.report.zeros))))

    def _repr_html_(self) -> str:
        # The report of a prune says itself that zeros make nothing smaller.
        lines = [repr(self)] if self.report.warnings else str(self).splitlines()
        return paragraphs(lines) + html_of(self.report.table())

    def _summary(self) -> str:
        report, count = self.report, len(self.report.tensors)
        if (shrinkage := report.shrinkage) is not None:
            return f"{shrinkage.parameters_before:,} -> {shrinkage.parameters:,} parameters"
        tensors = f"{count} tensor{'' if count == 1 else 's'}"
        return f"{report.zeros:,} zeros of {report.total:,} elements in {tensors}"

    def _whole(self, tensors: Tensors, unsent: Mapping[str, Any]) -> dict[str, Any]:
        """All entries of the model, in the order of the source; a tied one is one object."""
        for name in tensors.keys() & unsent.keys():
            raise InvalidStateDict(
                f"{name}: a pruned tensor needs this name, which another entry has; rename that one"
            )
        other_names = self._source.other_names or self._answer.other_names()
        return self._source.ordered(tied({**tensors, **unsent}, other_names))

    def _save(self, path: Path, entries: Mapping[str, Any], is_packed: bool = False) -> None:
        """Writes entries in the format of the source."""
        source, answer = self._source, self._answer
        folder, shrinkage = source.folder, self.report.shrinkage
        if folder is not None and shrinkage is not None and not is_file(path):
            folder = fitted_folder(folder, entries, self._groups, shrinkage)
        save(
            path,
            entries,
            source.metadata or answer.metadata,
            source.index or answer.index,
            source.tensors,
            source.torch_file,
            folder,
            source.onnx_file,
            is_packed,
        )


class FinalizeResult(_Result[Any]):
    """A model whose pruning is permanent.

    Attributes:
        report: On the tensors of the result.
    """

    def __repr__(self) -> str:
        return f"FinalizeResult({self._summary()})"

    def state_dict(self) -> dict[str, Any]:
        """Returns the tensors, torch's or arrays as in the source; tied ones are one object."""
        return values_of(self._model_entries(), self._source.as_torch)

    def apply_to(self, module: Any) -> None:
        """Finalizes a pruned torch.nn.Module in place, as torch.nn.utils.prune.remove does.

        Each pair X_orig, X_mask that was finalized becomes the parameter X, the same object as
        X_orig before, and the pruning hook is removed.

        Args:
            module: The one that was finalized, or one with the same values and masks.

        Raises:
            InvalidStateDict: It has other values or masks. The module is unchanged.
        """
        received = self._received
        torch_for("apply_to")
        from secateur.module import finalize

        values = values_of(self._model_entries(), as_torch=True)
        finalize(module, values, self._source.pairs().keys() & received.keys())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model: .safetensors, a torch file, or .onnx or a folder if it was one.

        The file is written whole, or not at all. All but .safetensors keep what the source has
        beside the weights; a NotSaved warning names what is not kept.

        A packed result is written packed.

        Args:
            path: The file or folder.
        """
        self._save(path_of(path), self._model_entries(), self._output == "packed")

    def _model_entries(self) -> Mapping[str, Any]:
        return self._whole(self._received, self._source.others)


class PruneResult(_Result[Of]):
    """A pruned model.

    Attributes:
        report: On the tensors that the spec named.
        checkpoint: The result on the server, with keep=True; else None.
    """

    def __init__(
        self,
        message: SparsityReport,
        source: Source,
        output: str,
        received: Received,
        checkpoint: Checkpoint | None,
        destination: str | None,
        groups: Sequence[pb.Group],
        example_inputs: Any,
    ) -> None:
        report = decode_report(message)
        super().__init__(report, source, received, destination, output, groups, example_inputs)
        self.checkpoint = checkpoint
        self._message = message

    def __repr__(self) -> str:
        places = [f", checkpoint={self.checkpoint.name!r}"] if self.checkpoint else []
        places += [f", destination={self._destination!r}"] if self._destination else []
        return f"PruneResult({self._summary()}, output={self._output!r}{''.join(places)})"

    @property
    def _form(self) -> Form:
        """The form that is meant if none is named."""
        return "shrunk" if self._output == "shrunk" else "dense"

    @cached_property
    def _extents(self) -> dict[str, Extent]:
        return decode_extents(self._message)

    @property
    def masks(self: "PruneResult[Masked]") -> dict[str, Any]:
        """The whole mask of each tensor that the spec named: bool, its shape, True is kept.

        A tied tensor has its mask under each of its names.

        Raises:
            SecateurError: The output has no masks, such as "dense" and "none".
        """
        return self._masks

    @cached_property
    @no_search_for_cycles()
    def _masks(self) -> dict[str, Any]:
        extents = self._extents
        masks = {
            name: self._mask_value(mask.reshape(extents[name].shape))
            for name, mask in self._flat_masks.items()
        }
        return tied(masks, {other: name for name in masks for other in extents[name].aliases})

    def state_dict(self, form: Form | None = None) -> dict[str, Any]:
        """Returns the pruned model; tied tensors are one object under each of their names.

        A form that the server did not send is made of the source as it is now. Tensors that were
        not pruned may share the source's memory.

        Args:
            form: An output that has data: "dense", "reparametrized" as torch.nn.utils.prune
                leaves it, "masks", or another one; "packed" is "dense" without the signs of zeros.
                None is "shrunk" of a shrunk result, and else "dense".

        Raises:
            SecateurError: The form cannot be made from the output that was requested.
        """
        return values_of(self._entries(self._form if form is None else form), self._source.as_torch)

    def save(self, path: str | os.PathLike[str], form: Form | None = None) -> None:
        """Writes the pruned model: .safetensors, a torch file, or .onnx or a folder if it was one.

        The file is written whole, or not at all. All but .safetensors keep what the source has
        beside the weights; a NotSaved warning names what is not kept. The folder of a shrunk model
        gets a config.json with the new sizes.

        Args:
            path: The file or folder.
            form: See state_dict; secateur.custom_from_mask reads "masks": bools in a torch file,
                else bits as the server sends them.
        """
        form = self._form if form is None else form
        to, made = path_of(path), form_of(form)
        if made.is_model:
            self._save(to, self._entries(form), form == "packed")
        else:
            shapes = {name: extent.shape for name, extent in self._extents.items()}
            save(to, *made.file(to, self._tensors(form), shapes))

    def apply_to(self: "PruneResult[Masked]", module: Any) -> None:
        """Prunes a torch.nn.Module as torch.nn.utils.prune does, for further work by torch's.

        Each pruned X becomes the parameter X_orig and the buffer X_mask, with a forward pre-hook.
        The prefixes of torch.compile and DataParallel may differ between the result and the module.

        Args:
            module: The one that was pruned, or one with the same parameters.

        Raises:
            InvalidStateDict: A mask does not fit. The module is unchanged.
        """
        masks = self.masks
        torch = torch_for("apply_to")
        from secateur.module import apply_masks

        tensors = {name: torch.as_tensor(mask) for name, mask in masks.items()}
        apply_masks(module, tensors, self._source.prunable_names())

    @cached_property
    def _flat_masks(self) -> dict[str, Mask]:
        form = FORMS.get(self._output)
        if form is None or form.to_masks is None:
            advice = "use result.shrink(module), or " if self._output == "shrunk" else ""
            raise SecateurError(
                f"output={self._output!r} has no masks; {advice}ask for output='masks' or "
                "'reparametrized'"
            )
        return form.to_masks(self._received, self._extents)

    def _mask_value(self, mask: Mask) -> Any:
        return torch_for("masks").from_numpy(mask) if self._source.as_torch else mask

    def _model_entries(self) -> Mapping[str, Any]:
        return self._entries(self._output)

    def _entries(self, form: str) -> Mapping[str, Any]:
        tensors = self._tensors(form)
        return self._whole(tensors, self._source.unsent()) if FORMS[form].is_model else tensors

    def _tensors(self, form: str) -> Tensors:
        """The tensors that a Prune with that output sends."""
        made = form_of(form)
        if has_tensors_of(form, self._output):
            return self._received
        if made.from_masks is None:
            raise SecateurError(f"form={form!r}: only the server makes it: ask for output={form!r}")
        if made.is_model and not self._source.is_here:
            raise SecateurError(
                f"the weights are on the server: ask for output={form!r}, or download them"
            )
        return made.from_masks(self._source, self._flat_masks)
