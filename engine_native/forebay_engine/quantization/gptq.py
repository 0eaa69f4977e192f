"""GPTQ checkpoints of 4 and 8 bits: https://arxiv.org/abs/2210.17323.

Layout, as AutoGPTQ and GPTQModel write it, with ``n = 32 / bits`` values in an int32, lowest first:
``qweight [in / n, out]`` packed along the inputs, ``qzeros [groups, out / n]`` packed along the
outputs, ``scales [groups, out]``, ``g_idx [in]`` the group of each input.
"""

from __future__ import annotations

from typing import Any

from forebay_engine.hf_config import ModelError
from forebay_engine.quantization.stored import Tensors, grouped, unpack
from forebay_kernels.matrix import Matrix


class Gptq:
    """Reads GPTQ; the first format stores zeros less one, ``gptq_v2`` as they are."""

    def __init__(self, settings: dict[str, Any]) -> None:
        layout = settings.get("checkpoint_format") or "gptq"
        if layout not in ("gptq", "gptq_v2"):
            raise ModelError(
                f"config.json: GPTQ's checkpoint_format {layout!r} is not supported (these are: "
                "gptq, gptq_v2); save the model again in one of them"
            )
        self._less = 1 if layout == "gptq" else 0

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        if f"{name}.qweight" not in tensors:
            return None
        packed = tensors.raw(f"{name}.qweight")  # [in * bits / 32, out]
        bits = len(packed) * 32 // into
        if bits not in (4, 8):
            raise ModelError(f"{name}: GPTQ of {bits} bits is not supported; quantise to 4 or 8")
        values = unpack(packed.T.contiguous(), bits)  # [out, in]
        if tuple(values.shape) != (out, into):
            raise ModelError(f"{name} is {list(values.shape)}, config.json asks for {[out, into]}")
        scale = tensors.raw(f"{name}.scales")  # [groups, out]
        zeros = unpack(tensors.raw(f"{name}.qzeros", len(scale), out * bits // 32), bits)
        zeros = (zeros + self._less) & ((1 << bits) - 1)  # [groups, out]; what was -1 is 0 again
        index = tensors.raw(f"{name}.g_idx", into) if f"{name}.g_idx" in tensors else None
        return grouped(name, values, scale.T, zeros.T, bits, index)

    def finish(self, tensors: Tensors) -> None:
        """Some tools write a bias of zeros for every layer."""
        for name in tensors.left(".bias"):
            if f"{name.removesuffix('.bias')}.qweight" in tensors and tensors.raw(name).any():
                raise ModelError(f"{name} is not zero, and the model has no place for it")
