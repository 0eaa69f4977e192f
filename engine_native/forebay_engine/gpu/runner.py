"""Runs steps on a GPU so that it never waits for the host, nor the host for it.

The device keeps what it knows of the running sequences (``table``); the host sends what has changed
in one copy (``layout``), and a step's inputs are worked out on the device (``inputs``). Steps in
which every row has one token are replays (``graphs``). ``launch`` puts a step into the device's
queue and comes back; a token that is drawn is in the table for the next step, whether or not the
host has seen it.

Nothing here needs a GPU but recorded graphs: tests run all the rest on a processor.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import replace
from functools import reduce
from itertools import accumulate
from operator import or_

import torch
from msgspec import structs
from torch import Tensor

from forebay_engine.batch import check_row, pool
from forebay_engine.cache_size import cache_groups, group_windows
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts, measured
from forebay_engine.gpu.drawing import Allowed, Drawing
from forebay_engine.gpu.graphs import CudaRecorder, Recorder, Replay, bucket, buckets
from forebay_engine.gpu.inputs import Lengths, StepInputs
from forebay_engine.gpu.launched import ByHost, LaunchedStep, Scores, fence, fetched
from forebay_engine.gpu.layout import Samples, Sections, Sizes, lay
from forebay_engine.gpu.memory import CudaMemory, DeviceMemory, Shares
from forebay_engine.gpu.table import Changes, Place, RequestTable
from forebay_engine.guided_masks import MaskThread
from forebay_engine.layers import LayerCache
from forebay_engine.loading import Checkpoint
from forebay_engine.memory import KV_BYTES
from forebay_engine.scoring import score_prompts
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, Sampled, StepPlan, StepResult
from forebay_engine.watermark import Watermark
from forebay_kernels import PagedBatch
from forebay_kernels.sampling import Wants

#: Rows of the steps that are timed at the start, whatever ``max_sequences`` is.
_TIMED_ROWS = 32

log = logging.getLogger(__name__)


class DeviceRunner:
    """A loaded model on a device; building one reads the weights and sizes the KV cache.

    :param device: tests give a processor.
    :param recorder: makes the replays; None: all steps are launched kernel by kernel.
    :param memory: of the device; None: the KV cache is sized as on a processor.
    """

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[float], None] = lambda share: None,
        *,
        device: torch.device,
        recorder: Recorder | None,
        memory: DeviceMemory | None,
    ) -> None:
        self._checkpoint = checkpoint = Checkpoint.of(config, device)
        shape = checkpoint.shape
        self._device = device
        self._speculates = config.speculation != "none"
        self.runs_ahead = checkpoint.draft is None
        self.block_size = config.block_size
        self.vocab_size = shape.vocab_size
        self.generates = not shape.headless
        self.eos_token_ids = shape.eos_token_ids
        #: Until they are measured, all steps cost the same, and guesses nothing.
        self.step_costs = StepCosts((1,), (1.0,))
        self.draft_costs: StepCosts | None = None
        self._masks = MaskThread(self.vocab_size)

        shares = Shares.begin(memory, config) if memory is not None else None
        self._model, scales = checkpoint.load(checkpoint.longest, progress)
        rows = max(config.max_sequences, _TIMED_ROWS)
        tokens = max(config.max_step_tokens, 2 * rows)
        windows = group_windows(shape)
        longest = checkpoint.longest + config.speculation_tokens + 2
        self._table = RequestTable(
            rows,
            groups=len(windows),
            pages=-(-longest // self.block_size),
            longest=longest,
            vocab=self.vocab_size,
            eos_token_ids=self.eos_token_ids,
            looks_back=not self._speculates,
            device=device,
        )
        self._inputs = StepInputs(self._table, windows, self.block_size, tokens)
        self._drawing = Drawing(self._table, self.vocab_size, tokens)
        hidden = self._largest_step(tokens, config.max_sequences)
        #: What replays come to.
        self._hidden = torch.zeros_like(hidden[:1]).repeat(config.max_sequences, 1)
        del hidden
        kv_bytes = config.kv_cache_bytes or (shares.kv_bytes() if shares else KV_BYTES)
        self.cache_groups = cache_groups(
            config, shape, checkpoint.kv_dtype.itemsize, checkpoint.draft, kv_bytes=kv_bytes
        )
        self.max_model_len = checkpoint.max_model_len(self.cache_groups)
        self._caches = checkpoint.caches(self.cache_groups, scales)
        self._draft = checkpoint.draft_model(self.max_model_len, self.cache_groups)

        self._recorder = recorder if self.generates and self._model.replayable else None
        self._replays: dict[int, Replay] = {}
        self._most_recorded = config.max_sequences

    @classmethod
    def on_gpu(
        cls, config: EngineConfig, progress: Callable[[float], None] = lambda share: None
    ) -> DeviceRunner:
        """On the first GPU, with CUDA's graphs."""
        device = torch.device("cuda", 0)
        return cls(
            config,
            progress,
            device=device,
            recorder=CudaRecorder(device),
            memory=CudaMemory(device),
        )

    def takes_unknown(self, sampling: SamplingParams) -> bool:
        return self._table.draws(sampling)

    def launch(self, plan: StepPlan) -> LaunchedStep:
        """Put the plan's rows into the device's queue."""
        with torch.inference_mode():
            try:
                return self._launch(plan.rows)
            except Exception:
                self._table.forget()
                raise

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the plan's tokens, write their keys and values, draw a token where one is asked."""
        return self.launch(plan).result()

    def warm_up(self) -> None:
        """Record the steps that are replayed, and measure what steps cost."""
        begin = time.perf_counter()
        with torch.inference_mode():
            if self._recorder is not None:
                for size in buckets(self._most_recorded):
                    self._record(size, self._recorder)
        if self._replays:
            took = time.perf_counter() - begin
            log.info("steps of %d numbers of rows recorded in %.1f s", len(self._replays), took)
        if self.generates:
            self._rehearse()
        if self._speculates:
            self.step_costs = measured(self.execute, self.cache_groups, self.block_size)
            log.info("%s", self.step_costs)
        if self._draft is not None:
            self.draft_costs = self._draft.measured()
            log.info("the draft model's %s", self.draft_costs)

    def _rehearse(self) -> None:
        """Run steps of each kind, so that no request waits for a kernel to be compiled."""
        greedy = SamplingParams(temperature=0.0)
        limited, penalised = SamplingParams(top_k=2), SamplingParams(presence_penalty=0.5)
        mark = Watermark(key=bytes(32))
        asking = replace(penalised, top_k=2, logprobs=1, watermark=mark)
        pages = ((0, 0),) * len(self.cache_groups)
        for sampling in (greedy, limited, penalised, asking):
            for rows, count in ((1, 1), (16, 1), (self._most_recorded, 1), (1, 2)):
                row = Row(0, (0,) * count, 0, count, pages, True, sampling, count)
                self.execute(
                    StepPlan(tuple(structs.replace(row, seq_id=-1 - id) for id in range(rows)))
                )
        decode = Row(-1, (0,), 0, 1, pages, True, greedy, 1)
        most = min(self._inputs.most_tokens, self.max_model_len) - 1
        # Attention takes tiles by a row's tokens times the heads that share a KV head.
        for count in sorted({min(count, most) for count in (4, 8, 16, 32, 64, most)}):
            for end in (count, self.max_model_len):  # at the beginning, and behind a long prefix
                tables = ((0,) * -(-end // self.block_size),) * len(self.cache_groups)
                chunk = Row(-2, (0,) * end, end - count, count, tables, True, greedy, end)
                for plan in (StepPlan((chunk,)), StepPlan((decode, chunk))):
                    self.execute(plan)

    def _launch(self, rows: tuple[Row, ...]) -> LaunchedStep:
        for row in rows:
            check_row(row, self.block_size)
        tokens = sum(row.count for row in rows)
        if tokens > self._inputs.most_tokens:
            raise ValueError(f"a step of {tokens} tokens; {self._inputs.most_tokens} are the most")
        places, changes = self._table.enter(rows)
        size = self._replayed(rows)
        samples = Samples.of(rows, places)
        by_host = [row for _, row in samples.by_host]
        allowed = self._masks.begin([*samples.masked, *by_host])
        words, sizes = self._lay(rows, places, changes, samples, size or 0)
        sections = self._inputs.send(words, sizes)
        self._drawing.begin(sections)
        if size is not None:
            self._replays[size]()
            hidden = self._hidden[: len(rows)]
        else:
            hidden = self._forward(sections, _lengths(rows))
        every = len(samples.at) == len(hidden)
        chosen = hidden if every else hidden.index_select(0, sections.sample_at)
        logits = self._model.logits(chosen) if len(chosen) else chosen
        asked = Wants(reduce(or_, (place.asked for place in places), 0))
        if samples.masked:
            asked |= Wants.MASKS
        drawn = self._drawing.draw(logits, sections, samples, allowed, asked)
        for row, place in zip(rows, places, strict=True):
            place.drawn = row.sample
        return LaunchedStep(
            tokens=fetched(drawn),
            rows=rows,
            samples=samples,
            by_host=self._by_host(logits, samples, allowed) if samples.by_host else None,
            scores=self._scores(rows, logits, drawn, sections, samples) if samples.scored else None,
            wait=fence(self._device),
            rest=lambda sampled: self._rest(rows, hidden if size is None else None, sampled),
            forget=self._table.forget,
        )

    def _lay(
        self,
        rows: Items[Row],
        places: Items[Place],
        changes: Changes,
        samples: Samples,
        padded: int,
    ) -> tuple[Tensor, Sizes]:
        nobody, pinned = self._table.nobody, self._device.type == "cuda"
        return lay(rows, places, changes, samples, padded=padded, nobody=nobody, pinned=pinned)

    def _forward(self, sections: Sections, lengths: Lengths) -> Tensor:
        token_ids, positions, batch = self._inputs.derive(sections, lengths)
        return self._model.forward(token_ids, positions, self._caches, batch)

    def _record(self, size: int, recorder: Recorder) -> None:
        """A replay of steps of so many rows, of which each has one token."""
        longest = Lengths(tuple(range(size + 1)), (self.max_model_len,) * size, size, replayed=True)
        words, sizes = self._lay((), (), Changes(), Samples(), size)

        def step() -> None:
            sections = self._inputs.sections(sizes)
            self._hidden[:size].copy_(self._forward(sections, longest))

        self._inputs.send(words, sizes)
        self._replays[size] = recorder.record(step)

    def _replayed(self, rows: Items[Row]) -> int | None:
        """For how many rows the replay is that can run these; None: none can."""
        for row in rows:
            if row.count != 1 or row.pooling is not None or row.lookahead is not None:
                return None
            if row.start < row.num_prompt - 1 and row.sampling.prompt_logprobs is not None:
                return None
        return bucket(self._replays, len(rows))

    def _by_host(self, logits: Tensor, samples: Samples, allowed: Allowed) -> ByHost:
        own = [fetched(logits[at : at + 1 + len(row.draft)]) for at, row in samples.by_host]
        rows = [row for _, row in samples.by_host]
        return ByHost(rows, own, allowed, self.eos_token_ids)

    def _scores(
        self,
        rows: Items[Row],
        logits: Tensor,
        drawn: Tensor,
        sections: Sections,
        samples: Samples,
    ) -> Scores:
        if len(samples.scored) < len(logits):
            logits, drawn = (x.index_select(0, sections.scored) for x in (logits, drawn))
        most = max(row.sampling.logprobs or 0 for row in rows)
        return Scores.of(logits, drawn, most)

    def _rest(
        self, rows: Items[Row], hidden: Tensor | None, sampled: tuple[Sampled, ...]
    ) -> StepResult:
        with torch.inference_mode():
            guessed = self._draft.guess(rows, sampled) if self._draft is not None else ()
            if hidden is None:
                return StepResult(sampled, guessed=guessed)
            prompt = score_prompts(hidden, rows, self._model.logits)
            return StepResult(sampled, pool(hidden, rows), guessed, prompt)

    def _largest_step(self, tokens: int, samples: int) -> Tensor:
        """Run as many tokens as a step may have, so that its memory is taken; the hidden states.

        They are stored nowhere, and see the same page over and over.
        """
        checkpoint, device = self._checkpoint, self._device
        shape, size = checkpoint.shape, self.block_size
        cache = LayerCache.empty(
            (shape.num_kv_heads, 1, size, shape.head_dim), checkpoint.kv_dtype, device
        )
        full, rest = divmod(tokens, checkpoint.longest)
        counts = [checkpoint.longest] * full + [rest] * (rest > 0)
        with torch.inference_mode():
            batch = PagedBatch(
                query_starts=tuple(accumulate(counts, initial=0)),
                seq_lens=tuple(counts),
                num_decodes=0,
                block_tables=torch.zeros(
                    (len(counts), -(-counts[0] // size)), dtype=torch.int32, device=device
                ),
                lengths=torch.tensor(counts, dtype=torch.int32, device=device),
                slots=torch.full((tokens,), -1, dtype=torch.int64, device=device),
            )
            nothing = torch.zeros(tokens, dtype=torch.int64, device=device)
            caches = [cache] * shape.num_layers
            hidden = self._model.forward(nothing, nothing, caches, batch)
            if self.generates:
                self._model.logits(hidden[:samples]).float()
            return hidden


def _lengths(rows: Items[Row]) -> Lengths:
    return Lengths(
        query_starts=tuple(accumulate((row.count for row in rows), initial=0)),
        seq_lens=tuple(row.start + row.count for row in rows),
        num_decodes=next((i for i, row in enumerate(rows) if row.count != 1), len(rows)),
    )
