"""Keys of a watermark from the tokens before a place, in Triton; see ``reference.watermark``.

One program a row, one lane a key: with ``SELF_HASH`` each lane hashes one token of the context,
else all hash the whole of it and the first is taken. A hash is 12 rounds of BLAKE2b for each block
of 32 tokens, a few microseconds, and rows are hashed side by side.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.adjustment import GREEN_LIST, MARKED_NOISE, NUM_PROMPT, SELF_HASH, WANTS
from forebay_kernels.reference.watermark import IV, SIGMA
from forebay_kernels.sampling import MOST_MARK_KEYS, SETTINGS, SamplingRows, Setting

_SETTINGS = tl.constexpr(SETTINGS)
_MARK_CONTEXT = tl.constexpr(int(Setting.MARK_CONTEXT))
#: Places at which a context is looked for at once.
_SEARCHED = tl.constexpr(256)
_BLOCK_TOKENS = tl.constexpr(32)


@triton.jit
def _turned(x: tl.tensor, BY: tl.constexpr) -> tl.tensor:
    return (x >> BY) | (x << (64 - BY))


@triton.jit
def _word(tokens: tl.tensor, end: tl.tensor, block: tl.tensor, order: tl.tensor) -> tl.tensor:
    """The word of a block that ``order`` points at: two tokens; 0 behind the end."""
    at = block * _BLOCK_TOKENS + 2 * tl.load(order)
    low = tl.load(tokens + at, mask=at < end, other=0).to(tl.uint64)
    return low | (tl.load(tokens + at + 1, mask=at + 1 < end, other=0).to(tl.uint64) << 32)


@triton.jit
def _mixed(
    a: tl.tensor,
    b: tl.tensor,
    c: tl.tensor,
    d: tl.tensor,
    tokens: tl.tensor,
    end: tl.tensor,
    block: tl.tensor,
    order: tl.tensor,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    a = a + b + _word(tokens, end, block, order)
    d = _turned(d ^ a, 32)
    c = c + d
    b = _turned(b ^ c, 24)
    a = a + b + _word(tokens, end, block, order + 1)
    d = _turned(d ^ a, 16)
    c = c + d
    b = _turned(b ^ c, 63)
    return a, b, c, d


@triton.jit
def _state_word(state: tl.tensor, at: tl.tensor, LANES: tl.constexpr) -> tl.tensor:
    low = tl.load(state + 2 * at).to(tl.uint32).to(tl.uint64)
    high = tl.load(state + 2 * at + 1).to(tl.uint32).to(tl.uint64)
    return tl.zeros([LANES], tl.uint64) + (low | (high << 32))


@triton.jit
def _hashed(
    tokens: tl.tensor,  # pointers [LANES]: where each lane's context begins
    end: tl.tensor,  # [LANES]: tokens of a context, the same everywhere and at least 1
    blocks: tl.tensor,
    state: tl.tensor,  # [8, 2] int32
    iv: tl.tensor,  # [8, 2] int32
    orders: tl.tensor,  # [12, 16] int32
    LANES: tl.constexpr,
) -> tl.tensor:
    """The first word of the hash: [LANES] uint64."""
    h0 = _state_word(state, 0, LANES)
    h1 = _state_word(state, 1, LANES)
    h2 = _state_word(state, 2, LANES)
    h3 = _state_word(state, 3, LANES)
    h4 = _state_word(state, 4, LANES)
    h5 = _state_word(state, 5, LANES)
    h6 = _state_word(state, 6, LANES)
    h7 = _state_word(state, 7, LANES)
    for block in range(0, blocks):
        taken = 128 + 4 * tl.minimum(end, (block + 1) * _BLOCK_TOKENS)
        last = tl.where(block == blocks - 1, -1, 0).to(tl.int64).to(tl.uint64)
        v0, v1, v2, v3, v4, v5, v6, v7 = h0, h1, h2, h3, h4, h5, h6, h7
        v8 = _state_word(iv, 0, LANES)
        v9 = _state_word(iv, 1, LANES)
        v10 = _state_word(iv, 2, LANES)
        v11 = _state_word(iv, 3, LANES)
        v12 = _state_word(iv, 4, LANES) ^ taken.to(tl.uint64)
        v13 = _state_word(iv, 5, LANES)
        v14 = _state_word(iv, 6, LANES) ^ last
        v15 = _state_word(iv, 7, LANES)
        for number in range(12):
            order = orders + 16 * number
            v0, v4, v8, v12 = _mixed(v0, v4, v8, v12, tokens, end, block, order)
            v1, v5, v9, v13 = _mixed(v1, v5, v9, v13, tokens, end, block, order + 2)
            v2, v6, v10, v14 = _mixed(v2, v6, v10, v14, tokens, end, block, order + 4)
            v3, v7, v11, v15 = _mixed(v3, v7, v11, v15, tokens, end, block, order + 6)
            v0, v5, v10, v15 = _mixed(v0, v5, v10, v15, tokens, end, block, order + 8)
            v1, v6, v11, v12 = _mixed(v1, v6, v11, v12, tokens, end, block, order + 10)
            v2, v7, v8, v13 = _mixed(v2, v7, v8, v13, tokens, end, block, order + 12)
            v3, v4, v9, v14 = _mixed(v3, v4, v9, v14, tokens, end, block, order + 14)
        h0, h1, h2, h3 = h0 ^ v0 ^ v8, h1 ^ v1 ^ v9, h2 ^ v2 ^ v10, h3 ^ v3 ^ v11
        h4, h5, h6, h7 = h4 ^ v4 ^ v12, h5 ^ v5 ^ v13, h6 ^ v6 ^ v14, h7 ^ v7 ^ v15
    return h0


@triton.jit
def _reversed(x: tl.tensor) -> tl.tensor:
    """Its 8 bytes in the other order."""
    x = ((x >> 8) & 0x00FF00FF00FF00FF) | ((x & 0x00FF00FF00FF00FF) << 8)
    x = ((x >> 16) & 0x0000FFFF0000FFFF) | ((x & 0x0000FFFF0000FFFF) << 16)
    return (x >> 32) | (x << 32)


@triton.jit
def _mark_kernel(
    requests: tl.tensor,  # [rows] int32
    positions: tl.tensor,  # [rows] int32
    settings: tl.tensor,  # [requests, SETTINGS] int32
    tokens: tl.tensor,  # [requests, longest] int32
    states: tl.tensor,  # [requests, 8, 2] int32
    iv: tl.tensor,  # [8, 2] int32
    orders: tl.tensor,  # [12, 16] int32
    keys: tl.tensor,  # [rows, LANES] int64
    counts: tl.tensor,  # [rows] int32
    tokens_row: tl.tensor,
    LANES: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    line = tl.load(requests + row)
    request = tl.maximum(line, 0).to(tl.int64)
    own = settings + request * _SETTINGS
    wants = tl.load(own + WANTS)
    if (line >= 0) & (wants & (GREEN_LIST | MARKED_NOISE) != 0):
        size = tl.load(own + _MARK_CONTEXT)
        start = tl.load(own + NUM_PROMPT)
        position = tl.load(positions + row)
        tokens += request * tokens_row
        count = tl.where(position - size >= start, 1, 0)
        if (count > 0) & (wants & MARKED_NOISE != 0):
            occurred = 0
            for first in range(start, position - size, _SEARCHED):
                at = first + tl.arange(0, _SEARCHED)
                same = at < position - size
                for number in range(0, size):
                    wanted = tl.load(tokens + position - size + number)
                    same = same & (tl.load(tokens + at + number, mask=same, other=-1) == wanted)
                occurred = tl.maximum(occurred, tl.max(same.to(tl.int32), 0))
            count = 1 - occurred
        if count > 0:
            lane = tl.arange(0, LANES)
            single = wants & SELF_HASH != 0
            count = tl.where(single, size, 1)
            first = tl.where(single & (lane < size), lane, 0)
            length = tl.where(single, 1, size)
            hashed = _hashed(
                tokens + position - size + first,
                tl.zeros([LANES], tl.int32) + length,
                tl.cdiv(length, _BLOCK_TOKENS),
                states + request * 16,
                iv,
                orders,
                LANES,
            )
            tl.store(
                keys + row.to(tl.int64) * LANES + lane,
                _reversed(hashed).to(tl.int64),
                mask=lane < count,
            )
        tl.store(counts + row, count)


@cache
def _constants(device: torch.device) -> tuple[Tensor, Tensor]:
    halves = [[word & 0xFFFFFFFF, word >> 32] for word in IV]
    return (
        torch.tensor(halves, dtype=torch.int64).to(torch.int32).to(device),
        torch.tensor(SIGMA, dtype=torch.int32).to(device),
    )


def mark_keys(rows: SamplingRows) -> None:
    """Write ``rows.mark_keys`` and ``mark_counts``; see ``reference.mark_keys``.

    The first call on a device copies constants to it, so it can't be one that is being captured.
    """
    table = rows.table
    if table.mark_states is None:
        raise ValueError("mark_states: a table without them has its keys made by the host")
    count = rows.requests.shape[0]
    if count == 0:
        return
    iv, orders = _constants(table.settings.device)
    _mark_kernel[(count,)](
        rows.requests,
        rows.positions,
        table.settings,
        table.tokens,
        table.mark_states,
        iv,
        orders,
        rows.mark_keys,
        rows.mark_counts,
        table.tokens.stride(0),
        LANES=MOST_MARK_KEYS,
        num_warps=2,
    )
