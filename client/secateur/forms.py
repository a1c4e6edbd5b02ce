"""The forms of a result: what a server sends of a pruned model, and the client makes of its masks.

A new output is a line in FORMS.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from secateur.errors import SecateurError
from secateur.mask_files import Shapes, entries_of, pack, unpack_all
from secateur.masking import pruned_tensors
from secateur.model import Mask, Source
from secateur.report_decoding import Extent
from secateur.tensors import LocalTensor, prior_mask
from secateur_proto.enums import values_by_name
from secateur_proto.pruner_pb2 import Output

Tensors = Mapping[str, LocalTensor]
Masks = Mapping[str, Mask]
Extents = Mapping[str, Extent]

# By their names. The output "none" has no data, and so no form.
OUTPUTS = values_by_name(Output.DESCRIPTOR)


def _as_sent(path: Path, tensors: Tensors, shapes: Shapes) -> tuple[Tensors, dict[str, str]]:
    return tensors, {}


@dataclass(frozen=True)
class Form:
    """A form of a result. Masks are flat, by the names of the tensors that the spec named.

    Attributes:
        content: What it holds, for help.
        is_model: Whether it has the whole model, and not masks alone.
        from_masks: Makes its tensors of a model and masks; None if only the server can.
        to_masks: Makes the masks of its tensors and their extents; None if they cannot be known.
        file: Makes the tensors and the metadata of a file of it, by the file's path and the shapes
            of the masks. Not called for a whole model.
    """

    content: str
    is_model: bool
    from_masks: Callable[[Source, Masks], Tensors] | None
    to_masks: Callable[[Tensors, Extents], dict[str, Mask]] | None = None
    file: Callable[[Path, Tensors, Shapes], tuple[Tensors, dict[str, str]]] = _as_sent


def _packed(source: Source, masks: Masks) -> Tensors:
    return {name: pack(mask) for name, mask in masks.items()}


def _unpacked(packed: Tensors, extents: Extents) -> dict[str, Mask]:
    return unpack_all(packed, {name: extents[name].total for name in packed})


def _paired(source: Source, masks: Masks) -> Tensors:
    return dict(pruned_tensors(source, masks, dense=False))


def _unpaired(tensors: Tensors, extents: Extents) -> dict[str, Mask]:
    return {name: prior_mask(tensors[f"{name}_mask"]) for name in extents}


def _dense(source: Source, masks: Masks) -> Tensors:
    return dict(pruned_tensors(source, masks, dense=True))


def _packed_model(source: Source, masks: Masks) -> Tensors:
    return dict(pruned_tensors(source, masks, dense=True, keeps_sign=False))


FORMS: Mapping[str, Form] = {
    "masks": Form("bits of masks", False, _packed, _unpacked, entries_of),
    "reparametrized": Form("X_orig and X_mask", True, _paired, _unpaired),
    "dense": Form("tensors with zeros", True, _dense),
    "packed": Form("tensors without zeros, compressed", True, _packed_model),
    "shrunk": Form("smaller tensors, without the pruned units of groups", True, None),
}


def is_model(output: str) -> bool:
    """Whether an output has the whole model, and not masks alone or no data."""
    return output in FORMS and FORMS[output].is_model


def is_made_of_masks(output: str) -> bool:
    """Whether the client makes an output of masks and its own weights."""
    return output in FORMS and FORMS[output].from_masks is not None


# The outputs that make a model with zeros smaller.
SMALLER = ("packed", "shrunk")


def not_smaller(output: str, zeros: int) -> str:
    """Returns a line that says that a result is not smaller than the model; empty if it is."""
    if not zeros or output in (*SMALLER, "none"):
        return ""
    return (
        "note: the file is as large as without zeros: `secateur shrink FOLDER -o SMALL` or "
        "output=shrunk with groups makes the model smaller, `secateur pack OUT -o SMALL` or "
        "output=packed makes its file smaller"
    )


def has_tensors_of(form: str, output: str) -> bool:
    """Whether the tensors of an output, once they are unpacked, are those of a form."""
    return form == output or {form, output} == {"dense", "packed"}


def form_of(name: object) -> Form:
    """Returns a form by its name.

    Raises:
        SecateurError: It is not one.
    """
    if not isinstance(name, str) or name not in FORMS:
        raise SecateurError(f"form={name!r} is none of {', '.join(map(repr, FORMS))}")
    return FORMS[name]
