"""A step that the device has in its queue, and what the host makes of it once it is done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from concurrent.futures import Future
from dataclasses import dataclass

import torch
from torch import Tensor

from forebay_engine.gpu.layout import Samples
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

    rows: Items[Row]
    #: Of each row, for one place, and one behind each guess.
    logits: Items[Tensor]  # [1 + guesses, vocab]
    allowed: Future[Mapping[int, Tensor]]
    eos_token_ids: frozenset[int]

    def draw(self) -> dict[int, list[Sampled]]:
        found: dict[int, list[Sampled]] = {row.seq_id: [] for row in self.rows}
        logits = torch.cat(list(self.logits))
        for item in sample(logits, self.rows, self.eos_token_ids, self.allowed.result()):
            found[item.seq_id].append(item)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchedStep:
    wait: Callable[[], None]
    rows: tuple[Row, ...]
    tokens: Tensor  # [samples] int64, on the host
    samples: Samples
    by_host: ByHost | None
    scores: Scores | None
    #: What else there is to be made of the step, from the tokens that it drew.
    rest: Callable[[tuple[Sampled, ...]], StepResult]
    #: Called if nothing comes of the step after all.
    forget: Callable[[], None]

    def result(self) -> StepResult:
        try:
            self.wait()
            return self.rest(tuple(self._sampled()))
        except Exception:
            self.forget()
            raise

    def _sampled(self) -> list[Sampled]:
        tokens = self.tokens.tolist()
        rows = [row for row in self.rows if row.sample]
        if len(rows) == len(tokens) and self.by_host is None and self.scores is None:
            return [Sampled(row.seq_id, token) for row, token in zip(rows, tokens, strict=True)]
        scored = {sample: number for number, sample in enumerate(self.samples.scored)}
        by_host = self.by_host.draw() if self.by_host is not None else {}
        found: list[Sampled] = []
        end = 0
        for row in rows:
            first, end = end, end + 1 + len(row.draft)
            if row.seq_id in by_host:
                found += by_host[row.seq_id]
                continue
            for at in range(1 + len(row.draft)):
                token = tokens[first + at]
                if self.scores is not None and first + at in scored and token >= 0:
                    found.append(self.scores.sampled(scored[first + at], row, token))
                else:
                    found.append(Sampled(row.seq_id, token))
                if row.draft[at : at + 1] != (token,):
                    break
        return found
