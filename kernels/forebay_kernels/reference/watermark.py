"""Keys of a watermark from the tokens before a place, in plain Python.

A key is a keyed BLAKE2b hash of 8 bytes (RFC 7693, https://www.rfc-editor.org/rfc/rfc7693) of token
ids as 4 bytes each, least byte first; its bytes, read the other way, are the number. What the hash
makes of its own key, which fills a block, is the same for all contexts: a state of 8 words, from
which alone the device goes on.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from forebay_kernels.sampling import MARKS, SamplingRows, Setting, Wants

#: Words that a state begins with.
IV = (
    0x6A09E667F3BCC908, 0xBB67AE8584CAA73B, 0x3C6EF372FE94F82B, 0xA54FF53A5F1D36F1,
    0x510E527FADE682D1, 0x9B05688C2B3E6C1F, 0x1F83D9ABFB41BD6B, 0x5BE0CD19137E2179,
)  # fmt: skip
#: Order of a block's words in each round.
SIGMA = (
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
    (11, 8, 12, 0, 5, 2, 15, 13, 10, 14, 3, 6, 7, 1, 9, 4),
    (7, 9, 3, 1, 13, 12, 11, 14, 2, 6, 5, 10, 4, 0, 15, 8),
    (9, 0, 5, 7, 2, 4, 10, 15, 14, 1, 11, 12, 6, 8, 3, 13),
    (2, 12, 6, 10, 0, 11, 8, 3, 4, 13, 7, 5, 15, 14, 1, 9),
    (12, 5, 1, 15, 14, 13, 4, 10, 0, 7, 6, 3, 9, 2, 8, 11),
    (13, 11, 7, 14, 12, 1, 3, 9, 5, 0, 15, 4, 8, 6, 2, 10),
    (6, 15, 14, 9, 11, 3, 0, 8, 12, 2, 13, 7, 1, 4, 10, 5),
    (10, 2, 8, 4, 7, 6, 1, 5, 15, 11, 9, 14, 3, 12, 13, 0),
    (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15),
    (14, 10, 4, 8, 9, 15, 13, 6, 1, 12, 0, 2, 11, 7, 5, 3),
)
_LONG = (1 << 64) - 1
_BLOCK = 128
_DIGEST = 8


def keyed_state(key: bytes, person: bytes) -> list[int]:
    """The state of a hash of 8 bytes that has taken in its key, and nothing else."""
    state = list(IV)
    state[0] ^= 0x01010000 ^ len(key) << 8 ^ _DIGEST
    padded = person.ljust(16, b"\0")
    state[6] ^= int.from_bytes(padded[:8], "little")
    state[7] ^= int.from_bytes(padded[8:], "little")
    return _compressed(state, key.ljust(_BLOCK, b"\0"), _BLOCK, last=False)


def key_from(state: Sequence[int], token_ids: Sequence[int]) -> int:
    """The key of at least one token, 64 bits."""
    data = b"".join(token_id.to_bytes(4, "little") for token_id in token_ids)
    for first in range(0, len(data), _BLOCK):
        end = min(first + _BLOCK, len(data))
        block = data[first:end].ljust(_BLOCK, b"\0")
        state = _compressed(state, block, _BLOCK + end, last=end == len(data))
    return int.from_bytes(state[0].to_bytes(8, "little"), "big")


def mark_keys(rows: SamplingRows) -> None:
    """Write ``mark_keys`` and ``mark_counts`` of rows whose request has a mark.

    The context of a place are the last tokens before it, if they all belong to the answer. A green
    list has one key of the whole context, or with ``SELF_HASH`` one of each token; marked noise has
    one, unless the context has occurred in the answer before.
    """
    table = rows.table
    for row, request in enumerate(rows.requests.tolist()):
        wants = Wants(0) if request < 0 else Wants(int(table.settings[request, Setting.WANTS]))
        if not wants & MARKS:
            continue
        size = int(table.settings[request, Setting.MARK_CONTEXT])
        start = int(table.settings[request, Setting.NUM_PROMPT])
        answer = table.tokens[request, start : int(rows.positions[row])].tolist()
        keys: list[int] = []
        if len(answer) >= size:
            state, context = _state(table.mark_states, request), answer[-size:]
            several = Wants.SELF_HASH in wants
            keys = [
                key_from(state, each) for each in ([[t] for t in context] if several else [context])
            ]
        earlier = (answer[at : at + size] for at in range(len(answer) - size))
        if Wants.MARKED_NOISE in wants and answer[-size:] in earlier:
            keys = []
        for at, key in enumerate(keys):
            rows.mark_keys[row, at] = key - (1 << 64) if key >> 63 else key
        rows.mark_counts[row] = len(keys)


def _state(states: Tensor | None, request: int) -> list[int]:
    if states is None:
        raise ValueError("mark_states: a table without them has its keys made by the host")
    return [low & 0xFFFFFFFF | (high & 0xFFFFFFFF) << 32 for low, high in states[request].tolist()]


def _compressed(state: Sequence[int], block: bytes, taken: int, *, last: bool) -> list[int]:
    """The state after a block; ``taken``: bytes with it, the key's block too."""
    words = [int.from_bytes(block[at : at + 8], "little") for at in range(0, _BLOCK, 8)]
    v = [*state, *IV]
    v[12] ^= taken
    v[14] ^= _LONG if last else 0
    for order in SIGMA:
        for at in range(8):
            row, turn = at % 4, at // 4
            a, b, c, d = (
                row,
                4 + (row + turn) % 4,
                8 + (row + 2 * turn) % 4,
                12 + (row + 3 * turn) % 4,
            )
            for word, (first, second) in zip(
                order[2 * at : 2 * at + 2], ((32, 24), (16, 63)), strict=True
            ):
                v[a] = (v[a] + v[b] + words[word]) & _LONG
                v[d] = _turned(v[d] ^ v[a], first)
                v[c] = (v[c] + v[d]) & _LONG
                v[b] = _turned(v[b] ^ v[c], second)
    return [word ^ v[at] ^ v[at + 8] for at, word in enumerate(state)]


def _turned(word: int, by: int) -> int:
    return (word >> by | word << (64 - by)) & _LONG
