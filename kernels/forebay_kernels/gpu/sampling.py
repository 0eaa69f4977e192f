"""Draws tokens, in Triton: one pass over the logits, and a join.

    z = adjusted logits (see ``gpu.adjustment``), minus infinity below the row's limit
    token = argmax(z + noise(key, token))      greedy rows: argmax(z); of equals the first

Each program looks at a share of one row's vocabulary and leaves its best token; the second kernel
picks the best of a row. Where the model's own log-probabilities are asked for, the shares also
leave their largest logit ``m_i`` and ``s_i = sum exp(x - m_i)``: of these ``logsumexp`` is joined.

Noise is most of the arithmetic: a hash and two logarithms. A tile that can't beat what its program
has found already, by a bound on all noise or by a cheap one on each token's, is left without.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from forebay_kernels.gpu.adjustment import (
    LOGPROB,
    MARKED_NOISE,
    NUM_PROMPT,
    PENALTIES,
    SEED_HIGH,
    SEED_LOW,
    TEMPERATURE,
    TRUNCATION,
    WANTS,
    adjusted,
    capped,
    real,
)
from forebay_kernels.gpu.noise import MOST_NOISE, gumbel, most_gumbel, position_key, token_bits
from forebay_kernels.gpu.truncation import limits_of
from forebay_kernels.gpu.tuning import choose
from forebay_kernels.sampling import (
    ANYTHING,
    MOST_MARK_KEYS,
    NO_TOKEN,
    SETTINGS,
    Drawn,
    SamplingRows,
    Wants,
)

_SETTINGS = tl.constexpr(SETTINGS)
_NO_TOKEN = tl.constexpr(NO_TOKEN)
#: Tokens that are counted at once.
_COUNT_TILE = 1024


@triton.jit
def _count_kernel(
    requests: tl.tensor,  # [rows] int32
    positions: tl.tensor,  # [rows] int32
    guessed: tl.tensor,  # [rows] int32
    settings: tl.tensor,  # [requests, SETTINGS] int32
    tokens: tl.tensor,  # [requests, longest] int32
    counts: tl.tensor,  # [requests, vocab] int32
    counted: tl.tensor,  # [requests] int32
    tokens_row: tl.tensor,
    counts_row: tl.tensor,
    TILE: tl.constexpr,
) -> None:
    """Take into ``counts`` what is known of the row's request, which its first row does for all."""
    row = tl.program_id(0)
    line = tl.load(requests + row)
    request = tl.maximum(line, 0).to(tl.int64)
    wants = tl.load(settings + request * _SETTINGS + WANTS)
    if (line >= 0) & (wants & PENALTIES != 0) & (tl.load(guessed + row) == 0):
        end = tl.load(positions + row)
        begin = tl.load(counted + request)
        num_prompt = tl.load(settings + request * _SETTINGS + NUM_PROMPT)
        for start in range(begin, end, TILE):
            at = start + tl.arange(0, TILE)
            token = tl.load(tokens + request * tokens_row + at, mask=at < end, other=0)
            seen = counts + request * counts_row + token
            tl.atomic_or(seen, 1, mask=(at < end) & (at < num_prompt))
            tl.atomic_add(seen, 2, mask=(at < end) & (at >= num_prompt))
        tl.debug_barrier()  # all threads have read ``counted``
        tl.store(counted + request, end)


@triton.jit
def _noised(
    z: tl.tensor, top: tl.tensor, best: tl.tensor, ids: tl.tensor, key: tl.tensor
) -> tuple[tl.tensor, tl.tensor]:
    """z with noise, and the largest of it; or as they are where none can beat the best so far."""
    if top + MOST_NOISE > best:
        bits = token_bits(ids, key, key >> 32)
        if tl.max(z + most_gumbel(bits), 0) > best:
            z += gumbel(bits)
            top = tl.max(z, 0)
    return z, top


@triton.jit
def _draw_kernel(
    logits: tl.tensor,  # [rows, vocab]
    requests: tl.tensor,  # [rows] int32
    positions: tl.tensor,  # [rows] int32
    mask_lines: tl.tensor,  # [rows] int32
    limits: tl.tensor,  # [rows] float32: of rows that truncate
    settings: tl.tensor,  # [requests, SETTINGS] int32
    edits: tl.tensor,  # [requests, 3, WIDTH] int32
    tokens: tl.tensor,  # [requests, longest] int32
    counts: tl.tensor,  # [requests, vocab] int32
    counted: tl.tensor,  # [requests] int32
    masks: tl.tensor,  # [lines, words] int32
    mark_keys: tl.tensor,  # [rows, MARK_KEYS] int64
    mark_counts: tl.tensor,  # [rows] int32
    values: tl.tensor,  # [rows, shares] float32: the largest sum; infinity: a logit is NaN
    found: tl.tensor,  # [rows, shares] int32: whose it is
    highest: tl.tensor,  # [rows, shares] float32: m_i
    total: tl.tensor,  # [rows, shares] float32: s_i
    softcap: tl.tensor,
    logits_row: tl.tensor,
    tokens_row: tl.tensor,
    counts_row: tl.tensor,
    masks_row: tl.tensor,
    size: tl.tensor,  # tokens of a share: a multiple of TILE
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    MARK_KEYS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGPROBS: tl.constexpr,
    ADJUSTS: tl.constexpr,
    TRUNCATES: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    share = tl.program_id(1)
    line = tl.load(requests + row)
    request = tl.maximum(line, 0).to(tl.int64)
    own = settings + request * _SETTINGS
    wants = tl.load(own + WANTS)
    temperature = real(own + TEMPERATURE)
    draws = temperature > 0.0
    scale = 1.0 / tl.where(draws, temperature, 1.0)
    position = tl.load(positions + row)
    mask_line = tl.load(mask_lines + row)
    seed = (tl.load(own + SEED_HIGH).to(tl.int64) << 32) | tl.load(own + SEED_LOW).to(tl.uint32)
    key = position_key(seed, position)
    if wants & MARKED_NOISE != 0:
        mark = tl.load(mark_keys + row.to(tl.int64) * MARK_KEYS).to(tl.uint64)
        key = tl.where(tl.load(mark_counts + row) > 0, mark, key)

    lane = tl.arange(0, TILE)
    begin = share * size
    end = tl.where(line >= 0, tl.minimum(begin + size, VOCAB), begin)  # padding: nothing
    best = tl.full([], float("-inf"), tl.float32)
    token = tl.full([], 0, tl.int32)
    m = tl.full([TILE], float("-inf"), tl.float32)
    s = tl.zeros([TILE], tl.float32)
    logits += row.to(tl.int64) * logits_row
    x_next = tl.load(logits + begin + lane, mask=begin + lane < end, other=float("-inf"))
    for start in range(begin, end, TILE):
        ids = start + lane
        x = capped(x_next, ids < end, softcap, SOFTCAP)
        # The next tile is on its way while this one is worked on.
        x_next = tl.load(logits + ids + TILE, mask=ids + TILE < end, other=float("-inf"))
        if LOGPROBS:  # noqa: SIM102 - one is known when this is compiled
            if wants & LOGPROB != 0:
                m_next = tl.maximum(m, x)
                finite = tl.where(m_next == float("-inf"), 0.0, m_next)
                s = s * tl.exp(m - finite) + tl.exp(x - finite)
                m = m_next
        z = adjusted(
            x, start, row, request, wants, scale, position, mask_line,
            own, edits, tokens, counts, counted, masks, mark_keys, mark_counts,
            tokens_row, counts_row, masks_row, VOCAB, TILE, WIDTH, MARK_KEYS, ADJUSTS,
        )  # fmt: skip
        if TRUNCATES:  # noqa: SIM102 - one is known when this is compiled
            if wants & TRUNCATION != 0:
                # Kept if not below: so a NaN is.
                z = tl.where(z < tl.load(limits + row), float("-inf"), z)
        z = tl.where(z != z, float("inf"), z)
        top = tl.max(z, 0)
        if draws:
            z, top = _noised(z, top, best, ids, key)
        if top > best:
            best = top
            token = tl.min(tl.where(z == top, ids, VOCAB), 0)

    place = row * tl.num_programs(1) + share
    tl.store(values + place, best)
    tl.store(found + place, token)
    if LOGPROBS:
        most = tl.max(m, 0)
        shrink = tl.exp(m - tl.where(most == float("-inf"), 0.0, most))
        tl.store(highest + place, most)
        tl.store(total + place, tl.sum(s * shrink, 0))


@triton.jit(do_not_specialize=["shares"])  # else some numbers of rows wait for a compiler
def _join_kernel(
    logits: tl.tensor,  # [rows, vocab]
    requests: tl.tensor,  # [rows] int32
    settings: tl.tensor,  # [requests, SETTINGS] int32
    values: tl.tensor,  # [rows, shares] float32
    found: tl.tensor,  # [rows, shares] int32
    highest: tl.tensor,  # [rows, shares] float32
    total: tl.tensor,  # [rows, shares] float32
    drawn: tl.tensor,  # [rows] int64
    logprobs: tl.tensor,  # [rows] float32
    totals: tl.tensor,  # [rows] float32
    softcap: tl.tensor,
    logits_row: tl.tensor,
    shares: tl.tensor,
    VOCAB: tl.constexpr,
    SHARES_PADDED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    LOGPROBS: tl.constexpr,
) -> None:
    row = tl.program_id(0)
    share = tl.arange(0, SHARES_PADDED)
    place = row * shares + share
    value = tl.load(values + place, mask=share < shares, other=float("-inf"))
    top = tl.max(value, 0)
    own = tl.load(found + place, mask=share < shares, other=VOCAB)
    token = tl.min(tl.where(value == top, own, VOCAB), 0)
    token = tl.where(tl.abs(top) == float("inf"), _NO_TOKEN, token)
    tl.store(drawn + row, token.to(tl.int64))
    if LOGPROBS:
        line = tl.load(requests + row)
        wants = tl.load(settings + tl.maximum(line, 0).to(tl.int64) * _SETTINGS + WANTS)
        m = tl.load(highest + place, mask=share < shares, other=float("-inf"))
        s = tl.load(total + place, mask=share < shares, other=0.0)
        told = (wants & LOGPROB != 0) & (token >= 0)
        most = tl.where(told, tl.max(m, 0), 0.0)
        whole = most + tl.log(tl.sum(tl.where(told, s * tl.exp(m - most), 1.0), 0))
        x = tl.load(logits + row.to(tl.int64) * logits_row + tl.maximum(token, 0))
        x = capped(x, told, softcap, SOFTCAP)
        tl.store(logprobs + row, tl.where(told, x - whole, float("nan")))
        tl.store(totals + row, tl.where(told, whole, float("nan")))


def sample(
    logits: Tensor,  # [rows, vocab]
    rows: SamplingRows,
    asked: Wants = ANYTHING,
    *,
    softcap: float | None = None,
) -> Drawn:
    """A token for each row; see ``reference.sample``.

    Nothing here waits for the device, and launches depend on shapes and on ``asked`` alone: what is
    not in it is not looked for, so two launches do for rows that ask for a temperature at most, one
    more counts tokens for penalties, and one finds limits.
    """
    count, vocab = logits.shape
    _check(logits, rows)
    device, table = logits.device, rows.table
    chosen = choose("sample", device, rows=count, vocab=vocab)
    size = chosen["tile"] * chosen["tiles"]
    shares = triton.cdiv(vocab, size)
    drawn = torch.empty(count, dtype=torch.int64, device=device)
    values, highest, total = torch.empty((3, count, shares), dtype=torch.float32, device=device)
    found = torch.empty((count, shares), dtype=torch.int32, device=device)
    told = torch.empty((2, count), dtype=torch.float32, device=device)
    if count == 0:
        return Drawn(tokens=drawn, logprobs=told[0], totals=told[1])
    adjusts = bool(asked & ~(Wants.TRUNCATION | Wants.MARKED_NOISE | Wants.LOGPROB))
    logprobs = Wants.LOGPROB in asked
    limits = values  # not read
    if Wants.PENALTIES in asked:
        _count_kernel[(count,)](
            rows.requests,
            rows.positions,
            rows.guessed,
            table.settings,
            table.tokens,
            table.counts,
            table.counted,
            table.tokens.stride(0),
            table.counts.stride(0),
            TILE=_COUNT_TILE,
        )
    if Wants.TRUNCATION in asked:
        limits = limits_of(logits, rows, softcap, adjusts=adjusts)
    _draw_kernel[(count, shares)](
        logits,
        rows.requests,
        rows.positions,
        rows.mask_lines,
        limits,
        table.settings,
        table.edits,
        table.tokens,
        table.counts,
        table.counted,
        rows.masks,
        rows.mark_keys,
        rows.mark_counts,
        values,
        found,
        highest,
        total,
        softcap or 0.0,
        logits.stride(0),
        table.tokens.stride(0),
        table.counts.stride(0),
        rows.masks.stride(0),
        size,
        VOCAB=vocab,
        TILE=chosen["tile"],
        WIDTH=table.edits.shape[2],
        MARK_KEYS=MOST_MARK_KEYS,
        SOFTCAP=softcap is not None,
        LOGPROBS=logprobs,
        ADJUSTS=adjusts,
        TRUNCATES=Wants.TRUNCATION in asked,
        num_warps=chosen["warps"],
    )
    _join_kernel[(count,)](
        logits,
        rows.requests,
        table.settings,
        values,
        found,
        highest,
        total,
        drawn,
        told[0],
        told[1],
        softcap or 0.0,
        logits.stride(0),
        shares,
        VOCAB=vocab,
        SHARES_PADDED=triton.next_power_of_2(
            triton.cdiv(vocab, chosen["tile"])
        ),  # one for all rows
        SOFTCAP=softcap is not None,
        LOGPROBS=logprobs,
        num_warps=1,
    )
    return Drawn(
        tokens=drawn,
        logprobs=told[0] if logprobs else None,
        totals=told[1] if logprobs else None,
    )


def _check(logits: Tensor, rows: SamplingRows) -> None:
    count, vocab = logits.shape
    if logits.stride(-1) != 1:
        raise ValueError("logits: the vocabulary must be contiguous")
    if rows.requests.shape[0] != count:
        raise ValueError(f"logits have {count} rows, requests {rows.requests.shape[0]}")
    if rows.table.counts.shape[1] != vocab:
        raise ValueError(f"counts are of {rows.table.counts.shape[1]} tokens, logits of {vocab}")
    if rows.masks.shape[1] < triton.cdiv(vocab, 32):
        raise ValueError(f"masks: {rows.masks.shape[1]} words are too few for {vocab} tokens")
