"""Gumbel noise as a function of (key, token id), in Triton: no generator, no state.

    bits(key, t)  three multiply-and-shift rounds on 32 bits, keyed with both halves of ``key``
    u = (bits + 1/2) / 2^31,   noise = -log(-log(1 - u))
    key(seed, position) = mix(mix(seed) xor position), mix: SplitMix64's finaliser

(Steele et al. 2014, https://doi.org/10.1145/2714064.2660195). A token's noise depends on nothing
else, so neither batch nor tile nor graph changes what is drawn.
"""

from __future__ import annotations

import triton
import triton.language as tl

#: Above the largest noise there is: -log(2^-32).
MOST_NOISE = tl.constexpr(22.2)
_UNIT = tl.constexpr(2.0**-31)
#: u = 1 would give minus infinity.
_MOST_U = tl.constexpr(1.0 - 2.0**-24)
_LOG_2 = tl.constexpr(0.6931471805599453)
#: 127, the exponent's offset, times log 2, and more than rounding takes.
_ABOVE = tl.constexpr(127 * 0.6931471805599453 + 1e-4)


@triton.jit
def token_bits(ids: tl.tensor, low: tl.tensor, high: tl.tensor) -> tl.tensor:
    """31 random bits of each token id, under the halves of a key: uint32."""
    x = ids.to(tl.uint32) ^ low.to(tl.uint32)
    x = (x ^ (x >> 17)) * 0xED5AD4BB + high.to(tl.uint32)
    x = (x ^ (x >> 11)) * 0xAC4C1B51
    x = (x ^ (x >> 15)) * 0x31848BAB
    return (x ^ (x >> 14)) & 0x7FFFFFFF


@triton.jit
def gumbel(bits: tl.tensor) -> tl.tensor:
    """Standard Gumbel noise of 31 random bits: float32, below ``MOST_NOISE``."""
    u = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * _UNIT, _MOST_U)
    # -log(1 - u): of small u, which the largest noise comes from, by its series, as 1 - u would
    # lose them; the eighth term is below 1e-7 of the whole.
    series = 1 / 6 + u * (1 / 7)
    series = 1 / 5 + u * series
    series = 1 / 4 + u * series
    series = 1 / 3 + u * series
    series = 1 / 2 + u * series
    series = u + u * u * series
    return -tl.log(tl.where(u < 0.125, series, -tl.log(1.0 - u)))


@triton.jit
def most_gumbel(bits: tl.tensor) -> tl.tensor:
    """A little above ``gumbel(bits)``, by 0.13 at most where u is below 1/8, and not below 0.

    The noise is below -log(u); and a float's bits, read as an integer, are a lower bound of its
    logarithm, as ``log2(2^e (1 + m)) >= e + m``.
    """
    u = tl.minimum((bits.to(tl.int32).to(tl.float32) + 0.5) * _UNIT, _MOST_U)
    return _ABOVE - _LOG_2 * (u.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-23)


@triton.jit
def position_key(seed: tl.tensor, position: tl.tensor) -> tl.tensor:
    """The key under which the token at ``position`` is drawn: uint64."""
    return _mix(_mix(seed.to(tl.uint64)) ^ position.to(tl.uint64))


@triton.jit
def _mix(z: tl.tensor) -> tl.tensor:
    z = z + 0x9E3779B97F4A7C15
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)
