"""The architectures, by the `model_type` of their config.json. A new one is an entry here.

The names are those of transformers 5.24: of the files that save_pretrained writes, which earlier
versions write too, and of state_dict() where it differs.
"""

from collections.abc import Mapping
from dataclasses import replace

from secateur.architectures.layout import (
    CONV1D,
    STACKED,
    Architecture,
    Config,
    Experts,
    Keys,
    Layout,
    Mlp,
)
from secateur.checks import integer

_SLIDING, _FULL = "sliding_attention", "full_attention"


def _qwen_types(config: Config, layers: int) -> list[str]:
    slides = config.get("use_sliding_window", False) and config.get("sliding_window", 4096)
    first = integer("config.json: max_window_layers", config.get("max_window_layers", 28))
    return [_SLIDING if slides and layer >= first else _FULL for layer in range(layers)]


def _gemma2_types(config: Config, layers: int) -> list[str]:
    return [_FULL if layer % 2 else _SLIDING for layer in range(layers)]


def _gemma3_types(config: Config, layers: int) -> list[str]:
    key = "sliding_window_pattern"
    period = integer(f"config.json: {key}", config.get(key, 6), 1)
    return [_SLIDING if (layer + 1) % period else _FULL for layer in range(layers)]


_ENCODER = Layout(
    stack="encoder.layer",
    qkv=("attention.self.query", "attention.self.key", "attention.self.value"),
    o="attention.output.dense",
    mlp=Mlp(("intermediate.dense",), "output.dense"),
)
_BERT = Architecture(
    bare="BertModel",
    base="bert",
    layouts=(_ENCODER,),
    keys=Keys(kv_heads=None),
    attention_bias=True,
    mlp_bias=True,
    embeddings="embeddings.word_embeddings",
    outputs=("cls.predictions.decoder", "cls.predictions"),
    has_head_dim=False,
)
_DISTILBERT = Architecture(
    bare="DistilBertModel",
    base="distilbert",
    layouts=(
        Layout(
            stack="transformer.layer",
            qkv=("attention.q_lin", "attention.k_lin", "attention.v_lin"),
            o="attention.out_lin",
            mlp=Mlp(("ffn.lin1",), "ffn.lin2"),
        ),
    ),
    keys=Keys("dim", "n_layers", "n_heads", None, "hidden_dim"),
    attention_bias=True,
    mlp_bias=True,
    embeddings="embeddings.word_embeddings",
    outputs=("vocab_projector",),
    has_head_dim=False,
)
_VIT = Architecture(
    bare="ViTModel",
    base="vit",
    layouts=(
        replace(
            _ENCODER,
            qkv=(
                "attention.attention.query",
                "attention.attention.key",
                "attention.attention.value",
            ),
        ),
        Layout(
            stack="layers",
            qkv=("attention.q_proj", "attention.k_proj", "attention.v_proj"),
            o="attention.o_proj",
            mlp=Mlp(("mlp.fc1",), "mlp.fc2"),
        ),
    ),
    keys=Keys(kv_heads=None),
    attention_bias=("qkv_bias", True),
    mlp_bias=True,
    embeddings="",
    outputs=(),
)
_GPT2 = Architecture(
    bare="GPT2Model",
    base="transformer",
    layouts=(
        Layout(
            stack="h",
            qkv=("attn.c_attn",) * 3,
            o="attn.c_proj",
            mlp=Mlp(("mlp.c_fc",), "mlp.c_proj", CONV1D),
            kind=CONV1D,
        ),
    ),
    keys=Keys("n_embd", "n_layer", "n_head", None, "n_inner"),
    attention_bias=True,
    mlp_bias=True,
    embeddings="wte",
    has_head_dim=False,
)
_SELF_ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_GATED = Mlp(("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")
_DECODER = Layout("layers", _SELF_ATTENTION, "self_attn.o_proj", _GATED)
_LLAMA = Architecture(
    bare="LlamaModel",
    base="model",
    layouts=(_DECODER,),
    attention_bias=("attention_bias", False),
    mlp_bias=("mlp_bias", False),
    heads_divide_hidden=True,
)
_MISTRAL = Architecture(
    bare="MistralModel",
    base="model",
    layouts=(_DECODER,),
    defaults={"num_key_value_heads": 8},
)
_QWEN2 = Architecture(
    bare="Qwen2Model",
    base="model",
    layouts=(_DECODER,),
    defaults={"num_key_value_heads": 32},
    attention_bias=True,
    layer_types=_qwen_types,
)
_QWEN3 = Architecture(
    bare="Qwen3Model",
    base="model",
    layouts=(_DECODER,),
    defaults={"num_key_value_heads": 32, "head_dim": 128},
    attention_bias=("attention_bias", False),
    layer_types=_qwen_types,
)
_STACKED = Mlp(
    ("mlp.experts.gate_up_proj", "mlp.experts.gate_up_proj"), "mlp.experts.down_proj", STACKED
)
_SEPARATE = Mlp(("mlp.experts.{}.gate_proj", "mlp.experts.{}.up_proj"), "mlp.experts.{}.down_proj")
_QWEN3_MOE = Architecture(
    bare="Qwen3MoeModel",
    base="model",
    layouts=(
        replace(_DECODER, experts=Experts("mlp.gate", _SEPARATE)),
        replace(_DECODER, experts=Experts("mlp.gate", _STACKED)),
    ),
    defaults={
        "num_key_value_heads": 4,
        "num_experts": 128,
        "moe_intermediate_size": 768,
        "decoder_sparse_step": 1,
        "num_experts_per_tok": 8,
    },
    attention_bias=("attention_bias", False),
)
_MIXTRAL = Architecture(
    bare="MixtralModel",
    base="model",
    layouts=(
        replace(
            _DECODER,
            mlp=None,
            experts=Experts(
                "block_sparse_moe.gate",
                Mlp(
                    ("block_sparse_moe.experts.{}.w1", "block_sparse_moe.experts.{}.w3"),
                    "block_sparse_moe.experts.{}.w2",
                ),
            ),
        ),
        replace(_DECODER, mlp=None, experts=Experts("mlp.gate", _STACKED)),
    ),
    keys=Keys(expert_intermediate="intermediate_size", experts=("num_local_experts",)),
    defaults={"num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2},
)
_GEMMA2 = Architecture(
    bare="Gemma2Model",
    base="model",
    layouts=(_DECODER,),
    defaults={"num_key_value_heads": 4, "head_dim": 256},
    attention_bias=("attention_bias", False),
    heads_divide_hidden=True,
    layer_types=_gemma2_types,
)
_GEMMA3 = replace(_GEMMA2, bare="Gemma3TextModel", layer_types=_gemma3_types)
_PHI3 = Architecture(
    bare="Phi3Model",
    base="model",
    layouts=(
        Layout(
            stack="layers",
            qkv=("self_attn.qkv_proj",) * 3,
            o="self_attn.o_proj",
            mlp=Mlp(("mlp.gate_up_proj",) * 2, "mlp.down_proj"),
        ),
    ),
)

ARCHITECTURES: Mapping[str, Architecture] = {
    "bert": _BERT,
    "distilbert": _DISTILBERT,
    "gemma2": _GEMMA2,
    # With images: only the language model is pruned.
    "gemma3": replace(
        _GEMMA3,
        bare="",
        base="language_model.model",
        inside="text_config",
        outputs=("language_model.lm_head", "lm_head"),
    ),
    "gemma3_text": _GEMMA3,
    "gpt2": _GPT2,
    "llama": _LLAMA,
    "mistral": _MISTRAL,
    "mixtral": _MIXTRAL,
    "phi3": _PHI3,
    "qwen2": _QWEN2,
    "qwen3": _QWEN3,
    "qwen3_moe": _QWEN3_MOE,
    "roberta": replace(
        _BERT, bare="RobertaModel", base="roberta", outputs=("lm_head.decoder", "lm_head")
    ),
    "vit": _VIT,
}
