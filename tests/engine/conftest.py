"""Tiny random checkpoints of every family, written by transformers, and runners over them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPECIALS = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
VOCAB = 384

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
_LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0],
    "long_factor": [1.0, 1.5, 2.0, 4.0, 8.0, 16.0],
}
_YARN = {
    "rope_type": "yarn",
    "rope_theta": 10_000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
_GEMMA = {
    "head_dim": 32,
    "query_pre_attn_scalar": 24,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
}
_QWEN3_MOE = {
    "num_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "head_dim": 24,
    "rope_parameters": _ROPE,
}

#: Of each family transformers' configuration class, and what differs from the common shape.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"rope_parameters": _LLAMA3}),
    "mistral": ("MistralConfig", {"sliding_window": 16, "rope_parameters": _ROPE}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_parameters": _YARN}),
    "qwen3": ("Qwen3Config", {"head_dim": 24, "rope_parameters": _ROPE}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            **_GEMMA,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100_000.0},
                "sliding_attention": _ROPE,
            },
        },
    ),
    # Caps low enough to be felt.
    "gemma2": (
        "Gemma2Config",
        {**_GEMMA, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 3.0},
    ),
    # Up to 512 positions the short factors; of a head's 16 dimensions 12 are rotated.
    "phi3": (
        "Phi3Config",
        {
            "sliding_window": 24,
            "max_position_embeddings": 1024,
            "original_max_position_embeddings": 512,
            "rope_parameters": {**_LONGROPE, "partial_rotary_factor": 0.75},
        },
    ),
    "mixtral": (
        "MixtralConfig",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "rope_parameters": _ROPE},
    ),
    "qwen3-moe": (  # the first layer is dense
        "Qwen3MoeConfig",
        {**_QWEN3_MOE, "mlp_only_layers": [0], "norm_topk_prob": True},
    ),
    "qwen3-moe-2": (  # every second layer has experts; all of them slide
        "Qwen3MoeConfig",
        {
            **_QWEN3_MOE,
            "decoder_sparse_step": 2,
            "use_sliding_window": True,
            "sliding_window": 16,
            "max_window_layers": 2,
        },
    ),
    "gpt2": ("GPT2Config", {"scale_attn_by_inverse_layer_idx": True}),
    "opt": ("OPTConfig", {"ffn_dim": 112, "hidden_size": 48}),
    "opt-350m": (  # as its shape is: norms behind, narrow embeddings
        "OPTConfig",
        {"ffn_dim": 112, "do_layer_norm_before": False, "word_embed_proj_dim": 32},
    ),
}

_ALTERNATING = {"sliding_window": 16, "layer_types": _GEMMA["layer_types"]}
_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}

#: The same of families without a class of ours.
FAMILIES |= {
    "granite": (
        "GraniteConfig",
        {"embedding_multiplier": 2.0, "logits_scaling": 3.0, "attention_multiplier": 0.1},
    ),
    "cohere2": ("Cohere2Config", {"logit_scale": 0.3, **_ALTERNATING}),
    "olmo2": ("Olmo2Config", {}),
    "stablelm": ("StableLmConfig", {}),
    "starcoder2": ("Starcoder2Config", {"sliding_window": 16}),
    "gpt-neox": ("GPTNeoXConfig", {}),
    "gpt-bigcode": ("GPTBigCodeConfig", {"multi_query": True}),
    "smollm3": ("SmolLM3Config", {"no_rope_layers": [1, 0, 1]}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**_EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 48},
    ),
    "gpt-oss": (
        "GptOssConfig",
        {"num_local_experts": 4, "head_dim": 16, "rope_parameters": _ROPE, **_ALTERNATING},
    ),
    # And of models that are refused, because there is more to them than attention.
    "mamba": ("MambaConfig", {}),
    "lfm2": ("Lfm2Config", {"layer_types": ["conv", "full_attention", "conv"]}),
    "bloom": ("BloomConfig", {}),
    "falcon": ("FalconConfig", {}),
    "deepseek-v3": (
        "DeepseekV3Config",
        {
            **_EXPERTS,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 16,
        },
    ),
}

_WITHOUT_GROUPS = {"GPT2Config", "OPTConfig", "GPTNeoXConfig", "GPTBigCodeConfig"}


def _family_config(family: str) -> Any:
    name, own = FAMILIES[family]
    settings = {**_COMMON, **own}
    if name in _WITHOUT_GROUPS:
        del settings["num_key_value_heads"]
    if name == "OPTConfig":
        settings["init_std"] = settings.pop("initializer_range")
    return getattr(import_module("transformers"), name)(**settings)


def _tokenizer() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = (
        "the water falls on the wheel and the wheel turns the shaft and the shaft turns the dynamo"
    )
    tokenizer.train_from_iterator([text] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return tokenizer


def _save(family: str, folder: Path) -> Path:
    hf: Any = import_module("transformers")  # untyped calls
    hf.utils.logging.disable_progress_bar()
    torch.manual_seed(list(FAMILIES).index(family))
    model = hf.AutoModelForCausalLM.from_config(_family_config(family)).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "ln_1.weight", "ln_2.weight", "ln_f.weight", "bias")):
                # All start at a constant.
                parameter.add_(torch.randn_like(parameter) * 0.3)
    # One family in several files, the others in one.
    model.save_pretrained(folder, max_shard_size="100KB" if family == "qwen3" else "1GB")
    _tokenizer().save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": 512, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """``tiny_checkpoint(family)``: a float32 folder of a random 3-layer model, made once.

    Families: those of FAMILIES; qwen3 is sharded. With tokenizer.json (byte-level, 384
    tokens, <bos> first), tokenizer_config.json and a chat template.
    """
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = _save(family, tmp_path_factory.mktemp(family))
        return made[family]

    return get


@pytest.fixture(scope="session", autouse=True)
def one_compute_thread() -> None:
    """Tests share their machine, and a second thread costs these sizes more than it gives."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of the demo model: ``$FOREBAY_DEMO_MODEL``, or where `forebay model pull` puts it."""
    default = "~/.cache/forebay/models/gemma-3-270m"
    folder = Path(os.environ.get("FOREBAY_DEMO_MODEL", default)).expanduser()
    if not (folder / "config.json").exists():
        pytest.fail(f"{folder} is not there: run `make model`, or set FOREBAY_DEMO_MODEL")
    return folder


Tensors = dict[str, np.ndarray[Any, np.dtype[Any]]]

GGUF_BYTES = [f"<0x{i:02X}>" for i in range(256)]
GGUF_WHOLE = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>", "\n\n"]
GGUF_PIECES = ["a", "b", "c", "▁", "▁b", "ab", "bc"]
GGUF_SCORES = {"▁b": -1.0, "bc": -2.0, "ab": -3.0}


@pytest.fixture(scope="session")
def tiny_gguf_tensors() -> Tensors:
    """Values of a random Gemma 3 of 7 layers, by GGUF name."""
    random = np.random.default_rng(1)
    shapes = {
        "attn_norm": (64,),
        "attn_q": (128, 64),
        "attn_k": (64, 64),
        "attn_v": (64, 64),
        "attn_q_norm": (32,),
        "attn_k_norm": (32,),
        "attn_output": (64, 128),
        "post_attention_norm": (64,),
        "ffn_norm": (64,),
        "ffn_gate": (96, 64),
        "ffn_up": (96, 64),
        "ffn_down": (64, 96),
        "post_ffw_norm": (64,),
    }
    vocab = len(GGUF_WHOLE) + len(GGUF_BYTES) + len(GGUF_PIECES)
    all_shapes: dict[str, tuple[int, ...]] = {"token_embd": (vocab, 64), "output_norm": (64,)}
    all_shapes |= {f"blk.{i}.{name}": shape for i in range(7) for name, shape in shapes.items()}
    return {
        f"{name}.weight": random.standard_normal(shape).astype(np.float32)
        for name, shape in all_shapes.items()
    }


@pytest.fixture(scope="session")
def write_gguf() -> Callable[[Path, Tensors], Path]:
    """``write_gguf(path, tensors)``: a Gemma 3 file with a small tokenizer; ffn_down as Q8_0."""
    import gguf

    def write(path: Path, tensors: Tensors) -> Path:
        writer = gguf.GGUFWriter(path, "gemma3")
        writer.add_context_length(256)
        writer.add_embedding_length(64)
        writer.add_block_count(7)
        writer.add_feed_forward_length(96)
        writer.add_head_count(4)
        writer.add_head_count_kv(2)
        writer.add_key_length(32)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_rope_freq_base(1_000_000.0)
        writer.add_sliding_window(16)
        tokens = GGUF_WHOLE + GGUF_BYTES + GGUF_PIECES
        writer.add_tokenizer_model("llama")
        writer.add_add_space_prefix(False)
        writer.add_token_list(tokens)
        writer.add_token_scores([GGUF_SCORES.get(token, -1000.0) for token in tokens])
        kinds = {**dict.fromkeys(GGUF_WHOLE, 3), "\n\n": 4, **dict.fromkeys(GGUF_BYTES, 6)}
        writer.add_token_types([kinds.get(token, 1) for token in tokens])
        writer.add_pad_token_id(0)
        writer.add_eos_token_id(1)
        writer.add_bos_token_id(2)
        writer.add_unk_token_id(3)
        for name, values in tensors.items():
            if "ffn_down" in name:
                kind = gguf.GGMLQuantizationType.Q8_0
                writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
            else:
                writer.add_tensor(name, values)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.fixture(scope="session")
def tiny_gguf(
    tmp_path_factory: pytest.TempPathFactory,
    tiny_gguf_tensors: Tensors,
    write_gguf: Callable[[Path, Tensors], Path],
) -> Path:
    """A small Gemma 3 GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny_gguf_tensors)
