"""What requests ask of their draws, as the kernels' tables hold it.

A request's lines are made once, when it comes in (:func:`settings`, :func:`edits`); what depends on
the tokens before a place, masks and a watermark's keys, is made for each place. :func:`fill` does
all of it for places whose tokens the host knows; who runs ahead of the host packs the same lines.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from forebay_engine.sampler import Place
from forebay_engine.sequence import SamplingParams
from forebay_engine.watermark import Watermark, context_keys, key_of, person_of
from forebay_kernels import SamplingRows, SamplingTable
from forebay_kernels.reference.watermark import keyed_state
from forebay_kernels.sampling import NO_EDIT, SETTINGS, Setting, Wants

_WORD = (1 << 32) - 1
#: An edit that is made at every position.
_ALWAYS = 2**31 - 1


def on_device(params: SamplingParams) -> bool:
    """Whether the kernels can draw as asked.

    Typical sampling needs a sort, and a bad word of several tokens the tokens before it, which the
    host may not know yet. Such rows are drawn by ``forebay_engine.sampler``, which is slower.
    """
    return params.typical_p == 1.0 and all(len(word) == 1 for word in params.bad_words)


def settings(params: SamplingParams, num_prompt: int) -> npt.NDArray[np.int32]:
    """A request's line of ``SamplingTable.settings``: ``[SETTINGS]``."""
    line = np.zeros(SETTINGS, np.int32)
    reals, words = line.view(np.float32), line.view(np.uint32)
    line[Setting.WANTS] = wants(params)
    reals[Setting.TEMPERATURE] = params.temperature
    words[Setting.SEED_LOW] = params.seed & _WORD
    words[Setting.SEED_HIGH] = params.seed >> 32 & _WORD
    line[Setting.TOP_K] = params.top_k
    reals[Setting.TOP_P] = params.top_p
    reals[Setting.LOG_MIN_P] = math.log(params.min_p) if params.min_p else -math.inf
    reals[Setting.REPETITION] = params.repetition_penalty
    reals[Setting.PRESENCE] = params.presence_penalty
    reals[Setting.FREQUENCY] = params.frequency_penalty
    line[Setting.NUM_PROMPT] = num_prompt
    if params.watermark is not None:
        key = key_of(params.watermark, ())
        reals[Setting.MARK_DELTA] = params.watermark.delta
        words[Setting.MARK_THRESHOLD] = params.watermark.threshold
        words[Setting.MARK_KEY_LOW], words[Setting.MARK_KEY_HIGH] = key & _WORD, key >> 32
        line[Setting.MARK_CONTEXT] = params.watermark.context
    return line


def wants(params: SamplingParams) -> Wants:
    """What the kernels have to look at, of a request on its own."""
    neutral = SamplingParams()
    asked = Wants(0)
    if params.logit_bias or params.bad_words or params.min_tokens:
        asked |= Wants.EDITS
    if any(
        getattr(params, name) != getattr(neutral, name)
        for name in ("repetition_penalty", "presence_penalty", "frequency_penalty")
    ):
        asked |= Wants.PENALTIES
    if params.temperature > 0 and any(
        getattr(params, name) != getattr(neutral, name) for name in ("top_k", "top_p", "min_p")
    ):
        asked |= Wants.TRUNCATION
    if params.logprobs is not None:
        asked |= Wants.LOGPROB
    return asked | _marks(params.watermark)


def _marks(mark: Watermark | None) -> Wants:
    if mark is None:
        return Wants(0)
    if mark.scheme == "gumbel":
        return Wants.MARKED_NOISE
    return Wants.GREEN_LIST | (Wants.SELF_HASH if mark.seeding == "selfhash" else Wants(0))


def num_edits(params: SamplingParams, eos_token_ids: frozenset[int]) -> int:
    """How wide a table's ``edits`` must be for this request."""
    ends = params.ends(eos_token_ids) if params.min_tokens else ()
    return len(params.logit_bias) + len(params.bad_words) + len(ends)


def edits(
    params: SamplingParams, num_prompt: int, eos_token_ids: frozenset[int], width: int
) -> npt.NDArray[np.int32]:
    """A request's line of ``SamplingTable.edits``: ``[3, width]``.

    :raises ValueError: there are more than ``width``.
    """
    made = [(token_id, value, _ALWAYS) for token_id, value in params.logit_bias.items()]
    made += [(word[0], -math.inf, _ALWAYS) for word in params.bad_words]
    if params.min_tokens:
        until = num_prompt + params.min_tokens
        made += [(token_id, -math.inf, until) for token_id in params.ends(eos_token_ids)]
    if len(made) > width:
        raise ValueError(f"edits: {len(made)} do not fit into {width}; make the table wider")
    line = np.full((3, width), NO_EDIT, np.int32)
    for at, (token_id, value, until) in enumerate(sorted(made)):
        line[0, at], line[2, at] = token_id, until
        line[1, at : at + 1].view(np.float32)[0] = value
    return line


def mask(
    params: SamplingParams, allowed: Tensor | None, vocab: int
) -> npt.NDArray[np.int32] | None:
    """A line of ``SamplingRows.masks``, ``[ceil(vocab / 32)]``; None: any token may come.

    ``allowed`` is what a grammar allows here, ``[vocab] bool``.
    """
    if allowed is None and not params.allowed_token_ids:
        return None
    bits = np.zeros(-(-vocab // 32) * 32, np.bool_)
    if params.allowed_token_ids:
        bits[list(params.allowed_token_ids)] = True
    else:
        bits[:vocab] = True
    if allowed is not None:
        bits[:vocab] &= allowed.numpy()
    return np.packbits(bits, bitorder="little").view(np.int32)


def mark_state(mark: Watermark) -> npt.NDArray[np.int32]:
    """A request's line of ``SamplingTable.mark_states``: ``[8, 2]``."""
    words = keyed_state(mark.key, person_of(mark))
    return np.array(words, np.uint64).view(np.int32).reshape(8, 2)


def mark_keys(place: Place) -> npt.NDArray[np.int64]:
    """The keys of a watermark at a place; none: it is not marked there."""
    mark = place.sampling.watermark
    keys = context_keys(mark, place.token_ids, place.num_prompt) if mark else ()
    return np.array(keys, np.uint64).view(np.int64)


def fill(
    places: Items[Place],
    eos_token_ids: frozenset[int],
    vocab: int,
    device: torch.device,
) -> SamplingRows:
    """Rows, and a table, in which each place is a request of its own.

    :raises ValueError: naming a place that :func:`on_device` refuses.
    """
    count = len(places)
    for place in places:
        if not on_device(place.sampling):
            raise ValueError("typical_p and bad_words of several tokens: the kernels have neither")
    lengths = [len(place.token_ids) for place in places]
    table = SamplingTable.empty(
        max(1, count),
        vocab,
        max(1, *lengths) if lengths else 1,
        max((num_edits(place.sampling, eos_token_ids) for place in places), default=0),
        device,
    )
    rows = SamplingRows.empty(count, max(1, count), table)
    width = table.edits.shape[2]
    for at, place in enumerate(places):
        params, prompt = place.sampling, place.num_prompt
        _put(table.settings[at], settings(params, prompt))
        _put(table.edits[at], edits(params, prompt, eos_token_ids, width))
        _put(table.tokens[at, : lengths[at]], np.array(place.token_ids, np.int32))
        words, keys = mask(params, place.allowed, vocab), mark_keys(place)
        if words is not None:
            _put(rows.masks[at], words)
            rows.mask_lines[at] = at
        _put(rows.mark_keys[at, : len(keys)], keys)
        rows.mark_counts[at] = len(keys)
        if params.watermark is not None and table.mark_states is not None:
            _put(table.mark_states[at], mark_state(params.watermark))
        rows.requests[at], rows.positions[at] = at, lengths[at]
    return rows


def _put(into: Tensor, values: npt.NDArray[np.int32] | npt.NDArray[np.int64]) -> None:
    into.copy_(torch.from_numpy(values))
