"""What a step's model runs on, from a few words a row and the table of requests."""

from __future__ import annotations

import torch
from torch import Tensor


def step_inputs(
    places: Tensor,  # [rows] int32: of each row, its place in the table
    starts: Tensor,  # [rows] int32: position of its first token; negative: no row
    query_starts: Tensor,  # [rows + 1] int32: its first token in the step, and the end
    tokens: Tensor,  # [tokens] int32: token ids; negative: the last one drawn for the row
    last: Tensor,  # [places] int32: the last token drawn, negative if none could be
    tables: Tensor,  # [places, groups, pages] int32
    block_size: int,
    *,
    token_ids: Tensor,  # [tokens] int64
    positions: Tensor,  # [tokens] int64
    lengths: Tensor,  # [rows] int32
    block_tables: Tensor,  # [groups, rows, pages] int32
    slots: Tensor,  # [groups, tokens] int64
) -> None:
    """Fill the last five.

    Of row ``r`` with ``n`` tokens from position ``s`` on: the positions ``s .. s + n``, the length
    ``s + n``, its pages, as many as hold so many tokens, and the slots
    ``page(p) * block_size + p % block_size``. What is no row has length 0, token 0 and slots of -1;
    its pages, like those behind a row's end, may be anything.
    """
    token = torch.arange(len(tokens), device=tokens.device, dtype=query_starts.dtype)
    row = torch.searchsorted(query_starts[1:], token, right=True)  # [tokens]
    start, place = starts[row], places[row].long()
    is_row = start >= 0
    position = (start.clamp(min=0) + token - query_starts[row]).long()
    drawn = last[place].clamp(min=0)
    token_ids.copy_(torch.where(tokens < 0, drawn, tokens).masked_fill(~is_row, 0))
    positions.copy_(position)
    page = tables[place, :, position // block_size].long()  # [tokens, groups]
    slot = page * block_size + (position % block_size).unsqueeze(1)
    slots.copy_(slot.masked_fill(~is_row.unsqueeze(1), -1).T)
    counts = query_starts[1:] - query_starts[:-1]
    lengths.copy_((starts + counts).masked_fill(starts < 0, 0))
    block_tables.copy_(tables[places.long()].transpose(0, 1))


def scatter(table: Tensor, at: Tensor, words: Tensor) -> None:
    """``table[at] = words``, all int32; no place twice."""
    table[at.long()] = words


def remember(
    drawn: Tensor,  # [samples] int64
    places: Tensor,  # [samples] int32
    positions: Tensor,  # [samples] int32
    last: Tensor,  # [places] int32
    tokens: Tensor,  # [places, longest] int32
) -> None:
    """The drawn tokens are the last of their requests, and stand at their positions.

    Of a request with several samples the last token is any of them.
    """
    last[places.long()] = drawn.int()
    tokens[places.long(), positions.long()] = drawn.int()
