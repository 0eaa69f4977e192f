"""A step that the device has in its queue, and what the host makes of it once it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from forebay_engine.sampler import sample
from forebay_engine.step import Row, Sampled, StepResult


def fetched(values: Tensor) -> Tensor:
    """A copy on the host, which is there when what is queued now has been done."""
    pinned = values.device.type == "cuda"
    found = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
    return found.copy_(values, non_blocking=True)


def fence(device: torch.device) -> Callable[[], None]:
    """What waits until all that is queued now has been done."""
    if device.type != "cuda":
        return lambda: None
    event: torch.Event = torch.cuda.current_stream(device).record_event()
    return event.synchronize


@dataclass(frozen=True, slots=True)
class Scores:
    """Log-probabilities of samples, on the host."""

    own: Tensor  # [scored] float32
    best: Tensor  # [scored, most] float32
    ids: Tensor  # [scored, most] int64

    @classmethod
    def of(cls, logits: Tensor, tokens: Tensor, most: int) -> Scores:
        """Of ``logits`` ``[scored, vocab]``, and of the tokens drawn from them."""
        logits = logits.float()
        total = logits.logsumexp(-1, keepdim=True)
        own = logits.gather(1, tokens.clamp(min=0).unsqueeze(1)).sub_(total).squeeze(1)
        best = logits.topk(min(most, logits.shape[1]))
        return cls(fetched(own), fetched(best.values - total), fetched(best.indices))

    def sampled(self, number: int, row: Row, token: int) -> Sampled:
        wanted = row.sampling.logprobs or 0
        ids, values = self.ids[number, :wanted].tolist(), self.best[number, :wanted].tolist()
        top = tuple(zip(ids, values, strict=True))
        return Sampled(row.seq_id, token, float(self.own[number]), top)


@dataclass(frozen=True, slots=True)
class ByHost:
    """Rows whose tokens the host draws, as the kernels can't."""

    rows: tuple[Row, ...]
    #: Of each row one place, and one behind each guess.
    logits: Tensor  # [places, vocab]
    masks: Future[Mapping[int, Tensor]]
    eos_token_ids: frozenset[int]

    def draw(self) -> dict[int, list[Sampled]]:
        found: dict[int, list[Sampled]] = {row.seq_id: [] for row in self.rows}
        for item in sample(self.logits, self.rows, self.eos_token_ids, self.masks.result()):
            found[item.seq_id].append(item)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    wait: Callable[[], None]
    rows: tuple[Row, ...]
    tokens: Tensor  # [samples] int64, on the host
    #: Of each row that draws, its first sample.
    first: Mapping[int, int]
    by_host: ByHost | None
    #: Samples with log-probabilities, and these.
    scored: Items[int]
    scores: Scores | None
    #: What else there is to be made of the step, from the tokens that it drew.
    rest: Callable[[tuple[Sampled, ...]], StepResult]

    def result(self) -> StepResult:
        self.wait()
        return self.rest(tuple(self._sampled()))

    def _sampled(self) -> list[Sampled]:
        tokens = self.tokens.tolist()
        numbers = {sample: number for number, sample in enumerate(self.scored)}
        drawn = self.by_host.draw() if self.by_host is not None else {}
        found: list[Sampled] = []
        for row in self.rows:
            if not row.sample:
                continue
            if row.seq_id in drawn:
                found += drawn[row.seq_id]
                continue
            first = self.first[row.seq_id]
            for at in range(1 + len(row.draft)):
                found.append(self._one(row, first + at, tokens[first + at], numbers))
                if row.draft[at : at + 1] != (tokens[first + at],):
                    break
        return found

    def _one(self, row: Row, sample: int, token: int, numbers: Mapping[int, int]) -> Sampled:
        if self.scores is None or sample not in numbers or token < 0:
            return Sampled(row.seq_id, token)
        return self.scores.sampled(numbers[sample], row, token)
