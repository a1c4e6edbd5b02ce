"""Exports Hugging Face folders to ONNX: the command `secateur export`."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from secateur.errors import InvalidStateDict, SecateurError
from secateur.onnx.exporting import check_exportable, export_checked
from secateur.paths import source_path

# The shapes of the token ids, or the number of images, that are checked. Dimensions of 2 and more
# are different lengths; the exporter takes a length of 1 for a constant.
_EXAMPLES = ((2, 7), (3, 5))


def export_folder(folder: Any, path: Path) -> str:
    """Writes the model of a Hugging Face folder as an .onnx file, in float32.

    The batch, and the sequence of a model of text, may have any length.

    Args:
        folder: With a config.json and weights.
        path: The .onnx file.

    Returns:
        On which inputs onnxruntime and torch were compared.

    Raises:
        SecateurError: It cannot be exported.
    """
    check_exportable(path)
    module = _model(source_path(folder, InvalidStateDict))
    examples = [_inputs(module, *shape) for shape in _EXAMPLES]
    export_checked(module, examples, path, _dynamic(examples[0]))
    shapes = " and ".join(
        ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in inputs.items())
        for inputs in examples
    )
    return f"onnxruntime computes what torch does on random {shapes}"


def _model(folder: Path) -> Any:
    """The model in a folder, of the class that its config names."""
    if not (folder / "config.json").is_file():
        raise InvalidStateDict(
            f"{folder}: has no config.json; only a Hugging Face folder is exported by the command; "
            "of another model, export the module in Python: secateur.export"
        )
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise SecateurError(
            f"export of a folder needs transformers: {error}; pip install transformers"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
        named = (getattr(config, "architectures", None) or [""])[0]
        cls = getattr(transformers, named, transformers.AutoModel)
        model, loaded = cls.from_pretrained(
            folder, local_files_only=True, dtype="float32", output_loading_info=True
        )
    except Exception as error:  # transformers raises errors of any kind
        raise InvalidStateDict(f"{folder}: transformers cannot load it: {error}") from None
    if missing := sorted(loaded["missing_keys"]):
        raise InvalidStateDict(f"{folder}: its weights lack {', '.join(missing[:3])}")
    model.config.use_cache = False
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("batched_mm")  # the default has no ONNX operator
    return model


def _inputs(module: Any, batch: int, length: int) -> dict[str, Any]:
    """Random inputs; a model of text gets a mask with padding."""
    import torch

    config, random = module.config, torch.Generator().manual_seed(0)
    if module.main_input_name == "input_ids" and not config.is_encoder_decoder:
        tokens = torch.randint(config.vocab_size, (batch, length), generator=random)
        mask = torch.ones_like(tokens)
        mask[0, -1] = 0
        return {"input_ids": tokens, "attention_mask": mask}
    if module.main_input_name == "pixel_values" and isinstance(config.image_size, int):
        shape = (batch, config.num_channels, config.image_size, config.image_size)
        return {"pixel_values": torch.rand(shape, generator=random)}
    raise InvalidStateDict(
        f"the inputs of a {type(module).__name__} are not known to the command; "
        "export it in Python: secateur.export(module, example_inputs, path)"
    )


def _dynamic(inputs: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """The dimensions that may have any length: the batch, and the sequence of texts."""
    of_text, of_images = {0: "batch", 1: "sequence"}, {0: "batch"}
    return {n: of_images if n == "pixel_values" else of_text for n in inputs}
