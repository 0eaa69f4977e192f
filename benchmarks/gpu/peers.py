"""What others make of the same shapes on the same card, where they are installed."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rows import Row


def transformers(folder: Path, name: str, device: torch.device, length: int) -> Iterator[Row]:
    """``generate`` alone, greedy, with its own cache."""
    from transformers import AutoModelForCausalLM

    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    model = loaded.to(device)
    prompt = torch.randint(2, 90, (1, length), device=device)

    def took(tokens: int) -> float:
        begin = time.perf_counter()
        model.generate(
            prompt, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
        )
        return time.perf_counter() - begin

    took(4)
    rate = 64 / (took(68) - took(4))
    yield Row(f"transformers, {name}: 1 x {length} tokens, decoding", rate, "tok/s")


def vllm(folder: Path, name: str, length: int) -> Iterator[Row]:
    """Its own benchmark of offline serving: one stream, and 256 requests at once."""
    if importlib.util.find_spec("vllm") is None:
        yield Row(f"vllm, {name}", None, "", note="not measured: vllm is not installed")
        return
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    engine: Any = LLM(str(folder), skip_tokenizer_init=True, max_model_len=8192)
    for rows, tokens in ((1, 128), (256, 128)):
        prompts = [
            {"prompt_token_ids": torch.randint(2, 9000, (length,)).tolist()} for _ in range(rows)
        ]
        spent = []
        for wanted in (1, 1 + tokens):
            sampling = SamplingParams(temperature=0.0, max_tokens=wanted, ignore_eos=True)
            sampling.detokenize = False
            begin = time.perf_counter()
            engine.generate(prompts, sampling, use_tqdm=False)
            spent.append(time.perf_counter() - begin)
        rate = rows * tokens / (spent[1] - spent[0])
        yield Row(f"vllm, {name}: {rows} x {length} tokens, decoding", rate, "tok/s")
