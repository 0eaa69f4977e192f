"""Embeddings are the pooled hidden states of transformers, however the work is cut."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.errors import RequestRefused, StartRefused
from forebay_engine.pooling import settle_pooling
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.wire import Done, Embed, Event, Generate

Checkpoint = Callable[[str], Path]

SHARED = [5 + (7 * i) % 370 for i in range(40)]
INPUTS = [[2, 17, 200], SHARED, [*SHARED, 9, 8, 7], [300], SHARED[:33]]

CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small chunks": {"max_step_tokens": 7},
    "no prefix cache": {"prefix_cache": False, "max_step_tokens": 16},
}


def expected(folder: Path, pooling: str) -> list[np.ndarray[Any, Any]]:
    import transformers as hf

    model: Any = hf.AutoModel.from_pretrained(folder, dtype=torch.float32)
    found = []
    for tokens in INPUTS:
        with torch.no_grad():
            hidden = model(torch.tensor([tokens])).last_hidden_state[0]
        vector = hidden.mean(0) if pooling == "mean" else hidden[-1]
        found.append((vector / vector.norm()).numpy())
    return found


@asynccontextmanager
async def embedding(folder: Path, **settings: Any) -> AsyncIterator[Engine]:
    config = replace(
        EngineConfig(model=str(folder), dtype="float32", kv_cache_bytes=4 << 20, threads=1),
        **settings,
    )
    engine = Engine(Runner(config), Tokenizer.from_folder(folder), None, config)
    stepping = asyncio.create_task(engine.run())
    try:
        yield engine
        engine.scheduler.check()
        assert engine.scheduler.cache.in_use == 0
        assert engine.scheduler.running == engine.scheduler.waiting == 0
        assert not stepping.done(), stepping.exception()
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_vectors_are_those_of_transformers(
    tiny_checkpoint: Checkpoint, pooling: str, cut: str
) -> None:
    folder = tiny_checkpoint("qwen3")
    want = expected(folder, pooling)
    async with embedding(folder, pooling=pooling, **CUTS[cut]) as engine:
        for _ in range(2):  # the second time with a filled cache
            found = await engine.embed(Embed(inputs=list(INPUTS)))
            vectors = [np.frombuffer(vector, "<f4") for vector in found.vectors]
            for vector, wanted in zip(vectors, want, strict=True):
                np.testing.assert_allclose(vector, wanted, atol=1e-5)
            assert found.prompt_tokens == sum(map(len, INPUTS))


@pytest.mark.parametrize("pooling", ["last", "mean"])
async def test_an_older_answer_takes_the_pages_and_the_text_starts_over(
    tiny_checkpoint: Checkpoint, pooling: str
) -> None:
    folder = tiny_checkpoint("llama")
    small = {"block_size": 4, "num_blocks": 14, "max_step_tokens": 2}
    async with embedding(folder, pooling=pooling, **small) as engine:
        done = asyncio.Event()
        events: list[Event] = []

        def emit(event: Event) -> None:
            events.append(event)
            if isinstance(event, Done):
                done.set()

        sampling = SamplingParams(temperature=0.0, max_tokens=30, ignore_eos=True)
        await engine.submit(Generate(prompts=[[2, 3, 4]], sampling=sampling), emit)
        found = await engine.embed(Embed(inputs=["the wheel turns", SHARED]))
        await done.wait()
        np.testing.assert_allclose(
            np.frombuffer(found.vectors[1], "<f4"), expected(folder, pooling)[1], atol=1e-5
        )
        assert isinstance(events[-1], Done)
        assert events[-1].completion_tokens == 30
        assert engine.scheduler.counters.preempted > 0


async def test_who_leaves_frees_what_he_held(tiny_checkpoint: Checkpoint) -> None:
    async with embedding(tiny_checkpoint("llama"), pooling="last", max_step_tokens=1) as engine:
        leaving = asyncio.create_task(engine.embed(Embed(inputs=[SHARED, SHARED[::-1]])))
        while not engine.scheduler.cache.in_use:
            await asyncio.sleep(0)
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        await engine.embed(Embed(inputs=[[3]]))


@pytest.mark.parametrize(
    ("inputs", "message", "param"),
    [
        ([], "no input", "input"),
        ([[]], "has 0 tokens; it must have 1 to 512", "input"),
        ([[1], [3] * 513], "has 513 tokens; it must have 1 to 512", "input"),
        ([[384]], "token id 384 is outside", "input"),
    ],
)
async def test_refusals_name_the_field(
    tiny_checkpoint: Checkpoint, inputs: list[str | list[int]], message: str, param: str
) -> None:
    async with embedding(tiny_checkpoint("llama"), pooling="last") as engine:
        with pytest.raises(RequestRefused, match=message) as refusal:
            await engine.embed(Embed(inputs=inputs))
        assert refusal.value.param == param


async def test_a_decoder_without_its_head_embeds_and_does_nothing_else(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    import transformers as hf

    whole = tiny_checkpoint("gemma3")
    model: Any = hf.AutoModel.from_pretrained(whole, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    shutil.copy(whole / "tokenizer.json", tmp_path)
    with pytest.raises(StartRefused, match="no output layer"):
        async with embedding(tmp_path):
            pass
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    async with embedding(tmp_path) as engine:
        found = await engine.embed(Embed(inputs=list(INPUTS)))
        for vector, wanted in zip(found.vectors, expected(whole, "mean"), strict=True):
            np.testing.assert_allclose(np.frombuffer(vector, "<f4"), wanted, atol=1e-5)
        with pytest.raises(RequestRefused, match="embeddings only"):
            await engine.submit(Generate(prompts=["a"]), lambda event: None)


async def test_a_model_that_writes_gives_no_embeddings_unasked(tiny_checkpoint: Checkpoint) -> None:
    async with embedding(tiny_checkpoint("llama")) as engine:
        with pytest.raises(RequestRefused, match="set pooling to last or mean"):
            await engine.embed(Embed(inputs=["a"]))


def test_the_folder_says_how_to_pool(tmp_path: Path) -> None:
    assert settle_pooling("auto", tmp_path) is None
    (tmp_path / "1_Pooling").mkdir()
    file = tmp_path / "1_Pooling" / "config.json"
    for name, pooling in [("mean_tokens", "mean"), ("lasttoken", "last")]:
        modes = {"pooling_mode_cls_token": False, f"pooling_mode_{name}": True}
        file.write_text(json.dumps({"word_embedding_dimension": 64, **modes}))
        assert settle_pooling("auto", tmp_path) == pooling
    assert settle_pooling("mean", tmp_path) == "mean"
    assert settle_pooling("none", tmp_path) is None
    file.write_text(json.dumps({"pooling_mode_cls_token": True}))
    with pytest.raises(StartRefused, match="pooling_mode_cls_token is on"):
        settle_pooling("auto", tmp_path)
    with pytest.raises(StartRefused, match="not one of auto, none, last, mean"):
        settle_pooling("max", tmp_path)
