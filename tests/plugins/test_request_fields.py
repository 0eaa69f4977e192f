"""Fields that a server would take and not heed are refused; `priority` has one direction."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
from msgspec import structs

from forebay.api import BackendFailed, BackendRefused, GenerateRequest, Sampling
from forebay.testing import Exchange, ScriptedServer, adapter_context, chat_request
from forebay.testing.adapter import collect
from forebay_plugins import llamacpp, trtllm, vllm

DESCRIPTION = {
    "paths": {"/v1/chat/completions": {}, "/v1/completions": {}},
    "components": {
        "schemas": {
            "ChatCompletionRequest": {"properties": {"messages": {}, "cache_salt": {}}},
            "CompletionRequest": {"properties": {"prompt": {}, "suffix": {}}},
            "HTTPValidationError": {"type": "object"},
        }
    },
}


def asking(endpoint: Any = "chat", **fields: Any) -> GenerateRequest:
    request = chat_request(endpoint=endpoint, **fields)
    return structs.replace(request, extra=tuple(fields))


async def sent(
    module: ModuleType, request: GenerateRequest, described: bool = True, **settings: Any
) -> dict[str, Any]:
    """The body that reaches the server, which then fails on it.

    :raises BackendRefused: it reaches none.
    """
    (kind,) = module.adapters()
    pages = {"/openapi.json": DESCRIPTION if described else {"paths": DESCRIPTION["paths"]}}
    pages |= {"/health": {}, "/v1/models": {"data": [{"id": "m"}]}, "/version": {"version": "9"}}

    async def script(exchange: Exchange) -> None:
        if exchange.path in pages:
            exchange.answer(200, pages[exchange.path])
        else:
            exchange.answer(500, b"")

    async with ScriptedServer(script) as server:
        made = kind.settings(adapter=kind.name, url=server.url, **settings)
        adapter = kind.build(made, adapter_context())
        try:
            if module is vllm:
                await adapter.probe()
            with pytest.raises(BackendFailed):
                await collect(adapter, request)
        finally:
            await adapter.aclose()
        body: dict[str, Any] = server.exchanges[-1].json
        return body


@pytest.mark.parametrize(
    ("module", "request_", "field"),
    [
        (vllm, asking(cache_salt="s", unheard_of=1), "unheard_of"),
        (vllm, asking("completions", cache_salt="s"), "cache_salt"),
        (llamacpp, asking(unheard_of=1), "unheard_of"),
        (llamacpp, asking(guided_regex="a"), "guided_regex"),
        (llamacpp, asking(priority=1), "priority"),
        (
            llamacpp,
            structs.replace(asking(), sampling=Sampling(max_tokens=9, min_tokens=2)),
            "min_tokens",
        ),
    ],
)
async def test_what_would_be_without_effect_is_refused(
    module: ModuleType, request_: GenerateRequest, field: str
) -> None:
    with pytest.raises(BackendRefused, match=field) as refused:
        await sent(module, request_)
    assert refused.value.param == field


@pytest.mark.parametrize(
    ("module", "endpoint", "fields", "settings"),
    [
        (vllm, "chat", {"cache_salt": "s"}, {}),
        (vllm, "completions", {"suffix": "s"}, {}),
        (vllm, "chat", {"unheard_of": 1}, {"described": False}),
        (llamacpp, "chat", {"grammar": "root ::= 'a'", "repeat_last_n": 3}, {}),
        (llamacpp, "chat", {"unheard_of": 1}, {"fields": frozenset({"unheard_of"})}),
    ],
)
async def test_what_is_known_is_sent(
    module: ModuleType, endpoint: str, fields: dict[str, Any], settings: dict[str, Any]
) -> None:
    body = await sent(module, asking(endpoint, **fields), **settings)
    assert {name: body[name] for name in fields} == fields


async def test_trtllm_has_the_highest_priority_first() -> None:
    """And from 0 to 1, with 0.5 for those who say nothing."""
    told = [
        (await sent(trtllm, asking(priority=said)))["priority"]
        for said in (-(10**9), -2, -1, 0, 1, 2, 10**9)
    ]
    assert told == sorted(set(told), reverse=True)
    assert told[3] == 0.5
    assert (min(told), max(told)) == pytest.approx((0, 1), abs=1e-6)
    with pytest.raises(BackendRefused, match="integer"):
        await sent(trtllm, asking(priority="high"))
    assert "priority" not in await sent(trtllm, asking(priority=None))
