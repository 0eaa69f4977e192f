"""A step's inputs from the table of requests: the specification itself, and Triton against it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from forebay_kernels import reference
from forebay_kernels.gpu.step_inputs import remember, scatter, step_inputs
from kernel_memory import Memory

BLOCK = 4
#: start and count of each row; a start of -1 is a padded row of one token.
STEPS = {
    "decodes": [(5, 1), (0, 1), (31, 1)],
    "padded": [(7, 1), (-1, 1), (-1, 1)],
    "mixed": [(3, 1), (0, 7), (5, 11), (15, 1)],
    "one long": [(2, 300)],
}


@dataclass(frozen=True, slots=True)
class Outputs:
    """Poisoned, so that what is not written shows."""

    token_ids: Tensor
    positions: Tensor
    lengths: Tensor
    block_tables: Tensor
    slots: Tensor

    @classmethod
    def of(cls, rows: int, tokens: int, groups: int, pages: int, device: torch.device) -> Outputs:
        def poisoned(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.full(shape, -77, dtype=dtype, device=device)

        return cls(
            poisoned(tokens, dtype=torch.int64),
            poisoned(tokens, dtype=torch.int64),
            poisoned(rows, dtype=torch.int32),
            poisoned(groups, rows, pages, dtype=torch.int32),
            poisoned(groups, tokens, dtype=torch.int64),
        )

    def named(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in self.__dataclass_fields__}


def inputs(rows: list[tuple[int, int]], device: torch.device) -> tuple[Tensor, ...]:
    """places, starts, query_starts, tokens, last and tables; the last two inside a wider one."""
    random = torch.Generator().manual_seed(len(rows))
    places = torch.randperm(len(rows) + 2, generator=random)[: len(rows)]
    starts = torch.tensor([start for start, _ in rows])
    ends = torch.tensor([0, *(count for _, count in rows)]).cumsum(0)
    tokens = torch.randint(0, 100, (int(ends[-1]),), generator=random)
    tokens[::3] = -1
    table = torch.randint(0, 1000, (len(rows) + 2, 4 + 2 * 80), generator=random)
    table[0, 0] = -1  # nothing could be drawn
    whole = [t.int().to(device) for t in (places, starts, ends, tokens, table)]
    return *whole[:4], whole[4][:, 0], whole[4][:, 4:].view(-1, 2, 80)


def test_the_specification_by_hand() -> None:
    places, starts = torch.tensor([1, 0, 2]).int(), torch.tensor([5, 0, -1]).int()
    tables = torch.tensor([[[3, 9]], [[7, 2]], [[5, 5]]]).int()
    out = Outputs.of(3, 5, 1, 2, torch.device("cpu"))
    reference.step_inputs(
        places,
        starts,
        torch.tensor([0, 1, 4, 5]).int(),
        torch.tensor([-1, 20, 21, 22, -1]).int(),
        torch.tensor([60, 61, 62]).int(),
        tables,
        BLOCK,
        **out.named(),
    )
    assert out.token_ids.tolist() == [61, 20, 21, 22, 0]
    assert out.positions.tolist() == [5, 0, 1, 2, 0]
    assert out.lengths.tolist() == [6, 3, 0]
    assert out.slots.tolist() == [[2 * 4 + 1, 12, 13, 14, -1]]
    assert out.block_tables[0, 0].tolist() == [7, 2]
    assert out.block_tables[0, 1, 0] == 3


@pytest.mark.parametrize("step", STEPS)
def test_triton_does_as_the_specification_says(
    step: str, device: torch.device, memory: Memory
) -> None:
    rows = STEPS[step]
    given = inputs(rows, device)
    tokens = len(given[3])
    expected, found = (Outputs.of(len(rows), tokens, 2, 80, device) for _ in range(2))
    reference.step_inputs(*given, BLOCK, **expected.named())
    table = given[5]._base
    assert table is not None
    with memory.recorded():
        step_inputs(*given, BLOCK, **found.named())
        read = memory.loaded(table)[given[0].cpu().long(), 4:].view(len(rows), 2, 80)
    for name in ("token_ids", "positions", "lengths", "slots"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    for row, (start, count) in enumerate(rows):
        pages = -(-(start + count) // BLOCK) if start >= 0 else 0
        own, other = found.block_tables[:, row], expected.block_tables[:, row]
        assert torch.equal(own[:, :pages], other[:, :pages])
        assert (own[:, pages:] == -77).all()  # no more is moved than is there
        assert not read[row, :, pages:].any()


@pytest.mark.parametrize("count", [0, 1, 300])
def test_words_go_to_their_places_and_no_others(count: int, device: torch.device) -> None:
    at = torch.randperm(1000)[:count].int()
    words = torch.arange(count).int() + 5
    found, expected = (torch.zeros(1000, dtype=torch.int32, device=device) for _ in range(2))
    scatter(found, at.to(device), words.to(device))
    reference.scatter(expected, at.to(device), words.to(device))
    assert torch.equal(found, expected)
    assert int((found > 0).sum()) == count


def test_drawn_tokens_are_remembered(device: torch.device) -> None:
    drawn, places = torch.tensor([7, -1, 9]), torch.tensor([2, 0, 4]).int()
    positions = torch.tensor([3, 0, 5]).int()
    found, expected = (torch.full((5, 8), -77, dtype=torch.int32, device=device) for _ in range(2))
    given = [t.to(device) for t in (drawn, places, positions)]
    remember(*given, found[:, 0], found[:, 2:])
    reference.remember(*given, expected[:, 0], expected[:, 2:])
    assert torch.equal(found, expected)
    assert found[2].tolist() == [7, -77, -77, -77, -77, 7, -77, -77]


def test_it_compiles_for_hopper(compile_for_hopper: Any) -> None:
    module = "forebay_kernels.gpu.step_inputs"
    wide = dict.fromkeys(("token_ids", "positions", "slots"), "*i64")
    narrow = ("places", "starts", "query_starts", "tokens", "last", "tables", "lengths")
    found = compile_for_hopper(
        {
            "kernel": f"{module}:_inputs_kernel",
            "types": {**wide, **dict.fromkeys((*narrow, "block_tables"), "*i32")},
            "constants": {"BLOCK_SIZE": 32, "TILE": 128},
            "warps": 1,
        },
        {
            "kernel": f"{module}:_scatter_kernel",
            "types": dict.fromkeys(("table", "at", "words"), "*i32"),
            "constants": {"TILE": 256},
        },
        {
            "kernel": f"{module}:_remember_kernel",
            "types": {
                "drawn": "*i64",
                **dict.fromkeys(("places", "positions", "last", "tokens"), "*i32"),
            },
            "constants": {"TILE": 256},
        },
    )
    assert all(one.spilled_bytes == 0 for one in found)
    print([(one.registers, one.shared_bytes) for one in found])
