"""Draws: Triton's kernels against the reference, token for token; their distribution and code."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import forebay_kernels as kernels
from forebay_kernels import SamplingRows, SamplingTable, reference
from forebay_kernels.gpu import sampling, truncation, tuning
from forebay_kernels.reference.sampling import adjusted, limit
from forebay_kernels.sampling import ANYTHING, NO_EDIT, NO_TOKEN, Setting, Wants

VOCAB = 300
ALWAYS = 2**31 - 1
NEUTRAL = {
    Setting.TEMPERATURE: 1.0,
    Setting.TOP_P: 1.0,
    Setting.LOG_MIN_P: -math.inf,
    Setting.REPETITION: 1.0,
}
WHOLES = {
    Setting.WANTS,
    Setting.SEED_LOW,
    Setting.SEED_HIGH,
    Setting.TOP_K,
    Setting.NUM_PROMPT,
    Setting.MARK_THRESHOLD,
    Setting.MARK_KEY_LOW,
    Setting.MARK_KEY_HIGH,
}


def make_rows(device: torch.device, count: int, vocab: int = VOCAB) -> SamplingRows:
    """So many rows, each of a request of its own with 12 tokens, of which 5 are its prompt."""
    table = SamplingTable.empty(count, vocab, 16, 6, device)
    random = torch.Generator().manual_seed(count)
    table.tokens[:, :12] = torch.randint(vocab, (count, 12), generator=random).int()
    table.tokens[:, 12:] = 1 << 30  # what lies behind the tokens is never read
    rows = SamplingRows.empty(count, count, table)
    rows.requests.copy_(torch.arange(count).flip(0))
    rows.positions.fill_(12)
    for request in range(count):
        ask(table, request, {Setting.SEED_LOW: 77 * request - 9, Setting.NUM_PROMPT: 5})
    return rows


def ask(table: SamplingTable, request: int, settings: dict[Setting, float]) -> None:
    """Write a line of settings: these, and else what asks for nothing but a draw."""
    line = table.settings[request].tolist()
    for column, value in {**(NEUTRAL if not any(line) else {}), **settings}.items():
        whole = column in WHOLES
        line[column] = int(value) if whole else struct.unpack("i", struct.pack("f", value))[0]
    table.settings[request] = torch.tensor(line, dtype=torch.int32)


def make_logits(device: torch.device, count: int, vocab: int = VOCAB, spread: float = 2) -> Tensor:
    random = torch.Generator().manual_seed(count + vocab)
    return (torch.randn((count, vocab), generator=random) * spread).to(device)


def assert_same(logits: Tensor, rows: SamplingRows, **settings: Any) -> list[int]:
    """Kernels and reference draw the same tokens: these."""
    want = reference.sample(logits, rows, **settings).tokens.tolist()
    got = sampling.sample(logits, rows, **settings).tokens
    assert got.dtype == torch.int64
    assert got.tolist() == want
    return want


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tiles so small that a row of the tests has many, and limits are often found the long way."""

    def choose(kernel: str, device: torch.device, **shape: int) -> dict[str, int]:
        return {"tile": 32, "tiles": 4, "warps": 1}

    monkeypatch.setattr(sampling, "choose", choose)
    monkeypatch.setattr(truncation, "choose", choose)


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_and_drawn_rows(
    device: torch.device, dtype: torch.dtype, softcap: float | None
) -> None:
    rows = make_rows(device, 5, 1030)
    for request, temperature in enumerate((0.0, 0.3, 1.0, 4.0, 0.0)):
        ask(rows.table, request, {Setting.TEMPERATURE: temperature})
    rows.requests[1] = -1
    logits = make_logits(device, 5, 1030).to(dtype)
    logits[0, 1020:] = logits[0].max()  # of equals the first
    logits[2] = -99.0  # less than what a cap makes of what lies past the end
    for asked in (ANYTHING, Wants(0)):
        got = sampling.sample(logits, rows, asked, softcap=softcap).tokens.tolist()
        assert got == reference.sample(logits, rows, softcap=softcap).tokens.tolist()
        assert got[1] == NO_TOKEN


def test_one_of_several_equal_logits_is_drawn_by_noise_alone(
    device: torch.device, small_tiles: None
) -> None:
    """Where every tile may hold it, and few are left without noise."""
    rows = make_rows(device, 12)
    drawn = assert_same(torch.zeros((12, VOCAB), device=device), rows)
    assert len(set(drawn)) > 9


def test_where_nothing_may_come_nothing_does(device: torch.device, small_tiles: None) -> None:
    rows = make_rows(device, 6)
    for request in range(6):
        ask(rows.table, request, {Setting.TEMPERATURE: float(request % 2)})
    logits = make_logits(device, 6)
    logits[:2, 170] = math.nan
    logits[2, 299] = -math.nan
    logits[3:5] = -math.inf
    assert assert_same(logits, rows)[:5] == [NO_TOKEN] * 5
    rows.mask_lines[:] = torch.arange(6)
    rows.masks[:2, 3] = 1 << 7  # token 103 alone, so the NaN is hidden
    assert assert_same(logits, rows)[:2] == [103, 103]


def test_each_change_of_logits(device: torch.device) -> None:
    rows = make_rows(device, 7)
    table, requests = rows.table, rows.requests.tolist()
    likely = make_logits(device, 7).topk(4, dim=1).indices.tolist()
    asked: list[dict[Setting, float]] = [
        {Setting.WANTS: Wants.EDITS},
        {Setting.WANTS: Wants.EDITS, Setting.TEMPERATURE: 0.0},
        {Setting.WANTS: Wants.PENALTIES, Setting.REPETITION: 1.9, Setting.PRESENCE: 0.5},
        {Setting.WANTS: Wants.PENALTIES, Setting.FREQUENCY: 0.8, Setting.TEMPERATURE: 0.0},
        {Setting.WANTS: Wants.GREEN_LIST, Setting.MARK_DELTA: 3.0, Setting.MARK_THRESHOLD: 1 << 30},
        {
            Setting.WANTS: Wants.GREEN_LIST | Wants.SELF_HASH, Setting.MARK_DELTA: 4.0,
            Setting.MARK_THRESHOLD: 1 << 28, Setting.MARK_KEY_LOW: -5, Setting.MARK_KEY_HIGH: 99,
            Setting.TEMPERATURE: 0.0,
        },
        {Setting.WANTS: Wants.MARKED_NOISE},
    ]  # fmt: skip
    before = reference.sample(make_logits(device, 7), rows).tokens.tolist()
    for row, request in enumerate(requests):
        ask(table, request, asked[row])
        table.tokens[request, 3:7] = torch.tensor([likely[row][0]] * 2 + likely[row][:2]).int()
        # The likeliest is not banned any more, the next is banned, the third is still favoured.
        made = sorted(zip(likely[row], (-math.inf, -math.inf, 1.5), (12, ALWAYS, 13), strict=False))
        ids, values, until = zip(*made, strict=True)
        rest = [0] * 5
        line = [[*ids, *[NO_EDIT] * 5], [*bits(*values), *rest], [*until, *rest]]
        table.edits[request] = torch.tensor(line, dtype=torch.int32)
        rows.mark_keys[row, :3] = torch.tensor([-(1 << 61), 5, (1 << 62) + 12345])
        rows.mark_counts[row] = 3
    assert assert_same(make_logits(device, 7), rows) != before
    rows.mark_counts[:] = 0
    assert_same(make_logits(device, 7), rows)


def bits(*values: float) -> tuple[int, ...]:
    return struct.unpack(f"{len(values)}i", struct.pack(f"{len(values)}f", *values))


#: Temperatures are powers of 2, by which dividing and multiplying round alike.
LIMITS: list[tuple[str, dict[Setting, float]]] = [
    ("spread", {Setting.TOP_K: 1}),
    ("spread", {Setting.TOP_K: 7, Setting.TOP_P: 0.6}),
    ("spread", {Setting.TOP_K: 30, Setting.TOP_P: 0.9, Setting.TEMPERATURE: 2.0}),
    ("spread", {Setting.TOP_P: 0.3}),
    ("spread", {Setting.TOP_P: 0.97, Setting.TEMPERATURE: 4.0}),
    ("spread", {Setting.LOG_MIN_P: math.log(0.2)}),
    ("spread", {Setting.TOP_K: 900, Setting.TOP_P: 0.5, Setting.LOG_MIN_P: math.log(0.5)}),
    ("ties", {Setting.TOP_K: 5, Setting.TOP_P: 0.7}),
    ("ties", {Setting.TOP_P: 0.5}),
    ("all alike", {Setting.TOP_K: 3}),
    ("ten nearly alike", {Setting.TOP_K: 6, Setting.TOP_P: 0.5}),
    ("one left", {Setting.TOP_K: 3, Setting.TOP_P: 0.97}),
    ("none left", {Setting.TOP_K: 3}),
]


def test_limits_are_exact(device: torch.device, small_tiles: None) -> None:
    """With ties kept, and where few or no tokens are left; some in registers, some the long way."""
    count, vocab = len(LIMITS), 70
    rows, logits = make_rows(device, count, vocab), make_logits(device, count, vocab)
    for row, (kind, asked) in enumerate(LIMITS):
        ask(rows.table, count - 1 - row, {Setting.WANTS: Wants.TRUNCATION, **asked})
        if kind == "ties":
            logits[row] = logits[row].round()
        elif kind == "all alike":
            logits[row] = -1.0
        elif kind == "ten nearly alike":
            logits[row] = 1 + torch.arange(70) * 2.0**-20
            logits[row, 10:] = -math.inf
        elif kind != "spread":
            logits[row, : 69 if kind == "one left" else 70] = -math.inf
    got = truncation.limits_of(logits, rows, None, adjusts=False).tolist()
    for row, (kind, asked) in enumerate(LIMITS):
        z = adjusted(logits[row], rows, row)
        want = limit(
            z,
            int(asked.get(Setting.TOP_K, 0)),
            asked.get(Setting.TOP_P, 1.0),
            asked.get(Setting.LOG_MIN_P, -math.inf),
        )
        assert torch.equal(z >= got[row], z >= want), (kind, asked)


def test_rows_of_one_request_see_its_guesses(device: torch.device) -> None:
    """Places of a request whose guesses are verified draw what later steps would draw there."""
    whole, rows = make_rows(device, 1), make_rows(device, 3)
    logits = make_logits(device, 3)
    asked = {
        Setting.WANTS: Wants.PENALTIES, Setting.FREQUENCY: 1.0, Setting.PRESENCE: 0.5,
        Setting.REPETITION: 1.3, Setting.TEMPERATURE: 0.0,
    }  # fmt: skip
    for each in (whole, rows):
        ask(each.table, 0, asked)
        each.table.tokens[0, :12] = logits.topk(12).indices[0].int()
        each.table.tokens[0, 8:11] = logits.argmax(1).int()
    rows.requests[:] = 0
    rows.positions[:] = torch.tensor([9, 10, 11])
    rows.guessed[:] = torch.tensor([0, 1, 2])
    together = assert_same(logits, rows)
    assert rows.table.counted.tolist() == [9, 0, 0]
    for step in range(3):
        whole.positions[:] = 9 + step
        assert assert_same(logits[step : step + 1], whole) == together[step : step + 1]
        assert whole.table.counted.tolist() == [9 + step]
    counts = whole.table.counts[0]
    tokens = whole.table.tokens[0, :11].long()
    assert (counts & 1).nonzero().flatten().tolist() == sorted(set(tokens[:5].tolist()))
    assert (counts >> 1).tolist() == torch.bincount(tokens[5:], minlength=VOCAB).tolist()


@pytest.mark.parametrize("softcap", [None, 4.0])
def test_log_probabilities(device: torch.device, small_tiles: None, softcap: float | None) -> None:
    rows, logits = make_rows(device, 4), make_logits(device, 4, spread=6)
    logits[2, :150] = -math.inf
    logits[3] = -math.inf
    for request in range(4):
        ask(rows.table, request, {Setting.WANTS: Wants.LOGPROB if request != 2 else 0})
    for asked in (ANYTHING, Wants.LOGPROB):
        got = sampling.sample(logits, rows, asked, softcap=softcap)
        want = reference.sample(logits.double(), rows, asked, softcap=softcap)
        torch.testing.assert_close(got.logprobs, want.logprobs, equal_nan=True)
        torch.testing.assert_close(got.totals, want.totals, equal_nan=True)
        told = torch.isfinite(got.logprobs if got.logprobs is not None else logits)
        assert told.tolist() == [True, False, True, softcap is not None]
    assert sampling.sample(logits, rows, Wants(0)).logprobs is None


def test_the_distribution_is_the_one_that_was_asked_for(device: torch.device) -> None:
    """Chi-square of draws with top-p, a penalty and a mask, all at once."""
    vocab, draws = 16, 3000
    table = SamplingTable.empty(draws, vocab, 8, 0, device)
    rows = SamplingRows.empty(draws, 1, table)
    table.tokens[:, :2] = torch.tensor([3, 5]).int()
    for request in range(draws):
        ask(table, request, {
            Setting.WANTS: Wants.PENALTIES | Wants.TRUNCATION, Setting.SEED_LOW: request,
            Setting.TOP_P: 0.8, Setting.PRESENCE: 0.7, Setting.NUM_PROMPT: 1,
            Setting.TEMPERATURE: 1.2,
        })  # fmt: skip
    rows.requests.copy_(torch.arange(draws))
    rows.positions.fill_(2)
    rows.mask_lines.fill_(0)
    rows.masks[0, 0] = 0b0111_1011_1111_1110
    logits = make_logits(device, 1, vocab, 1.0).expand(draws, -1)

    x = logits[0].double().cpu()
    x[5] -= 0.7
    x[[0, 10, 15]] = -math.inf
    likely = (x / 1.2).softmax(0)
    falling, order = likely.sort(descending=True)
    kept = order[falling.cumsum(0) - falling < 0.8]
    want = torch.zeros(vocab, dtype=torch.float64)
    want[kept] = likely[kept] / likely[kept].sum()

    drawn = reference.sample(logits, rows).tokens.cpu()
    seen = torch.bincount(drawn, minlength=vocab)
    assert not seen[want == 0].any()
    statistic = float(((seen - draws * want) ** 2 / (draws * want))[want > 0].sum())
    free = len(kept) - 1
    assert statistic < free * (1 - 2 / (9 * free) + 3.09 * math.sqrt(2 / (9 * free))) ** 3
    some = 6 if device.type == "cpu" else draws  # the interpreter takes its time
    first = SamplingRows(
        table=table, masks=rows.masks,
        **{name: getattr(rows, name)[:some] for name in (
            "requests", "positions", "guessed", "mask_lines", "mark_keys", "mark_counts")},
    )  # fmt: skip
    assert (
        sampling.sample(logits[:some].contiguous(), first).tokens.tolist() == drawn[:some].tolist()
    )


def test_rows_may_begin_further_off_than_32_bits_reach(device: torch.device) -> None:
    rows, logits = make_rows(device, 3), make_logits(device, 3).bfloat16()
    ask(rows.table, 0, {Setting.WANTS: Wants.TRUNCATION | Wants.LOGPROB, Setting.TOP_K: 2})
    space = torch.empty((1 << 31) + VOCAB, dtype=torch.bfloat16, device=device)
    apart = space.as_strided((3, VOCAB), (1 << 30, 1))  # of the space between nothing is touched
    apart.copy_(logits)
    want, got = reference.sample(logits, rows), sampling.sample(apart, rows)
    assert got.tokens.tolist() == want.tokens.tolist()
    torch.testing.assert_close(got.totals, want.totals, equal_nan=True)


def test_what_does_not_fit_together_is_refused(device: torch.device) -> None:
    rows, logits = make_rows(device, 2), make_logits(device, 2)
    with pytest.raises(ValueError, match="logits have 1 rows, requests 2"):
        sampling.sample(logits[:1], rows)
    with pytest.raises(ValueError, match="counts are of 300 tokens, logits of 299"):
        sampling.sample(logits[:, :299], rows)
    with pytest.raises(ValueError, match="vocabulary must be contiguous"):
        sampling.sample(logits.T.contiguous().T, rows)
    assert kernels.sample(logits[:0], make_rows(device, 0)).tokens.shape == (0,)


TYPES = {
    "logits": "*bf16",
    "softcap": "fp32",
    **dict.fromkeys(("mark_keys", "drawn"), "*i64"),
    **dict.fromkeys(
        ("limits", "values", "highest", "total", "gathered", "logprobs", "totals"), "*fp32"
    ),
    **dict.fromkeys(
        (
            "requests", "positions", "guessed", "mask_lines", "settings", "edits", "tokens",
            "counts", "counted", "masks", "mark_counts", "found", "states", "iv", "orders",
        ),
        "*i32",
    ),
}  # fmt: skip


def test_sampling_compiles_for_hopper(compile_for_hopper: Any, device: torch.device) -> None:
    jobs = [
        _draw_job(device, 151_936, False, False),
        _draw_job(device, 128_256, False, True),
        _draw_job(device, 262_144, True, True),
        _limit_job(device, 151_936, False),
        _limit_job(device, 262_144, True),
        {
            "kernel": "forebay_kernels.gpu.watermark:_mark_kernel",
            "types": {**TYPES, "keys": "*i64"},
            "constants": {"LANES": 64},
            "warps": 2,
        },
        {
            "kernel": "forebay_kernels.gpu.sampling:_count_kernel",
            "types": TYPES,
            "constants": {"TILE": 1024},
        },
        {
            "kernel": "forebay_kernels.gpu.sampling:_join_kernel",
            "types": TYPES,
            "constants": {
                "VOCAB": 262_144, "SHARES_PADDED": 256, "SOFTCAP": True, "LOGPROBS": True,
            },
            "warps": 1,
        },
    ]  # fmt: skip
    found = compile_for_hopper(*jobs)
    assert [one.spilled_bytes for one in found] == [0] * len(jobs)
    assert all("ld.global.v4" in one.ptx for one in found[:3])  # 8 bf16 at once
    assert all("ld.global.v2" in one.ptx for one in found[3:5])
    # As many threads on a multiprocessor as keep the memory busy: see the benchmark's notes.
    assert found[0].registers <= 64
    assert max(one.registers for one in found[1:3]) <= 104
    # What is gathered is read by other threads, and ``counted`` written when all have read it: a
    # barrier sees to it, which the interpreter does not miss.
    for one in found[3:5]:
        behind_gathering = one.ptx.split("st.global")[-2]
        assert "bar.sync" in behind_gathering.split("ld.global")[0]
    behind_counting = found[6].ptx.split("st.global")[0].rpartition("bra")[2]
    assert "bar.sync" in behind_counting


def _draw_job(device: torch.device, vocab: int, adjusts: bool, logprobs: bool) -> dict[str, Any]:
    chosen = tuning.choose("sample", device, rows=256, vocab=vocab)
    return {
        "kernel": "forebay_kernels.gpu.sampling:_draw_kernel",
        "types": TYPES,
        "constants": {
            "VOCAB": vocab, "TILE": chosen["tile"], "WIDTH": 16, "MARK_KEYS": 64,
            "SOFTCAP": adjusts, "LOGPROBS": logprobs,
            "ADJUSTS": adjusts, "TRUNCATES": adjusts,
        },
        "warps": chosen["warps"],
        "aligned": ["logits_row", "counts_row", "size"],
    }  # fmt: skip


def _limit_job(device: torch.device, vocab: int, adjusts: bool) -> dict[str, Any]:
    chosen = tuning.choose("truncate", device, vocab=vocab, adjusts=adjusts)
    tile = chosen["tile"]
    return {
        "kernel": "forebay_kernels.gpu.truncation:_limit_kernel",
        "types": TYPES,
        "constants": {
            "VOCAB": vocab, "TILE": tile, "MOST": tile // 4, "HELD": tile // 2, "WIDTH": 16,
            "MARK_KEYS": 64, "SOFTCAP": False, "ADJUSTS": adjusts,
        },
        "warps": chosen["warps"],
        "aligned": ["logits_row", "counts_row", "size"],
    }  # fmt: skip
