"""A figure with the arithmetic that leads to it, and the units in which it is read and written."""

from __future__ import annotations

import re
from typing import Literal

from msgspec import Struct

from forebay.api import ConfigError

__all__ = ["CapacityError", "Line", "amount", "bytes_of", "number"]

Unit = Literal["bytes", "tokens", "sequences", "parameters", "blocks", "share", "tokens/s"]

_UNITS = {
    "": 1,
    "B": 1,
    **{f"{prefix}B": 1000 ** (i + 1) for i, prefix in enumerate("kMGT")},
    **{f"{prefix}iB": 1024 ** (i + 1) for i, prefix in enumerate("KMGT")},
}


class CapacityError(ConfigError):
    """A shape or an amount that can't be computed with; the message says why and what to do."""


class Line(Struct, frozen=True):
    """``name`` is ``arithmetic``, which gives ``value``."""

    name: str
    arithmetic: str
    value: float
    unit: Unit


def amount(value: float, unit: Unit) -> str:
    """A value with its unit, as people read it; bytes in powers of 1000 and of 1024."""
    match unit:
        case "bytes":
            if value < 1000:
                return f"{number(value)} B"
            return f"{_scaled(value, 1000, 'B')} = {_scaled(value, 1024, 'iB')}"
        case "share":
            return f"{value:.1%}"
        case "tokens/s":
            return f"{value:,.1f} tokens/s"
        case _:
            return f"{number(value)} {unit}"


def number(value: float) -> str:
    """With thousands apart, and a digit behind the point only where there is something."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def bytes_of(text: str) -> int:
    """Bytes of ``80GB``, ``24GiB``, ``512 MiB`` or a plain number.

    :raises CapacityError: it is none of these.
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _UNITS.get(found[2]) if found else None
    if found is None or factor is None:
        raise CapacityError(f"{text!r} is no amount of memory; write it like 80GB or 24GiB")
    return int(float(found[1]) * factor)


def _scaled(value: float, base: int, suffix: str) -> str:
    """Four digits in the largest unit of which there is one at least."""
    prefixes = ["k" if base == 1000 else "K", "M", "G", "T", "P"]
    power = sum(value >= base ** (i + 1) for i in range(len(prefixes)))
    if power == 0:
        return f"{number(value)} B"
    return f"{value / base**power:,.4g} {prefixes[power - 1]}{suffix}"
