"""The request fields that a vLLM server knows, as it describes them itself.

It takes any other field as well, answers 200 and says nothing: so those are refused here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from msgspec import Struct

from forebay.api import BackendError, BackendLacks, Endpoint, GenerateRequest
from forebay_plugins.openai_wire import OpenAIServer

__all__ = ["Known", "known_fields", "refuse_unknown"]

Known = Mapping[Endpoint, frozenset[str]]
_SCHEMAS: Mapping[Endpoint, str] = {
    "chat": "ChatCompletionRequest",
    "completions": "CompletionRequest",
}


class Schema(Struct):
    properties: dict[str, Any] = {}


class Components(Struct, frozen=True):
    schemas: dict[str, Schema] = {}


class Description(Struct):
    """Of an OpenAPI description."""

    components: Components = Components()


async def known_fields(server: OpenAIServer) -> Known:
    """For each endpoint; none for those of which the server does not tell."""
    try:
        description: Description = await server.get_json("/openapi.json", Description)
    except BackendError:  # --disable-fastapi-docs
        return {}
    schemas = description.components.schemas
    return {
        endpoint: frozenset(schemas[name].properties)
        for endpoint, name in _SCHEMAS.items()
        if name in schemas and schemas[name].properties
    }


def refuse_unknown(request: GenerateRequest, known: Known, translated: Collection[str]) -> None:
    """``translated``: fields that are not passed on by their name.

    :raises BackendLacks: a field would be without effect.
    """
    fields = known.get(request.endpoint)
    for field in request.extra if fields else ():
        if field not in (fields or ()) and field not in translated:
            raise BackendLacks(
                f"the vLLM backend cannot serve `{field}`: it does not know the field", param=field
            )
