"""Names of tensors in GGUF files, and what they are called in Hugging Face's checkpoints."""

from __future__ import annotations

from gguf import GGMLQuantizationType

from forebay_engine.hf_config import ModelError

#: Types that layers keep, with the bytes of a value: groups of 32 with a scale, and int4's zero.
KEPT = {
    GGMLQuantizationType.Q8_0: 1.0 + 4 / 32,
    GGMLQuantizationType.Q4_0: 0.5 + 8 / 32,
}

_DECODER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GPT2 = {
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_GPT2_OUTER = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "output": "lm_head",
}
_INNER = {
    "gemma2": _DECODER | _GEMMA,
    "gemma3": _DECODER | _GEMMA,
    "gpt2": _GPT2,
    "phi3": _DECODER | {"ffn_up": "mlp.gate_up_proj"},
}


def is_weight(name: str) -> bool:
    """False for factors of the rotation, which the configuration holds."""
    return not name.startswith("rope_")


def less_one(architecture: str, name: str) -> bool:
    """Whether GGUF holds ``1 + w`` where a checkpoint holds ``w``: Gemma's norms."""
    return architecture.startswith("gemma") and name.endswith("norm.weight")


def tensor_name(architecture: str, name: str) -> str:
    """Hugging Face's name of a GGUF tensor.

    :raises ModelError: this architecture has no such tensor.
    """
    gpt2 = architecture == "gpt2"
    parts = name.split(".")
    inner = _INNER.get(architecture, _DECODER)
    outer = _GPT2_OUTER if gpt2 else _OUTER
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in inner:
        layers = "transformer.h" if gpt2 else "model.layers"
        return f"{layers}.{parts[1]}.{inner[parts[2]]}.{parts[3]}"
    if len(parts) == 2 and parts[0] in outer:
        return f"{outer[parts[0]]}.{parts[1]}"
    raise ModelError(f"the GGUF tensor {name} has no place in {architecture}")
