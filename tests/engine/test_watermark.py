"""Watermarks: what they do to a draw, that guesses change nothing, and what detection proves."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from msgspec import structs

from forebay_engine.config import EngineConfig
from forebay_engine.detect import main
from forebay_engine.detection import detect, log_binomial_tail, log_gamma_tail
from forebay_engine.engine import Engine
from forebay_engine.errors import RequestRefused, StartRefused
from forebay_engine.noise import token_bits
from forebay_engine.prompts import PromptEncoder
from forebay_engine.runner import Runner
from forebay_engine.sampler import sample
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row
from forebay_engine.tokenizer import Tokenizer
from forebay_engine.watermark import (
    KEY_VARIABLE,
    Marks,
    Watermark,
    bits_of,
    context_keys,
    key_of,
    parse,
    read_key,
)
from forebay_engine.wire import Done, Event, Generate, Output

KEY = bytes(range(32))
SELF = Watermark(key=KEY)
LEFT = Watermark(seeding="lefthash", context=2, key=KEY)
GUMBEL = Watermark(scheme="gumbel", context=2, key=KEY)
NONE: frozenset[int] = frozenset()
LOGITS = np.array([1.0, 0.2, -0.5, 2.0, 0.9, -3.0, 1.4, 0.0])
MODEL = Path(__file__).parents[1] / "fakes" / "engine_model"


def row(tokens: list[int], mark: Watermark | None, num_prompt: int = 1, **params: Any) -> Row:
    return Row(
        seq_id=7,
        token_ids=tokens,
        start=len(tokens) - 1,
        count=1,
        block_tables=((0,),),
        sample=True,
        sampling=SamplingParams(watermark=mark, **params),
        num_prompt=num_prompt,
    )


def draw(tokens: list[int], mark: Watermark | None, **params: Any) -> int:
    logits = torch.tensor(LOGITS, dtype=torch.float32)[None]
    return sample(logits, [row(tokens, mark, **params)], NONE)[0].token_id


def shares(rows: list[Row]) -> np.ndarray[Any, Any]:
    logits = torch.tensor(LOGITS, dtype=torch.float32).expand(len(rows), -1)
    drawn = [sampled.token_id for sampled in sample(logits, rows, NONE)]
    return np.bincount(drawn, minlength=8) / len(rows)


def softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    raised = np.exp(logits - logits.max())
    return np.asarray(raised / raised.sum())


def chi_square(found: np.ndarray[Any, Any], want: np.ndarray[Any, Any], count: int) -> float:
    assert not found[want == 0].any()
    possible = want > 0
    return float(count * ((found - want)[possible] ** 2 / want[possible]).sum())


def is_green(mark: Watermark, context: list[int], token: int) -> bool:
    """By the definition, one token at a time."""
    if mark.seeding == "lefthash":
        return bits_of(key_of(mark, context), token) < mark.gamma * 2**31
    least = min(bits_of(key_of(mark, [one]), token) for one in context)
    return bits_of(key_of(mark, []), least) < mark.gamma * 2**31


@pytest.mark.parametrize("key", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_the_detectors_hash_is_the_samplers(key: int) -> None:
    ids = [*range(2000), 262143, 2**31 - 1]
    assert token_bits(key, torch.tensor(ids)).tolist() == [bits_of(key, one) for one in ids]


@pytest.mark.parametrize("mark", [SELF, LEFT], ids=lambda mark: mark.seeding)
@pytest.mark.parametrize("params", [{}, {"top_k": 5, "presence_penalty": 0.7}])
def test_green_tokens_are_raised_by_delta(mark: Watermark, params: dict[str, Any]) -> None:
    tokens = [4, 1, 6, 6, 2]
    mark = replace(mark, gamma=0.5, delta=1.3)
    context = tokens[-mark.context :]
    green = np.array([is_green(mark, context, token) for token in range(8)])
    assert 0 < green.sum() < 8
    logits = LOGITS + 1.3 * green
    logits[[1, 6, 2]] -= params.get("presence_penalty", 0.0)
    if "top_k" in params:
        logits[np.argsort(-logits)[5:]] = -np.inf
    found = shares([row(tokens, mark, seed=seed, **params) for seed in range(1500)])
    assert chi_square(found, softmax(logits), 1500) < 24.3  # 7 degrees, 99.9 %
    assert draw(tokens, mark, temperature=0.0, **params) == int(logits.argmax())


@pytest.mark.parametrize("params", [{}, {"top_p": 0.8, "temperature": 0.7}])
def test_over_all_keys_gumbel_leaves_the_distribution_alone(params: dict[str, Any]) -> None:
    tokens, count = [4, 1, 6], 2000
    logits = LOGITS / params.get("temperature", 1.0)
    order = np.argsort(-logits)
    before = np.cumsum(softmax(logits)[order]) - softmax(logits)[order]
    logits[order[before >= params.get("top_p", 1.0)]] = -np.inf
    keys = [replace(GUMBEL, key=number.to_bytes(32, "big")) for number in range(count)]
    found = shares([row(tokens, key, **params) for key in keys])
    assert chi_square(found, softmax(logits), count) < 24.3


def test_gumbel_draws_by_key_and_context_and_by_the_seed_where_there_is_no_new_context() -> None:
    def drawn(tokens: list[int]) -> int:
        return len({draw(tokens, GUMBEL, seed=seed) for seed in range(40)})

    assert drawn([4, 1, 6]) == 1
    assert drawn([4, 1]) > 1, "half of the context would be prompt"
    assert drawn([4, 1, 6, 2, 1, 6]) > 1, "the context was there before"
    assert drawn([4, 6, 2, 1, 6]) == 1
    assert drawn([1, 6, 6, 6]) > 1, "and overlapped"
    assert len({draw([0, a, b], GUMBEL) for a in range(8) for b in range(8)}) > 3


@pytest.mark.parametrize("mark", [SELF, LEFT, GUMBEL], ids=lambda m: f"{m.scheme}-{m.seeding}")
def test_guesses_change_nothing(mark: Watermark) -> None:
    """Each place has the context of its own guesses; a small vocabulary makes contexts recur."""
    random = np.random.default_rng(5)
    places = torch.tensor(random.standard_normal((40, 8)) * 1.5, dtype=torch.float32)
    allowed = torch.ones(40, 8, dtype=torch.bool)
    allowed[:, 5] = False
    params = {"seed": 3, "frequency_penalty": 0.2, "top_p": 0.95}

    def one(tokens: list[int]) -> int:
        at = slice(len(tokens) - 1, len(tokens))
        return sample(places[at], [row(tokens, mark, **params)], NONE, {7: allowed[at]})[0].token_id

    alone = [3]
    for _ in range(36):
        alone.append(one(list(alone)))
    unmarked = [3]
    for _ in range(36):
        unmarked.append(draw(list(unmarked), None, **params))
    assert alone != unmarked
    tokens, accepted = [3], 0
    while len(tokens) < len(alone):
        draft = alone[len(tokens) : len(tokens) + 4]
        if len(tokens) % 3 == 0:
            draft[-1] = (draft[-1] + 1) % 8
        asked = structs.replace(
            row(list(tokens), mark, **params), draft=tuple(draft), count=1 + len(draft)
        )
        at = slice(len(tokens) - 1, len(tokens) + len(draft))
        got = [s.token_id for s in sample(places[at], [asked], NONE, {7: allowed[at]})]
        accepted += len(got) - 1
        tokens += got
    assert tokens[: len(alone)] == alone
    assert accepted > 15


def test_tails_are_exact() -> None:
    for least, count in ((0, 5), (1, 1), (3, 10), (10, 10), (40, 90), (90, 100)):
        exact = sum(
            (
                math.comb(count, k) * Fraction(1, 4) ** k * Fraction(3, 4) ** (count - k)
                for k in range(least, count + 1)
            ),
            Fraction(0),
        )
        assert math.exp(log_binomial_tail(least, count, 0.25)) == pytest.approx(float(exact))
    assert log_gamma_tail(1, 3.5) == pytest.approx(-3.5)
    assert math.exp(log_gamma_tail(2, 4.0)) == pytest.approx(5 * math.exp(-4))
    # Chi-square with 200 degrees of freedom exceeds 267.541 with probability 0.001.
    assert math.exp(log_gamma_tail(100, 267.541 / 2)) == pytest.approx(0.001, rel=1e-4)
    # Far beyond what a float holds.
    assert log_binomial_tail(5000, 5000, 0.25) == pytest.approx(5000 * math.log(0.25))
    assert log_gamma_tail(10, 5000.0) < -4900


def unmarked_text(random: np.random.Generator, size: int) -> list[int]:
    """As repetitive as a text: few words, phrases that come again."""
    phrases = [random.integers(0, 60, random.integers(2, 9)).tolist() for _ in range(8)]
    text: list[int] = []
    while len(text) < size:
        text += phrases[random.integers(8)] if random.random() < 0.5 else [int(random.integers(60))]
    return text[:size]


@pytest.mark.parametrize("mark", [SELF, LEFT, GUMBEL], ids=lambda m: f"{m.scheme}-{m.seeding}")
def test_without_a_mark_p_values_are_uniform(mark: Watermark) -> None:
    """Kolmogorov and Smirnov's test; steps of the binomial tail are filled by chance."""
    random = np.random.default_rng(7)
    found, count = [], 300
    for number in range(count):
        keyed = replace(mark, key=number.to_bytes(32, "big"))
        evidence = detect(unmarked_text(random, 150), keyed)
        p = evidence.p_value
        if evidence.green is not None and evidence.gamma is not None:
            above = math.exp(
                log_binomial_tail(evidence.green + 1, evidence.scored, evidence.gamma)
                if evidence.green < evidence.scored
                else -math.inf
            )
            p = above + random.random() * (p - above)
        found.append(p)
    ordered = np.sort(found)
    steps = np.arange(count + 1) / count
    distance = max((steps[1:] - ordered).max(), (ordered - steps[:-1]).max())
    assert distance < 1.95 / math.sqrt(count)  # 99.9 %


def test_each_case_counts_once() -> None:
    text = [5, 9, 2, 7, 1]
    for mark in (LEFT, GUMBEL):
        once, often = detect([*text, 5, 9], mark), detect([*text * 20, 5, 9], mark)
        assert once.scored == often.scored == 5
        assert once.p_value == often.p_value
    short = detect([1, 2], SELF)
    assert (short.scored, short.p_value, short.z) == (0, 1.0, 0.0)


async def generated(
    runner: Runner, config: EngineConfig, mark: Watermark, prompt: list[int], **params: Any
) -> list[int]:
    engine = Engine(runner, Tokenizer.from_folder(Path(config.model)), None, config)
    stepping = asyncio.create_task(engine.run())
    tokens: list[int] = []
    done = asyncio.Event()

    def emit(event: Event) -> None:
        if isinstance(event, Output):
            tokens.extend(event.token_ids)
        if isinstance(event, Done):
            done.set()

    sampling = SamplingParams(ignore_eos=True, **params)
    await engine.submit(Generate(prompts=[prompt], seed=4, sampling=sampling, watermark=mark), emit)
    await done.wait()
    stepping.cancel()
    await asyncio.gather(stepping, return_exceptions=True)
    return tokens


@pytest.mark.parametrize("scheme", ["kgw", "gumbel"])
async def test_an_answer_of_the_engine_bears_its_mark_with_guesses_and_without(
    scheme: Any,
    tiny_checkpoint: Callable[[str], Path],
    tmp_path: Path,
) -> None:
    (tmp_path / "key").write_text("a secret of the operator\n")
    config = EngineConfig(
        model=str(tiny_checkpoint("llama")),
        kv_cache_bytes=1 << 20,
        block_size=8,
        watermark_key_file=str(tmp_path / "key"),
    )
    mark = Watermark(scheme=scheme, delta=4.0)
    runner = Runner(config)
    prompt = [2, 40, 41, 42, 43, 40, 41, 42]
    plain = await generated(runner, config, mark, prompt, max_tokens=120)
    guessing = replace(config, speculation="ngram", max_step_tokens=7)
    assert await generated(runner, guessing, mark, prompt, max_tokens=120) == plain
    keyed = replace(mark, key=read_key(config.watermark_key_file))
    assert detect(plain, keyed).p_value < 1e-6
    # From the middle, and without the prompt.
    assert detect(plain[40:], keyed).p_value < 1e-3
    assert detect(plain, replace(keyed, key=KEY)).p_value > 1e-3


def test_what_is_configured_is_what_answers_get() -> None:
    tokenizer = Tokenizer.from_folder(MODEL)

    def mark_of(marks: Marks, asked: Watermark | bool | None, **params: Any) -> Watermark | None:
        command = Generate(prompts=["a"], watermark=asked, sampling=SamplingParams(**params))
        return PromptEncoder(tokenizer, None, 261, marks).sampling(command).watermark

    keyed, always = Marks(KEY), Marks(KEY, parse("gumbel context=3"))
    assert mark_of(keyed, None) is None
    assert mark_of(keyed, False) is None
    assert mark_of(keyed, True) == SELF
    # A client's key is never the key.
    assert mark_of(keyed, replace(LEFT, key=b"mine")) == LEFT
    for asked in (None, True):
        assert mark_of(always, asked) == replace(parse("gumbel context=3"), key=KEY)
    wrong: list[tuple[Marks, Watermark | bool | None, dict[str, Any], str]] = [
        (always, False, {}, "its own mark"),
        (always, LEFT, {}, "its own mark"),
        (Marks(), True, {}, f"no key: .*{KEY_VARIABLE}"),
        (keyed, Watermark(gamma=1.0), {}, "gamma is 1; it must be between 0 and 1"),
        (keyed, Watermark(delta=-1.0), {}, "delta is -1"),
        (keyed, Watermark(context=0), {}, "context is 0"),
        (keyed, GUMBEL, {"temperature": 0.0}, "temperature 0"),
    ]
    for marks, asked, params, sentence in wrong:
        with pytest.raises(RequestRefused, match=sentence) as refusal:
            mark_of(marks, asked, **params)
        assert refusal.value.param == "watermark"
    assert "\\x" not in repr(SELF)
    assert "key" not in repr(SELF)


def test_the_configuration_is_read_strictly(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert parse("kgw gamma=0.5 delta=1 context=1 seeding=lefthash") == Watermark(
        gamma=0.5, delta=1.0, context=1, seeding="lefthash"
    )
    for text in ("red", "kgw gamma=x", "kgw key=abc", "kgw strength=3", "kgw gamma=2"):
        with pytest.raises(StartRefused, match="watermark: "):
            Marks.settled(EngineConfig(model="m", watermark=text))
    with pytest.raises(StartRefused, match=f"watermark_key_file, or set {KEY_VARIABLE}"):
        Marks.settled(EngineConfig(model="m", watermark="kgw"))
    with pytest.raises(StartRefused, match="watermark_key_file"):
        read_key(str(tmp_path / "none"))
    monkeypatch.setenv(KEY_VARIABLE, "short")
    with pytest.raises(StartRefused, match="5 bytes; make one of at least 16"):
        read_key("")
    monkeypatch.setenv(KEY_VARIABLE, "long enough a secret")
    (tmp_path / "key").write_text("long enough a secret\n")
    assert read_key("") == read_key(str(tmp_path / "key")) != b""


def marked_ids(mark: Watermark, count: int = 200) -> list[int]:
    """Even choice from 100 tokens, as the mark would have it."""
    tokens: list[int] = []
    for seed in range(count):
        asked = row(list(tokens) or [0], mark, num_prompt=0, seed=seed)
        tokens.append(sample(torch.zeros(1, 100), [asked], NONE)[0].token_id)
    return tokens


@pytest.mark.parametrize("scheme", ["kgw", "gumbel"])
def test_the_program_tells_marked_from_unmarked(
    scheme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "long enough a secret")
    mark = replace(parse(scheme), key=read_key(""))

    def run(*arguments: str, input: str = "") -> Result:
        return CliRunner().invoke(main, ["--watermark", scheme, *arguments], input=input)

    ids = marked_ids(mark)
    found = run("--tokens", "--json", input=json.dumps(ids))
    assert found.exit_code == 0, found.output
    evidence = json.loads(found.output)
    assert evidence["p_value"] < 1e-8
    assert evidence["tokens"] == 200
    assert ("green" in evidence) == (scheme == "kgw")
    file = tmp_path / "text"
    file.write_text("nobody marked this text, whoever may have written it")
    said = run(str(file), "--model", str(MODEL))
    assert said.exit_code == 0, said.output
    assert "p-value   0." in said.output
    for arguments, sentence in (
        (("--tokens",), "not token ids"),
        ((), "needs --model"),
        (("--model", "nowhere"), "tokenizer.json is missing"),
        (("--tokens", "--watermark", "red"), "is no watermark"),
    ):
        failed = run(*arguments, input="some words")
        assert failed.exit_code != 0
        assert sentence in failed.output
    monkeypatch.delenv(KEY_VARIABLE)
    assert "there is no key" in run("--tokens", input="1 2").output


def test_no_context_no_keys() -> None:
    assert context_keys(SELF, [1, 2, 3, 4], 1) == ()
    assert len(context_keys(SELF, [1, 2, 3, 4, 5], 1)) == 4
    assert len(context_keys(LEFT, [1, 2, 3, 4, 5], 3)) == 1
