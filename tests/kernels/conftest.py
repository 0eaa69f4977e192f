"""Inputs for the operators. Without a GPU Triton's kernels run under its interpreter."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from queue import SimpleQueue
from subprocess import PIPE
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from torch import Tensor

from forebay_kernels import PagedBatch, dispatch, reference
from forebay_kernels.cpu import operators
from kernel_memory import Memory, watch

#: Relative error of attention in each type, and what bounds it: rounding of probabilities and sum.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True, slots=True)
class Case:
    """A mixed batch over shuffled pages; slots that no row holds are NaN."""

    query: Tensor  # [tokens, heads, head_dim]
    keys: Tensor  # [kv_heads, pages, block_size, head_dim]
    values: Tensor  # [kv_heads, pages, block_size, head_dim]
    batch: PagedBatch
    #: ``key_scale`` and ``value_scale``, each ``[kv_heads]``, if the cache holds quotients.
    scales: dict[str, Tensor] = field(default_factory=dict)

    def in_fp8(self) -> Case:
        """The same with a cache in FP8: slots that no row holds are NaN still."""
        limit = torch.finfo(torch.float8_e4m3fn).max
        caches, scales = [], {}
        for name, cache in (("key_scale", self.keys), ("value_scale", self.values)):
            largest = cache.float().nan_to_num().abs().amax((1, 2, 3))  # [kv_heads]
            scales[name] = largest / limit
            quotient = cache.float() / scales[name].view(-1, 1, 1, 1)
            caches.append(quotient.to(torch.float8_e4m3fn))
        return replace(self, keys=caches[0], values=caches[1], scales=scales)

    def assert_near(self, got: Tensor, first: int = 0, **settings: Any) -> None:
        """From token ``first`` on, what the reference finds in float64 but for its roundings."""
        caches = self.keys.double(), self.values.double()
        settings |= self.scales
        want = reference.paged_attention(self.query.double(), *caches, self.batch, **settings)
        assert got.dtype == self.query.dtype
        error = (got.double() - want)[first:].norm() / want[first:].norm()
        assert error < TOLERANCE[got.dtype], f"relative error {error:.2e}"


MakeCase = Callable[..., Case]


@pytest.fixture(scope="session")
def device() -> torch.device:
    return DEVICE


class _Inspect:
    """``inspect`` for Triton's interpreter, which looks through its own modules at every call.

    It replaces those of their members that are its builtins, whose names stay the same. To look for
    them again took a third of the time of these tests.
    """

    def __init__(self) -> None:
        self._builtins: dict[int, list[str]] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(inspect, name)

    def getmembers(self, owner: Any) -> list[tuple[str, Any]]:
        names = self._builtins.get(id(owner))
        if names is None:
            names = [
                name for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)
            ]
            self._builtins[id(owner)] = names
        return [(name, getattr(owner, name)) for name in names]


@pytest.fixture(autouse=True, scope="session")
def quick_interpreter() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("triton.runtime.interpreter.inspect", _Inspect())
        yield


@pytest.fixture(autouse=True)
def memory(monkeypatch: pytest.MonkeyPatch) -> Memory:
    """Every launch under the interpreter fails that touches what none of its tensors holds."""
    return watch(monkeypatch)


@pytest.fixture(params=["compiled", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each test twice: with the compiled kernels, and without them."""
    chosen: str = request.param
    if chosen == "torch":
        for module in (dispatch, operators):
            monkeypatch.setattr(module, "available", lambda x: False)
    return chosen


@pytest.fixture
def exact_conversions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton's interpreter round to narrower types as GPUs and torch do.

    Its own conversion to FP8 loses the carry of a mantissa that is rounded up, and cuts off what is
    below the smallest normal value; to bfloat16 it does not round.
    """
    types = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
    }

    def convert(data: Any, before: tl.dtype, after: tl.dtype, rounding: object) -> Any:
        stored = torch.from_numpy(np.array(data).view(f"int{before.primitive_bitwidth}"))
        found = stored.view(types[before]).float().to(types[after])
        number = {8: torch.uint8, 16: torch.uint16, 32: torch.uint32}[after.primitive_bitwidth]
        return found.view(number).numpy()

    monkeypatch.setattr("triton.runtime.interpreter._convert_float", convert)


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as Hopper would run it."""

    ptx: str
    #: Of a block; at most 232,448 are there.
    shared_bytes: int
    #: Of a thread; at most 255.
    registers: int
    #: Of a thread, in memory as registers were not enough.
    spilled_bytes: int


#: Takes jobs: a dict with ``kernel`` as ``module:function``, the Triton ``types`` of arguments by
#: name (others are int32), ``constants``, and perhaps ``warps``, ``stages``, and ``aligned``, those
#: arguments that are promised to be multiples of 16. Or a function to call whose launches are to
#: be compiled, for tensors on the CPU as for a GPU's: ``launch`` as ``file:function``, and its
#: ``arguments``.
CompileForHopper = Callable[..., list[Compiled]]


class Compilers:
    """Processes that compile, each one job at a time; started when they are first needed."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._idle: SimpleQueue[subprocess.Popen[str]] = SimpleQueue()
        self._threads = ThreadPoolExecutor(os.cpu_count() or 1, initializer=self._start)

    def _start(self) -> None:
        env = {**os.environ, "TRITON_CACHE_DIR": str(self._cache)}
        env.pop("TRITON_INTERPRET", None)
        program = [
            sys.executable,
            "-P",
            "-W",
            "error",
            str(Path(__file__).with_name("compilation.py")),
        ]
        self._idle.put(subprocess.Popen(program, env=env, stdin=PIPE, stdout=PIPE, text=True))

    def __call__(self, *jobs: dict[str, Any]) -> list[Compiled]:
        return [one for found in self._threads.map(self._compile, jobs) for one in found]

    def _compile(self, job: dict[str, Any]) -> list[Compiled]:
        process = self._idle.get()
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            print(json.dumps(job), file=process.stdin, flush=True)
            answer = json.loads(process.stdout.readline())
        finally:
            self._idle.put(process)
        assert "found" in answer, answer["failed"]
        return [Compiled(**one) for one in answer["found"]]

    def close(self) -> None:
        self._threads.shutdown()
        while not self._idle.empty():
            with self._idle.get() as process:
                process.kill()


@pytest.fixture(scope="session")
def compile_for_hopper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CompileForHopper]:
    """The jobs of a test side by side, by processes that serve all tests: Triton starts slowly."""
    compilers = Compilers(tmp_path_factory.mktemp("triton"))
    yield compilers
    compilers.close()


@pytest.fixture
def make_case() -> MakeCase:
    """``make_case(rows, heads=, kv_heads=, dim=, block_size=, dtype=)``, rows as (length, count).

    Decode rows (count 1, or 0 tokens held) come first, as in a plan.
    """
    return _case


def _case(
    rows: list[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    spare_pages: int = 3,
) -> Case:
    random = torch.Generator().manual_seed(len(rows) * 1000 + dim + heads)
    needed = [-(-length // block_size) for length, _ in rows]
    pages = torch.randperm(sum(needed) + spare_pages, generator=random)
    size = (kv_heads, len(pages), block_size, dim)
    keys, values = (torch.full(size, float("nan"), dtype=dtype) for _ in range(2))
    # What lies past a row's end is never read: a page that does not exist must do no harm.
    tables = torch.full((len(rows), max(1, *needed) + 1), 1 << 30, dtype=torch.int32)
    slots: list[int] = []
    for row, (length, count) in enumerate(rows):
        first = sum(needed[:row])
        own = pages[first : first + needed[row]]
        tables[row, : needed[row]] = own.int()
        places = [int(own[p // block_size]) * block_size + p % block_size for p in range(length)]
        for cache in (keys, values):
            held = torch.randn((kv_heads, length, dim), generator=random).to(dtype)
            cache.flatten(1, 2)[:, places] = held
        slots += places[length - count :] if length else [-1]
    starts = [0]
    for _, count in rows:
        starts.append(starts[-1] + count)
    query = torch.randn((starts[-1], heads, dim), generator=random).to(dtype)
    batch = PagedBatch(
        query_starts=tuple(starts),
        seq_lens=tuple(length for length, _ in rows),
        num_decodes=sum(count == 1 for _, count in rows),
        block_tables=tables.to(DEVICE),
        lengths=torch.tensor([length for length, _ in rows], dtype=torch.int32, device=DEVICE),
        slots=torch.tensor(slots, device=DEVICE),
    )
    return Case(query.to(DEVICE), keys.to(DEVICE), values.to(DEVICE), batch)
