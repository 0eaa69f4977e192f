"""Draws, in plain PyTorch, one row after another."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from forebay_kernels.reference.layers import wide
from forebay_kernels.sampling import (
    ANYTHING,
    NO_EDIT,
    NO_TOKEN,
    Drawn,
    SamplingRows,
    Setting,
    Wants,
)

_WORD = (1 << 32) - 1
_LONG = (1 << 64) - 1


def sample(
    logits: Tensor,  # [rows, vocab]
    rows: SamplingRows,
    asked: Wants = ANYTHING,
    *,
    softcap: float | None = None,
) -> Drawn:
    """``argmax(z + noise(key, token))`` over the tokens that are kept; greedy: ``argmax(z)``.

    ``z`` is :func:`adjusted`; kept are those that reach :func:`limit`. With Gumbel noise this is a
    draw from the softmax (Maddison et al. 2014, https://arxiv.org/abs/1411.0030). The noise is
    ``-log(-log(1 - u))`` with ``u = (bits + 1/2) / 2^31`` of :func:`token_bits` under
    :func:`position_key`, or the place's mark key; so a token's draw depends on nothing else. Of
    equal sums the lowest token is drawn; ``NO_TOKEN`` where z is minus infinity everywhere, or NaN
    or infinity anywhere. A mask takes the NaN of a banned token away; an edit does not.

    ``asked`` is what the rows ask for together, masks included: nothing else need be looked for.
    Log-probabilities are those of ``softcap * tanh(logits / softcap)``, before all else is done.
    """
    whole = wide(logits)
    if softcap is not None:
        whole = softcap * torch.tanh(whole / softcap)
    tokens = torch.full((len(whole),), NO_TOKEN, dtype=torch.int64, device=logits.device)
    told = torch.full((2, len(whole)), math.nan, dtype=torch.float32, device=logits.device)
    for row, request in enumerate(rows.requests.tolist()):
        if request < 0:
            continue
        tokens[row] = _draw(adjusted(whole[row], rows, row), rows, row)
        wants = Wants(int(rows.table.settings[request, Setting.WANTS]))
        if Wants.LOGPROB in wants and tokens[row] >= 0:
            total = whole[row].logsumexp(-1)
            told[:, row] = torch.stack((whole[row, tokens[row]] - total, total))
    if Wants.LOGPROB not in asked:
        return Drawn(tokens=tokens)
    return Drawn(tokens=tokens, logprobs=told[0], totals=told[1])


def adjusted(x: Tensor, rows: SamplingRows, row: int) -> Tensor:
    """A row's logits after mask, edits, penalties, green list and temperature: ``[vocab]``."""
    table, request = rows.table, int(rows.requests[row])
    position, ids = int(rows.positions[row]), torch.arange(len(x), device=x.device)
    reals = table.settings[request].view(torch.float32).tolist()
    wants = Wants(int(table.settings[request, Setting.WANTS]))
    line = int(rows.mask_lines[row])
    if line >= 0:
        x = x.masked_fill((rows.masks[line][ids // 32] >> (ids % 32)) & 1 == 0, -math.inf)
    if Wants.EDITS in wants:
        edited, values, until = table.edits[request]
        made = (edited != NO_EDIT) & (position < until)
        x = x.index_add(0, edited[made], values.view(torch.float32)[made].to(x.dtype))
    if Wants.PENALTIES in wants:
        tokens = table.tokens[request, :position].long()
        answer = tokens[int(table.settings[request, Setting.NUM_PROMPT]) :]
        strength = reals[Setting.REPETITION]
        seen, times = (
            torch.bincount(tokens, minlength=len(x)),
            torch.bincount(answer, minlength=len(x)),
        )
        x = torch.where(seen > 0, torch.where(x > 0, x / strength, x * strength), x)
        x = x - (times > 0) * reals[Setting.PRESENCE] - times * reals[Setting.FREQUENCY]
    keys = rows.mark_keys[row, : int(rows.mark_counts[row])].tolist()
    if Wants.GREEN_LIST in wants and keys:
        least = torch.stack([token_bits(key, ids) for key in keys]).amin(0)
        if Wants.SELF_HASH in wants:
            low, high = table.settings[request, Setting.MARK_KEY_LOW :][:2].tolist()
            least = token_bits((high << 32) | (low & _WORD), least)
        threshold = int(table.settings[request, Setting.MARK_THRESHOLD]) & _WORD
        x = x + (least < threshold) * reals[Setting.MARK_DELTA]
    return x / (reals[Setting.TEMPERATURE] or 1.0)


def limit(z: Tensor, top_k: int, top_p: float, log_min_p: float) -> float:
    """What ``z`` must reach to be kept, the largest of three limits; tokens that tie are all kept.

    Top-k's is the k-th largest. Top-p's is reached by the fewest likeliest of those whose
    probabilities, among those, add up to ``top_p``. Min-p's is the largest less ``-log_min_p``.
    """
    falling = z.sort(descending=True).values
    found = float(falling[0]) + log_min_p
    if 0 < top_k < len(z):
        found = max(found, float(falling[top_k - 1]))
        falling = falling[falling >= falling[top_k - 1]]
    if top_p < 1.0:
        reached = falling.double().softmax(-1).cumsum(-1)
        needed = int((reached < top_p).sum())
        found = max(found, float(falling[min(needed, len(falling) - 1)]))
    return found


def _draw(z: Tensor, rows: SamplingRows, row: int) -> int:
    if not float(z.max()) > -math.inf or float(z.max()) == math.inf:
        return NO_TOKEN
    setting = rows.table.settings[int(rows.requests[row])]
    reals, wholes = setting.view(torch.float32).tolist(), setting.tolist()
    if reals[Setting.TEMPERATURE] == 0:
        return int(z.argmax())
    wants = Wants(wholes[Setting.WANTS])
    if Wants.TRUNCATION in wants:
        least = limit(z, wholes[Setting.TOP_K], reals[Setting.TOP_P], reals[Setting.LOG_MIN_P])
        z = z.masked_fill(z < least, -math.inf)
    key = position_key(
        wholes[Setting.SEED_HIGH] << 32 | wholes[Setting.SEED_LOW] & _WORD,
        int(rows.positions[row]),
    )
    if Wants.MARKED_NOISE in wants and int(rows.mark_counts[row]) > 0:
        key = int(rows.mark_keys[row, 0])
    bits = token_bits(key, torch.arange(len(z), device=z.device))
    # In float32 first, as bits lose their last in it anyhow: 1 - u must not become 0.
    u = ((bits.float() + 0.5) * 2.0**-31).clamp(max=1.0 - 2.0**-24).to(z.dtype)
    return int((z - torch.log(-torch.log1p(-u))).argmax())


def position_key(seed: int, position: int) -> int:
    """``mix(mix(seed) xor position)`` with SplitMix64's finaliser: 64 bits.

    Steele et al. 2014, https://doi.org/10.1145/2714064.2660195.
    """
    return _mix(_mix(seed & _LONG) ^ position)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _LONG
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _LONG
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _LONG
    return z ^ (z >> 31)


def token_bits(key: int, ids: Tensor) -> Tensor:
    """31 bits of each token id, by three multiply-and-shift rounds on 32 bits: int64."""
    x = ids.long() ^ (key & _WORD)
    x = ((x ^ x >> 17) * 0xED5AD4BB + (key >> 32 & _WORD)) & _WORD
    x = (x ^ x >> 11) * 0xAC4C1B51 & _WORD
    x = (x ^ x >> 15) * 0x31848BAB & _WORD
    return (x ^ x >> 14) & (_WORD >> 1)
