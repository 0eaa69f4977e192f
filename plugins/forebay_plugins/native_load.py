"""What the native engine tells of itself, by the names under which vLLM shows the same."""

from __future__ import annotations

from forebay.api import Distribution, Load
from forebay_engine.client import Status

__all__ = ["load_of"]

#: The engine's own counts, where the usual name is another; the rest goes by its own.
_COUNTERS = {
    "admitted": "sequences_admitted",
    "finished": "sequences_finished",
    "aborted": "sequences_aborted",
    "expired": "sequences_expired",
    "failed": "sequences_failed",
    "preempted": "preemptions",
    "cached_tokens": "prefix_cache_hits",
    "generated_tokens": "generation_tokens",
    "drafted_tokens": "spec_decode_num_draft_tokens",
    "accepted_tokens": "spec_decode_num_accepted_tokens",
    "evicted": "kv_cache_evictions",
}
_GAUGES = {
    "kv_fragmentation": "kv_cache_fragmentation_ratio",
    "kv_cached": "kv_cache_reusable_ratio",
    "open_requests": "open_requests",
    "tasks": "tasks",
}


def load_of(status: Status) -> Load:
    """The load of an engine that has said how it is."""
    counters = {_COUNTERS.get(name, name): value for name, value in status.counters.items()}
    # vLLM counts what is looked up in the prefix cache: each prompt, once.
    counters["prefix_cache_queries"] = counters.get("prompt_tokens", 0)
    return Load(
        running=status.running,
        waiting=status.waiting,
        kv_usage=status.kv_usage,
        counters=counters,
        gauges={_GAUGES.get(name, name): value for name, value in status.gauges.items()},
        distributions={
            name: Distribution(found.bounds, found.counts, found.sum)
            for name, found in status.distributions.items()
        },
    )
