"""How large a KV cache is, and what fits into a memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from forebay.capacity.line import CapacityError, Line, number
from forebay.capacity.shape import ModelShape

__all__ = ["BITS", "per_token", "sequence_bytes", "size_lines", "what_fits"]

#: Of one number in the cache. int4 and int8 without their scales: how many there are differs.
BITS = {"fp32": 32, "fp16": 16, "bf16": 16, "fp8": 8, "int8": 8, "int4": 4}


def per_token(shape: ModelShape, bits: int) -> float:
    """Bytes that one more token takes while it is within every window."""
    return shape.layers * shape.elements_per_layer * bits / 8


def sequence_bytes(shape: ModelShape, bits: int, tokens: int, block: int = 1) -> float:
    """Bytes of one sequence; each layer holds whole blocks, a windowed one its last tokens only.

    A window that begins inside a block touches one block more than it fills; that one is counted.
    """
    per_layer = shape.elements_per_layer * bits / 8
    held = sum(_held(tokens, window, block) for window in shape.windows)
    return (shape.full_layers * _up(tokens, block) + held) * per_layer


def size_lines(
    shape: ModelShape, dtype: str, tokens: int, batch: int, block: int = 1
) -> Iterator[Line]:
    """The cache of a token, of a sequence of ``tokens``, and of ``batch`` of them."""
    bits = BITS[dtype]
    width = f"{bits / 8:g} B ({dtype})"
    if shape.latent is not None:
        inner = f"({shape.latent.rank} latent + {shape.latent.rope_dim} of the key)"
    else:
        plural = "s" if shape.kv_heads > 1 else ""
        heads = f"{shape.kv_heads} KV head{plural} × {shape.head_dim} dimensions"
        inner = f"2 (keys, values) × {heads}"
    layer = shape.elements_per_layer * bits / 8
    yield Line("one token in one layer", f"{inner} × {width}", layer, "bytes")
    whole = per_token(shape, bits)
    yield Line(
        "one token in all layers", f"{shape.layers} layers × {number(layer)} B", whole, "bytes"
    )
    one = sequence_bytes(shape, bits, tokens, block)
    arithmetic = _sequence_arithmetic(shape, tokens, block, layer)
    yield Line(f"one sequence of {tokens:,} tokens", arithmetic, one, "bytes")
    yield Line(f"{batch:,} such sequences", f"{batch:,} × {number(one)} B", batch * one, "bytes")


def what_fits(
    shape: ModelShape,
    dtype: str,
    memory: float,
    weights: float,
    tokens: int,
    *,
    block: int = 1,
    reserve: float = 0,
) -> list[Line]:
    """The memory that is left for the cache, and the sequences of ``tokens`` that go into it.

    :raises CapacityError: nothing is left.
    """
    bits = BITS[dtype]
    left = memory - weights - reserve
    sums = f"{number(memory)} B − {number(weights)} B of weights − {number(reserve)} B in reserve"
    if left <= 0:
        raise CapacityError(
            f"--memory: {sums} leaves nothing for a KV cache; "
            "give more memory, or narrower weights by --weights"
        )
    token, one = per_token(shape, bits), sequence_bytes(shape, bits, tokens, block)
    return [
        Line("left for the KV cache", sums, left, "bytes"),
        Line(
            "tokens, no windows or sharing",
            f"⌊{number(left)} ÷ {number(block * token)} B a block⌋ × {block}",
            left // (block * token) * block,
            "tokens",
        ),
        Line(
            f"sequences of {tokens:,} tokens at once",
            f"⌊{number(left)} ÷ {number(one)} B⌋",
            left // one,
            "sequences",
        ),
    ]


def _sequence_arithmetic(shape: ModelShape, tokens: int, block: int, layer: float) -> str:
    rounded = "" if block == 1 else f" (in blocks of {block})"
    terms = []
    if shape.full_layers:
        terms.append(f"{shape.full_layers} layers × {_up(tokens, block):,} tokens")
    for window, layers in sorted(Counter(shape.windows).items()):
        held = _held(tokens, window, block)
        terms.append(f"{layers} layers × {held:,} tokens (window {window:,})")
    joined = " + ".join(terms)
    whole = f"({joined})" if len(terms) > 1 else joined
    return f"{whole}{rounded} × {number(layer)} B"


def _up(tokens: int, block: int) -> int:
    return -(-tokens // block) * block


def _held(tokens: int, window: int, block: int) -> int:
    """Most tokens in the blocks that a window of ``window`` tokens touches."""
    return min(_up(tokens, block), _up(window - 1, block) + block)
