"""The request fields that `llama-server` heeds beside OpenAI's (tag b11434).

Of others it says nothing, and answers without them: so they are refused here.
"""

from __future__ import annotations

from collections.abc import Set

from forebay.api import BackendLacks, GenerateRequest

__all__ = ["refuse_unknown"]

_FIELDS = frozenset(
    {
        "adaptive_decay",
        "adaptive_target",
        "add_generation_prompt",
        "backend_sampling",
        "cache_prompt",
        "chat_template_kwargs",
        "continue_final_message",
        "dry_allowed_length",
        "dry_base",
        "dry_multiplier",
        "dry_penalty_last_n",
        "dry_sequence_breakers",
        "dynatemp_exponent",
        "dynatemp_range",
        "grammar",
        "id_slot",
        "json_schema",
        "logit_bias",
        "lora",
        "min_keep",
        "mirostat",
        "mirostat_eta",
        "mirostat_tau",
        "n_cache_reuse",
        "n_discard",
        "n_indent",
        "n_keep",
        "n_predict",
        "n_probs",
        "parse_tool_calls",
        "post_sampling_probs",
        "reasoning_budget_tokens",
        "reasoning_effort",
        "reasoning_format",
        "reasoning_in_content",
        "repeat_last_n",
        "repeat_penalty",
        "response_fields",
        "return_progress",
        "return_tokens",
        "samplers",
        "sse_ping_interval",
        "t_max_predict_ms",
        "thinking_budget_tokens",
        "timings_per_token",
        "top_n_sigma",
        "typical_p",
        "verbose",
        "xtc_probability",
        "xtc_threshold",
    }
)


def refuse_unknown(request: GenerateRequest, further: Set[str]) -> None:
    """``further``: fields that this server takes as well.

    :raises BackendLacks: a field would be without effect.
    """
    for field in request.extra:
        if field not in _FIELDS and field not in further:
            raise _refusal(field, "it does not know the field")
    if request.echo:
        raise _refusal("echo", "it gives no prompts back")
    if request.sampling.min_tokens > 0:
        raise _refusal("min_tokens", "it has no least length")


def _refusal(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"a llama.cpp backend cannot serve `{field}`: {why}", param=field)
