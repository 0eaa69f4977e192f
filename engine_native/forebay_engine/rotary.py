"""Rotary position embedding: the angles of a step's tokens, and who is rotated by them.

Su et al. 2021, https://arxiv.org/abs/2104.09864. Frequency ``i`` of ``dim`` rotated dimensions is
``theta ** (-2 i / dim)`` radians a position; the scaled types change some of them so that a model
reads contexts longer than it was trained with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_engine.hf_config import ModelConfig, Rope


@dataclass(frozen=True, slots=True)
class Angles:
    """Cosine and sine of every token's rotation."""

    cos: Tensor  # [tokens, rotated / 2] float32
    sin: Tensor  # [tokens, rotated / 2] float32


class Rotary:
    """Angles of positions."""

    def __init__(self, rope: Rope, config: ModelConfig, device: torch.device) -> None:
        dim = int(config.head_dim * rope.partial)
        self._frequency = _frequency(rope, dim, config.served_length).to(device)  # [dim / 2]
        self._attention_factor = rope.attention_factor

    def __call__(self, positions: Tensor) -> Angles:
        return Angles(*kernels.rotary_angles(positions, self._frequency, self._attention_factor))


def _frequency(rope: Rope, dim: int, served_length: int) -> Tensor:
    """Radians a position of each rotated pair: ``[dim / 2]``."""
    theta = rope.theta
    if rope.kind == "dynamic":
        # A larger base for the length beyond the original one: NTK-aware scaling, in
        # https://arxiv.org/abs/2309.00071 section 3.3.
        stretch = max(1.0, served_length / rope.original_max_position)
        theta *= (rope.factor * stretch - (rope.factor - 1.0)) ** (dim / (dim - 2))
    frequency: Tensor = 1.0 / theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    match rope.kind:
        case "linear":
            return frequency / rope.factor
        case "longrope":  # https://arxiv.org/abs/2402.13753
            long = served_length > rope.original_max_position
            return frequency / torch.tensor(rope.long_factor if long else rope.short_factor)
        case "llama3":
            return _llama3(rope, frequency)
        case "yarn":
            return _yarn(rope, frequency, dim)
    return frequency


def _llama3(rope: Rope, frequency: Tensor) -> Tensor:
    """Keep the short waves, stretch the long ones, blend between (Llama 3.1's release code)."""
    turns = rope.original_max_position * frequency / (2.0 * math.pi)  # in the original context
    blend = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    kept = blend.clamp(0.0, 1.0)
    return kept * frequency + (1.0 - kept) * frequency / rope.factor


def _yarn(rope: Rope, frequency: Tensor, dim: int) -> Tensor:
    """A ramp over the pairs' numbers: https://arxiv.org/abs/2309.00071 section 3.2."""

    def pair(turns: float) -> float:
        """Where a pair turns this often in the original context."""
        wave = rope.original_max_position / (turns * 2.0 * math.pi)
        return dim * math.log(wave) / (2.0 * math.log(rope.theta))

    low, high = pair(rope.beta_fast), pair(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    width = high - low or 0.001  # a step where both are one
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / width).clamp(0.0, 1.0)
    return ramp * frequency / rope.factor + (1.0 - ramp) * frequency
