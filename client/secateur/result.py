"""What a call gives back."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from secateur.checkpoint import Checkpoint
from secateur.cycles import no_search_for_cycles
from secateur.errors import InvalidStateDict, SecateurError
from secateur.files import save
from secateur.mask_files import entries_of, pack, unpack_all
from secateur.paths import path_of
from secateur.report import Extent, Report, decode_extents, decode_report
from secateur.source import Mask, Source
from secateur.tensors import Bytes, LocalTensor, prior_mask, to_value, torch_for
from secateur.ties import each_once, tied
from secateur.transfer import Received
from secateur_proto.dtypes import DTYPES
from secateur_proto.report_pb2 import SparsityReport

Tensors = Mapping[str, LocalTensor]


class FinalizeResult:
    """A model whose pruning is permanent."""

    def __init__(
        self, report: Report, source: Source, received: Received, destination: str | None = None
    ) -> None:
        self.report = report
        self._source = source
        self._answer = received
        self._destination = destination

    def __repr__(self) -> str:
        return f"FinalizeResult({_summary(self.report)})"

    @property
    def _received(self) -> Tensors:
        return _here(self._answer, self._destination)

    def state_dict(self) -> dict[str, Any]:
        """The tensors, in the source's kind: of torch, or arrays. Tied ones are one object."""
        return _values(self._entries(), self._source)

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

        values = _values(self._entries(), replace(self._source, as_torch=True))
        finalize(module, values, self._source.pairs().keys() & received.keys())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes .safetensors or a torch file, or a folder if it came from one.

        What is written is there whole, or not at all. A torch file and a folder keep what the
        source has beside the weights; a NotSaved warning names what is not kept.
        """
        _save(path_of(path), self._entries(), self._source, self._answer)

    def _entries(self) -> dict[str, Any]:
        return _whole(self._received, self._source.others, self._source, self._answer)


class PruneResult:
    """What was pruned.

    report: over the tensors that the spec named.
    checkpoint: what was kept, where it was asked.
    """

    def __init__(
        self,
        said: SparsityReport,
        source: Source,
        output: str,
        received: Received,
        checkpoint: Checkpoint | None = None,
        destination: str | None = None,
    ) -> None:
        self.report = decode_report(said)
        self.checkpoint = checkpoint
        self._said = said
        self._source = source
        self._output = output
        self._answer = received
        self._destination = destination

    def __repr__(self) -> str:
        places = [f", checkpoint={self.checkpoint.name!r}"] if self.checkpoint else []
        places += [f", destination={self._destination!r}"] if self._destination else []
        return f"PruneResult({_summary(self.report)}, output={self._output!r}{''.join(places)})"

    @property
    def _received(self) -> Tensors:
        return _here(self._answer, self._destination)

    def of(self, source: Source) -> "PruneResult":
        """The result of the same model, with what is here of it."""
        answer, kept = self._answer, self.checkpoint
        return PruneResult(self._said, source, self._output, answer, kept, self._destination)

    @cached_property
    def _extents(self) -> dict[str, Extent]:
        return decode_extents(self._said)

    @cached_property
    @no_search_for_cycles()
    def masks(self) -> dict[str, Any]:
        """The whole mask of each tensor that the spec named: bool, its shape, True is kept.

        A tied tensor has its mask under each of its names.
        Errors: SecateurError, for the outputs "dense" and "none", which have no masks.
        """
        extents = self._extents
        masks = {
            name: self._mask_value(mask.reshape(extents[name].shape))
            for name, mask in self._flat_masks.items()
        }
        return tied(masks, {other: name for name in masks for other in extents[name].aliases})

    def state_dict(self, form: str = "dense") -> dict[str, Any]:
        """The pruned model: "dense", or "reparametrized" as torch.nn.utils.prune leaves it.

        Tied tensors are one object under each of their names.

        A form that did not come over the wire is made of the source as it is now. What was not
        pruned may share the source's memory.
        Errors: SecateurError, for a form that cannot be made from the output that was asked for.
        """
        return _values(self._entries(form), self._source)

    def save(self, path: str | os.PathLike[str], form: str = "dense") -> None:
        """Writes the pruned model as .safetensors or a torch file, or a folder if it came from one.

        What is written is there whole, or not at all. A torch file and a folder keep what the
        source has beside the weights; a NotSaved warning names what is not kept.
        form: as of state_dict, or "masks", which secateur.custom_from_mask reads: of a torch file
            bools, else bits, as the wire has them.
        """
        to = path_of(path)
        _check_form(form)
        if form == "masks":  # which are not the model
            shapes = {name: extent.shape for name, extent in self._extents.items()}
            save(to, *entries_of(to, self._tensors(form), shapes))
        else:
            _save(to, self._entries(form), self._source, self._answer)

    def apply_to(self, module: Any) -> None:
        """Prunes a torch.nn.Module as torch.nn.utils.prune does, so that its functions go on.

        Each pruned X becomes the parameter X_orig and the buffer X_mask, with a forward pre-hook.
        The prefixes of torch.compile and DataParallel may differ between the result and the module.
        Errors: InvalidStateDict, with the module unchanged.
        """
        masks = self.masks
        torch = torch_for("apply_to")
        from secateur.module import apply_masks

        tensors = {name: torch.as_tensor(mask) for name, mask in masks.items()}
        apply_masks(module, tensors, self._source.prunable_names())

    @cached_property
    def _flat_masks(self) -> dict[str, Mask]:
        if self._output == "masks":
            packed = self._received
            return unpack_all(packed, {name: self._extents[name].total for name in packed})
        if self._output == "reparametrized":
            return {
                name: prior_mask(self._received[f"{name}_mask"]) for name in self.report.tensors
            }
        raise SecateurError(f"output={self._output!r} has no masks; ask for output='masks'")

    def _mask_value(self, mask: Mask) -> Any:
        if not self._source.as_torch:
            return mask
        import torch

        return torch.from_numpy(mask)

    def _entries(self, form: str) -> Mapping[str, Any]:
        tensors = self._tensors(form)
        return (
            tensors
            if form == "masks"
            else _whole(tensors, self._source.unsent(), self._source, self._answer)
        )

    def _tensors(self, form: str) -> Tensors:
        """What a Prune of that form sends back."""
        _check_form(form)
        if form == self._output:
            return self._received
        if form == "masks":
            return {name: pack(mask) for name, mask in self._flat_masks.items()}
        if not self._source.is_here:
            raise SecateurError(
                f"the weights are on the server: ask for output={form!r}, or download them"
            )
        return dict(_pruned_tensors(self._source, self._flat_masks, form == "dense"))


def _summary(report: Report) -> str:
    count = len(report.tensors)
    tensors = f"{count} tensor{'' if count == 1 else 's'}"
    return f"{report.zeros:,} zeros of {report.total:,} elements in {tensors}"


def _check_form(form: Any) -> None:
    if not isinstance(form, str) or form not in ("dense", "reparametrized", "masks"):
        raise SecateurError(f"form={form!r} is none of 'dense', 'reparametrized', 'masks'")


def _here(received: Received, destination: str | None) -> Tensors:
    """Errors: SecateurError, where the server wrote the result to a URI."""
    if destination:
        raise SecateurError(f"the result is at {destination}, and was not sent")
    return received.tensors


def _whole(
    tensors: Tensors, unsent: Mapping[str, Any], source: Source, received: Received
) -> dict[str, Any]:
    """All entries of a result, in the order of the source; a tied one is one object.

    Raises:
        InvalidStateDict: A name of a pruned tensor is that of an entry that was not sent.
    """
    for name in tensors.keys() & unsent.keys():
        raise InvalidStateDict(f"{name}: stands where half of a pair, or its X, is to be")
    other_names = source.other_names or received.other_names()
    entries, places = tied({**tensors, **unsent}, other_names), source.places()
    names = sorted(entries, key=lambda name: places.get(name, len(places)))
    return {name: entries[name] for name in names}


def _values(entries: Mapping[str, Any], source: Source) -> dict[str, Any]:
    def value(name: str, entry: Any) -> Any:
        return to_value(name, entry, source.as_torch) if isinstance(entry, LocalTensor) else entry

    return each_once(value, entries)


def _save(path: Path, entries: Mapping[str, Any], source: Source, answer: Received) -> None:
    """Writes what a model has become, in the way of its source."""
    save(
        path,
        entries,
        source.metadata or answer.metadata,
        source.index or answer.index,
        source.tensors,
        source.torch_file,
        source.folder,
    )


def _pruned_tensors(
    source: Source, masks: Mapping[str, Mask], dense: bool
) -> Iterator[tuple[str, LocalTensor]]:
    """What was sent, with masks applied; a pair that no mask is for keeps its own."""
    pairs = source.pairs()
    prior = set(pairs.values())
    names = {f"{base}_orig": base for base in pairs}
    for stored, tensor in source.only_parameters().tensors.items():
        if stored in prior:
            continue
        name = names.get(stored, stored)
        mask = masks.get(name)
        if mask is None and name in pairs:
            mask = prior_mask(source.tensors[pairs[name]])
        if mask is None:
            yield stored, tensor
        elif dense:
            yield name, LocalTensor(tensor.dtype, tensor.shape, _folded(tensor, mask))
        else:
            taken = {f"{name}_orig", f"{name}_mask"} & source.tensors.keys()
            if name not in pairs and taken:
                raise InvalidStateDict(f"{taken.pop()} stands where the pruned {name} is to be")
            numbers = _as_numbers(tensor.dtype, mask)
            yield f"{name}_orig", tensor
            yield f"{name}_mask", LocalTensor(tensor.dtype, tensor.shape, numbers)


def _unsigned(dtype: str) -> np.dtype[Any]:
    """The unsigned integer dtype with as many bits."""
    return np.dtype(f"u{DTYPES[dtype].bits // 8}")


def _folded(tensor: LocalTensor, mask: Mask) -> Callable[[], Bytes]:
    """What is pruned becomes 0 of its own sign, as in weight * mask: -0.5 becomes -0.0."""
    unsigned = _unsigned(tensor.dtype)
    is_floating = tensor.kind == "floating"
    sign = unsigned.type(is_floating << (8 * unsigned.itemsize - 1))

    def read() -> Bytes:
        bits = tensor.read().view(unsigned)
        return np.where(mask, bits, bits & sign).view(np.uint8)

    return read


def _as_numbers(dtype: str, mask: Mask) -> Callable[[], Bytes]:
    """A mask of 0 and 1."""
    one = _unsigned(dtype).type(DTYPES[dtype].one)
    return lambda: (mask * one).view(np.uint8)
