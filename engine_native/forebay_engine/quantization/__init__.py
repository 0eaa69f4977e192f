"""Which reader unpacks a quantised checkpoint; each of its layers becomes one ``Matrix``.

What a layer is stored as is seen from its tensors, not from the configuration's lists of modules
to convert or to ignore: those name what a tool was told, the tensors what it did.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from forebay_engine.hf_config import ModelError
from forebay_engine.quantization.awq import Awq
from forebay_engine.quantization.bitsandbytes import BitsAndBytes
from forebay_engine.quantization.compressed_tensors import CompressedTensors
from forebay_engine.quantization.fp8 import BlockFp8
from forebay_engine.quantization.gptq import Gptq
from forebay_engine.quantization.stored import Format

#: ``quant_method`` of config.json -> a reader from ``quantization_config``.
_FORMATS: dict[str, Callable[[dict[str, Any]], Format]] = {
    "awq": Awq,
    "bitsandbytes": lambda settings: BitsAndBytes(),
    "compressed-tensors": CompressedTensors,
    "fbgemm_fp8": BlockFp8,
    "fp8": BlockFp8,
    "gptq": Gptq,
}


def read_format(folder: Path) -> Format | None:
    """How the folder's weights are quantised; None if they are not.

    :raises ModelError: in a way that is not supported.
    """
    path = folder / "config.json"
    if not path.is_file():
        return None
    settings = json.loads(path.read_text(encoding="utf-8")).get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method", "unknown")
    if method not in _FORMATS:
        raise ModelError(
            f"{path}: quant_method {method!r} is not supported (these are: "
            f"{', '.join(sorted(_FORMATS))}); give the unquantised checkpoint and set "
            "quantization: int8, int4 or fp8"
        )
    return _FORMATS[method](settings)
