"""The tokens of answers whose backend does not report them: counted here, and marked so."""

from __future__ import annotations

from msgspec import structs

from forebay.api import Delta, Finished, GenerateRequest, Request, Usage
from forebay.prefix_index import PrefixIndex

__all__ = ["UsageCounter"]


class UsageCounter:
    """Of one attempt."""

    def __init__(self, request: Request, index: PrefixIndex) -> None:
        self._request = request
        self._index = index
        self._tokens = 0

    def see(self, delta: Delta) -> None:
        """By its token ids; else as one token, if it says something, which may be too few."""
        says = delta.text or delta.reasoning or delta.tool_calls
        self._tokens += len(delta.token_ids) or bool(says)

    def complete(self, finished: Finished, events: int) -> Finished:
        """With usage. ``events``: of the whole answer, for adapters that hand over bytes and count
        nothing. Of the prompt's tokens the index has an estimate, which does not see images."""
        usage = finished.usage
        if not isinstance(self._request, GenerateRequest):
            return finished
        if usage is not None and usage.source == "reported":
            return finished
        prompt = usage.prompt_tokens if usage is not None else 0
        counted = Usage(
            prompt_tokens=prompt or self._index.prompt_tokens(self._index.key(self._request)),
            completion_tokens=self._tokens or events if usage is None else usage.completion_tokens,
            source="counted",
        )
        return structs.replace(finished, usage=counted)
