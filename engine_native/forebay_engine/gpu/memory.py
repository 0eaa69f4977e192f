"""How a GPU's memory is shared out: weights, what a step needs, and the KV cache gets the rest."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

import torch

from forebay_engine.config import EngineConfig
from forebay_engine.errors import StartRefused
from forebay_engine.memory import all_weight_bytes, folder_bytes, mib

log = logging.getLogger(__name__)


class DeviceMemory(Protocol):
    """Bytes of a device's memory."""

    def total(self) -> int: ...

    def free(self) -> int: ...


class CudaMemory:
    """What the driver says; what torch keeps for its next allocations counts as taken."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def free(self) -> int:
        return torch.cuda.mem_get_info(self._device)[0]


@dataclass(frozen=True, slots=True)
class Shares:
    """Of a device's memory, what the engine may take, and what there was before it began."""

    memory: DeviceMemory
    config: EngineConfig
    #: Bytes that others, and the driver, had taken.
    others: int

    @classmethod
    def begin(cls, memory: DeviceMemory, config: EngineConfig) -> Shares:
        """Before anything is read.

        :raises StartRefused: the model can't fit; the message holds the sum and what can be done.
        """
        share = config.gpu_memory_share
        if not 0.0 < share <= 1.0:
            raise StartRefused(f"gpu_memory_share is {share:g}; it must be above 0 and at most 1")
        found = cls(memory, config, memory.total() - memory.free())
        weights, cache = all_weight_bytes(config, on_gpu=True), config.kv_cache_bytes
        there = found.allowed - found.others
        if weights + cache > there:
            raise StartRefused(
                f"{config.model} does not fit into the GPU's memory: {mib(weights)} of weights + "
                f"{mib(cache)} of KV cache = {mib(weights + cache)}, but {mib(there)} are left of "
                f"its {mib(memory.total())}: {mib(found.others)} are taken, and gpu_memory_share "
                f"is {share:g}; lower kv_cache_bytes, raise gpu_memory_share, or choose a smaller "
                "model or quantization: int8"
            )
        return found

    def kv_bytes(self) -> int:
        """What the KV cache can have, once the weights are there and the largest step has run.

        :raises StartRefused: nothing is left.
        """
        total = self.memory.total()
        taken = total - self.memory.free()
        if self.config.draft_model is not None:  # it is read when there are pages for it
            taken += folder_bytes(self.config, self.config.draft_model, on_gpu=True)
        told = (
            f"gpu_memory_share: {self.config.gpu_memory_share:g} of the GPU's {mib(total)} are "
            f"{mib(self.allowed)}; {mib(self.others)} were taken before, and {mib(taken)} with "
            f"weights and steps of {self.config.max_step_tokens} tokens"
        )
        if taken >= self.allowed:
            raise StartRefused(
                f"{told}: nothing is left for the KV cache; lower max_step_tokens, raise "
                "gpu_memory_share, or choose a smaller model or quantization: int8"
            )
        log.info("%s; the KV cache gets %s", told, mib(self.allowed - taken))
        return self.allowed - taken

    @property
    def allowed(self) -> int:
        """Bytes, those of others among them."""
        return int(self.memory.total() * self.config.gpu_memory_share)
