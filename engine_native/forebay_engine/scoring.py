"""Log-probabilities of a prompt's own tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from collections.abc import Sequence as Items

import torch
from torch import Tensor

from forebay_engine.step import PromptToken, Row

#: Logits of so many places are held at once: 64 MiB for a vocabulary of 262144.
_PLACES = 64


def score_prompts(
    hidden: Tensor, rows: Items[Row], logits: Callable[[Tensor], Tensor]
) -> tuple[PromptToken, ...]:
    """What was likely at each place of the prompts whose rows ask for it.

    :param hidden: ``[tokens, hidden]``, of all rows of a step.
    :param logits: of some of them, ``[places, vocab]``.
    """
    found: list[PromptToken] = []
    first = 0
    for row in rows:
        last = min(row.start + row.count, row.num_prompt - 1)
        if row.sampling.prompt_logprobs is not None:
            for start in range(row.start, last, _PLACES):
                end = min(start + _PLACES, last)
                part = hidden[first + start - row.start : first + end - row.start]
                found += _scored(row, start, logits(part))
        first += row.count
    return tuple(found)


def _scored(row: Row, start: int, logits: Tensor) -> Iterator[PromptToken]:
    """Each place from ``start`` on speaks of the token behind it."""
    logprobs = logits.float().log_softmax(-1)  # [places, vocab]
    tokens = list(row.token_ids[start + 1 : start + 1 + len(logits)])
    own = logprobs.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1))  # [places, 1]
    ranks = ((logprobs > own).sum(-1) + 1).tolist()
    best = logprobs.topk(min(row.sampling.prompt_logprobs or 0, logprobs.shape[1]))
    values, ids = best.values.tolist(), best.indices.tolist()
    for number, token_id in enumerate(tokens):
        yield PromptToken(
            row.seq_id,
            start + 1 + number,
            token_id,
            float(own[number]),
            ranks[number],
            tuple(zip(ids[number], values[number], strict=True)),
        )
