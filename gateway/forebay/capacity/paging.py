"""What is lost to the last, half-filled block of each sequence, and what sharing a prefix saves."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from msgspec import Struct

from forebay.capacity.line import CapacityError, Line, number

__all__ = ["Utilisation", "expected", "prefix_lines", "read_lengths", "utilisation"]

#: Names of columns that make up a sequence's length, in the traces that are published.
_COLUMNS = (
    ("num_total_tokens",),
    ("ContextTokens", "GeneratedTokens"),
    ("input_length", "output_length"),
    ("input_toks", "output_toks"),
)


class Utilisation(Struct, frozen=True):
    """How full the blocks of ``block`` tokens are."""

    block: int
    #: Slots in the blocks of all sequences.
    slots: float
    #: Of those, the ones that hold a token.
    tokens: float
    arithmetic: str

    @property
    def share(self) -> float:
        return self.tokens / self.slots


def utilisation(lengths: Sequence[int], block: int) -> Utilisation:
    """Exactly, for sequences of these lengths."""
    tokens = sum(lengths)
    blocks = sum(-(-length // block) for length in lengths)
    arithmetic = f"{number(tokens)} tokens ÷ ({number(blocks)} blocks × {block})"
    return Utilisation(block, blocks * block, tokens, arithmetic)


def expected(mean: float, block: int) -> Utilisation:
    """By formula, for lengths that end anywhere in a block alike: (block - 1) / 2 slots are lost.

    The assumption holds where lengths spread over several blocks.
    """
    slots = mean + (block - 1) / 2
    return Utilisation(block, slots, mean, f"{mean:g} ÷ ({mean:g} + ({block} − 1) ÷ 2)")


def read_lengths(path: Path) -> list[int]:
    """Prompt and answer together of each request in a trace: CSV with a header, or JSON lines.

    :raises CapacityError: it can't be read, or has none of the columns that are known.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            if path.suffix == ".csv":
                rows = list(csv.DictReader(file))
            else:
                rows = [json.loads(line) for line in file if line.strip()]
    except OSError as error:
        raise CapacityError(f"--trace: {path} can't be read: {error.strerror}") from error
    except ValueError as error:
        raise CapacityError(f"--trace: {path} is neither CSV nor JSON lines: {error}") from error
    columns = next((names for names in _COLUMNS if rows and set(names) <= rows[0].keys()), None)
    if columns is None:
        known = "; ".join(" and ".join(names) for names in _COLUMNS)
        raise CapacityError(f"--trace: {path} has none of these columns: {known}")
    lengths = [sum(int(row[name]) for name in columns) for row in rows]
    return [length for length in lengths if length > 0]


def prefix_lines(
    shared: int, own: int, requests: int, hit_rate: float, block: int, token_bytes: float
) -> list[Line]:
    """What a prefix of ``shared`` tokens, common to all requests, spares them.

    ``hit_rate``: of the requests after the first, those that find it cached.

    :raises CapacityError: no whole block is shared.
    """
    # One token at least is computed: its logits are what the step is for.
    reused = min(shared, shared + own - 1) // block * block
    if reused == 0:
        raise CapacityError(
            f"--shared: {shared} tokens fill no block of {block}, and only whole blocks are "
            "shared; give a longer prefix or a smaller --block"
        )
    prompt, hits = shared + own, (requests - 1) * hit_rate
    saved = hits * reused
    held = requests * -(-prompt // block) * block
    spared = hits * reused
    return [
        Line("tokens reused by a hit", f"⌊{shared} ÷ {block}⌋ × {block}", reused, "tokens"),
        Line(
            "prompt tokens without a cache", f"{requests} × {prompt}", requests * prompt, "tokens"
        ),
        Line(
            "prompt tokens spared",
            f"({requests} − 1) × {hit_rate:g} × {reused}",
            saved,
            "tokens",
        ),
        Line(
            "share of prefill spared",
            f"{number(saved)} ÷ {number(requests * prompt)}",
            saved / (requests * prompt),
            "share",
        ),
        Line(
            "KV of all at once, nothing shared",
            f"{number(held)} slots × {number(token_bytes)} B",
            held * token_bytes,
            "bytes",
        ),
        Line(
            "KV spared by sharing blocks",
            f"{number(spared)} slots × {number(token_bytes)} B",
            spared * token_bytes,
            "bytes",
        ),
    ]
