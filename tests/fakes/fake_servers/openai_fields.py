"""Requests in OpenAI's words: what is wrong with their types, and what they ask of the model."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from fake_servers.model import Ask, tokenize

__all__ = ["ask_of", "mistakes", "named_tool", "prompts_of", "stops_of"]

_KINDS: Mapping[str, str] = {
    **dict.fromkeys(
        ("frequency_penalty", "min_p", "presence_penalty", "repetition_penalty", "temperature"),
        "number",
    ),
    "top_p": "number",
    **dict.fromkeys(
        ("max_completion_tokens", "max_tokens", "min_tokens", "n", "seed", "top_k", "top_logprobs"),
        "integer",
    ),
    "messages": "list",
    "tools": "list",
    "stream": "boolean",
    "ignore_eos": "boolean",
    "logit_bias": "dictionary",
    "response_format": "dictionary",
    "stream_options": "dictionary",
}
_TYPES: Mapping[str, tuple[type, ...]] = {
    "number": (int, float),
    "integer": (int,),
    "list": (list,),
    "boolean": (bool,),
    "dictionary": (dict,),
}
_SHORT = {"number": "float", "integer": "int", "boolean": "bool", "dictionary": "dict"}


def mistakes(
    body: Mapping[str, Any], required: Collection[str], known: Collection[str] | None = None
) -> list[dict[str, Any]]:
    """As pydantic lists them; ``known``: the only fields there may be."""
    found = [
        _mistake("missing", name, "Field required", dict(body))
        for name in required
        if name not in body
    ]
    for name, value in body.items():
        kind = _KINDS.get(name)
        if known is not None and name not in known:
            found.append(_mistake("extra_forbidden", name, "Extra inputs are not permitted", value))
        elif kind and value is not None and not isinstance(value, _TYPES[kind]):
            short, article = _SHORT.get(kind, kind), "an" if kind == "integer" else "a"
            said = f"Input should be a valid {kind}"
            if isinstance(value, str) and kind in ("number", "integer", "boolean"):
                said += f", unable to parse string as {article} {kind}"
                short += "_parsing"
            else:
                short += "_type"
            found.append(_mistake(short, name, said, value))
    for place, tool in enumerate(_list(body.get("tools"))):
        if not isinstance(tool, dict) or not (tool.get("function") or {}).get("name"):
            found.append(_mistake("missing", f"tools.{place}.function.name", "Field required", {}))
    return found


def _mistake(kind: str, place: str, message: str, value: Any) -> dict[str, Any]:
    loc = ("body", *(int(part) if part.isdecimal() else part for part in place.split(".")))
    return {"type": kind, "loc": loc, "msg": message, "input": value}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def stops_of(body: Mapping[str, Any]) -> tuple[str, ...]:
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(stop)


def prompts_of(prompt: Any, begin: Collection[int]) -> list[tuple[int, ...]]:
    """Token ids of each prompt; ``begin`` is put before texts."""
    if isinstance(prompt, str):
        return [(*begin, *tokenize(prompt))]
    if prompt and all(isinstance(token, int) for token in prompt):
        return [tuple(prompt)]
    return [found for each in prompt for found in prompts_of(each, begin)]


def ask_of(
    body: Mapping[str, Any], prompt: tuple[int, ...], max_tokens: int, forced: str | None = None
) -> Ask:
    """``max_tokens``: where the request has none."""
    given = {
        name: body[name]
        for name in (
            *("temperature", "top_p", "top_k", "min_p", "frequency_penalty", "presence_penalty"),
            *("repetition_penalty", "seed", "ignore_eos", "min_tokens"),
        )
        if body.get(name) is not None
    }
    asked = body.get("max_completion_tokens") or body.get("max_tokens")
    bias = {int(token): float(value) for token, value in (body.get("logit_bias") or {}).items()}
    return Ask(
        prompt=prompt,
        max_tokens=asked or max_tokens,
        stop=stops_of(body),
        stop_tokens=frozenset(body.get("stop_token_ids") or ()),
        logit_bias=bias,
        forced=forced,
        **given,
    )


def named_tool(body: Mapping[str, Any]) -> dict[str, Any] | None:
    """The function that a request's ``tool_choice`` names, or with ``required`` the first."""
    choice, tools = body.get("tool_choice"), _list(body.get("tools"))
    if choice == "required" and tools:
        return dict(tools[0]["function"])
    if not isinstance(choice, dict):
        return None
    name = (choice.get("function") or {}).get("name")
    functions = [tool["function"] for tool in tools]
    return next((function for function in functions if function["name"] == name), None)
