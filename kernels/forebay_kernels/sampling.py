"""What the rows of a step ask of their draws, as device tensors of fixed shapes.

A :class:`SamplingTable` has one line a request, written once when the request is admitted; a step
brings only :class:`SamplingRows`: which request each row draws for, and where. Every tensor keeps
its address and its shape, so a captured graph may read them, and whoever runs the steps fills them
in place from one packed copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Any

import torch
from torch import Tensor

#: Drawn where no token may come: all are banned, one is NaN, or the row is padding.
NO_TOKEN = -1
#: Keys of a watermark at one place, at most: tokens of its context.
MOST_MARK_KEYS = 64
#: Fills the ids of a line of :attr:`SamplingTable.edits` behind its last edit.
NO_EDIT = 2**31 - 1


class Wants(IntFlag):
    """What a request asks beyond the likeliest token: bits of ``Setting.WANTS``.

    Of all rows of a step together, which its caller knows, they choose the kernels that run.
    """

    #: It has lines in ``edits``.
    EDITS = 1
    PENALTIES = 2
    #: Top-k, top-p or min-p; never together with temperature 0.
    TRUNCATION = 4
    #: The logits of a green list are raised, if the place has mark keys.
    GREEN_LIST = 8
    #: The token's bits under all keys decide together: the least of them is hashed once more.
    SELF_HASH = 16
    #: Noise comes from the place's first mark key, if it has any, and not from its position.
    MARKED_NOISE = 32
    LOGPROB = 64
    #: Of all rows together: some have a line of masks. A row says so by ``mask_lines`` alone.
    MASKS = 128


#: Whatever a row may ask for.
ANYTHING = ~Wants(0)
#: What takes mark keys.
MARKS = Wants.GREEN_LIST | Wants.MARKED_NOISE


class Setting(IntEnum):
    """Columns of ``SamplingTable.settings``, 32 bits each; 64 bytes a request, two sectors."""

    WANTS = 0
    #: float32 bits, as all that is not said to be an integer; 0: greedy.
    TEMPERATURE = 1
    #: Halves of a 64-bit integer.
    SEED_LOW = 2
    SEED_HIGH = 3
    #: Integer; 0: off.
    TOP_K = 4
    #: 1: off.
    TOP_P = 5
    #: Natural logarithm of min-p; minus infinity: off.
    LOG_MIN_P = 6
    #: 1: off. It must not be 0.
    REPETITION = 7
    PRESENCE = 8
    FREQUENCY = 9
    #: Integer: tokens of the prompt, which only the repetition penalty looks at.
    NUM_PROMPT = 10
    #: Added to the logits of green tokens.
    MARK_DELTA = 11
    #: Unsigned integer: bits below it are green.
    MARK_THRESHOLD = 12
    #: Halves of the key that ``Wants.SELF_HASH`` hashes with.
    MARK_KEY_LOW = 13
    MARK_KEY_HIGH = 14
    #: Integer: tokens of the answer that decide on the next; at most ``MOST_MARK_KEYS``.
    MARK_CONTEXT = 15


#: Columns of a line of settings.
SETTINGS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingTable:
    """One line a request. A line is written when its request comes in, and not read before."""

    #: See :class:`Setting`.
    settings: Tensor  # [requests, SETTINGS] int32
    #: Sparse changes: token ids, rising, ``NO_EDIT`` behind the last; float32 bits added to their
    #: logits, minus infinity to ban; and the position from which on they are not made any more (the
    #: ban of stop tokens below ``min_tokens``; 2^31 - 1: always made). A token may stand twice.
    edits: Tensor  # [requests, 3, edits] int32, edits a power of two
    #: Each request's tokens from position 0: what penalties count, guessed ones of the step too.
    tokens: Tensor  # [requests, longest] int32
    #: What was seen of each token: bit 0: in the prompt; the rest: how often in the answer. Cleared
    #: together with ``counted`` when a request comes in, and kept up by the draws.
    counts: Tensor  # [requests, vocab] int32
    #: Tokens of the request that are in ``counts``.
    counted: Tensor  # [requests] int32
    #: State of the hash that makes a watermark's keys, in halves of its words, see
    #: ``reference.watermark``. None: the host writes ``SamplingRows.mark_keys``.
    mark_states: Tensor | None = None  # [requests, 8, 2] int32

    @classmethod
    def empty(
        cls, requests: int, vocab: int, longest: int, edits: int, device: torch.device
    ) -> SamplingTable:
        """For so many requests of so many tokens; ``edits`` of each is rounded up to 2^n."""
        width = 1 << max(0, edits - 1).bit_length()
        whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return cls(
            settings=torch.zeros((requests, SETTINGS), **whole),
            edits=torch.full((requests, 3, width), NO_EDIT, **whole),
            tokens=torch.zeros((requests, longest), **whole),
            counts=torch.zeros((requests, vocab), **whole),
            counted=torch.zeros(requests, **whole),
            mark_states=torch.zeros((requests, 8, 2), **whole),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingRows:
    """Where the tokens of a step are drawn: one row for each row of logits.

    A request whose guesses are verified has several rows: one after its last known token, and one
    after each guess, whose tokens stand in ``table.tokens`` already.
    """

    table: SamplingTable
    #: Line of the table; negative: padding, which draws ``NO_TOKEN``.
    requests: Tensor  # [rows] int32
    #: Of the token that is drawn: how many of the request's tokens stand before it.
    positions: Tensor  # [rows] int32
    #: How many of the tokens before it, the last ones, are guesses.
    guessed: Tensor  # [rows] int32
    #: Line of ``masks`` that says which tokens may come; negative: any.
    mask_lines: Tensor  # [rows] int32
    #: Bit ``t % 32`` of word ``t // 32`` stands for token ``t``.
    masks: Tensor  # [lines, ceil(vocab / 32)] int32
    #: 64-bit keys of the watermark at this place, and how many; 0: it is not marked here.
    mark_keys: Tensor  # [rows, MOST_MARK_KEYS] int64
    mark_counts: Tensor  # [rows] int32

    @classmethod
    def empty(cls, rows: int, lines: int, table: SamplingTable) -> SamplingRows:
        """So many rows, all of them padding, and lines of masks."""
        device, vocab = table.counts.device, table.counts.shape[1]
        whole: dict[str, Any] = {"dtype": torch.int32, "device": device}
        return cls(
            table=table,
            requests=torch.full((rows,), -1, **whole),
            positions=torch.zeros(rows, **whole),
            guessed=torch.zeros(rows, **whole),
            mask_lines=torch.full((rows,), -1, **whole),
            masks=torch.zeros((lines, -(-vocab // 32)), **whole),
            mark_keys=torch.zeros((rows, MOST_MARK_KEYS), dtype=torch.int64, device=device),
            mark_counts=torch.zeros(rows, **whole),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """What came out, row by row."""

    tokens: Tensor  # [rows] int64
    #: Of the drawn token in the model's own distribution, and the logarithm of the sum of all
    #: exponentials; NaN where ``Wants.LOGPROB`` is not set or nothing was drawn. None: not asked.
    logprobs: Tensor | None = None  # [rows] float32
    totals: Tensor | None = None  # [rows] float32
