"""Embeddings: one unit vector for a text, pooled from the last hidden states of its tokens.

``last`` takes the last token's, ``mean`` the mean of all. A folder that sentence-transformers wrote
says which in ``1_Pooling/config.json``; its other modules (dense layers, prompts) are not applied.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from forebay_engine.errors import EngineError, RequestRefused, StartRefused
from forebay_engine.scheduler import Scheduler
from forebay_engine.sequence import FinishReason, Pooling, SamplingParams, Sequence
from forebay_engine.step import Pooled

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

    Vector = npt.NDArray[np.float32]

_FILE = Path("1_Pooling") / "config.json"
#: Its switches that we can follow; any other that is on would be served wrongly.
_MODES = {"pooling_mode_mean_tokens": "mean", "pooling_mode_lasttoken": "last"}


def settle_pooling(asked: str, folder: Path) -> Pooling | None:
    """How this model pools; None: it gives no embeddings.

    :raises StartRefused: the setting is unknown, or the folder wants a pooling that is not there.
    """
    known: tuple[Pooling, ...] = get_args(Pooling)
    for pooling in known:
        if asked == pooling:
            return pooling
    if asked == "none":
        return None
    if asked != "auto":
        raise StartRefused(f"pooling {asked!r} is not one of auto, none, {', '.join(known)}")
    path = folder / _FILE
    if not path.is_file():
        return None
    settings: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    on = [name for name, value in settings.items() if value is True and "pooling_mode" in name]
    if len(on) != 1 or on[0] not in _MODES:
        raise StartRefused(
            f"{path}: {', '.join(on) or 'no pooling mode'} is on, but one of {', '.join(_MODES)} "
            "is served; set pooling to last or mean if that is what the model was trained for"
        )
    return settle_pooling(_MODES[on[0]], folder)


@dataclass(slots=True, eq=False)
class _Job:
    sequence: Sequence
    vector: asyncio.Future[Vector]
    #: Of the tokens seen so far.
    total: Vector | None = None


class Pooler:
    """The embeddings under way, each a sequence of the scheduler that draws no token."""

    def __init__(
        self,
        scheduler: Scheduler,
        ids: Iterator[int],
        pooling: Pooling | None,
        *,
        max_model_len: int,
    ) -> None:
        self._scheduler = scheduler
        self._max_model_len = max_model_len
        self._ids = ids
        self._pooling = pooling
        self._jobs: dict[int, _Job] = {}

    def add(self, prompts: list[list[int]], salt: bytes) -> list[asyncio.Future[Vector]]:
        """Queue prompts; the unit vector of each, ``[hidden]``. To cancel one frees what it holds.

        :raises RequestRefused: one can't be embedded; nothing is queued.
        """
        if self._pooling is None:
            raise RequestRefused(
                "this model gives no embeddings; to pool its hidden states set pooling to last or "
                "mean",
                "model",
            )
        for prompt in prompts:
            if not 1 <= len(prompt) <= self._max_model_len:
                raise RequestRefused(
                    f"an input has {len(prompt)} tokens; it must have 1 to {self._max_model_len}, "
                    "as many as the context holds",
                    "input",
                )
        return [self._add(prompt, self._pooling, salt) for prompt in prompts]

    def take(self, pooled: tuple[Pooled, ...]) -> None:
        """Add what a step found, once the scheduler has applied it."""
        for item in pooled:
            job = self._jobs.get(item.seq_id)
            if job is None:
                continue
            # A sequence that was preempted starts over.
            job.total = item.vector if item.start == 0 else _sum(job.total, item.vector)
            if job.sequence.finish_reason is FinishReason.STOP:
                del self._jobs[item.seq_id]
                _settle(job.vector, job.total)

    def fail(self, seq_id: int, message: str) -> None:
        """A step could not be executed for this sequence, which the scheduler has ended."""
        job = self._jobs.pop(seq_id, None)
        if job is not None and not job.vector.done():
            job.vector.set_exception(EngineError(message))

    def _add(self, prompt: list[int], pooling: Pooling, salt: bytes) -> asyncio.Future[Vector]:
        sequence = Sequence(
            next(self._ids), prompt, SamplingParams(), arrival=time.monotonic(), pooling=pooling
        )
        future: asyncio.Future[Vector] = asyncio.get_running_loop().create_future()
        self._scheduler.add(sequence, salt=salt)
        self._jobs[sequence.id] = _Job(sequence, future)
        future.add_done_callback(lambda done: self._abandon(sequence.id, done))
        return future

    def _abandon(self, seq_id: int, future: asyncio.Future[Vector]) -> None:
        if future.cancelled() and self._jobs.pop(seq_id, None) is not None:
            self._scheduler.abort(seq_id)


def _sum(total: Vector | None, vector: Vector) -> Vector:
    return vector if total is None else total + vector


def _settle(future: asyncio.Future[Vector], total: Vector) -> None:
    if not future.done():
        # The mean has the direction of the sum.
        length = float(total @ total) ** 0.5
        future.set_result(total / length if length else total)
