"""transformers' `generate` over one batch, for benchmarks/engine_cpu.py.

Reads {model, threads, prompts, tokens} as JSON from standard input, and writes {seconds,
cpu_seconds, memory}. The batch runs once with few tokens before it is timed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    asked = json.load(sys.stdin)
    torch.set_num_threads(asked["threads"])
    # Any: its signature has a type for each way of generating.
    model: Any = AutoModelForCausalLM.from_pretrained(asked["model"], dtype=torch.bfloat16)
    prompts, tokens = torch.tensor(asked["prompts"]), asked["tokens"]

    def generate(tokens: int) -> None:
        found = model.generate(
            prompts,
            attention_mask=torch.ones_like(prompts),
            do_sample=False,
            min_new_tokens=tokens,
            max_new_tokens=tokens,
        )
        if found.shape[1] != prompts.shape[1] + tokens:
            raise SystemExit(f"{found.shape[1] - prompts.shape[1]} tokens, not {tokens}")

    generate(2)
    begin, cpu = time.perf_counter(), time.process_time()
    generate(tokens)
    seconds, cpu = time.perf_counter() - begin, time.process_time() - cpu
    memory = psutil.Process().memory_full_info().pss
    print(json.dumps({"seconds": seconds, "cpu_seconds": cpu, "memory": memory}))


if __name__ == "__main__":
    main()
