"""Writes a plain checkpoint again in the quantised formats that the engine reads.

Rounding to the nearest, without calibration: this shows that a format is read rightly and what its
grid costs, not what its tool would make of the model. Layouts are those in the docstrings of
``forebay_engine.quantization``.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

Tensors = dict[str, Tensor]

#: The 16 values of nf4 (QLoRA, https://arxiv.org/abs/2305.14314, appendix E) and of fp4 (E2M1 with
#: bitsandbytes' subnormal), by their codes.
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
    -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
    0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
    0.7229568362236023, 1.0,
)  # fmt: skip
FP4 = tuple(
    sign * value
    for sign in (1.0, -1.0)
    for value in (0.0, 0.005208333333, 2 / 3, 1.0, 1 / 3, 0.5, 1 / 6, 0.25)
)


def to_groups(
    weight: Tensor, bits: int, group: int, *, sym: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Levels ``[out, in]``, scale and zero ``[out, groups]`` by the range of each group."""
    grouped, top = weight.reshape(len(weight), -1, group), (1 << bits) - 1
    if sym:
        middle = 1 << (bits - 1)
        scale = (grouped.abs().amax(-1) / (middle - 1)).clamp_min(1e-8).half().float()
        zero = torch.full_like(scale, middle)
    else:
        low, high = grouped.amin(-1).clamp_max(0.0), grouped.amax(-1).clamp_min(0.0)
        scale = ((high - low) / top).clamp_min(1e-6).half().float()
        zero = (-low / scale).round().clamp(0, top)
    levels = (grouped / scale[..., None]).round() + zero[..., None]
    return levels.clamp(0, top).flatten(1).int(), scale, zero.int()


def pack(values: Tensor, bits: int) -> Tensor:
    """``[..., n]`` into int32 ``[..., n * bits / 32]``, the first value lowest."""
    parts = values.long().reshape(*values.shape[:-1], -1, 32 // bits)
    words = (parts << torch.arange(0, 32, bits)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(
    weight: Tensor, *, bits: int = 4, group: int = 128, sym: bool = False, v2: bool = False,
    act_order: bool = False,
) -> Tensors:  # fmt: skip
    """``act_order``: columns by their size, so that those of a group do not lie together."""
    group = weight.shape[1] if group == -1 else group
    order = torch.arange(weight.shape[1])
    if act_order:
        order = weight.abs().sum(0).argsort(descending=True)
    levels, scale, zero = to_groups(weight[:, order], bits, group, sym=sym)
    index = torch.empty(len(order), dtype=torch.int32)
    index[order] = torch.arange(len(order), dtype=torch.int32) // group
    in_place = torch.empty_like(levels)
    in_place[:, order] = levels
    stored = zero if v2 else (zero - 1) & ((1 << bits) - 1)
    return {
        "qweight": pack(in_place, bits).T.contiguous(),
        "qzeros": pack(stored.T.contiguous(), bits),
        "scales": scale.T.half().contiguous(),
        "g_idx": index,
    }


def awq(weight: Tensor, *, group: int = 128) -> Tensors:
    levels, scale, zero = to_groups(weight, 4, group)

    def interleaved(values: Tensor) -> Tensor:  # [n, out]
        eights = values.reshape(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]]
        return pack(eights.flatten(-2), 4)

    return {
        "qweight": interleaved(levels.T),
        "qzeros": interleaved(zero.T),
        "scales": scale.T.half().contiguous(),
    }


def bnb4(weight: Tensor, *, kind: str = "nf4", double: bool = True) -> Tensors:
    block, nested_block = 64, 256
    code = torch.tensor(NF4 if kind == "nf4" else FP4)
    blocks = torch.split(weight.flatten(), block)
    absmax = torch.stack([values.abs().max() for values in blocks]).float()
    wide = absmax.repeat_interleave(block)[: weight.numel()].clamp_min(1e-12)
    ordered = code.sort()
    middles = (ordered.values[1:] + ordered.values[:-1]) / 2
    codes = ordered.indices[torch.bucketize(weight.flatten() / wide, middles)]
    state: dict[str, Any] = {
        "quant_type": kind, "blocksize": block, "dtype": "float32", "shape": list(weight.shape),
    }  # fmt: skip
    found = {
        "weight": (codes[0::2] << 4 | codes[1::2]).to(torch.uint8)[:, None],
        "weight.quant_map": code,
        "weight.absmax": absmax,
    }
    if double:
        offset = absmax.mean()
        nested = torch.stack(
            [part.abs().max() for part in torch.split(absmax - offset, nested_block)]
        )
        levels = torch.linspace(-1.0, 1.0, 256)
        each = nested.repeat_interleave(nested_block)[: len(absmax)].clamp_min(1e-12)
        places = torch.bucketize((absmax - offset) / each, (levels[1:] + levels[:-1]) / 2)
        found |= {
            "weight.absmax": places.to(torch.uint8),
            "weight.nested_absmax": nested,
            "weight.nested_quant_map": levels,
        }
        state |= {
            "nested_blocksize": nested_block, "nested_dtype": "float32",
            "nested_offset": float(offset),
        }  # fmt: skip
    text = json.dumps(state).encode()
    found[f"weight.quant_state.bitsandbytes__{kind}"] = torch.tensor(list(text), dtype=torch.uint8)
    return found


def bnb8(weight: Tensor) -> Tensors:
    most = weight.abs().amax(1).float()
    levels = (weight * (127.0 / most[:, None])).round().to(torch.int8)
    return {"weight": levels, "SCB": most, "weight_format": torch.tensor(0, dtype=torch.uint8)}


def fp8(weight: Tensor, *, per: str = "tensor", name: str = "weight_scale") -> Tensors:
    """``per``: ``tensor``, ``channel``, or ``block`` of 128 by 128."""
    out, into = weight.shape
    if per == "tensor":
        scale = weight.abs().max().reshape(1) / 448.0
        wide = scale[:, None]
    elif per == "channel":
        scale = wide = weight.abs().amax(1, keepdim=True) / 448.0
    else:
        rows, columns = -(-out // 128), -(-into // 128)
        padded = torch.zeros(rows * 128, columns * 128)
        padded[:out, :into] = weight
        scale = padded.reshape(rows, 128, columns, 128).abs().amax((1, 3)) / 448.0
        wide = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:out, :into]
    return {"weight": (weight / wide).to(torch.float8_e4m3fn), name: scale}


def ct_int8(weight: Tensor) -> Tensors:
    scale = weight.abs().amax(1, keepdim=True) / 127.0
    return {"weight": (weight / scale).round().to(torch.int8), "weight_scale": scale}


def ct_packed(weight: Tensor, *, bits: int = 4, group: int = 128, sym: bool = True) -> Tensors:
    levels, scale, zero = to_groups(weight, bits, group, sym=sym)
    found = {
        "weight_packed": pack(levels, bits),
        "weight_scale": scale,
        "weight_shape": torch.tensor(weight.shape),
    }
    if not sym:
        found["weight_zero_point"] = pack(zero.T.contiguous(), bits).T.contiguous()
    return found


#: How the names of layers end; Mixtral's experts have w1, w2 and w3.
_PROJECTIONS = ("_proj", "lm_head", ".w1", ".w2", ".w3")


def rewrite(
    folder: Path, target: Path, config: dict[str, Any], encode: Callable[[Tensor], Tensors]
) -> Path:
    """``folder`` with every projection's weight encoded; the rest as it is, in ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".json", ".jinja") and not path.name.endswith(".index.json"):
            shutil.copy(path, target / path.name)
    data = json.loads((folder / "config.json").read_text())
    if config:
        data["quantization_config"] = config
    (target / "config.json").write_text(json.dumps(data))
    tensors: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names: list[str] = file.keys()
            for name in names:
                tensor = file.get_tensor(name)
                layer, _, last = name.rpartition(".")
                if last == "weight" and layer.endswith(_PROJECTIONS):
                    tensors |= {f"{layer}.{k}": v for k, v in encode(tensor.float()).items()}
                else:
                    tensors[name] = tensor
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target


def _ct(format: str) -> dict[str, Any]:
    return {"quant_method": "compressed-tensors", "format": format, "config_groups": {}}


_BLOCKS = {"quant_method": "fp8", "weight_block_size": [128, 128]}
_GPTQ: dict[str, Any] = {"quant_method": "gptq"}


def encodings(group: int) -> dict[str, tuple[dict[str, Any], Callable[[Tensor], Tensors]]]:
    """By name: config.json's ``quantization_config`` and how a weight is stored."""
    return {
        "gptq 4 bits": (_GPTQ, lambda w: gptq(w, group=group)),
        "gptq 4 bits, symmetric, v2": (
            {**_GPTQ, "checkpoint_format": "gptq_v2"},
            lambda w: gptq(w, group=group, sym=True, v2=True),
        ),
        "gptq 4 bits, act-order": (_GPTQ, lambda w: gptq(w, group=group, act_order=True)),
        "gptq 8 bits": (_GPTQ, lambda w: gptq(w, bits=8, group=group)),
        "gptq 4 bits, one group": (_GPTQ, lambda w: gptq(w, group=-1)),
        "awq": ({"quant_method": "awq", "version": "gemm"}, lambda w: awq(w, group=group)),
        "bitsandbytes nf4": ({"quant_method": "bitsandbytes"}, lambda w: bnb4(w, double=False)),
        "bitsandbytes nf4, double": ({"quant_method": "bitsandbytes"}, bnb4),
        "bitsandbytes fp4": ({"quant_method": "bitsandbytes"}, lambda w: bnb4(w, kind="fp4")),
        "bitsandbytes int8": ({"quant_method": "bitsandbytes"}, bnb8),
        "fp8 per tensor": ({"quant_method": "fp8"}, fp8),
        "fp8 per channel": (_ct("float-quantized"), lambda w: fp8(w, per="channel")),
        "fp8 blocks": (_BLOCKS, lambda w: fp8(w, per="block", name="weight_scale_inv")),
        "compressed-tensors int8": (_ct("int-quantized"), ct_int8),
        "compressed-tensors w4a16": (_ct("pack-quantized"), lambda w: ct_packed(w, group=group)),
        "compressed-tensors w4a16, zeros": (
            _ct("pack-quantized"), lambda w: ct_packed(w, group=group, sym=False)
        ),
        "compressed-tensors w8a16": (
            _ct("pack-quantized"), lambda w: ct_packed(w, bits=8, group=group)
        ),
    }  # fmt: skip
