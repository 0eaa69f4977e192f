"""What a request says, in the words of text-generation-inference; what has no word is refused.

TGI answers values out of its bounds with 422 and runs fields it does not know without them; so both
are settled before anything is sent. Bounds: the router's `validation.rs` at 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec
from msgspec import Struct

from forebay.api import BackendLacks, GenerateRequest

__all__ = ["Info", "chat_fields", "generate_body", "refuse", "refuse_unknown"]

#: Alternatives that it reports for each token (its `--max-top-n-tokens`).
_TOP_TOKENS = 5
#: ``max_tokens`` of /v1/completions where none is given, by OpenAI's documentation.
_COMPLETION_TOKENS = 16
#: Fields of its own that the native routes take; chat takes none of these.
_NATIVE = frozenset({"adapter_id", "do_sample", "grammar", "truncate", "typical_p", "watermark"})
_CHAT = frozenset({"guideline", "tool_prompt"})


class Info(Struct):
    """What is read of `GET /info`: the limits that this server was started with."""

    model_id: str
    version: str = ""
    max_total_tokens: int = 0
    max_concurrent_requests: int = 0
    max_stop_sequences: int = 4


def refuse(field: str, why: str) -> BackendLacks:
    return BackendLacks(f"a tgi backend cannot serve `{field}`: {why}", param=field)


def refuse_unknown(extra: tuple[str, ...], known: frozenset[str] = frozenset()) -> None:
    """Refuse fields that this route does not know.

    :raises BackendLacks: there is one.
    """
    for field in extra:
        if field not in known:
            where = "only completions have it" if field in _NATIVE else "it does not know the field"
            raise refuse(field, where)


def generate_body(
    request: GenerateRequest, adapter: str, info: Info | None, neutral: bool = True
) -> bytes:
    """The body of `/generate` and `/generate_stream`.

    ``neutral``: sample where nothing is said of it, which TGI itself would not.

    :raises BackendLacks: the request asks for what these cannot do.
    """
    refuse_unknown(request.extra, _NATIVE)
    for field, why in _impossible(request, info):
        raise refuse(field, why)
    sampling = request.sampling
    greedy = sampling.temperature == 0
    parameters: dict[str, object] = {
        "details": True,
        "do_sample": not greedy if neutral or greedy else None,
        "max_new_tokens": sampling.max_tokens or _COMPLETION_TOKENS,
        "temperature": sampling.temperature or None,
        "top_p": _top_p(request),
        "top_k": sampling.top_k if (sampling.top_k or 0) > 0 and not greedy else None,
        "repetition_penalty": sampling.repetition_penalty,
        "frequency_penalty": sampling.frequency_penalty,
        "seed": sampling.seed,
        "stop": sampling.stop or None,
        "top_n_tokens": sampling.logprobs or None,
        "grammar": _grammar(request),
        "adapter_id": adapter or None,
        **{name: request.fields[name] for name in request.extra},
    }
    said = {name: value for name, value in parameters.items() if value is not None}
    return msgspec.json.encode({"inputs": request.prompts[0], "parameters": said})


def chat_fields(request: GenerateRequest, adapter: str, info: Info | None) -> dict[str, object]:
    """What to change in the body for `/v1/chat/completions`; None: to leave out.

    :raises BackendLacks: the request asks for what that route cannot do.
    """
    refuse_unknown(request.extra, _CHAT)
    for field, why in _impossible(request, info):
        raise refuse(field, why)
    sampling = request.sampling
    if (sampling.top_k or 0) > 0:
        raise refuse("top_k", "only completions have it")
    if request.needs_tools and request.needs_schema:
        raise refuse("response_format", "it excludes `tools`")
    # Chat has no repetition penalty, but makes one of a presence penalty: that plus 2.
    repetition = sampling.repetition_penalty
    presence = None if repetition in (None, 1) else (repetition or 0) - 2
    return {
        "model": adapter or "tgi",
        "stream": request.stream,
        "max_tokens": sampling.max_tokens,
        "max_completion_tokens": None,
        "stop": sampling.stop or None,
        "top_p": _top_p(request),
        "presence_penalty": presence,
        "response_format": _grammar(request),
        "top_logprobs": sampling.logprobs,
        # Without effect here, or refused for their form.
        **dict.fromkeys(("ignore_eos", "logit_bias", "min_p", "min_tokens", "n")),
        **dict.fromkeys(("repetition_penalty", "top_k")),
    }


def _impossible(request: GenerateRequest, info: Info | None) -> Iterator[tuple[str, str]]:
    """The fields that cannot be served, each with the reason."""
    sampling = request.sampling
    stops = info.max_stop_sequences if info else 4
    most = info.max_total_tokens if info else 0
    top = "top_logprobs" if request.endpoint == "chat" else "logprobs"
    rules: tuple[tuple[str, bool, str], ...] = (
        ("n", request.n > 1, "it gives one choice"),
        ("prompt", not _one_text(request), "it takes one prompt, and that as text"),
        ("echo", request.echo and sampling.logprobs is not None, "not with `logprobs`"),
        ("max_tokens", 0 < most <= (sampling.max_tokens or 0), f"at most {most - 1}"),
        ("stop", len(sampling.stop) > stops, f"at most {stops} stop strings"),
        ("top_p", sampling.top_p == 0, "it must be above 0"),
        ("min_p", bool(sampling.min_p), "it has no such sampling"),
        ("presence_penalty", bool(sampling.presence_penalty), "use `repetition_penalty`"),
        ("repetition_penalty", sampling.repetition_penalty == 0, "it must be above 0"),
        ("seed", (sampling.seed or 0) < 0, "it must not be negative"),
        ("min_tokens", sampling.min_tokens > 0, "it has no least length"),
        ("ignore_eos", sampling.ignore_eos, "it always ends at the end token"),
        (top, (sampling.logprobs or 0) > _TOP_TOKENS, f"at most {_TOP_TOKENS}"),
    )
    return ((field, why) for field, broken, why in rules if broken)


def _one_text(request: GenerateRequest) -> bool:
    if request.endpoint == "chat":
        return True
    return len(request.prompts) == 1 and isinstance(request.prompts[0], str)


def _top_p(request: GenerateRequest) -> float | None:
    """None for 1, which it refuses, and for greedy requests, which it would then sample."""
    top_p = request.sampling.top_p
    return None if top_p == 1 or request.sampling.temperature == 0 else top_p


def _grammar(request: GenerateRequest) -> dict[str, Any] | None:
    """``response_format`` as TGI's grammar, which it is on both routes; ``text`` is none."""
    if not request.needs_schema:
        return None
    wanted: dict[str, Any] = msgspec.json.decode(request.fields["response_format"])
    if "value" in wanted:  # its own form: a JSON schema or a regular expression
        return wanted
    described = wanted.get("json_schema")
    schema = described.get("schema") if isinstance(described, dict) else None
    if not isinstance(schema, dict) or "properties" not in schema:
        raise refuse("response_format", "it needs a JSON schema with `properties`")
    return {"type": "json", "value": schema}
