"""What a draw looks at: logits after mask, edits, penalties, green list and temperature, in Triton.

In this order, as the reference: ``softcap * tanh(x / softcap)``, what the mask allows, edits (bias
and bans), repetition, presence and frequency penalty, ``+ delta`` for green tokens, ``/
temperature``. Each is made for those rows only that ask for it; a row that asks for nothing pays
the load of one word. The kernels that find limits and the one that draws share these functions, so
both see the same numbers to the last bit.
"""

from __future__ import annotations

import triton
import triton.language as tl

from forebay_kernels.gpu.noise import token_bits
from forebay_kernels.sampling import Setting, Wants

EDITS = tl.constexpr(int(Wants.EDITS))
PENALTIES = tl.constexpr(int(Wants.PENALTIES))
TRUNCATION = tl.constexpr(int(Wants.TRUNCATION))
GREEN_LIST = tl.constexpr(int(Wants.GREEN_LIST))
SELF_HASH = tl.constexpr(int(Wants.SELF_HASH))
MARKED_NOISE = tl.constexpr(int(Wants.MARKED_NOISE))
LOGPROB = tl.constexpr(int(Wants.LOGPROB))

WANTS = tl.constexpr(int(Setting.WANTS))
TEMPERATURE = tl.constexpr(int(Setting.TEMPERATURE))
SEED_LOW = tl.constexpr(int(Setting.SEED_LOW))
SEED_HIGH = tl.constexpr(int(Setting.SEED_HIGH))
TOP_K = tl.constexpr(int(Setting.TOP_K))
TOP_P = tl.constexpr(int(Setting.TOP_P))
LOG_MIN_P = tl.constexpr(int(Setting.LOG_MIN_P))
REPETITION = tl.constexpr(int(Setting.REPETITION))
PRESENCE = tl.constexpr(int(Setting.PRESENCE))
FREQUENCY = tl.constexpr(int(Setting.FREQUENCY))
NUM_PROMPT = tl.constexpr(int(Setting.NUM_PROMPT))
MARK_DELTA = tl.constexpr(int(Setting.MARK_DELTA))
MARK_THRESHOLD = tl.constexpr(int(Setting.MARK_THRESHOLD))
MARK_KEY_LOW = tl.constexpr(int(Setting.MARK_KEY_LOW))
MARK_KEY_HIGH = tl.constexpr(int(Setting.MARK_KEY_HIGH))

_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def real(setting: tl.tensor) -> tl.tensor:
    """The float32 in a column of settings."""
    return tl.load(setting).to(tl.float32, bitcast=True)


@triton.jit
def capped(x: tl.tensor, held: tl.tensor, softcap: tl.tensor, SOFTCAP: tl.constexpr) -> tl.tensor:
    """``softcap * tanh(x / softcap)``, or ``x`` as it is: float32; minus infinity if not held."""
    x = x.to(tl.float32)
    if SOFTCAP:
        # tanh from exp(-2 |x|), which cannot overflow.
        decay = tl.exp2(tl.abs(x / softcap) * (-2.0 * _LOG2_E))
        x = tl.where(x < 0.0, -softcap, softcap) * (1.0 - decay) / (1.0 + decay)
        x = tl.where(held, x, float("-inf"))
    return x


@triton.jit
def adjusted(
    x: tl.tensor,  # [TILE] float32: of the tokens ``start .. start + TILE``
    start: tl.tensor,
    row: tl.tensor,
    request: tl.tensor,  # int64
    wants: tl.tensor,
    scale: tl.tensor,  # 1 / temperature
    position: tl.tensor,
    mask_line: tl.tensor,
    settings: tl.tensor,  # of the request: [SETTINGS] int32
    edits: tl.tensor,  # [requests, 3, WIDTH] int32
    tokens: tl.tensor,  # [requests, longest] int32
    counts: tl.tensor,  # [requests, vocab] int32
    counted: tl.tensor,  # [requests] int32
    masks: tl.tensor,  # [lines, words] int32
    mark_keys: tl.tensor,  # [rows, MARK_KEYS] int64
    mark_counts: tl.tensor,  # [rows] int32
    tokens_row: tl.tensor,
    counts_row: tl.tensor,
    masks_row: tl.tensor,
    VOCAB: tl.constexpr,
    TILE: tl.constexpr,
    WIDTH: tl.constexpr,
    MARK_KEYS: tl.constexpr,
    ADJUSTS: tl.constexpr,  # some row asks for more than a temperature
) -> tl.tensor:
    if not ADJUSTS:
        return x * scale
    ids = start + tl.arange(0, TILE)
    if mask_line >= 0:
        word = tl.load(
            masks + mask_line.to(tl.int64) * masks_row + ids // 32, mask=ids < VOCAB, other=0
        )
        x = tl.where((word >> (ids % 32)) & 1 != 0, x, float("-inf"))
    if wants & EDITS != 0:
        edit = edits + request * 3 * WIDTH
        edited = tl.load(edit + tl.arange(0, WIDTH))  # rising: those of this tile are neighbours
        first = tl.sum((edited < start).to(tl.int32), 0)
        end = tl.sum((edited < start + TILE).to(tl.int32), 0)
        for at in range(first, end):
            made = (ids == tl.load(edit + at)) & (position < tl.load(edit + 2 * WIDTH + at))
            x += tl.where(made, real(edit + WIDTH + at), 0.0)
    if wants & PENALTIES != 0:
        seen = tl.load(counts + request * counts_row + ids, mask=ids < VOCAB, other=0)
        for at in range(tl.load(counted + request), position):  # guesses
            seen += tl.where(ids == tl.load(tokens + request * tokens_row + at), 2, 0)
        strength = real(settings + REPETITION)
        x = tl.where(seen != 0, tl.where(x > 0.0, x / strength, x * strength), x)
        times = seen >> 1
        x -= tl.where(times > 0, real(settings + PRESENCE), 0.0)
        x -= times.to(tl.float32) * real(settings + FREQUENCY)
    if wants & GREEN_LIST != 0:
        keys = tl.load(mark_counts + row)
        least = tl.full([TILE], 0x7FFFFFFF, tl.uint32)
        for at in range(0, keys):
            key = tl.load(mark_keys + row.to(tl.int64) * MARK_KEYS + at)
            least = tl.minimum(least, token_bits(ids, key, key >> 32))
        if wants & SELF_HASH != 0:
            least = token_bits(
                least, tl.load(settings + MARK_KEY_LOW), tl.load(settings + MARK_KEY_HIGH)
            )
        green = (keys > 0) & (least < tl.load(settings + MARK_THRESHOLD).to(tl.uint32))
        x += tl.where(green, real(settings + MARK_DELTA), 0.0)
    return x * scale
