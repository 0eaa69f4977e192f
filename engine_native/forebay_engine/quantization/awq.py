"""AWQ checkpoints (https://arxiv.org/abs/2306.00978) as AutoAWQ writes them for its GEMM kernels.

``qweight [in, out / 8]`` and ``qzeros [groups, out / 8]`` pack eight outputs of 4 bits in an int32
in the order 0 2 4 6 1 3 5 7; ``scales [groups, out]``. ``w = (q - zero) * scale``.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from forebay_engine.hf_config import ModelError
from forebay_engine.quantization.stored import Tensors, grouped, unpack
from forebay_kernels.matrix import Matrix

#: Where the outputs 0..7 lie among the eight.
_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)


class Awq:
    """Reads AWQ's GEMM layout of 4 bits."""

    def __init__(self, settings: dict[str, Any]) -> None:
        version, bits = settings.get("version") or "gemm", settings.get("bits", 4)
        if str(version).lower() != "gemm" or bits != 4:
            raise ModelError(
                f"config.json: AWQ version {version!r} of {bits} bits is not supported; "
                "quantise with version gemm to 4 bits"
            )

    def matrix(self, tensors: Tensors, name: str, out: int, into: int) -> Matrix | None:
        if f"{name}.qweight" not in tensors:
            return None
        values = _unpack(tensors.raw(f"{name}.qweight", into, out // 8))  # [in, out]
        scale = tensors.raw(f"{name}.scales")  # [groups, out]
        zeros = _unpack(tensors.raw(f"{name}.qzeros", len(scale), out // 8))
        return grouped(name, values.T, scale.T, zeros.T, 4, None)

    def finish(self, tensors: Tensors) -> None:
        """Nothing else is stored."""


def _unpack(packed: Tensor) -> Tensor:
    """``[n, out / 8]`` int32 as ``[n, out]`` in the outputs' order."""
    eights = unpack(packed, 4).reshape(len(packed), -1, 8)
    return eights[:, :, list(_PLACES)].flatten(1)
