"""Runs steps: holds the model, its cache and the device; knows nothing of requests or queues."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable

import torch
from msgspec import structs

from forebay_engine.batch import build_batch, pool
from forebay_engine.cache_size import cache_groups
from forebay_engine.config import EngineConfig
from forebay_engine.costs import StepCosts, measured
from forebay_engine.guided_masks import MaskThread
from forebay_engine.loading import Checkpoint
from forebay_engine.memory import KV_BYTES
from forebay_engine.ready_memory import ReadyMemory
from forebay_engine.sampler import draw
from forebay_engine.scoring import score_prompts
from forebay_engine.sequence import SamplingParams
from forebay_engine.step import Row, Sampled, StepPlan, StepResult
from forebay_engine.step_runner import Finished
from forebay_engine.threads import ThreadPolicy, run_queue_wait
from forebay_kernels import cpu

#: Steps by which a number of threads is judged at first; while serving, the policy goes on.
_TIMED = 3

log = logging.getLogger(__name__)


class Runner:
    """A loaded model that executes step plans; building one reads the weights (seconds)."""

    runs_ahead = False

    def __init__(
        self,
        config: EngineConfig,
        progress: Callable[[float], None] = lambda share: None,
        memory: ReadyMemory | None = None,
    ) -> None:
        """``progress`` is told the share of the weights that has been read, 0 to 1.

        ``memory``: where weights are laid out as far as it goes; what is left is given back.
        """
        checkpoint = Checkpoint.of(config, torch.device("cpu"))
        shape, draft = checkpoint.shape, checkpoint.draft
        self._device = checkpoint.device
        self._threads = config.threads
        self._policy: ThreadPolicy | None = None
        self._speculates = config.speculation != "none"
        #: Until they are measured, all steps cost the same, and guesses nothing.
        self.step_costs = StepCosts((1,), (1.0,))
        self.draft_costs: StepCosts | None = None
        self._memory = memory
        cpu.borrow_from(None if memory is None else memory.take)
        cpu.set_threads(self._threads or _cores())  # which lay out the weights
        self._settle_threads()
        self.block_size = config.block_size
        size, kv_bytes = checkpoint.kv_dtype.itemsize, config.kv_cache_bytes or KV_BYTES
        self.cache_groups = cache_groups(config, shape, size, draft, kv_bytes=kv_bytes)
        self.max_model_len = checkpoint.max_model_len(self.cache_groups)
        self._model, scales = checkpoint.load(self.max_model_len, progress)
        self.vocab_size = shape.vocab_size
        self.generates = not shape.headless
        self.eos_token_ids = shape.eos_token_ids
        self._masks = MaskThread(self.vocab_size)
        self._windows = [group.window for group in self.cache_groups]
        self._caches = checkpoint.caches(self.cache_groups, scales)
        #: Tokens that the last launched step drew, by ``seq_id``.
        self._drawn: dict[int, int] = {}
        self._draft = checkpoint.draft_model(self.max_model_len, self.cache_groups)

    def takes_unknown(self, sampling: SamplingParams) -> bool:
        return True

    def launch(self, plan: StepPlan) -> Finished:
        """The whole step: the processor that would go on meanwhile is the one that computes."""
        result = self.execute(StepPlan(tuple(self._known(row) for row in plan.rows)))
        self._drawn = {item.seq_id: item.token_id for item in result.sampled}
        return Finished(result)

    def execute(self, plan: StepPlan) -> StepResult:
        """Run the plan's tokens, write their keys and values, draw a token where one is asked."""
        if self._policy is None:
            return self._execute(plan)
        rows, tokens = len(plan.rows), plan.num_tokens
        self._threads = self._policy.begin(rows, tokens)
        result = self._execute(plan)
        self._policy.end(rows, tokens)
        return result

    def _known(self, row: Row) -> Row:
        """The row with the token that was unknown when it was planned."""
        if not row.unknown:
            return row
        if row.seq_id not in self._drawn:
            raise ValueError(f"sequence {row.seq_id}: the last step drew no token for it")
        token = max(0, self._drawn[row.seq_id])  # where none could come, any is as good
        return structs.replace(row, token_ids=[*row.token_ids, token], unknown=0)

    def _execute(self, plan: StepPlan) -> StepResult:
        self._settle_threads()
        with torch.inference_mode():
            rows = [row for row in plan.rows if row.sample]
            masks = self._masks.begin(rows)
            batch = build_batch(plan, self.block_size, self._device, self._windows)
            hidden = self._model.forward(
                batch.token_ids, batch.positions, self._caches, batch.paged
            )
            pooled = pool(hidden, plan.rows)
            sampled: tuple[Sampled, ...] = ()
            if rows:
                places = hidden[batch.sample_at]  # [places, hidden]
                sampled = draw(self._model, places, rows, self.eos_token_ids, masks.result)
            guessed = self._draft.guess(plan.rows, sampled) if self._draft else ()
            prompt = score_prompts(hidden, plan.rows, self._model.logits)
            return StepResult(sampled, pooled, guessed, prompt)

    def warm_up(self) -> None:
        """Run steps until the kernels are laid out, settle the threads, measure what steps cost."""
        self._choose_threads()
        if self._memory is not None:
            cpu.borrow_from(None)
            self._memory.settle()
        if self._speculates:
            self.step_costs = measured(self.execute, self.cache_groups, self.block_size)
            log.info("%s", self.step_costs)
        if self._draft is not None:
            self.draft_costs = self._draft.measured()
            log.info("the draft model's %s", self.draft_costs)

    def _choose_threads(self) -> None:
        """Settle how many threads to use.

        On a shared machine a second thread can cost more than it gives: a barrier waits while the
        neighbour has the core. So real steps are timed, with one thread and with every core.
        """
        if self._threads:
            self._timed_step()
            return
        choices = sorted({1, _cores()})
        timed: dict[int, float] = {}
        for threads in choices:
            self._threads = threads
            self._timed_step()
            timed[threads] = min(self._timed_step() for _ in range(_TIMED))
        self._threads = min(timed, key=lambda threads: timed[threads])
        self._policy = ThreadPolicy(choices, self._threads, run_queue_wait)
        found = ", ".join(f"{n}: {1000 * seconds:.1f} ms" for n, seconds in timed.items())
        log.info("compute threads: %d (one decode step by threads: %s)", self._threads, found)

    def _settle_threads(self) -> None:
        """OpenMP keeps the count for each thread that computes, and a caller may change threads."""
        if not self._threads:
            return
        cpu.set_threads(self._threads)
        # The compiled kernels have threads of their own; torch's would only stand in their way.
        threads = 1 if cpu.enabled() else self._threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)

    def _timed_step(self) -> float:
        """Seconds of a decode step of one token at position 0 of page 0, before any request."""
        row = Row(
            seq_id=-1,
            token_ids=(0,),
            start=0,
            count=1,
            block_tables=((0,),) * len(self._windows),
            sample=self.generates,
            sampling=SamplingParams(temperature=0.0),
            num_prompt=1,
        )
        begin = time.perf_counter()
        self.execute(StepPlan((row,)))
        return time.perf_counter() - begin


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
