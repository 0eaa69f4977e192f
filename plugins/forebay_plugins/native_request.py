"""A request in the native engine's words; what it has no word for is refused by name."""

from __future__ import annotations

import re
from typing import Any, Literal

import msgspec
from msgspec import Struct

from forebay.api import Attempt, BackendLacks, BackendRefused, GenerateRequest, Message
from forebay_engine.client import Generate, SamplingParams, Watermark
from forebay_plugins.native_guide import GUIDE_FIELDS, guide_of

__all__ = ["FIELDS", "generate_command", "message_fields", "unsupported"]

#: OpenAI's default for completions; a chat answer may fill the context.
_COMPLETION_TOKENS = 16
_PATH = re.compile(r" - at `\$\.?(.*)`$")


class Mark(Struct, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """A watermark of one's own; ``gamma``: share of green tokens, ``delta``: added to their logits,
    ``context``: tokens before a token that decide on it."""

    scheme: Literal["kgw", "gumbel"] = "kgw"
    gamma: float = 0.25
    delta: float = 2.0
    context: int = 4
    seeding: Literal["selfhash", "lefthash"] = "selfhash"


class Fields(Struct, kw_only=True, frozen=True):
    """What the engine takes beside the gateway's own fields, by the names that vLLM gave them.

    Those who read ``return_token_ids`` are further on: the engine always tells them.
    """

    #: Each of these tokens ends the answer and is no part of its text.
    stop_token_ids: tuple[int, ...] = ()
    #: The text ends with the stop string or token, not before it.
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    return_token_ids: bool = False
    #: Added to the logits of these tokens, -100 to 100.
    logit_bias: dict[int, float] = {}
    #: Texts, kept out with a space before them as well, or runs of token ids.
    bad_words: list[str | list[int]] = []
    #: No other token comes.
    allowed_token_ids: tuple[int, ...] = ()
    #: As text-generation-inference and transformers call it; vLLM has none.
    typical_p: float = 1.0
    #: True: of the engine's usual kind, as text-generation-inference has it.
    watermark: bool | Mark | None = None
    #: Smaller ones run earlier.
    priority: int = 0
    #: So many of the likeliest tokens at each place of the prompt, beside its own.
    prompt_logprobs: int | None = None


#: Their names: what ``GenerateRequest.extra`` may have.
FIELDS = frozenset(Fields.__struct_fields__) | GUIDE_FIELDS


def generate_command(request: GenerateRequest, attempt: Attempt) -> Generate:
    """The engine's form of a request.

    :raises BackendRefused: it asks for what the engine can't do.
    """
    guide = guide_of(request)
    _refuse_lacking(request, guided=guide is not None)
    further = _further(request)
    chat = request.endpoint == "chat"
    return Generate(
        messages=[message_fields(message) for message in request.messages] if chat else None,
        prompts=[p if isinstance(p, str) else list(p) for p in request.prompts],
        n=request.n,
        sampling=_sampling(request, further),
        guide=guide[1] if guide is not None else None,
        fill_context=chat and request.sampling.max_tokens is None,
        seed=request.sampling.seed,
        bad_words=further.bad_words,
        watermark=_watermark(further.watermark),
        priority=further.priority,
        timeout=attempt.timeouts.total or None,
        salt=request.identity.tenant,
        echo=request.echo,
        traceparent=attempt.headers.get("traceparent", ""),
    )


def _refuse_lacking(request: GenerateRequest, *, guided: bool) -> None:
    reasons = [
        (request.needs_tools, "tools", "tool calls"),
        (request.needs_schema and not guided, "response_format", "this form of answers"),
        (request.needs_multimodal, "messages", "messages with parts other than text"),
    ]
    reasons += [(True, name, f"the field {name!r}") for name in request.extra if name not in FIELDS]
    for applies, param, what in reasons:
        if applies:
            raise unsupported(what, param)


def prompt_logprobs(request: GenerateRequest) -> int | None:
    """So many of the likeliest tokens at each place of the prompt as the field asks for."""
    return _further(request).prompt_logprobs


def _further(request: GenerateRequest) -> Fields:
    """:raises BackendRefused: a field's value has another type than the engine's."""
    body = msgspec.json.encode({name: request.fields[name] for name in request.extra})
    try:
        return msgspec.json.decode(body, type=Fields)
    except msgspec.ValidationError as error:
        where = _PATH.search(str(error))
        raise BackendRefused(
            _PATH.sub("", str(error)), param=where.group(1) if where else None
        ) from None


def _watermark(asked: bool | Mark | None) -> bool | Watermark | None:
    return Watermark(**msgspec.structs.asdict(asked)) if isinstance(asked, Mark) else asked


def unsupported(what: str, param: str) -> BackendLacks:
    return BackendLacks(f"the native engine does not support {what}", param=param)


def message_fields(message: Message) -> dict[str, Any]:
    found: dict[str, Any] = {"role": message.role, "content": message.text()}
    if message.name is not None:
        found["name"] = message.name
    if message.reasoning_content is not None:
        found["reasoning_content"] = message.reasoning_content
    if message.tool_calls is not None:
        found["tool_calls"] = [msgspec.json.decode(call) for call in message.tool_calls]
    if message.tool_call_id is not None:
        found["tool_call_id"] = message.tool_call_id
    return found


def _sampling(request: GenerateRequest, further: Fields) -> SamplingParams:
    """What the client left open takes the engine's neutral value."""
    sampling = request.sampling
    scored = [further.prompt_logprobs, sampling.logprobs if request.echo else None]
    asked = {
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": 0 if sampling.top_k == -1 else sampling.top_k,
        "min_p": sampling.min_p,
        "frequency_penalty": sampling.frequency_penalty,
        "presence_penalty": sampling.presence_penalty,
        "repetition_penalty": sampling.repetition_penalty,
        "logprobs": sampling.logprobs,
    }
    given: dict[str, Any] = {name: value for name, value in asked.items() if value is not None}
    return SamplingParams(
        **{"max_tokens": _COMPLETION_TOKENS, **given},
        stop=sampling.stop,
        stop_token_ids=further.stop_token_ids,
        include_stop=further.include_stop_str_in_output,
        skip_special_tokens=further.skip_special_tokens,
        logit_bias=further.logit_bias,
        allowed_token_ids=further.allowed_token_ids,
        typical_p=further.typical_p,
        prompt_logprobs=max((n for n in scored if n is not None), default=None),
        min_tokens=sampling.min_tokens,
        ignore_eos=sampling.ignore_eos,
    )
