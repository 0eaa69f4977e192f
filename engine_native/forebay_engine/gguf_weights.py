"""A GGUF file's tensors under the names and in the shapes of a checkpoint's.

Q8_0 and Q4_0 are kept as they are, in groups of 32; other types are dequantised a few rows at a
time. Llama's queries and keys lie there with each head's two halves interleaved, which is undone;
Gemma's norms hold ``1 + w``, of which a checkpoint holds ``w``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from gguf import GGMLQuantizationType
from torch import Tensor

from forebay_engine.gguf_file import GgufFile, GgufTensor
from forebay_engine.gguf_names import KEPT, is_weight, less_one, tensor_name
from forebay_engine.quantization.stored import Tensors
from forebay_kernels.matrix import Dense, GroupedInt8, Int4, Matrix

_GROUP = 32


class GgufWeights:
    """Reads the file's tensors, and is the format that keeps the quantised ones."""

    def __init__(self, file: GgufFile, dtype: torch.dtype) -> None:
        """``dtype``: of dequantised matrices; vectors stay in float32.

        :raises ModelError: a tensor has no place in the architecture.
        """
        self._dtype = dtype
        self._architecture: str = file.metadata["general.architecture"]
        heads = file.metadata.get(f"{self._architecture}.attention.head_count", 1)
        self._heads = {
            "attn_q": heads,
            "attn_k": file.metadata.get(f"{self._architecture}.attention.head_count_kv", heads),
        }
        self._tensors = {
            tensor_name(self._architecture, name): tensor
            for name, tensor in file.tensors.items()
            if is_weight(name)
        }

    def readers(self) -> dict[str, Callable[[], Tensor]]:
        """By Hugging Face's name: reads the tensor, dequantised."""
        return {name: partial(self._read, name) for name in self._tensors}

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        """GGUF holds every layer as ``[out, into]``, GPT-2's too."""
        stored = self._tensors.get(f"{name}.weight")
        if stored is None or stored.shape != (out, into) or stored.kind not in KEPT:
            return Dense(tensors.raw(f"{name}.weight", out, into))
        tensors.claim(f"{name}.weight")
        rows = self._in_order(stored, torch.from_numpy(stored.blocks.copy()))  # [out, bytes]
        blocks = rows.reshape(out, into // _GROUP, -1)
        scale = blocks[:, :, :2].contiguous().view(torch.float16).float().squeeze(-1)
        values = blocks[:, :, 2:]  # [out, in / 32, bytes]
        if stored.kind == GGMLQuantizationType.Q8_0:
            signed = values.contiguous().view(torch.int8).reshape(out, into)
            return GroupedInt8(signed, scale, None, _GROUP)
        # Sixteen bytes hold the columns 0..15 of a group low and 16..31 high.
        q = torch.cat([values & 15, values >> 4], dim=-1)
        packed = (q[:, :, 0::2] | (q[:, :, 1::2] << 4)).reshape(out, into // 2)
        return Int4(packed, scale, torch.full_like(scale, 8.0), _GROUP)

    def finish(self, tensors: Tensors) -> None:
        """Nothing else is stored."""

    def _read(self, name: str) -> Tensor:
        """Matrices in the type asked for, vectors in float32."""
        tensor = self._tensors[name]
        dtype = self._dtype if len(tensor.shape) > 1 else torch.float32
        found = torch.empty(len(tensor.blocks), tensor.shape[-1], dtype=dtype)
        for rows in tensor.chunks():
            found[rows] = torch.from_numpy(tensor.values(rows))
        found = self._in_order(tensor, found.reshape(tensor.shape))
        return found - 1.0 if less_one(self._architecture, tensor.name) else found

    def _in_order(self, tensor: GgufTensor, rows: Tensor) -> Tensor:
        """Of Llama's queries and keys each head's halves one after the other."""
        parts = tensor.name.split(".")
        heads = self._heads.get(parts[2]) if len(parts) == 4 else None
        if self._architecture != "llama" or heads is None:
            return rows
        return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)
