"""What changes logits before a draw, and what picks tokens by them. All on one place's ``[vocab]``.

Written for vocabularies of 262144 on a CPU, where a full sort takes 28 ms, torch's ``topk`` of 50
takes 0.9 and its ``nonzero`` 1.6, while numpy finds the positions in 0.1 to 0.3.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Items

import numpy as np
import torch
from torch import Tensor

from forebay_engine.noise import token_bits
from forebay_engine.sequence import SamplingParams
from forebay_engine.watermark import Watermark, key_of

#: Share of the whole down to which tokens are sorted for top-p, before all are.
_SHARES = (1e-3, 1e-5)
#: Tokens of which only the likeliest is looked at first.
_BLOCK = 256


def bias(logits: Tensor, biases: dict[int, float]) -> None:
    """Add to the logits of some tokens, in place."""
    ids = torch.tensor(list(biases), device=logits.device)
    logits[ids] += torch.tensor(list(biases.values()), device=logits.device)


def allow_only(logits: Tensor, token_ids: Items[int]) -> None:
    """Ban all other tokens, in place."""
    banned = torch.ones_like(logits, dtype=torch.bool)
    banned[as_tensor(token_ids, logits.device)] = False
    logits.masked_fill_(banned, -math.inf)


def last_tokens(words: Iterable[Items[int]], token_ids: Items[int]) -> list[int]:
    """The last tokens of those words whose other tokens stand at the end of ``token_ids``."""
    return [
        word[-1]
        for word in words
        if len(word) == 1 or tuple(token_ids[-(len(word) - 1) :]) == tuple(word[:-1])
    ]


def penalise(
    logits: Tensor, token_ids: Items[int], num_prompt: int, params: SamplingParams
) -> None:
    """Apply the penalties to ``logits`` in place.

    Repetition (Keskar et al. 2019, https://arxiv.org/abs/1909.05858) looks at prompt and answer,
    the other two, which are OpenAI's, at the answer only.
    """
    # Writing the same value twice is harmless, so nobody needs to look for doubled tokens.
    tokens = as_tensor(token_ids, logits.device)
    if params.repetition_penalty != 1.0:
        found = logits[tokens]
        strength = params.repetition_penalty
        logits[tokens] = torch.where(found > 0, found / strength, found * strength)
    answer = tokens[num_prompt:]
    if params.presence_penalty != 0.0:
        logits[answer] = logits[answer] - params.presence_penalty
    if params.frequency_penalty != 0.0:
        each = torch.full(answer.shape, -params.frequency_penalty, device=logits.device)
        logits.index_add_(0, answer, each)


def raise_green(logits: Tensor, mark: Watermark, keys: Items[int]) -> None:
    """Add ``delta`` to the tokens that are green under the keys of their context, in place."""
    ids = torch.arange(len(logits), dtype=torch.int32, device=logits.device)
    least = token_bits(keys[0], ids)
    if mark.seeding == "selfhash":
        for key in keys[1:]:
            torch.minimum(least, token_bits(key, ids), out=least)
        least = token_bits(key_of(mark, ()), least)
    logits.add_(least < mark.threshold, alpha=mark.delta)


def as_tensor(token_ids: Items[int], device: torch.device) -> Tensor:
    """``[n] int64``; by way of numpy, which reads a list in a fifth of torch's time."""
    return torch.from_numpy(np.array(token_ids, dtype=np.int64)).to(device)


def keep(logits: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """What top-k, top-p, min-p and typical leave: logits and their token ids, ``[n]``; None: all.

    Each looks at what the one before it left: top-p at the softmax of the top-k tokens, min-p (a
    share of the likeliest token's probability) at the difference to the largest logit. Tokens that
    tie at a limit are all kept.
    """
    ids: Tensor | None = None
    for find in (_top_k, _top_p, _min_p, _typical):
        kept = find(logits, params)
        if kept is not None:
            ids = kept if ids is None else ids[kept]
            logits = logits[kept]
    return logits, ids


def _top_k(logits: Tensor, params: SamplingParams) -> Tensor | None:
    if not 0 < params.top_k < len(logits):
        return None
    return reaching(logits, float(largest(logits, params.top_k)[0][-1]))


def _top_p(logits: Tensor, params: SamplingParams) -> Tensor | None:
    """The fewest likeliest tokens whose probabilities add up to ``top_p``."""
    if params.top_p == 1.0:
        return None
    total = float(logits.logsumexp(-1))
    for share in (*_SHARES, 0.0):
        some = logits[reaching(logits, total + math.log(share) if share else -math.inf)]
        falling = some.sort(descending=True).values
        reached = (falling.double() - total).exp().cumsum(-1)
        needed = int((reached < params.top_p).sum()) + 1
        if needed <= len(falling):
            return reaching(logits, float(falling[needed - 1]))
    return None  # rounding left the sum of all below top_p


def _min_p(logits: Tensor, params: SamplingParams) -> Tensor | None:
    if params.min_p == 0.0:
        return None
    return reaching(logits, float(logits.max()) + math.log(params.min_p))


def _typical(logits: Tensor, params: SamplingParams) -> Tensor | None:
    """Locally typical sampling (Meister et al. 2023, https://arxiv.org/abs/2202.00666).

    The fewest tokens that add up to ``typical_p``, those first whose surprise (minus the
    log-probability) is nearest to the mean surprise, which is the entropy.
    """
    if params.typical_p == 1.0:
        return None
    logprobs = logits.double().log_softmax(-1)
    probs = logprobs.exp()
    entropy = -torch.xlogy(probs, probs).sum()
    distance = (logprobs + entropy).abs()  # of banned tokens: infinite
    rising, order = distance.sort()
    needed = int((probs[order].cumsum(-1) < params.typical_p).sum())
    return reaching(-distance, -float(rising[min(needed, len(rising) - 1)]))


def reaching(values: Tensor, limit: float) -> Tensor:
    """Positions of the values that are at least ``limit``: ``[n] int64``."""
    if values.device.type != "cpu":
        return (values >= limit).nonzero().flatten()
    return torch.from_numpy(np.flatnonzero(values.numpy() >= limit))


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest with their positions, falling, as ``topk`` gives them, but sooner.

    So many blocks reach the ``count``-th largest of the blocks' maxima that so many values do, too:
    what is smaller can be left out.
    """
    blocks = len(values) // _BLOCK
    if count > blocks:
        found = values.topk(min(count, len(values)))
        return found.values, found.indices
    tops = values[: blocks * _BLOCK].view(blocks, _BLOCK).amax(-1)
    some = reaching(values, float(tops.topk(count).values[-1]))
    found = values[some].topk(count)
    return found.values, some[found.indices]
