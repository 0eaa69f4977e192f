"""Instructions that bring two values at a time out of the words of a ``PackedMatrix``.

A register holds the words of two neighbouring lanes; the outcome is a register for each value of a
word, with those of both lanes as bfloat16 or float16 side by side, which is how matrix instructions
take them. Triton alone would widen every value to a register of its own, shift, convert and pack
it: about six instructions a value in place of one.

The trick is old (it is in FasterTransformer, and in Marlin: https://arxiv.org/abs/2408.11743): bits
that are put behind a float's leading bit are an integer added to that leading bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

#: a & b | c, as a table of its 8 results.
_AND_OR = "0xEA"


def unpacking(bits: int, dtype: torch.dtype, codes: Tensor | None = None) -> str:
    """PTX: outputs ``$0`` and up, one for each value of a word, from the last operand."""
    if codes is not None:
        return _block(4, _lookup(codes))
    return _block(2, _bytes(dtype)) if bits == 8 else _block(4, _nibbles(dtype))


def _block(outputs: int, lines: list[str]) -> str:
    registers = ".reg .b32 w, x, s, p, a, b, lo, hi, f0, f1, f2, f3;"
    return "\n".join(["{", registers, f"mov.b32 w, ${outputs};", *lines, "}"])


def _nibbles(dtype: torch.dtype) -> list[str]:
    """``16 + q``: the four bits go to the top of the mantissa, of 7 bits or of 10."""
    top = 3 if dtype == torch.bfloat16 else 6
    mask = _both(15 << top)
    base = _both(0x4180 if dtype == torch.bfloat16 else 0x4C00)  # 16
    lines = []
    for j in range(4):
        by = top - 4 * j
        lines.append(f"shl.b32 x, w, {by};" if by > 0 else f"shr.b32 x, w, {-by};")
        lines.append(f"lop3.b32 ${j}, x, {mask}, {base}, {_AND_OR};")
    return lines


def _bytes(dtype: torch.dtype) -> list[str]:
    """``q``, of two's complement: its low 7 bits, less 128 if its sign is set, without rounding.

    ``(base + low) - (base + sign)``, as a base of 128 (bfloat16) or 1024 (float16) has the value 1
    in its last bit. In bfloat16 a set sign makes 256 of 128, which is the same.
    """
    base = _both(0x4300 if dtype == torch.bfloat16 else 0x6400)
    minus = _both(0xBF80 if dtype == torch.bfloat16 else 0xBC00)  # -1
    kind = "bf16x2" if dtype == torch.bfloat16 else "f16x2"
    lines = [f"mov.b32 s, {minus};"]
    for j in range(2):
        lines += [
            f"shr.b32 x, w, {8 * j};",
            f"lop3.b32 a, x, {_both(0x7F)}, {base}, {_AND_OR};",
            f"lop3.b32 b, x, {_both(0x80)}, {base}, {_AND_OR};",
            f"fma.rn.{kind} ${j}, b, s, a;",
        ]
    return lines


def _lookup(codes: Tensor) -> list[str]:
    """``codes[q]``: a permutation of bytes is a table of 8, and a second one takes the right half.

    Low and high bytes of the codes are looked up for the four values of a lane at once, put
    together, and sorted by value instead of lane.
    """
    values = [int(code) & 0xFFFF for code in codes.view(torch.int16).tolist()]
    low, high = ([value >> shift & 255 for value in values] for shift in (0, 8))
    tables = [
        [f"0x{int.from_bytes(bytes(table[i : i + 4]), 'little'):08X}" for i in range(0, 16, 4)]
        for table in (low, high)
    ]
    lines = []
    for lane in range(2):
        lines += [
            f"shr.b32 x, w, {16 * lane};",
            "and.b32 s, x, 0x7777;",  # bit 3 would ask for a sign
            "shr.b32 p, x, 1;",
            f"lop3.b32 p, p, 0x4444, 0x3210, {_AND_OR};",  # byte i of the lower or upper half
        ]
        for table, name in zip(tables, ("lo", "hi"), strict=True):
            lines += [
                f"prmt.b32 a, {table[0]}, {table[1]}, s;",
                f"prmt.b32 b, {table[2]}, {table[3]}, s;",
                f"prmt.b32 {name}, a, b, p;",
            ]
        lines += [
            f"prmt.b32 f{2 * lane}, lo, hi, 0x5140;",  # values 0 and 1
            f"prmt.b32 f{2 * lane + 1}, lo, hi, 0x7362;",  # values 2 and 3
        ]
    return lines + [
        f"prmt.b32 ${j}, f{j // 2}, f{2 + j // 2}, {'0x7632' if j % 2 else '0x5410'};"
        for j in range(4)
    ]


def _both(half: int) -> str:
    return f"0x{half << 16 | half:08X}"
