"""Responses that may be continued: kept in memory, apart for each tenant, within bounds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import msgspec
from litestar import Request, Response, delete, get
from litestar.handlers import HTTPRouteHandler
from msgspec import Struct

from forebay.access import Access
from forebay.api import RequestError

#: Bytes that an entry costs beside its texts: objects, keys and pointers.
_ENTRY = 1024


class UnknownResponse(RequestError):
    kind = "response_not_found"
    status = 404


class Stored(Struct, frozen=True):
    #: The response object, as GET gives it.
    body: bytes
    #: The conversation up to and with this response, each a message of the chat dialect. A
    #: continuation shares the bytes of those before it.
    messages: tuple[bytes, ...]

    @property
    def size(self) -> int:
        """At most; what a conversation shares is counted with each of its responses."""
        return _ENTRY + len(self.body) + sum(map(len, self.messages))


class ResponseStore:
    """At most ``limit`` bytes for each tenant; the oldest responses make room."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._kept: dict[str, OrderedDict[str, Stored]] = {}
        self._sizes: dict[str, int] = {}

    def put(self, tenant: str, response_id: str, stored: Stored) -> None:
        if stored.size > self._limit:
            return
        kept = self._kept.setdefault(tenant, OrderedDict())
        kept[response_id] = stored
        self._sizes[tenant] = self._sizes.get(tenant, 0) + stored.size
        while self._sizes[tenant] > self._limit:
            _, oldest = kept.popitem(last=False)
            self._sizes[tenant] -= oldest.size

    def get(self, tenant: str, response_id: str) -> Stored:
        """:raises UnknownResponse: it is not there, or not this tenant's."""
        kept = self._kept.get(tenant)
        if kept is None or response_id not in kept:
            raise UnknownResponse(
                f"there is no response {response_id!r}: it was never stored, or has made room "
                "for newer ones"
            )
        return kept[response_id]

    def delete(self, tenant: str, response_id: str) -> None:
        """:raises UnknownResponse: it is not there, or not this tenant's."""
        self._sizes[tenant] = self._sizes.get(tenant, 0) - self.get(tenant, response_id).size
        del self._kept[tenant][response_id]


def response_routes(store: ResponseStore, access: Access) -> list[HTTPRouteHandler]:
    """``GET`` and ``DELETE /v1/responses/{id}``."""

    @get("/v1/responses/{response_id:str}", sync_to_thread=False)
    def retrieve(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant = access.identify(request.headers).tenant
        _refuse_queries(request.query_params)
        return _json(store.get(tenant, request.path_params["response_id"]).body)

    @delete("/v1/responses/{response_id:str}", sync_to_thread=False, status_code=200)
    def remove(request: Request[Any, Any, Any]) -> Response[bytes]:
        tenant = access.identify(request.headers).tenant
        response_id = request.path_params["response_id"]
        store.delete(tenant, response_id)
        gone = {"id": response_id, "object": "response", "deleted": True}
        return _json(msgspec.json.encode(gone))

    return [retrieve, remove]


def _refuse_queries(query: Mapping[str, Any]) -> None:
    if query:
        name = next(iter(query))
        raise RequestError("a stored response is given as a whole, without options", param=name)


def _json(body: bytes) -> Response[bytes]:
    return Response(body, media_type="application/json")
