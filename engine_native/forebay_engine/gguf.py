"""Turns a Gemma 3 GGUF file into a Hugging Face folder.

Quantised weights are widened to bfloat16, so the folder holds the quantised model in a type that
every engine reads, not the original checkpoint. Format: https://github.com/ggml-org/ggml/blob/
master/docs/gguf.md; what is written: https://huggingface.co/docs/safetensors.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize

from forebay_engine.gguf_tokenizer import END_OF_TURN, write_tokenizer
from forebay_engine.hf_config import ModelError

#: Told of (what is done now, how much is done, of how much).
Progress = Callable[[str, int, int], None]

WEIGHTS = "model.safetensors"

#: Values widened at once: 8 MiB of float32, so that memory stays small whatever the model.
_CHUNK = 2 << 20

# Gemma 3 files leave these out, because llama.cpp has them in its code.
_LOCAL_ROPE_THETA = 10_000.0
_FULL_ATTENTION_EVERY = 6

_OUTER = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
_INNER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}


def convert(source: Path, folder: Path, progress: Progress) -> str:
    """Write ``source`` as a Hugging Face folder; the SHA-256 of its weights file.

    :raises ModelError: the file is of another architecture, or has a tensor without a place.
    """
    reader = GGUFReader(source)
    meta = {key: field.contents() for key, field in reader.fields.items()}
    architecture = meta.get("general.architecture")
    if architecture != "gemma3":
        raise ModelError(f"{source}: a GGUF of {architecture!r}; only gemma3 can be converted")
    folder.mkdir(parents=True, exist_ok=True)
    progress("tokenizer", 0, 1)
    write_tokenizer(meta, folder)
    progress("tokenizer", 1, 1)
    _write_json(folder / "config.json", model_config(meta))
    _write_json(folder / "generation_config.json", _generation_config(meta))
    return _write_weights(reader.tensors, folder / WEIGHTS, progress)


def model_config(meta: dict[str, Any]) -> dict[str, Any]:
    """config.json from the file's metadata."""
    own = {key.removeprefix("gemma3."): value for key, value in meta.items()}
    layers, head_dim = own["block_count"], own["attention.key_length"]
    return {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "transformers_version": "5.0.0",  # whose form of config.json this is
        "dtype": "bfloat16",
        "vocab_size": len(meta["tokenizer.ggml.tokens"]),
        "hidden_size": own["embedding_length"],
        "intermediate_size": own["feed_forward_length"],
        "num_hidden_layers": layers,
        "num_attention_heads": own["attention.head_count"],
        "num_key_value_heads": own["attention.head_count_kv"],
        "head_dim": head_dim,
        "query_pre_attn_scalar": head_dim,
        # Stored as float32: 9.99999997e-07 was 1e-06.
        "rms_norm_eps": float(f"{own['attention.layer_norm_rms_epsilon']:.6g}"),
        "max_position_embeddings": own["context_length"],
        "sliding_window": own["attention.sliding_window"],
        "layer_types": [
            "sliding_attention" if i % _FULL_ATTENTION_EVERY else "full_attention"
            for i in range(1, layers + 1)
        ],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": own["rope.freq_base"]},
            "sliding_attention": {"rope_type": "default", "rope_theta": _LOCAL_ROPE_THETA},
        },
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": meta["tokenizer.ggml.eos_token_id"],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def _generation_config(meta: dict[str, Any]) -> dict[str, Any]:
    """With the end of a turn among the ends: the file itself names the end of a text alone."""
    end_of_turn = meta["tokenizer.ggml.tokens"].index(END_OF_TURN)
    return {
        "bos_token_id": meta["tokenizer.ggml.bos_token_id"],
        "eos_token_id": [meta["tokenizer.ggml.eos_token_id"], end_of_turn],
        "pad_token_id": meta["tokenizer.ggml.padding_token_id"],
    }


def tensor_name(name: str) -> str:
    """Hugging Face's name of a GGUF tensor."""
    parts = name.removesuffix(".weight").split(".")
    if len(parts) == 3 and parts[0] == "blk" and parts[2] in _INNER:
        return f"model.layers.{parts[1]}.{_INNER[parts[2]]}.weight"
    if len(parts) == 1 and parts[0] in _OUTER:
        return f"{_OUTER[parts[0]]}.weight"
    raise ModelError(f"the GGUF tensor {name} has no place in Gemma 3")


def _write_weights(tensors: list[ReaderTensor], path: Path, progress: Progress) -> str:
    header, size = _header(tensors)
    digest, done = sha256(), 0
    with path.open("wb") as file:
        for piece in (header, *_pieces(tensors)):
            file.write(piece)
            digest.update(piece)
            done += len(piece)
            progress("weights", done, len(header) + size)
    return digest.hexdigest()


def _header(tensors: list[ReaderTensor]) -> tuple[bytes, int]:
    """The safetensors header, with its length before it, and the size of what follows."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + 2 * int(tensor.n_elements)
        shape = [int(n) for n in reversed(tensor.shape)]  # GGUF names the fastest axis first
        entries[tensor_name(tensor.name)] = {
            "dtype": "BF16",
            "shape": shape,
            "data_offsets": [start, end],
        }
    text = json.dumps(entries).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, end


def _pieces(tensors: list[ReaderTensor]) -> Iterator[bytes]:
    """The tensors' values in bfloat16, a few rows at a time."""
    for tensor in tensors:
        # GGUF holds Gemma's 1 + w of a norm, a checkpoint holds w.
        shift = np.float32(1.0 if tensor_name(tensor.name).endswith("norm.weight") else 0.0)
        rows = tensor.data.reshape(-1, tensor.data.shape[-1])
        step = max(1, _CHUNK * len(rows) // int(tensor.n_elements))
        for start in range(0, len(rows), step):
            values = dequantize(rows[start : start + step], tensor.tensor_type)
            yield to_bfloat16(values - shift).tobytes()


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    rounded: npt.NDArray[np.uint16] = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")
    return rounded


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
