"""Whether a model fits into this machine's memory, found out before any of it is read.

A process that outgrows its memory is killed without a word, or drags the machine into swapping; a
refusal with the sum is better.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from forebay_engine.config import EngineConfig
from forebay_engine.errors import StartRefused

#: Of the KV cache on a processor, unless something else is asked.
KV_BYTES = 512 << 20
#: Interpreter and libraries, about; measured with torch 2.13 on CPU.
_PROGRAM_BYTES = 400 << 20
#: Bytes of an element as stored, by safetensors' names of types: those that take the model's type,
#: and integers and FP8, which stay as they are.
_FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_OTHERS = {"I64": 8, "I32": 4, "I16": 2}
_DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}
#: Bytes of a value that is rounded while loading: int4 has 8 bytes of scale and zero a group of 32,
#: FP8 is widened to bfloat16 on a CPU.
_ROUNDED = {"int8": 1.0, "int4": 0.5 + 8 / 32, "fp8": 2.0}
#: Outputs for each input from which an output layer is so large a part of a model that a processor
#: gets a copy of it in int8: 409 of Gemma 3 270M, 148 of Qwen 3 0.6B, 31 of Llama 3.1 8B.
_SCREENED = 64
_EMBEDDINGS = ("embed_tokens.weight", "wte.weight")
_HEAD = "lm_head.weight"
#: Of all experts of a layer in one tensor.
_EXPERTS = ("experts.gate_up_proj", "experts.down_proj")


def refuse_what_does_not_fit(config: EngineConfig, available: int | None = None) -> None:
    """Compare weights and KV cache with the memory that is left.

    :raises StartRefused: they don't fit; the message holds the sum and what can be done.
    """
    available = available_bytes() if available is None else available
    if available is None:
        return
    weights = all_weight_bytes(config)
    cache = config.kv_cache_bytes or KV_BYTES
    needed = weights + cache + _PROGRAM_BYTES
    if needed > available:
        raise StartRefused(
            f"{config.model} does not fit into memory: {mib(weights)} of weights + "
            f"{mib(cache)} of KV cache + {mib(_PROGRAM_BYTES)} for the program = "
            f"{mib(needed)}, but {mib(available)} are available; "
            "lower kv_cache_bytes, or choose a smaller model or dtype, or quantization: int8"
        )


def all_weight_bytes(config: EngineConfig, *, on_gpu: bool = False) -> int:
    """Of the model, and of the draft model if there is one."""
    folders = [folder for folder in (config.model, config.draft_model) if folder is not None]
    return sum(folder_bytes(config, folder, on_gpu=on_gpu) for folder in folders)


def folder_bytes(config: EngineConfig, folder: str, *, on_gpu: bool) -> int:
    """Of one of them."""
    return weight_bytes(Path(folder), config.dtype, config.quantization, on_gpu=on_gpu)


def weight_bytes(
    folder: Path, dtype: str, quantization: str = "none", *, on_gpu: bool = False
) -> int:
    """Bytes of a folder's safetensors, or of its GGUF file, once they are loaded.

    With them the second copy of an embedding that is the output layer too: laid out for its kernel,
    or rounded, while tokens are looked up in the first; and the copy in int8 of a large one. On a
    GPU there is the second only if it is rounded, and never the third, float16 stays as it is, and
    FP8 takes a byte.
    """
    tensors = _tensors(folder)
    if all(name != _HEAD for name, _ in tensors) and not (on_gpu and quantization == "none"):
        tensors += [(_HEAD, tensor) for name, tensor in tensors if name.endswith(_EMBEDDINGS)]
    total = sum(_bytes(name, tensor, dtype, quantization, on_gpu) for name, tensor in tensors)
    if not on_gpu and quantization == "none":
        total += sum(_screen_bytes(tensor) for name, tensor in tensors if name == _HEAD)
    return total


def is_screened(out: int, into: int) -> bool:
    """Whether a plain output layer of this size gets a copy in int8 on a processor."""
    return out >= _SCREENED * into


def laid_out_bytes(config: EngineConfig) -> int:
    """Of what a processor's kernels lay out anew: all but the embeddings, which are looked up."""
    found = 0
    for folder in filter(None, (config.model, config.draft_model)):
        read = [item for item in _tensors(Path(folder)) if item[0].endswith(_EMBEDDINGS)]
        found += folder_bytes(config, folder, on_gpu=False)
        found -= sum(_bytes(*item, config.dtype, config.quantization, False) for item in read)
    return found


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, of the machine or of its control group."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    machine = int(found[1]) << 10 if found else None
    group = _group_bytes(Path("/sys/fs/cgroup"))
    return min((limit for limit in (machine, group) if limit is not None), default=None)


def _group_bytes(group: Path) -> int | None:
    """What a version 2 control group has left; its page cache can be given back."""
    limit, stat = group / "memory.max", group / "memory.stat"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return None
    cache = re.search(r"^inactive_file (\d+)", stat.read_text(), re.MULTILINE)
    used = int((group / "memory.current").read_text())
    return int(most) - used + (int(cache[1]) if cache else 0)


def _tensors(folder: Path) -> list[tuple[str, dict[str, Any]]]:
    """Names, types and shapes in a folder's safetensors, or in its GGUF file."""
    if (folder / "model.gguf").is_file():
        return _gguf_header(folder / "model.gguf")
    return [item for path in folder.glob("*.safetensors") for item in _header(path)]


def _header(path: Path) -> Iterable[tuple[str, dict[str, Any]]]:
    """Names, types and shapes: a JSON object behind its length (safetensors' format)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header: dict[str, dict[str, Any]] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return header.items()


def _gguf_header(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """In safetensors' words; what is kept quantised as so many bytes, the rest dequantised."""
    from forebay_engine.gguf_file import GgufFile
    from forebay_engine.gguf_names import KEPT, is_weight, tensor_name

    file = GgufFile(path)
    found: list[tuple[str, dict[str, Any]]] = []
    for tensor in file.tensors.values():
        if not is_weight(tensor.name):
            continue
        name = tensor_name(file.metadata["general.architecture"], tensor.name)
        if tensor.kind in KEPT and not name.endswith(_EMBEDDINGS):
            size = int(math.prod(tensor.shape) * KEPT[tensor.kind])
            kind = "I8" if KEPT[tensor.kind] > 1.0 else "U8"
            found.append((name, {"dtype": kind, "shape": [size]}))
        else:
            found.append((name, {"dtype": "BF16", "shape": tensor.shape}))
    return found


def _bytes(name: str, tensor: dict[str, Any], dtype: str, quantization: str, on_gpu: bool) -> int:
    """Of one tensor; matrices other than embeddings may be rounded, the head to int8 at best."""
    kind, shape = tensor["dtype"], tensor["shape"]
    values: int = math.prod(shape)
    if kind not in _FLOATS:
        return values if on_gpu and kind.startswith("F8") else _quantized_bytes(kind, values, dtype)
    is_layer = len(shape) == 2 and name.endswith(".weight") and not name.endswith(_EMBEDDINGS)
    is_layer |= len(shape) == 3 and name.endswith(_EXPERTS)
    if is_layer and quantization in _ROUNDED and dtype != "float32":
        if on_gpu and quantization == "fp8":
            return values
        return int(values * _ROUNDED["int8" if name == _HEAD else quantization])
    as_stored = 4 if kind == "F16" and not on_gpu else _FLOATS[kind]  # computed in float32
    return values * _DTYPES.get(dtype, as_stored)


def _screen_bytes(tensor: dict[str, Any]) -> int:
    """Of the copy in int8 of an output layer: its bytes, and three figures an output."""
    kind, shape = tensor["dtype"], tensor["shape"]
    if kind not in _FLOATS or len(shape) != 2 or not is_screened(*shape):
        return 0
    outputs: int = shape[0]
    return outputs * int(shape[1]) + 3 * 4 * outputs


def _quantized_bytes(kind: str, values: int, dtype: str) -> int:
    """There are kernels for integers, FP8 is widened; for exactness in float32 all of it is."""
    if kind.startswith("F8"):
        return values * (4 if dtype == "float32" else 2)
    stored = values * _OTHERS.get(kind, 1)
    # A byte of packed weights is two values, one of int8's is one.
    return stored * (4 if kind == "I8" else 8) if dtype == "float32" else stored


def mib(amount: int) -> str:
    return f"{amount / (1 << 20):,.0f} MiB"
