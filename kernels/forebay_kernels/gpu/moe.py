"""Mixtures of experts in Triton: every expert that was chosen is read once, for all of its tokens.

    out[t] = sum_k weight[t, k] * down[e] (silu(gate[e] x[t]) * up[e] x[t]),   e = chosen[t, k]

in five launches, none of which depends on what the router says: a graph can hold them.

1. ``route``: softmax over the experts, the ``top_k`` likeliest and their weights.
2. Pairs of a token and one of its experts are sorted by expert (by counting, so that equals keep
   their order): ``order`` names the pairs, ``starts[e]`` says where those of expert ``e`` begin.
3. The product with gate and up of each expert, with its gate applied before anything is written.
4. The product with down, times the router's weight, written to the pair's own place.
5. The sum of each token's pairs, always in one order: nothing is added up in memory, so that a
   token's result does not depend on chance.

The products are cut into tiles of rows of one expert. How many tiles there are only the device
knows: as many programs are launched as there could be at most, each finds its tile in ``starts``,
and the rest ends at once. Weights may be int8 or e4m3 with scales (see ``gpu.fp8``), widened in
registers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.fp8 import takes, widened
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.matrix import Dense, Fp8, Int8, Matrix

#: Pairs that a program of the sort looks at together, few or many: each size is compiled, and a
#: request whose size is a new one waits for it.
_FEW_PAIRS, _MANY_PAIRS = 128, 1024
#: Columns that a program of the sum adds up.
_SUM_TILE = 1024


@triton.jit
def _route_kernel(
    logits: tl.tensor,  # [tokens, experts]
    weight: tl.tensor,  # [tokens, top_k] float32
    chosen: tl.tensor,  # [tokens, top_k] int32
    logits_row: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    NORMALISED: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TOP_K_PADDED: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    expert, slot = tl.arange(0, EXPERTS_PADDED), tl.arange(0, TOP_K_PADDED)
    score = tl.load(
        logits + token * logits_row + expert, mask=expert < EXPERTS, other=float("-inf")
    ).to(tl.float32)
    # A padded row may hold NaN; the experts that it is sent to must exist all the same.
    score = tl.where(score == score, score, float("-inf"))
    top = tl.max(score, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.exp(score - top), 0)
    likely = tl.zeros([TOP_K_PADDED], tl.float32)
    found = tl.zeros([TOP_K_PADDED], tl.int32)
    for k in tl.static_range(TOP_K):
        best = tl.argmax(score, 0)
        likely = tl.where(slot == k, tl.exp(tl.max(score, 0) - top), likely)
        found = tl.where(slot == k, best, found)
        score = tl.where(expert == best, float("-inf"), score)
    if NORMALISED:
        total = tl.sum(likely, 0)
    place = token * TOP_K + slot
    total = tl.where(total > 0.0, total, 1.0)  # of a padded row it may be 0
    tl.store(weight + place, likely / total, mask=slot < TOP_K)
    tl.store(chosen + place, found, mask=slot < TOP_K)


@triton.jit(do_not_specialize=["pairs"])
def _sort_kernel(
    chosen: tl.tensor,  # [pairs] int32
    order: tl.tensor,  # [pairs] int32
    starts: tl.tensor,  # [experts + 1] int32
    pairs: tl.tensor,
    EXPERTS: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    expert = tl.program_id(0)
    lane = tl.arange(0, TILE)
    start = 0  # of the pairs of this expert: behind all of lower ones
    for first in range(0, pairs, TILE):
        pair = first + lane
        wants = tl.load(chosen + pair, mask=pair < pairs, other=EXPERTS)
        start += tl.sum((wants < expert).to(tl.int32), 0)
    tl.store(starts + expert, start)
    if expert == EXPERTS - 1:
        tl.store(starts + EXPERTS, pairs)
    for first in range(0, pairs, TILE):
        pair = first + lane
        own = (tl.load(chosen + pair, mask=pair < pairs, other=EXPERTS) == expert).to(tl.int32)
        tl.store(order + start + tl.cumsum(own, 0) - 1, pair, mask=own == 1)
        start += tl.sum(own, 0)


@triton.jit
def _product_kernel(
    x: tl.tensor,  # [tokens, in] with GATED, else [pairs, in] in the order of the sort
    weight: tl.tensor,  # [experts, out, in]; with GATED [experts, 2 out, in]: gate, then up
    scale: tl.tensor,  # [experts, groups, rows of weight] float32
    starts: tl.tensor,  # [experts + 1] int32
    order: tl.tensor,  # [pairs] int32
    routed: tl.tensor,  # [pairs] float32: the router's weights
    out: tl.tensor,  # [pairs, out], with GATED in the order of the sort
    x_row: tl.tensor,
    EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    INTO: tl.constexpr,
    OUT: tl.constexpr,
    GATED: tl.constexpr,
    GROUPS: tl.constexpr,  # 0: no scales; 1: one a channel
    GROUP: tl.constexpr,
    EXPERTS_PADDED: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    TILE_OUT: tl.constexpr,  # rows of the weights
    TILE_IN: tl.constexpr,
    TALL: tl.constexpr,  # tiles of rows that share what they read of the weights
    PRECISION: tl.constexpr,
) -> None:
    # How many tiles each expert has, and which expert the tile of this program belongs to.
    each = tl.arange(0, EXPERTS_PADDED)
    first = tl.load(starts + each, mask=each < EXPERTS, other=0)
    behind = tl.load(starts + each + 1, mask=each < EXPERTS, other=0)
    tiles = tl.cdiv(behind - first, TILE_ROWS)  # [EXPERTS_PADDED]
    upto = tl.cumsum(tiles, 0)
    across = tl.cdiv(2 * OUT if GATED else OUT, TILE_OUT)
    band = tl.program_id(0) // (TALL * across)
    within = tl.program_id(0) % (TALL * across)
    height = tl.minimum(tl.sum(tiles, 0) - band * TALL, TALL)
    if within >= height * across:  # there is no such tile; true of all bands behind the last
        return
    tile = band * TALL + within % height
    expert = tl.sum((upto <= tile).to(tl.int32), 0)
    tile -= tl.sum(tl.where(each < expert, tiles, 0), 0)
    end = tl.load(starts + expert + 1)
    place = tl.load(starts + expert) + tile * TILE_ROWS + tl.arange(0, TILE_ROWS)
    held = place < end
    pair = tl.load(order + place, mask=held, other=0)

    row = place
    if GATED:
        row = pair // TOP_K
    # Channels of the output, and the rows of the weights that give them: with GATED half of the
    # tile is gate and half is up, so that one product gives both.
    WIDE: tl.constexpr = TILE_OUT // 2 if GATED else TILE_OUT
    ROWS: tl.constexpr = 2 * OUT if GATED else OUT
    lane, base = tl.arange(0, TILE_OUT), (within // height) * WIDE
    source = base + lane % WIDE
    is_source = source < OUT
    source += lane // WIDE * OUT
    column = tl.arange(0, TILE_IN)
    own = expert.to(tl.int64)  # with it the weights may be over 2^31 values
    x_tile = x + row.to(tl.int64)[:, None] * x_row + column[None, :]
    weight_tile = weight + (own * ROWS + source)[:, None] * INTO + column[None, :]
    scale_tile = scale + own * GROUPS * ROWS + source

    total = tl.zeros([TILE_ROWS, TILE_OUT], tl.float32)
    for start in range(0, INTO, TILE_IN):
        wanted_x, wanted = held[:, None], is_source[:, None]
        if INTO % TILE_IN != 0:
            wanted_x = wanted_x & (start + column < INTO)[None, :]
            wanted = wanted & (start + column < INTO)[None, :]
        a = tl.load(x_tile + start, mask=wanted_x, other=0.0)  # [TILE_ROWS, TILE_IN]
        b = tl.load(weight_tile + start, mask=wanted, other=0.0)  # [TILE_OUT, TILE_IN]
        if GROUPS > 0:
            b = widened(b, a)
        if GROUPS > 1:
            factor = tl.load(scale_tile + start // GROUP * ROWS, mask=is_source, other=0.0)
            part = tl.dot(a, tl.trans(b), input_precision=PRECISION)
            total += factor[None, :] * part
        else:
            total = tl.dot(a, tl.trans(b), total, input_precision=PRECISION)
    if GROUPS == 1:
        total *= tl.load(scale_tile, mask=is_source, other=0.0)[None, :]
    channel = base + tl.arange(0, WIDE)
    if GATED:
        pairs = tl.permute(tl.reshape(total, (TILE_ROWS, 2, WIDE)), (0, 2, 1))
        gate, up = tl.split(pairs)
        decay = tl.exp(-tl.abs(gate))  # which cannot overflow
        found = gate * tl.where(gate < 0.0, decay, 1.0) / (1.0 + decay) * up
        target = place
    else:
        found = total * tl.load(routed + pair, mask=held, other=0.0)[:, None]
        target = pair
    tl.store(
        out + target.to(tl.int64)[:, None] * OUT + channel[None, :],
        found.to(out.dtype.element_ty),
        mask=held[:, None] & (channel < OUT)[None, :],
    )


@triton.jit
def _sum_kernel(
    parts: tl.tensor,  # [tokens, top_k, width]
    out: tl.tensor,  # [tokens, width]
    WIDTH: tl.constexpr,
    TOP_K: tl.constexpr,
    TILE: tl.constexpr,
) -> None:
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < WIDTH
    total = tl.zeros([TILE], tl.float32)
    for k in tl.static_range(TOP_K):
        at = parts + (token * TOP_K + k) * WIDTH + column
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)


@dataclass(frozen=True, slots=True, eq=False)
class _Stacked:
    """One matrix of each expert."""

    weight: Tensor  # [experts, out, in]
    scale: Tensor | None  # of int8 and e4m3: [experts, groups, out] float32
    group: int  # columns that share a scale

    @property
    def groups(self) -> int:
        return 0 if self.scale is None else self.scale.shape[1]


class PackedExperts:
    """A layer's experts, each a gate and up and a down, stacked."""

    def __init__(self, gate_up: _Stacked, down: _Stacked) -> None:
        self._gate_up, self._down = gate_up, down
        self._experts, self._hidden, self._inner = down.weight.shape

    def __call__(self, x: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """See ``reference.experts``; ``weight`` and ``chosen`` are what ``route`` gives."""
        if x.shape[1] != self._hidden or x.stride(1) != 1:
            raise ValueError(f"{list(x.shape)}, but it takes contiguous [tokens, {self._hidden}]")
        tokens, top_k = chosen.shape
        out = torch.empty((tokens, self._hidden), dtype=x.dtype, device=x.device)
        if tokens == 0:
            return out
        order, starts = sort_pairs(chosen, self._experts)
        gated = torch.empty((tokens * top_k, self._inner), dtype=x.dtype, device=x.device)
        self._product(x, self._gate_up, starts, order, weight, gated, top_k)
        parts = torch.empty((tokens * top_k, self._hidden), dtype=x.dtype, device=x.device)
        self._product(gated, self._down, starts, order, weight, parts, top_k)
        tile = min(_SUM_TILE, triton.next_power_of_2(self._hidden))
        _sum_kernel[(tokens, triton.cdiv(self._hidden, tile))](
            parts, out, WIDTH=self._hidden, TOP_K=top_k, TILE=tile
        )
        return out

    def _product(
        self,
        x: Tensor,
        matrices: _Stacked,
        starts: Tensor,
        order: Tensor,
        routed: Tensor,
        out: Tensor,
        top_k: int,
    ) -> None:
        (pairs, width), rows = out.shape, matrices.weight.shape[1]
        chosen = choose(
            "moe_product",
            x.device,
            rows=triton.cdiv(pairs, self._experts),
            value_bytes=x.element_size(),
        )
        tile_rows, tile_in = chosen["tile_rows"], chosen["tile_in"]
        if matrices.groups > 1:
            tile_in = min(tile_in, matrices.group)
        # At most: each expert that was chosen has a last tile with one row in it.
        most = (pairs + min(self._experts, pairs) * (tile_rows - 1)) // tile_rows
        _product_kernel[(most * triton.cdiv(rows, chosen["tile_out"]),)](
            x,
            matrices.weight,
            routed if matrices.scale is None else matrices.scale,
            starts,
            order,
            routed,
            out,
            x.stride(0),
            EXPERTS=self._experts,
            TOP_K=top_k,
            INTO=matrices.weight.shape[2],
            OUT=width,
            GATED=matrices is self._gate_up,
            GROUPS=matrices.groups,
            GROUP=matrices.group,
            EXPERTS_PADDED=triton.next_power_of_2(self._experts),
            TILE_ROWS=tile_rows,
            TILE_OUT=chosen["tile_out"],
            TILE_IN=tile_in,
            TALL=chosen["tall"],
            # Full float32: the default rounds its factors to 10 bits of mantissa.
            PRECISION="ieee" if x.dtype == torch.float32 else "tf32",
            num_warps=chosen["warps"],
            num_stages=chosen["stages"],
        )


def route(logits: Tensor, top_k: int, *, normalised: bool) -> tuple[Tensor, Tensor]:
    """See ``reference.route``."""
    tokens, experts = logits.shape
    if logits.stride(1) != 1:
        raise ValueError("logits: rows must be contiguous")
    weight = torch.empty((tokens, top_k), dtype=torch.float32, device=logits.device)
    chosen = torch.empty((tokens, top_k), dtype=torch.int32, device=logits.device)
    if tokens:
        _route_kernel[(tokens,)](
            logits,
            weight,
            chosen,
            logits.stride(0),
            EXPERTS=experts,
            TOP_K=top_k,
            NORMALISED=normalised,
            EXPERTS_PADDED=triton.next_power_of_2(experts),
            TOP_K_PADDED=triton.next_power_of_2(top_k),
            num_warps=1,  # up to 8 experts a thread: its sums need no other warp
        )
    return weight, chosen


def sort_pairs(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """Pairs ``[tokens, top_k]`` by expert: ``order [pairs]``, and ``starts [experts + 1]``, int32.

    The pairs of expert ``e`` are ``order[starts[e] : starts[e + 1]]``, rising.
    """
    pairs = chosen.numel()
    order = torch.empty(pairs, dtype=torch.int32, device=chosen.device)
    starts = torch.empty(experts + 1, dtype=torch.int32, device=chosen.device)
    tile = _FEW_PAIRS if pairs <= _FEW_PAIRS else _MANY_PAIRS
    _sort_kernel[(experts,)](chosen, order, starts, pairs, EXPERTS=experts, TILE=tile)
    return order, starts


def pack_experts(
    gate_up: Sequence[Matrix], down: Sequence[Matrix], dtype: torch.dtype
) -> PackedExperts:
    """The matrices of each expert together, for tokens of this type.

    Kept as they are: plain values, int8 with a scale a channel, and e4m3 with the groups that
    ``gpu.fp8`` takes; others are widened to ``dtype``.
    """
    return PackedExperts(_stack(gate_up, dtype), _stack(down, dtype))


def _stack(parts: Sequence[Matrix], dtype: torch.dtype) -> _Stacked:
    into = parts[0].shape[1]
    int8 = [part for part in parts if isinstance(part, Int8)]
    if len(int8) == len(parts):
        scale = torch.stack([part.scale[None] for part in int8])
        return _Stacked(torch.stack([part.weight for part in int8]), scale, into)
    fp8 = [part for part in parts if isinstance(part, Fp8)]
    if len(fp8) == len(parts) and all(p.group == fp8[0].group and takes(p) for p in fp8):
        # Bytes, as torch stacks no e4m3 on every device.
        weight = torch.stack([part.weight.view(torch.uint8) for part in fp8])
        scale = torch.stack([part.scale.float().t() for part in fp8]).contiguous()
        return _Stacked(weight.view(torch.float8_e4m3fn), scale, fp8[0].group)
    plain = [p.weight if isinstance(p, Dense) else p.dequantize() for p in parts]
    return _Stacked(torch.stack([weight.to(dtype) for weight in plain]), None, into)
