"""The runner for GPUs draws the tokens of the plain one, whatever it records, pads and replays.

Here it runs on a processor; in place of CUDA's graphs there is what holds a recorded step to their
discipline (``fakes/replaying.py``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from msgspec import structs

import forebay_kernels
from forebay_engine.config import EngineConfig
from forebay_engine.engine import Engine
from forebay_engine.gpu.runner import DeviceRunner
from forebay_engine.runner import Runner
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, StepPlan
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.watermark import Watermark
from forebay_engine.wire import Done, Event, Failed, Generate, Output
from forebay_kernels import dispatch
from forebay_kernels.sampling import Drawn
from replaying import Calls, CheckingRecorder

CPU = torch.device("cpu")
SHARED = [5 + (7 * i) % 370 for i in range(40)]
PROMPTS = [[2, 17, 200], SHARED, [*SHARED, 9, 8, 7], [*SHARED, 9, 9], [300], SHARED[:33]]
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(temperature=0.9, top_p=0.9, max_tokens=12, ignore_eos=True)

Checkpoint = Callable[[str], Path]


def settings(folder: Path, **own: Any) -> EngineConfig:
    common = {"dtype": "float32", "max_model_len": 72, "kv_cache_bytes": 1 << 20, "threads": 1}
    return EngineConfig(model=str(folder), **{"max_sequences": 6, **common, **own})


def on_device(config: EngineConfig) -> tuple[DeviceRunner, CheckingRecorder]:
    recorder = CheckingRecorder()
    runner = DeviceRunner(config, device=CPU, recorder=recorder, memory=None)
    runner.warm_up()
    return runner, recorder


async def answers(
    runner: Any, config: EngineConfig, sampling: SamplingParams, choices: int = 1
) -> list[list[int]]:
    """Of each prompt its choices: one alone at first, then all others, one of them given up."""
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())
    found: dict[int, list[list[int]]] = {}

    async def ask(number: int, until: int | None = None) -> None:
        tokens = found[number] = [[] for _ in range(choices)]
        enough = asyncio.Event()

        def emit(event: Event) -> None:
            assert not isinstance(event, Failed), event
            if isinstance(event, Output):
                tokens[event.index] += event.token_ids
            if isinstance(event, Done) or (until and len(tokens[0]) >= until):
                enough.set()

        command = Generate(prompts=[PROMPTS[number]], n=choices, seed=number, sampling=sampling)
        request = await engine.submit(command, emit)
        await enough.wait()
        engine.abort(request)

    async def ask_all() -> None:
        await ask(0, until=4)
        given_up = asyncio.create_task(ask(1, until=3))
        await asyncio.gather(*(ask(number) for number in range(2, len(PROMPTS))), given_up)
        await asyncio.gather(*(ask(number) for number in (0, 1)))

    try:
        asked = asyncio.create_task(ask_all())
        await asyncio.wait([stepping, asked], return_when=asyncio.FIRST_COMPLETED)
        if stepping.done():
            stepping.result()
        asked.result()
    finally:
        stepping.cancel()
        await asyncio.gather(stepping, return_exceptions=True)
        engine.scheduler.check()
    return [tokens for number in sorted(found) for tokens in found[number]]


CUTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "small chunks": {"max_step_tokens": 9, "max_sequences": 5},
    "preempted": {"block_size": 4, "num_blocks": 20},
    "no prefix cache": {"prefix_cache": False, "block_size": 5},
}
#: The device draws all but the last, which the host draws from its logits.
DRAWS = {
    "greedy": GREEDY,
    "drawn": DRAWN,
    "penalised": SamplingParams(
        temperature=0.8,
        top_k=20,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        repetition_penalty=1.2,
        logit_bias={5: 2.0, 9: -3.0},
        min_tokens=12,
        max_tokens=12,
    ),
    "green": replace(DRAWN, watermark=Watermark(key=b"k" * 32, context=2)),
    "marked noise": replace(
        DRAWN, watermark=Watermark(scheme="gumbel", key=b"k" * 32, context=1), presence_penalty=0.1
    ),
    "masked": replace(DRAWN, allowed_token_ids=tuple(range(5, 90))),
    "typical": replace(DRAWN, typical_p=0.7),
}
CASES = [
    ("llama", "plain", "greedy"),
    ("llama", "preempted", "penalised"),
    ("llama", "small chunks", "typical"),
    ("gemma3", "preempted", "drawn"),
    ("gemma3", "no prefix cache", "greedy"),
    ("gemma3", "small chunks", "marked noise"),
    ("llama", "preempted", "green"),
    ("qwen3", "small chunks", "masked"),
]


@pytest.mark.parametrize(("family", "cut", "draw"), CASES)
async def test_tokens_are_those_of_the_plain_runner(
    family: str, cut: str, draw: str, tiny_checkpoint: Checkpoint
) -> None:
    config = settings(tiny_checkpoint(family), **CUTS[cut])
    runner, recorder = on_device(config)
    sampling = DRAWS[draw]
    assert runner.takes_unknown(sampling) == (draw != "typical")
    expected = await answers(Runner(config), config, sampling)
    assert await answers(runner, config, sampling) == expected
    assert sum(count > 0 for count in recorder.replays) > 2


async def test_choices_log_probabilities_and_guesses_are_those_of_the_plain_runner(
    tiny_checkpoint: Checkpoint,
) -> None:
    config = settings(tiny_checkpoint("gemma3"))
    runner, _ = on_device(config)
    plain = Runner(config)
    sampling = replace(DRAWN, logprobs=2)
    assert await answers(runner, config, sampling, 2) == await answers(plain, config, sampling, 2)
    for one_group in (
        decode(1, [2, 8, 9, 4], 0, [1], count=4, sampling=replace(GREEDY, logprobs=3)),
        decode(2, [2, 8, 9, 4], 0, [2], count=6, draft=(7, 7), sampling=GREEDY),
        decode(3, [2, 8, 9], 0, [3], count=3, sample=False, pooling="mean"),
        decode(4, [2, 8, 9], 0, [4], count=3, sampling=replace(GREEDY, prompt_logprobs=1)),
    ):
        row = structs.replace(one_group, block_tables=one_group.block_tables * 2)
        expected, found = plain.execute(StepPlan((row,))), runner.execute(StepPlan((row,)))
        assert [item.token_id for item in found.sampled] == [i.token_id for i in expected.sampled]
        for one, other in zip(found.sampled, expected.sampled, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-5)
            assert [id for id, _ in one.top] == [id for id, _ in other.top]
        assert [item.token_id for item in found.prompt] == [i.token_id for i in expected.prompt]
        for mine, theirs in zip(found.pooled, expected.pooled, strict=True):
            assert mine.vector == pytest.approx(theirs.vector, abs=1e-4)


def decode(seq_id: int, tokens: list[int], start: int, pages: list[int], **own: Any) -> Row:
    whole = {"count": 1, "sample": True, "sampling": GREEDY, "num_prompt": len(tokens)}
    return Row(
        seq_id=seq_id, token_ids=tokens, start=start, block_tables=(pages,), **{**whole, **own}
    )


@pytest.fixture(scope="module")
def llama(tiny_checkpoint: Checkpoint) -> tuple[Runner, DeviceRunner, CheckingRecorder]:
    """A plain runner and one for a device, over the same weights."""
    config = settings(tiny_checkpoint("llama"), block_size=4)
    return Runner(config), *on_device(config)


def test_a_token_that_nobody_knows_yet_comes_from_the_table(
    llama: tuple[Runner, DeviceRunner, CheckingRecorder],
) -> None:
    """Three sequences one step ahead, of which the second leaves and another takes its place."""
    plain, runner, recorder = llama
    prompts = {1: [2, 8, 9, 4], 2: [2, 5], 3: [2, 7, 7], 4: [9, 9]}
    expected = {id: alone(plain, prompt) for id, prompt in prompts.items()}
    before = sum(recorder.replays)
    known = {id: list(tokens) for id, tokens in prompts.items()}
    pages = {id: list(range(6 * id, 6 * id + 6)) for id in prompts}

    def row(id: int, unknown: bool) -> Row:
        start = len(known[id]) if unknown else 0
        count = 1 if unknown else len(known[id])
        return decode(id, known[id], start, pages[id], count=count, unknown=int(unknown))

    last = runner.launch(StepPlan(tuple(row(id, False) for id in (1, 2, 3))))
    for number in range(6):
        there = (1, 2, 3) if number < 2 else (1, 3) if number < 4 else (1, 3, 4)
        new = number == 4
        rows = [row(id, not (new and id == 4)) for id in there]
        following = runner.launch(StepPlan(tuple(sorted(rows, key=lambda r: r.count > 1))))
        for item in last.result().sampled:
            known[item.seq_id].append(item.token_id)
        last = following
    for item in last.result().sampled:
        known[item.seq_id].append(item.token_id)
    for id, tokens in known.items():
        assert tokens == expected[id][: len(tokens)], id
        assert len(tokens) > len(prompts[id])
    assert sum(recorder.replays) == before + 5
    gone = decode(2, known[2], len(known[2]), pages[2], unknown=1)
    with pytest.raises(ValueError, match="sequence 2: the last step drew no token for it"):
        runner.launch(StepPlan((gone,)))


def alone(
    runner: Runner, prompt: list[int], sampling: SamplingParams = GREEDY, id: int = 1
) -> list[int]:
    tokens = list(prompt)
    for _ in range(8):
        row = decode(id, list(tokens), 0, list(range(12, 18)), count=len(tokens))
        row = structs.replace(row, sampling=sampling, num_prompt=len(prompt))
        tokens.append(runner.execute(StepPlan((row,))).sampled[0].token_id)
    return tokens


def test_pages_of_another_time_are_not_read(
    llama: tuple[Runner, DeviceRunner, CheckingRecorder],
) -> None:
    """A sequence that was left out of a step comes back with other pages; so does a failed one."""
    plain, runner, _ = llama
    prompt = [2, 8, 9, 4, 6, 5, 7]
    expected = alone(plain, prompt)
    other = decode(2, [3, 3], 0, [11], count=2)
    runner.execute(StepPlan((decode(1, prompt, 0, [20, 21], count=7),)))
    runner.execute(StepPlan((other,)))
    again = runner.execute(StepPlan((decode(1, prompt, 0, [31, 32], count=7),)))
    assert again.sampled[0].token_id == expected[7]
    broken = decode(3, [1, 2], 0, [-1], count=2)
    with pytest.raises(ValueError, match="sequence 3"):
        runner.execute(StepPlan((broken,)))
    moved = runner.execute(StepPlan((decode(1, prompt, 0, [41, 42], count=7),)))
    assert moved.sampled[0].token_id == expected[7]


def test_what_a_failed_step_told_is_told_again(
    llama: tuple[Runner, DeviceRunner, CheckingRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, runner, _ = llama
    prompt = [2, 8, 9, 4, 6, 5, 7]
    plan = StepPlan((decode(5, prompt, 0, [23, 24], count=7),))

    def fail(*args: Any) -> None:
        raise RuntimeError("lost")

    with monkeypatch.context() as patch:
        patch.setattr(runner._inputs, "send", fail)
        with pytest.raises(RuntimeError, match="lost"):
            runner.execute(plan)
    assert runner.execute(plan).sampled[0].token_id == alone(plain, prompt)[7]


def test_counts_begin_anew_with_a_sequence(
    llama: tuple[Runner, DeviceRunner, CheckingRecorder],
) -> None:
    _, runner, _ = llama
    runner._table.sampling.counts.fill_(7)
    sampling = replace(GREEDY, presence_penalty=0.5)
    runner.execute(StepPlan((decode(6, [2, 8], 0, [25], count=2, sampling=sampling),)))
    lines = (runner._table.sampling.counts == 0).all(1)
    assert lines.tolist().count(True) == 1


def test_what_a_graph_would_not_follow_is_seen() -> None:
    static = torch.zeros(4)
    changing: dict[str, Any] = {"number": 2.0, "tensor": torch.ones(4)}
    steps: dict[str, Callable[[], Any]] = {
        "number": lambda: static.mul_(changing["number"]),
        "tensor": lambda: static.add_(changing["tensor"]),
    }
    for name, step in steps.items():
        replay = CheckingRecorder().record(step)
        replay()
        changing[name] = changing[name] + 1
        with pytest.raises(AssertionError, match=r"recorded .* but replayed"):
            replay()
    for inference in (False, True):  # the runner's steps are run in it
        for ask in (lambda: static.sum().item(), lambda: bool(static[0] == 1.0)):
            with (
                torch.inference_mode(inference),
                pytest.raises(AssertionError, match="a recorded step must not call"),
            ):
                CheckingRecorder().record(ask)


def test_more_changes_than_one_copy_takes_are_told_as_well(
    llama: tuple[Runner, DeviceRunner, CheckingRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, runner, _ = llama
    prompt = [2, 8, 9, 4, 6, 5, 7]
    monkeypatch.setattr("forebay_engine.gpu.inputs._CHANGES", 3)
    found = runner.execute(StepPlan((decode(77, prompt, 0, [51, 22], count=7),)))
    assert found.sampled[0].token_id == alone(plain, prompt)[7]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (39, "39 rows in a step, where 32 are the most"),
        (1, "a step of 600 tokens; 512 are the most"),
    ],
)
def test_steps_that_are_too_large_are_refused(
    rows: int, message: str, llama: tuple[Runner, DeviceRunner, CheckingRecorder]
) -> None:
    tokens = [1] * (600 if rows == 1 else 1)
    pages = list(range(150))
    plan = StepPlan(tuple(decode(i, tokens, 0, pages, count=len(tokens)) for i in range(rows)))
    with pytest.raises(ValueError, match=message):
        llama[1].execute(plan)


def test_nothing_in_a_steady_step_waits_for_the_device(
    llama: tuple[Runner, DeviceRunner, CheckingRecorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What would fetch a value from a GPU fails: the steps are launched, and not looked at."""
    _, runner, _ = llama
    prompts = {id: [2, 8, id] for id in (1, 2, 3)}

    def step(known: bool) -> StepPlan:
        rows = [
            decode(id, tokens, 0 if known else 3 + steps, [10 * id, 10 * id + 1],
                   count=3 if known else 1, unknown=int(not known))
            for id, tokens in prompts.items()
        ]  # fmt: skip
        return StepPlan(tuple(rows))

    steps = 0
    launched = [runner.launch(step(True))]

    def fetch(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("this waits for the device")

    with monkeypatch.context() as patch, Calls():
        # Triton's kernel is not here, and its specification looks at what it is given.
        patch.setattr(forebay_kernels, "sample", lambda x, *_: Drawn(tokens=x.max(-1)[1]))
        for name in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, fetch)
        for _ in range(4):
            launched.append(runner.launch(step(False)))
            for tokens in prompts.values():
                tokens.append(5)  # whatever it is: the last one is on the device
            steps += 1
    assert [len(one.result().sampled) for one in launched] == [3] * 5


@pytest.mark.gpu
def test_nothing_in_a_steady_step_waits_for_the_gpu(tiny_checkpoint: Checkpoint) -> None:
    config = settings(tiny_checkpoint("llama"), device="cuda", kv_cache_bytes=0)
    runner = DeviceRunner.on_gpu(config)
    runner.warm_up()
    tokens = [2, 8, 9]
    launched = [runner.launch(StepPlan((decode(1, tokens, 0, [1], count=3),)))]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for at in range(3, 9):
            launched.append(
                runner.launch(
                    StepPlan((decode(1, [*tokens, *[0] * (at - 3)], at, [1], unknown=1),))
                )
            )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    drawn = [one.result().sampled[0].token_id for one in launched]
    plain = Runner(replace(config, device="cpu"))
    assert drawn == alone(plain, tokens)[3:10]


class Again:
    """Replays by running the step again."""

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        step()
        return step


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs Triton's interpreter")
def test_steps_of_triton_kernels_draw_the_tokens_of_the_plain_runner(
    tiny_checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that a GPU computes but the matrix products, in steps launched one ahead."""
    config = settings(tiny_checkpoint("qwen3"), block_size=4, num_blocks=20, max_sequences=2)
    plain = Runner(config)
    asking = SamplingParams(temperature=0.8, presence_penalty=0.7, seed=4)
    prompts = {1: ([2, 8, 9, 4, 6], GREEDY), 2: ([2, 5], asking)}
    expected = {id: alone(plain, *prompt, id) for id, prompt in prompts.items()}
    runner = DeviceRunner(config, device=CPU, recorder=Again(), memory=None)
    monkeypatch.setattr(dispatch, "has_triton", lambda x: True)
    monkeypatch.setattr(DeviceRunner, "_rehearse", lambda self: None)
    runner.warm_up()
    known = {id: list(tokens) for id, (tokens, _) in prompts.items()}
    launched = []
    for step in range(2):
        rows = []
        for id, (prompt, sampling) in prompts.items():
            count = 1 if step else len(prompt)
            start = len(prompt) + step - 1 if step else 0
            row = decode(id, known[id], start, [4 * id, 4 * id + 1, 4 * id + 2], count=count)
            rows.append(
                structs.replace(
                    row, sampling=sampling, unknown=min(step, 1), num_prompt=len(prompt)
                )
            )
        launched.append(runner.launch(StepPlan(tuple(rows))))
        if step:
            for item in launched[step - 1].result().sampled:
                known[item.seq_id].append(item.token_id)
    for item in launched[-1].result().sampled:
        known[item.seq_id].append(item.token_id)
    for id, tokens in known.items():
        assert tokens == expected[id][: len(tokens)]
        assert len(tokens) == len(prompts[id][0]) + 2
