"""Random transformers of a few thousand parameters, made with transformers. Imports it late."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

_SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "vocab_size": 50,
    "max_position_embeddings": 40,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_SHARED = {**_SIZES, **_TOKENS, "num_key_value_heads": 2}
_DIM = {"head_dim": 8}
_IMAGES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
}
_EXPERTS = {"num_experts_per_tok": 2}

# By name: the class of the config, that of the model, and the config.
TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "bert": ("BertConfig", "BertForSequenceClassification", _SIZES),
    "bare bert": ("BertConfig", "BertModel", _SIZES),
    "roberta": ("RobertaConfig", "RobertaForMaskedLM", _SIZES),
    "distilbert": (
        "DistilBertConfig",
        "DistilBertForSequenceClassification",
        {"dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48, "vocab_size": 50},
    ),
    "vit": ("ViTConfig", "ViTForImageClassification", _IMAGES),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {"n_embd": 32, "n_layer": 3, "n_head": 4, "vocab_size": 50, "n_positions": 40, **_TOKENS},
    ),
    "llama": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_SHARED, "attention_bias": True, "mlp_bias": True},
    ),
    "llama without sharing": (
        "LlamaConfig",
        "LlamaForCausalLM",
        {**_SHARED, "num_key_value_heads": 4},
    ),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_SHARED, **_DIM}),
    "qwen2": (
        "Qwen2Config",
        "Qwen2ForCausalLM",
        {**_SHARED, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_SHARED, "head_dim": 16}),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            **_SHARED,
            **_DIM,
            **_EXPERTS,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [1],
            "norm_topk_prob": True,
        },
    ),
    "mixtral": ("MixtralConfig", "MixtralForCausalLM", {**_SHARED, **_EXPERTS, "num_experts": 4}),
    "gemma2": ("Gemma2Config", "Gemma2ForCausalLM", {**_SHARED, **_DIM, "sliding_window": 4}),
    "gemma3_text": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_SHARED, **_DIM, "sliding_window": 4, "sliding_window_pattern": 2},
    ),
    "gemma3": (
        "Gemma3Config",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": {**_SHARED, **_DIM, "model_type": "gemma3_text"},
            "vision_config": _IMAGES,
            "mm_tokens_per_image": 4,
        },
    ),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_SHARED, "num_attention_heads": 8}),
}


def tiny(name: str) -> Any:
    """Makes a model in float64 whose every parameter is random, norms and biases too."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    config, model, sizes = TINY[name]
    made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    made.config._attn_implementation = "eager"
    made.config._experts_implementation = "eager"  # the default does not compute float64
    generator = torch.Generator().manual_seed(0)
    for parameter in made.parameters():
        values = torch.empty_like(parameter, dtype=torch.float64)
        parameter.data = values.uniform_(-0.5, 0.5, generator=generator)
    return made.eval()


def saved(name: str, path: Path, **options: Any) -> Any:
    """Makes a model and its Hugging Face folder; returns the model."""
    model = tiny(name)
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(path, **options)
    return model


def loaded(path: Path, kind: Any = None, dtype: torch.dtype = torch.float64) -> Any:
    """Loads a folder by `kind`, else AutoModel: no warning is logged, and every tensor fits."""
    import transformers

    with _warnings() as logged:
        model, found = (kind or transformers.AutoModel).from_pretrained(
            path,
            dtype=dtype,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    assert logged == []
    assert not any(found.values()), found
    return model.eval()


@contextmanager
def _warnings() -> Iterator[list[str]]:
    """Yields the warnings that transformers logs in the block."""
    logged: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            logged.append(record.getMessage())

    handler, logger = Recorder(logging.WARNING), logging.getLogger("transformers")
    logger.addHandler(handler)
    try:
        yield logged
    finally:
        logger.removeHandler(handler)


def inputs(model: Any) -> dict[str, torch.Tensor]:
    """Fixed inputs of a model."""
    generator = torch.Generator().manual_seed(1)
    if model.config.model_type == "vit":
        images = torch.randn((2, 3, 16, 16), generator=generator, dtype=torch.float64)
        return {"pixel_values": images}
    return {"input_ids": torch.randint(3, 50, (2, 12), generator=generator)}


def outputs(model: Any) -> torch.Tensor:
    """What a model computes of `inputs`."""
    with torch.no_grad():
        answer = model(**inputs(model))
    logits: torch.Tensor = answer["logits"] if "logits" in answer else answer[0]
    return logits
