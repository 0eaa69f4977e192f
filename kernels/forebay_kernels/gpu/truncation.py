"""Limits of top-k, top-p and min-p without a sort, in Triton: one program a row that asks.

A row keeps the tokens whose z (adjusted logits over temperature) reaches its limit, the largest of

    top-k   the k-th largest z
    top-p   of those: the largest v with sum_{z >= v} exp(z) >= p * (sum of those all)
    min-p   max z + log(min_p)

so all that tie are kept. The first pass over the row keeps the largest z of each of ``TILE``
classes of tokens; so many classes reach the j-th largest of these that so many tokens do, too. With
j = k, or ``MOST`` where k is larger or not given, the second pass gathers the tokens that reach it:
few more than j, unless ties abound. Among them limits are found in registers, exactly, bit by bit
of an order-preserving integer: the largest v that so many, or so much mass, reaches. Where they
don't suffice (top-p of a flat distribution, a large k, ties) the same search goes over the whole
row, two bits a pass: 17 passes, and as many more if both top-k and top-p need it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.adjustment import (
    LOG_MIN_P,
    TEMPERATURE,
    TOP_K,
    TOP_P,
    TRUNCATION,
    WANTS,
    adjusted,
    capped,
    real,
)
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.sampling import MOST_MARK_KEYS, SETTINGS, SamplingRows

_SETTINGS = tl.constexpr(SETTINGS)
#: The order-preserving integer of minus infinity: what is banned lies there, or is no token.
_BANNED = tl.constexpr(0x007FFFFF)


@triton.jit
def _ordered(x: tl.tensor) -> tl.tensor:
    """float32 as uint32 in the same order, none of them 0."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) | -2147483648)).to(tl.uint32, bitcast=True)


@triton.jit
def _value(ordered: tl.tensor) -> tl.tensor:
    """The float32 of an ordered integer; of 0: minus infinity."""
    bits = ordered.to(tl.int32, bitcast=True)
    x = (bits ^ (~(bits >> 31) | -2147483648)).to(tl.float32, bitcast=True)
    return tl.where(ordered == 0, float("-inf"), x)


@triton.jit
def _reaching(
    ordered: tl.tensor, weights: tl.tensor, target: tl.tensor, BITS: tl.constexpr
) -> tl.tensor:
    """The largest v of ``BITS`` leading bits that so much weight reaches; 0: none."""
    found = tl.full([], 0, tl.uint32)
    for step in range(BITS):
        trial = found | (tl.full([], 1, tl.uint32) << (31 - step))
        enough = tl.sum(tl.where(ordered >= trial, weights, 0.0), 0) >= target
        found = tl.where(enough, trial, found)
    return found


@triton.jit
def _loaded(
    logits: tl.tensor, start: tl.tensor, VOCAB: tl.constexpr, TILE: tl.constexpr
) -> tl.tensor:
    """The row's logits ``start .. start + TILE``; minus infinity past the vocabulary's end."""
    ids = start + tl.arange(0, TILE)
    return tl.load(logits + ids, mask=ids < VOCAB, other=float("-inf"))


@triton.jit
def _reaching_in_row(
    by_mass: tl.tensor,
    target: tl.tensor,  # tokens, or a share of the mass
    least: tl.tensor,  # uint32: what lies below does not count
    top: tl.tensor,
    row: tl.tensor,
    request: tl.tensor,
    wants: tl.tensor,
    scale: tl.tensor,
    position: tl.tensor,
    mask_line: tl.tensor,
    logits: tl.tensor,
    settings: tl.tensor,
    edits: tl.tensor,
    tokens: tl.tensor,
    counts: tl.tensor,
    counted: tl.tensor,
    masks: tl.tensor,
    mark_keys: tl.tensor,
    mark_counts: tl.tensor,
    softcap: tl.tensor,
    tokens_row: tl.tensor,
    counts_row: tl.tensor,
    masks_row: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    MARK_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADJUSTS: tl.constexpr,
) -> tl.tensor:
    """As ``_reaching``, of the whole row, two bits a pass; a pass before them sums the mass."""
    lane = tl.arange(0, TILE)
    one = tl.full([], 1, tl.uint32)
    found = tl.full([], 0, tl.uint32)
    for step in range(17):
        unit = one << (32 - 2 * tl.maximum(step, 1)).to(tl.uint32)
        low = tl.zeros([TILE], tl.float32)
        middle = tl.zeros([TILE], tl.float32)
        high = tl.zeros([TILE], tl.float32)
        x_next = _loaded(logits, 0, VOCAB, TILE)
        for start in range(0, VOCAB, TILE):
            x = capped(x_next, start + lane < VOCAB, softcap, SOFTCAP)
            x_next = _loaded(logits, start + TILE, VOCAB, TILE)
            z = adjusted(
                x, start, row, request, wants, scale, position, mask_line,
                settings, edits, tokens, counts, counted, masks, mark_keys, mark_counts,
                tokens_row, counts_row, masks_row, VOCAB, TILE, WIDTH, MARK_KEYS, ADJUSTS,
            )  # fmt: skip
            ordered = _ordered(z)
            weight = tl.where(by_mass, tl.exp(z - top), 1.0)
            weight = tl.where(ordered >= least, weight, 0.0)
            low += tl.where((ordered >= found + unit) | (step == 0), weight, 0.0)
            middle += tl.where(ordered >= found + 2 * unit, weight, 0.0)
            high += tl.where(ordered >= found + 3 * unit, weight, 0.0)
        if step == 0:
            target = tl.where(by_mass, target * tl.sum(low, 0), target)
        else:
            found += tl.where(tl.sum(low, 0) >= target, unit, 0)
            found += tl.where(tl.sum(middle, 0) >= target, unit, 0)
            found += tl.where(tl.sum(high, 0) >= target, unit, 0)
    return found


@triton.jit
def _limit_kernel(
    logits: tl.tensor,  # [rows, vocab]
    requests: tl.tensor,  # [rows] int32
    positions: tl.tensor,  # [rows] int32
    mask_lines: tl.tensor,  # [rows] int32
    settings: tl.tensor,  # [requests, SETTINGS] int32
    edits: tl.tensor,  # [requests, 3, WIDTH] int32
    tokens: tl.tensor,  # [requests, longest] int32
    counts: tl.tensor,  # [requests, vocab] int32
    counted: tl.tensor,  # [requests] int32
    masks: tl.tensor,  # [lines, words] int32
    mark_keys: tl.tensor,  # [rows, MARK_KEYS] int64
    mark_counts: tl.tensor,  # [rows] int32
    gathered: tl.tensor,  # [rows, HELD] float32
    limits: tl.tensor,  # [rows] float32
    softcap: tl.tensor,
    logits_row: tl.tensor,
    tokens_row: tl.tensor,
    counts_row: tl.tensor,
    masks_row: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    MOST: tl.constexpr,  # tokens that are gathered on purpose
    HELD: tl.constexpr,  # room for those that come along
    WIDTH: tl.constexpr,
    MARK_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    ADJUSTS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    line = tl.load(requests + row)
    request = tl.maximum(line, 0).to(tl.int64)
    own = settings + request * _SETTINGS
    wants = tl.load(own + WANTS)
    if (line < 0) | (wants & TRUNCATION == 0):
        return
    scale = 1.0 / real(own + TEMPERATURE)
    top_k = tl.load(own + TOP_K)
    top_p = real(own + TOP_P)
    by_k = (top_k > 0) & (top_k < VOCAB)
    few = by_k & (top_k <= MOST)
    by_p = top_p < 1.0
    position = tl.load(positions + row)
    mask_line = tl.load(mask_lines + row)

    lane = tl.arange(0, TILE)
    logits += row.to(tl.int64) * logits_row
    tops = tl.full([TILE], float("-inf"), tl.float32)
    x_next = _loaded(logits, 0, VOCAB, TILE)
    for start in range(0, VOCAB, TILE):
        x = capped(x_next, start + lane < VOCAB, softcap, SOFTCAP)
        x_next = _loaded(logits, start + TILE, VOCAB, TILE)
        z = adjusted(
            x, start, row, request, wants, scale, position, mask_line,
            own, edits, tokens, counts, counted, masks, mark_keys, mark_counts,
            tokens_row, counts_row, masks_row, VOCAB, TILE, WIDTH, MARK_KEYS, ADJUSTS,
        )  # fmt: skip
        tops = tl.maximum(tops, z)
    top = tl.max(tops, 0)
    top = tl.where(top == float("-inf"), 0.0, top)  # all are banned: no limit is too low
    limit = top + real(own + LOG_MIN_P)

    if by_k | by_p:
        least = _reaching(_ordered(tops), 1.0, tl.where(few, top_k, MOST), 16)
        least = tl.maximum(least, _BANNED + 1)
        held = tl.full([], 0, tl.int32)
        total = tl.zeros([TILE], tl.float32)
        x_next = _loaded(logits, 0, VOCAB, TILE)
        for start in range(0, VOCAB, TILE):
            x = capped(x_next, start + lane < VOCAB, softcap, SOFTCAP)
            x_next = _loaded(logits, start + TILE, VOCAB, TILE)
            z = adjusted(
                x, start, row, request, wants, scale, position, mask_line,
                own, edits, tokens, counts, counted, masks, mark_keys, mark_counts,
                tokens_row, counts_row, masks_row, VOCAB, TILE, WIDTH, MARK_KEYS, ADJUSTS,
            )  # fmt: skip
            if by_p:
                total += tl.exp(z - top)
            hit = (_ordered(z) >= least).to(tl.int32)
            hits = tl.sum(hit, 0)
            if hits > 0:
                to = held + tl.cumsum(hit, 0) - hit
                tl.store(gathered + row * HELD + to, z, mask=(hit > 0) & (to < HELD))
                held += hits
        tl.debug_barrier()  # what one thread has gathered another reads
        slot = tl.arange(0, HELD)
        some = tl.load(gathered + row * HELD + slot, mask=slot < held, other=float("-inf"))
        ordered = _ordered(some)

        floor = tl.full([], 0, tl.uint32) + (_BANNED + 1)  # what lies below does not count
        for step in range(2):  # top-k, then top-p
            by_mass = step == 1
            if (by_p & by_mass) | (by_k & (step == 0)):
                weights = tl.where(by_mass, tl.exp(some - top), 1.0)
                weights = tl.where(ordered >= floor, weights, 0.0)
                weight = tl.sum(weights, 0)
                # The k likeliest are all among those gathered; of all tokens the sum is known.
                mass = top_p * tl.where(by_k, weight, tl.sum(total, 0))
                target = tl.where(by_mass, mass, top_k.to(tl.float32))
                known = few | (by_mass & (by_k == 0) & (weight >= target))
                if known & (held <= HELD):
                    found = _reaching(ordered, weights, target, 32)
                else:
                    found = _reaching_in_row(
                        by_mass, tl.where(by_mass, top_p, target), floor, top, row, request, wants,
                        scale, position, mask_line, logits, own, edits, tokens, counts, counted,
                        masks, mark_keys, mark_counts, softcap, tokens_row, counts_row, masks_row,
                        VOCAB, TILE, WIDTH, MARK_KEYS, SOFTCAP, ADJUSTS,
                    )  # fmt: skip
                limit = tl.maximum(limit, _value(found))
                floor = tl.maximum(floor, found)
    tl.store(limits + row, limit)


def limits_of(
    logits: Tensor, rows: SamplingRows, softcap: float | None, *, adjusts: bool
) -> Tensor:
    """What z must reach in each row that truncates; what is there for the others is not said.

    ``[rows] float32``. ``counts`` must hold the tokens before the guesses. ``adjusts``: some rows
    may ask for more than a temperature.
    """
    count, vocab = logits.shape
    table = rows.table
    chosen = choose("truncate", logits.device, vocab=vocab, adjusts=adjusts)
    tile = chosen["tile"]
    limits = torch.empty(count, dtype=torch.float32, device=logits.device)
    gathered = torch.empty((count, tile // 2), dtype=torch.float32, device=logits.device)
    _limit_kernel[(count,)](
        logits,
        rows.requests,
        rows.positions,
        rows.mask_lines,
        table.settings,
        table.edits,
        table.tokens,
        table.counts,
        table.counted,
        rows.masks,
        rows.mark_keys,
        rows.mark_counts,
        gathered,
        limits,
        softcap or 0.0,
        logits.stride(0),
        table.tokens.stride(0),
        table.counts.stride(0),
        rows.masks.stride(0),
        VOCAB=vocab,
        TILE=tile,
        MOST=tile // 4,
        HELD=tile // 2,
        WIDTH=table.edits.shape[2],
        MARK_KEYS=MOST_MARK_KEYS,
        SOFTCAP=softcap is not None,
        ADJUSTS=adjusts,
        num_warps=chosen["warps"],
    )
    return limits
