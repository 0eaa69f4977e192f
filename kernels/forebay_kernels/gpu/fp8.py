"""Products with FP8 (e4m3) weights on a GPU: ``x @ w.T`` with ``w = weight * scale``.

Three ways, of which ``pack_fp8`` takes one by the layout and by how many tokens there are:

- Few tokens: the weights' bytes are the time, so tokens stay in their own type and weights are
  widened in registers (W8A16): half the bytes of bfloat16, no rounding of tokens, one launch.
- Many tokens, a scale for each channel: tokens are rounded to e4m3, each by its own scale, and
  ``torch._scaled_mm`` multiplies (W8A8).
- Many tokens, a scale for each block of 128 by 128: tokens are rounded by groups of 128, too, and
  the kernel here adds up each 128 products on the tensor cores and the scaled sums in float32
  (DeepSeek-V3, https://arxiv.org/abs/2412.19437, section 3.3.2).

The last way costs one multiplication and one addition in float32 for each 128 on the tensor cores:
for a tile of 128 by 128 some 70 ns beside 280. To widen such weights instead would bound it by the
rate of bfloat16, which is half; to round them again, by channel, would add an error of their own
size.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.quantize_fp8 import quantize_fp8
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.matrix import Fp8

#: Columns that a matrix instruction takes of e4m3 at least.
_LEAST_COLUMNS = 32
#: ``torch._scaled_mm`` wants both dimensions of the weights as multiples of this.
_SCALED_MM_MULTIPLE = 16


@triton.jit
def widened(weight: tl.tensor, like: tl.tensor) -> tl.tensor:
    """e4m3 in the type of ``like``, exactly.

    By way of float32: straight to bfloat16 the compiler makes of it a conversion (F2F) of which a
    multiprocessor does 16 a cycle, but at 4.3 TB/s there come 18.6 weights a cycle. This way is two
    and a half instructions a weight, on units that do 64 and 128.
    """
    return weight.to(tl.float16).to(tl.float32).to(like.dtype)


@triton.jit(do_not_specialize=["tokens"])
def _product_kernel(
    x: tl.tensor,  # [tokens, in] e4m3, or of the type of out
    x_scale: tl.tensor,  # [tokens, groups] float32; only read if x is e4m3
    weight: tl.tensor,  # [out, in] e4m3
    weight_scale: tl.tensor,  # [groups, out] float32: neighbours are read together
    bias: tl.tensor,  # [out] float32
    out: tl.tensor,  # [tokens, out]
    tokens: tl.tensor,
    x_row: tl.tensor,
    INTO: tl.constexpr,
    OUT: tl.constexpr,
    GROUPS: tl.constexpr,
    GROUP: tl.constexpr,  # of x and weight alike; TILE_IN divides it unless there is only one
    BIAS: tl.constexpr,
    ROUNDED: tl.constexpr,  # x is e4m3
    TILE_TOKENS: tl.constexpr,
    TILE_OUT: tl.constexpr,
    TILE_IN: tl.constexpr,
    TALL: tl.constexpr,  # tiles of tokens that share what they read of the weights
    PRECISION: tl.constexpr,
) -> None:
    # Tiles of tokens first, TALL at a time, so that weights are still in the L2 when they are
    # wanted again.
    across = tl.cdiv(OUT, TILE_OUT)
    band = tl.program_id(0) // (TALL * across)
    within = tl.program_id(0) % (TALL * across)
    height = tl.minimum(tl.cdiv(tokens, TILE_TOKENS) - band * TALL, TALL)
    token = (band * TALL + within % height) * TILE_TOKENS + tl.arange(0, TILE_TOKENS)
    channel = (within // height) * TILE_OUT + tl.arange(0, TILE_OUT)
    column = tl.arange(0, TILE_IN)
    is_token, is_channel = token < tokens, channel < OUT
    x_tile = x + token.to(tl.int64)[:, None] * x_row + column[None, :]
    weight_tile = weight + channel.to(tl.int64)[:, None] * INTO + column[None, :]

    total = tl.zeros([TILE_TOKENS, TILE_OUT], tl.float32)
    for start in range(0, INTO, TILE_IN):
        wanted_x, wanted_weight = is_token[:, None], is_channel[:, None]
        if INTO % TILE_IN != 0:
            wanted_x = wanted_x & (start + column < INTO)[None, :]
            wanted_weight = wanted_weight & (start + column < INTO)[None, :]
        a = tl.load(x_tile + start, mask=wanted_x, other=0.0)  # [TILE_TOKENS, TILE_IN]
        b = tl.load(weight_tile + start, mask=wanted_weight, other=0.0)  # [TILE_OUT, TILE_IN]
        if not ROUNDED:
            b = widened(b, a)
        if GROUPS == 1:
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
        else:
            # Asked for before the product, so that they come while it is computed.
            group = start // GROUP
            scale = tl.load(weight_scale + group * OUT + channel, mask=is_channel, other=0.0)
            scale = scale[None, :]
            if ROUNDED:
                scale = (
                    scale
                    * tl.load(x_scale + token * GROUPS + group, mask=is_token, other=0.0)[:, None]
                )
            total += scale * tl.dot(a, tl.trans(b), input_precision=PRECISION)
    if GROUPS == 1:
        total *= tl.load(weight_scale + channel, mask=is_channel, other=0.0)[None, :]
        if ROUNDED:
            total *= tl.load(x_scale + token, mask=is_token, other=0.0)[:, None]
    if BIAS:
        total += tl.load(bias + channel, mask=is_channel, other=0.0)[None, :]
    tl.store(
        out + token.to(tl.int64)[:, None] * OUT + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=is_token[:, None] & is_channel[None, :],
    )


class PackedFp8:
    """``x @ matrix.T + bias`` in the type of ``x``."""

    def __init__(self, matrix: Fp8, bias: Tensor | None) -> None:
        self._out, self._into = matrix.shape
        self._weight = matrix.weight.contiguous()
        self._scale = matrix.scale.float().t().contiguous()  # [groups, out]
        self._bias = None if bias is None else bias.float().contiguous()
        self._short_bias = None if bias is None else bias.to(torch.bfloat16)
        self._groups = self._scale.shape[0]
        #: Columns of a token that are rounded together.
        self.group = self._into if self._groups == 1 else matrix.group
        sizes = (self._out, self._into)
        self._whole = self._groups == 1 and all(n % _SCALED_MM_MULTIPLE == 0 for n in sizes)

    def __call__(self, x: Tensor) -> Tensor:
        """``[tokens, in] -> [tokens, out]``."""
        if x.dim() != 2 or x.shape[1] != self._into:
            raise ValueError(f"{list(x.shape)}, but it takes [tokens, {self._into}]")
        if x.stride(1) != 1:
            x = x.contiguous()
        if not self.rounds(x):
            return self._product(x, None, x.dtype)
        return self.quantized(*quantize_fp8(x, self.group), x.dtype)

    def rounds(self, x: Tensor) -> bool:
        """Whether so many tokens are rounded to e4m3: then they may be given so."""
        return bool(choose("fp8_path", x.device, tokens=len(x))["rounds"])

    def quantized(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        """The same of tokens that are rounded already, as ``reference.quantize_fp8`` does.

        ``values`` is ``[tokens, in]`` e4m3, ``scale`` ``[tokens, in / group]`` float32.
        """
        if not self._whole or dtype != torch.bfloat16:
            return self._product(values, scale, dtype)
        # What it asks for with scales of rows: values [tokens, in] with contiguous rows, weights
        # [in, out] with contiguous columns, both sizes of them multiples of 16; scales [tokens, 1]
        # and [1, out], float32 and contiguous; bfloat16 out. Any number of tokens will do.
        return torch._scaled_mm(
            values,
            self._weight.t(),
            scale_a=scale,
            scale_b=self._scale,
            bias=self._short_bias,
            out_dtype=torch.bfloat16,
            # Sums of the tensor cores are kept in 14 bits of mantissa, against the 4 of what they
            # add: promoting them to float32 now and then costs a tenth to a fifth of the rate.
            use_fast_accum=True,
        )

    def _product(self, x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
        tokens = len(x)
        out = torch.empty((tokens, self._out), dtype=dtype, device=x.device)
        if tokens == 0:
            return out
        # Powers of two, so that the tile's columns are one too.
        chosen = choose("fp8_product", x.device, tokens=tokens, out=self._out)
        tile_in = min(chosen["tile_in"], triton.next_power_of_2(self.group))
        grid = (
            triton.cdiv(tokens, chosen["tile_tokens"]) * triton.cdiv(self._out, chosen["tile_out"]),
        )
        _product_kernel[grid](
            x,
            x if scale is None else scale,
            self._weight,
            self._scale,
            self._scale if self._bias is None else self._bias,
            out,
            tokens,
            x.stride(0),
            INTO=self._into,
            OUT=self._out,
            GROUPS=self._groups,
            GROUP=self.group,
            BIAS=self._bias is not None,
            ROUNDED=scale is not None,
            TILE_TOKENS=chosen["tile_tokens"],
            TILE_OUT=chosen["tile_out"],
            TILE_IN=max(tile_in, _LEAST_COLUMNS),
            TALL=chosen["tall"],
            # Full float32: the default rounds its factors to 10 bits of mantissa.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=chosen["warps"],
            num_stages=chosen["stages"],
        )
        return out


def pack_fp8(matrix: Fp8, bias: Tensor | None = None) -> PackedFp8 | None:
    """The layer for a GPU; None if its groups are none that the kernel takes."""
    return PackedFp8(matrix, bias) if takes(matrix) else None


def takes(matrix: Fp8) -> bool:
    """The whole input may be a group, and powers of two from 32 on: checkpoints have 128."""
    group = matrix.group
    return matrix.scale.shape[1] == 1 or (group >= _LEAST_COLUMNS and group & (group - 1) == 0)
