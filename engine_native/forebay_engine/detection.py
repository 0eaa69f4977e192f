"""Whether a text bears a watermark, and how sure that is. No tensors here."""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass

from forebay_engine.watermark import Watermark, bits_of, context_keys, key_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """What a text says of a key."""

    scheme: str
    tokens: int
    #: Those that count: with a whole context, each case once.
    scored: int
    #: ``kgw``: of those, and the share that chance gives.
    green: int | None = None
    gamma: float | None = None
    #: ``gumbel``: sum of the exponential scores, whose mean is 1 by chance.
    score: float | None = None
    #: Standard deviations above chance.
    z: float
    #: Probability that a text which knows nothing of the key scores as high.
    p_value: float
    log10_p_value: float


def detect(token_ids: Items[int], mark: Watermark) -> Evidence:
    """Look for a mark.

    Only what the key judges independently is counted, or the probability would be wrong: a token
    in its context once, with ``selfhash`` an anchor and its token once, and with ``gumbel`` the
    first token in a context.
    """
    return _detect_gumbel(token_ids, mark) if mark.scheme == "gumbel" else _detect(token_ids, mark)


def _detect(token_ids: Items[int], mark: Watermark) -> Evidence:
    verdicts: dict[object, bool] = {}
    again = key_of(mark, ())
    for at in range(mark.context, len(token_ids)):
        keys = context_keys(mark, token_ids[at - mark.context : at], 0)
        least = min(bits_of(key, token_ids[at]) for key in keys)
        if mark.seeding == "selfhash":
            verdicts[least] = bits_of(again, least) < mark.threshold
        else:
            verdicts[keys[0], token_ids[at]] = least < mark.threshold
    scored, green = len(verdicts), sum(verdicts.values())
    gamma = mark.threshold / (1 << 31)
    deviation = math.sqrt(scored * gamma * (1 - gamma))
    log_p = log_binomial_tail(green, scored, gamma)
    return Evidence(
        scheme=mark.scheme,
        tokens=len(token_ids),
        scored=scored,
        green=green,
        gamma=gamma,
        z=(green - gamma * scored) / deviation if scored else 0.0,
        p_value=math.exp(log_p),
        log10_p_value=log_p / math.log(10),
    )


def _detect_gumbel(token_ids: Items[int], mark: Watermark) -> Evidence:
    scores: dict[int, float] = {}
    for at in range(mark.context, len(token_ids)):
        key = key_of(mark, token_ids[at - mark.context : at])
        if key not in scores:
            scores[key] = -math.log((bits_of(key, token_ids[at]) + 0.5) / (1 << 31))
    scored, score = len(scores), math.fsum(scores.values())
    log_p = log_gamma_tail(scored, score)
    return Evidence(
        scheme=mark.scheme,
        tokens=len(token_ids),
        scored=scored,
        score=score,
        z=(score - scored) / math.sqrt(scored) if scored else 0.0,
        p_value=math.exp(log_p),
        log10_p_value=log_p / math.log(10),
    )


def log_binomial_tail(least: int, count: int, chance: float) -> float:
    """Logarithm of the probability of ``least`` or more of ``count``, term by term."""
    if least <= 0:
        return 0.0
    yes, no = math.log(chance), math.log1p(-chance)
    whole = math.lgamma(count + 1)
    return _log_sum(
        whole - math.lgamma(k + 1) - math.lgamma(count - k + 1) + k * yes + (count - k) * no
        for k in range(least, count + 1)
    )


def log_gamma_tail(count: int, score: float) -> float:
    """Logarithm of the probability that ``count`` exponential variables sum to ``score`` or more.

    That is the chance of fewer than ``count`` events where ``score`` are expected.
    """
    if count == 0:
        return 0.0
    return _log_sum(k * math.log(score) - score - math.lgamma(k + 1) for k in range(count))


def _log_sum(logs: Iterable[float]) -> float:
    terms = list(logs)
    top = max(terms)
    return min(0.0, top + math.log(math.fsum(math.exp(term - top) for term in terms)))
