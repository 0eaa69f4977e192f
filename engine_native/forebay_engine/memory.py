"""Whether a model fits into this machine's memory, found out before any of it is read.

A process that outgrows its memory is killed without a word, or drags the machine into swapping; a
refusal with the sum is better.
"""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path

from forebay_engine.config import EngineConfig
from forebay_engine.errors import StartRefused

#: Interpreter and libraries, about; measured with torch 2.13 on CPU.
_PROGRAM_BYTES = 400 << 20
_BYTES = {"float32": 4, "bfloat16": 2}
#: Bytes of an element as stored, by safetensors' names of types.
_STORED = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1}


def refuse_what_does_not_fit(config: EngineConfig, available: int | None = None) -> None:
    """Compare weights and KV cache with the memory that is left.

    :raises StartRefused: they don't fit; the message holds the sum and what can be done.
    """
    available = available_bytes() if available is None else available
    if available is None:
        return
    weights = weight_bytes(Path(config.model), config.dtype)
    needed = weights + config.kv_cache_bytes + _PROGRAM_BYTES
    if needed > available:
        raise StartRefused(
            f"{config.model} does not fit into memory: {_mib(weights)} of weights + "
            f"{_mib(config.kv_cache_bytes)} of KV cache + {_mib(_PROGRAM_BYTES)} for the program = "
            f"{_mib(needed)}, but {_mib(available)} are available; "
            "lower kv_cache_bytes, or choose a smaller model or dtype"
        )


def weight_bytes(folder: Path, dtype: str) -> int:
    """Bytes of all tensors in a folder's safetensors files, once they have this ``dtype``."""
    return sum(_tensor_bytes(path, dtype) for path in folder.glob("*.safetensors"))


def available_bytes() -> int | None:
    """Memory that can be taken without swapping, of the machine or of its control group."""
    meminfo = Path("/proc/meminfo")
    if not meminfo.is_file():
        return None
    found = re.search(r"^MemAvailable:\s+(\d+) kB", meminfo.read_text(), re.MULTILINE)
    machine = int(found[1]) << 10 if found else None
    group = _group_bytes(Path("/sys/fs/cgroup"))
    return min((limit for limit in (machine, group) if limit is not None), default=None)


def _group_bytes(group: Path) -> int | None:
    """What a version 2 control group has left; its page cache can be given back."""
    limit, stat = group / "memory.max", group / "memory.stat"
    if not limit.is_file() or (most := limit.read_text().strip()) == "max":
        return None
    cache = re.search(r"^inactive_file (\d+)", stat.read_text(), re.MULTILINE)
    used = int((group / "memory.current").read_text())
    return int(most) - used + (int(cache[1]) if cache else 0)


def _tensor_bytes(path: Path, dtype: str) -> int:
    """From the header alone: a JSON object behind its length (safetensors' format)."""
    with path.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return sum(
        math.prod(tensor["shape"]) * _BYTES.get(dtype, _STORED.get(tensor["dtype"], 4))
        for tensor in header.values()
    )


def _mib(amount: int) -> str:
    return f"{amount / (1 << 20):,.0f} MiB"
