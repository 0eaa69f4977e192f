"""Gumbel noise as a function of (key, token id): no generator, no state.

A position's 64-bit key is mixed from seed and position (SplitMix64's finaliser; Steele et al. 2014,
https://doi.org/10.1145/2714064.2660195); each token id is hashed with both halves of the key by
three multiply-and-shift rounds on 32 bits, which torch does for a whole vocabulary at once.
"""

from __future__ import annotations

import torch
from torch import Tensor

_MASK = (1 << 64) - 1
#: Above the largest noise there is.
MAX_NOISE = 22.2


def position_key(seed: int, position: int) -> int:
    """The key under which the token at ``position`` is drawn."""
    return _mix(_mix(seed & _MASK) ^ (position & _MASK))


def gumbel(key: int, token_ids: Tensor) -> Tensor:
    """Standard Gumbel noise of each token id: ``[n] int -> [n] float32``, below ``MAX_NOISE``."""
    bits = token_bits(key, token_ids)
    # Large noise comes from small u, where float32 is finest; u = 1 would give minus infinity.
    u = bits.float().add_(0.5).mul_(2.0**-31).clamp_(max=1.0 - 2.0**-24)
    return u.neg_().log1p_().neg_().log_().neg_()


def token_bits(key: int, token_ids: Tensor) -> Tensor:
    """31 random bits of each token id, ``[n] int32`` and not negative."""
    x = token_ids.to(torch.int32, copy=True).bitwise_xor_(_signed(key & 0xFFFFFFFF))
    x.bitwise_xor_(_shift(x, 17)).mul_(_signed(0xED5AD4BB)).add_(_signed(key >> 32))
    x.bitwise_xor_(_shift(x, 11)).mul_(_signed(0xAC4C1B51))
    x.bitwise_xor_(_shift(x, 15)).mul_(_signed(0x31848BAB))
    return x.bitwise_xor_(_shift(x, 14)).bitwise_and_(0x7FFFFFFF)


def _mix(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _shift(x: Tensor, by: int) -> Tensor:
    """Logical right shift: int32's own one repeats the sign."""
    return (x >> by).bitwise_and_((1 << (32 - by)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 32) if value >= 1 << 31 else value
