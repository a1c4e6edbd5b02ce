"""From the names of llama.cpp's tensors to those of Hugging Face."""

import re
from collections.abc import Collection

# Where the number of an expert is in a name.
EXPERT = "{expert}"

_PARTS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",  # of Phi-3
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    # Mixtures of experts, as Qwen names them.
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"ffn_{part}_exps": f"mlp.experts.{EXPERT}.{part}_proj" for part in ("gate", "up", "down")},
    **{f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")},
}
_WHOLE = {"output.weight": "lm_head.weight", "token_embd.weight": "model.embed_tokens.weight"}
_BLOCK = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


def hugging_face_name(name: str, names: Collection[str]) -> str | None:
    """Returns the name of a tensor in Llama, Mistral, Qwen2, Qwen3, Gemma 2 and 3, and Phi-3.

    Args:
        name: As in a GGUF file.
        names: All names of the model; they tell whether it is Phi-3, which has no gate of its own.

    Returns:
        The name, with EXPERT if it is of all experts; None if it is unknown.
    """
    found = _BLOCK.fullmatch(name)
    if found is None:
        return _WHOLE.get(name)
    layer, part = found.groups()
    place = _PARTS.get(part)
    if part == "ffn_up" and f"blk.{layer}.ffn_gate.weight" not in names:
        place = "mlp.gate_up_proj"
    return None if place is None else f"model.layers.{layer}.{place}.weight"
