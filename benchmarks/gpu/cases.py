"""What a kernel's benchmark says of itself, so that one script can check and time all of them.

Each kernel has a module here with ``cases(device, small) -> Iterator[Make]``: a case that can't be
made leaves the others alone. ``small`` shapes are for a run under Triton's interpreter, which
proves the script and not the speed.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from forebay_kernels import PagedBatch, reference


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One kernel on one shape; ``run`` allocates as it does in the engine, and nothing else."""

    #: ``kernel: shape``, as printed.
    name: str
    run: Callable[[], Tensor | tuple[Tensor, ...]]
    #: The same by the reference, in float32 or wider, of which ``run``'s relative error is taken.
    reference: Callable[[], Tensor | tuple[Tensor, ...]]
    #: Largest relative error (of norms) that is right for the types.
    tolerance: float
    #: Read and written by an ideal kernel: each value once.
    bytes: int
    #: Multiplications and additions; 0: memory is the limit.
    flops: int = 0
    #: Which matrix ceiling bounds ``flops``: ``bf16``, ``fp8`` or ``int8``.
    unit: str = "bf16"
    #: Share of the ceiling that it is to reach; None: no goal of its own.
    goal: float | None = None


#: Fills a case's tensors.
Make = Callable[[], Case]


@dataclass(frozen=True, slots=True, kw_only=True)
class Attention:
    """One layer's attention; the defaults are those of Llama 3.1 8B."""

    heads: int = 32
    kv_heads: int = 8
    dim: int = 128
    page: int = 32
    window: int | None = None
    fp8: bool = False
    goal: float | None = None

    def kind(self) -> list[str]:
        """What a case's name says of it."""
        more = ["fp8" if self.fp8 else "", f"window {self.window}" if self.window else ""]
        heads = f"{self.heads}/{self.kv_heads} heads of {self.dim}, pages of {self.page}"
        return [heads, *filter(None, more)]

    def case(
        self,
        attend: Callable[..., None],
        name: str,
        rows: Items[tuple[int, int]],
        device: torch.device,
        *,
        small: bool,
        held: int,
        flops: int = 0,
    ) -> Case:
        """
        :param rows: (tokens held, tokens run) of each, those that run one token first.
        :param held: slots that any query of their row sees.
        """
        dtype = torch.float16 if small else torch.bfloat16
        batch, pages = paged(rows, self.page, device)
        query = torch.randn((batch.num_tokens, self.heads, self.dim), dtype=dtype, device=device)
        size = (self.kv_heads, pages, self.page, self.dim)
        keys, values = (torch.randn(size, dtype=dtype, device=device) for _ in range(2))
        settings: dict[str, Any] = {"scale": self.dim**-0.5, "window": self.window}
        if self.fp8:
            keys, values = keys.to(torch.float8_e4m3fn), values.to(torch.float8_e4m3fn)
            scale = torch.linspace(0.5, 2.0, self.kv_heads, device=device)
            settings |= {"key_scale": scale, "value_scale": scale}

        def run() -> Tensor:
            out = torch.empty_like(query)
            attend(query, keys, values, out, batch, **settings)
            return out

        read = 2 * held * self.kv_heads * self.dim * keys.element_size()
        return Case(
            name=name,
            run=run,
            reference=partial(
                reference.paged_attention, query.float(), keys, values, batch, **settings
            ),
            tolerance=3e-3 if small else 2e-2,
            bytes=read + 2 * query.numel() * query.element_size(),
            flops=flops,
            goal=self.goal,
        )


def paged(rows: Items[tuple[int, int]], page: int, device: torch.device) -> tuple[PagedBatch, int]:
    """A batch over shuffled pages, and how many pages there are; see :meth:`Attention.case`."""
    lengths, counts = zip(*rows, strict=True)
    pages = [-(-length // page) for length in lengths]
    order = torch.randperm(sum(pages), device=device).int()
    tables = torch.zeros((len(pages), max(pages)), dtype=torch.int32, device=device)
    for row, own in enumerate(torch.split(order, pages)):
        tables[row, : len(own)] = own
    starts = tuple(accumulate(counts, initial=0))
    batch = PagedBatch(
        query_starts=starts,
        seq_lens=lengths,
        num_decodes=sum(count == 1 for count in counts),
        block_tables=tables,
        lengths=torch.tensor(lengths, dtype=torch.int32, device=device),
        slots=torch.full((starts[-1],), -1, device=device),
    )
    return batch, sum(pages)
