"""Greedy decoding by hand: a runner's steps in any cut, and transformers beside it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Iterable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from forebay_engine.config import EngineConfig
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, Sampled, StepPlan

Tensors = dict[str, torch.Tensor]

GREEDY = SamplingParams(temperature=0.0)


class Decoding:
    """Sequences over shuffled pages, run by a runner in steps of any cut."""

    def __init__(self, runner: Runner, prompts: list[list[int]], sampling: SamplingParams) -> None:
        self.runner = runner
        self.prompts = prompts
        self.tokens = [list(prompt) for prompt in prompts]
        self.done = [0] * len(prompts)
        self.sampling = sampling
        pages = list(range(runner.cache_groups[0].num_blocks))
        random.Random(7).shuffle(pages)
        share = len(pages) // len(prompts)
        self.pages = [pages[i * share : (i + 1) * share] for i in range(len(prompts))]

    def step(self, counts: dict[int, int]) -> dict[int, Sampled]:
        """Run ``counts[i]`` tokens of sequence ``i``; what was drawn, by sequence."""
        order = sorted(counts, key=lambda i: counts[i] != 1)
        rows = tuple(self._row(i, counts[i]) for i in order)
        result = self.runner.execute(StepPlan(rows))
        drawn = {sampled.seq_id: sampled for sampled in result.sampled}
        assert list(drawn) == [row.seq_id for row in rows if row.sample]
        for i, count in counts.items():
            self.done[i] += count
        for i, sampled in drawn.items():
            self.tokens[i].append(sampled.token_id)
        return drawn

    def _row(self, i: int, count: int) -> Row:
        end = self.done[i] + count
        table = self.pages[i][: -(-end // self.runner.block_size)]
        return Row(
            seq_id=i,
            token_ids=self.tokens[i],
            start=self.done[i],
            count=count,
            block_tables=(table,) * len(self.runner.cache_groups),
            sample=end == len(self.tokens[i]),
            sampling=self.sampling,
            num_prompt=len(self.prompts[i]),
        )

    def finish(self, length: int, chunk: int = 1 << 30) -> list[list[int]]:
        """Run to ``length`` answer tokens each, prompts in chunks; the answers."""
        while waiting := [i for i, t in enumerate(self.tokens) if self._answer(t, i) < length]:
            self.step({i: min(chunk, len(self.tokens[i]) - self.done[i]) for i in waiting})
        return [t[len(p) :] for t, p in zip(self.tokens, self.prompts, strict=True)]

    def _answer(self, tokens: list[int], i: int) -> int:
        return len(tokens) - len(self.prompts[i])


def tiny_runner(folder: Path, **settings: Any) -> Runner:
    config: dict[str, Any] = {"num_blocks": 64, "block_size": 8, "max_model_len": 512, "threads": 1}
    return Runner(EngineConfig(model=str(folder), **{**config, **settings}))


def prompts(*lengths: int) -> list[list[int]]:
    random_ids = random.Random(3)
    return [[random_ids.randrange(5, 384) for _ in range(length)] for length in lengths]


def reference_model(folder: Path, dtype: torch.dtype) -> Any:
    hf: Any = import_module("transformers")  # untyped calls
    hf.utils.logging.disable_progress_bar()
    return hf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def reference_logprobs(model: Any, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits: torch.Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, -1]
    return logits.float().log_softmax(-1)


def assert_greedy(
    model: Any, asked: list[list[int]], answers: list[list[int]], slack: float = 0.0
) -> None:
    """At each place of each answer no token is likelier: it is the model's greedy chain.

    ``slack``: by how much a logit may be behind the highest, where both sides round.
    """
    for prompt, answer in zip(asked, answers, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer]), use_cache=False).logits[0].float()
        logits = logits[len(prompt) - 1 : -1]
        behind = logits.amax(-1) - logits.gather(1, torch.tensor(answer).unsqueeze(1))[:, 0]
        assert float(behind.max()) <= slack, behind.tolist()


def restored(source: Path, target: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    save_file(change(tensors), target / "model.safetensors", {"format": "pt"})
    return target


def rewritten(source: Path, target: Path, change: dict[str, Any], drop: Iterable[str] = ()) -> Path:
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    config.update(change)
    for key in drop:
        del config[key]
    (target / "config.json").write_text(json.dumps(config))
    return target
