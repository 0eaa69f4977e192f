"""A client's side of a conversation with the gateway, or with the backend itself."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import httpx
import msgspec

from forebay.api import Capabilities
from forebay.conformance.answer import Answer, Lacking

__all__ = ["PROMPT", "Talk"]

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
#: Which models go on with for a while; that of none is expected to make sense.
PROMPT = "one two three four five six seven eight"


class Talk:
    """Asks as any OpenAI client would.

    ``claims``: what the gateway says that the backend can do. ``admin`` is there only in talks with
    the gateway, ``backend`` only there and if the backend can be asked by HTTP.
    """

    def __init__(
        self,
        client: httpx.AsyncClient,
        model: str,
        claims: Capabilities,
        admin: httpx.AsyncClient | None = None,
        backend: Talk | None = None,
    ) -> None:
        self._client = client
        self.model = model
        self.claims = claims
        self._admin = admin
        self.backend = backend

    async def ask(
        self,
        path: str,
        body: Mapping[str, Any] | bytes | None = None,
        *,
        method: str = "POST",
        headers: Mapping[str, str] = {},
    ) -> Answer:
        """Ask and take all of the answer. ``body`` is sent as JSON, unless it is bytes."""
        content = body if isinstance(body, bytes | None) else msgspec.json.encode(body)
        raw = bytearray()
        request = self._client.stream(
            method,
            path,
            content=content,
            headers={"content-type": "application/json", **headers},
        )
        async with request as response:
            broke = ""
            try:
                async for piece in response.aiter_raw():
                    raw += piece
            except httpx.TransportError as error:
                broke = str(error) or type(error).__name__
        return Answer(response.status_code, response.headers, bytes(raw), broke)

    async def chat(self, prompt: str = PROMPT, **fields: Any) -> Answer:
        """Ask for chat: greedy and short, unless ``fields`` say otherwise; None takes one out."""
        messages = [{"role": "user", "content": prompt}]
        return await self.ask(CHAT, self.body({"messages": messages, **fields}))

    async def complete(self, prompt: object = PROMPT, **fields: Any) -> Answer:
        """The same for completions; ``prompt`` may also be several, or token ids."""
        return await self.ask(COMPLETIONS, self.body({"prompt": prompt, **fields}))

    async def generate(self, prompt: str = PROMPT, **fields: Any) -> Answer:
        """Where it does not matter: by chat, or by completions if there is no chat."""
        return await self.ask(*self.generation(prompt, **fields))

    async def refusal(self, prompt: str = PROMPT, **fields: Any) -> Answer:
        """The answer to what should be refused. Who takes it all the same is not waited for: that
        might take for ever."""
        path, body = self.generation(prompt, stream=True, **fields)
        request = self._client.stream("POST", path, json=body)
        async with request as response:
            raw = b"" if response.status_code == httpx.codes.OK else await response.aread()
        return Answer(response.status_code, response.headers, raw)

    def generation(self, prompt: str, **fields: Any) -> tuple[str, dict[str, Any]]:
        """Path and body with which :meth:`generate` asks."""
        if "chat" in self.claims.endpoints or "completions" not in self.claims.endpoints:
            return CHAT, self.body({"messages": [{"role": "user", "content": prompt}], **fields})
        return COMPLETIONS, self.body({"prompt": prompt, **fields})

    def body(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        body = {"model": self.model, "max_tokens": 8, "temperature": 0, **fields}
        return {name: value for name, value in body.items() if value is not None}

    @asynccontextmanager
    async def opened(
        self, path: str, body: Mapping[str, Any], *needs: str
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """The pieces of a stream as they come; leaving the block is leaving the conversation."""
        async with self._client.stream("POST", path, json=dict(body)) as response:
            if response.status_code != httpx.codes.OK:
                Answer(response.status_code, response.headers, await response.aread()).expect(
                    *needs
                )
            yield response.aiter_raw()

    async def operator(self, path: str) -> Any:
        """What the admin port answers. :raises Lacking: there is none."""
        if self._admin is None:
            raise Lacking("only the gateway has an admin port")
        response = await self._admin.get(path)
        response.raise_for_status()
        if "json" not in response.headers["content-type"]:
            return response.text
        return response.json()
