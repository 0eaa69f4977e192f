"""The transport seam: what an adapter may ask of an HTTP connection, and nothing more.

The gateway decides what stands behind it; adapters never import a client library on the data path.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping

__all__ = ["Upstream", "UpstreamResponse"]


class UpstreamResponse(ABC):
    """A response whose head has arrived. Close it in every case; closing twice is fine.

    Closing before the body's end closes the connection, which is how a backend learns that
    nobody waits for its tokens any more.
    """

    status: int
    #: Lower-case names; of a repeated header the last value.
    headers: Mapping[str, str]

    @abstractmethod
    def chunks(self) -> AsyncIterator[bytes]:
        """The body as it arrives, never empty chunks.

        Nothing is read ahead of the caller beyond the socket's buffer: that is the backpressure.

        :raises StreamTruncated: the connection broke within the body.
        """

    @abstractmethod
    async def read(self, limit: int = 64 << 20) -> bytes:
        """The whole body.

        :raises BackendGarbage: it is longer than ``limit`` bytes.
        :raises StreamTruncated: the connection broke within the body.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Give the connection back if the body was read to its end, else close it."""


class Upstream(ABC):
    """Connections to one base URL."""

    @abstractmethod
    async def send(
        self,
        method: str,
        path: str,
        *,
        body: bytes = b"",
        headers: Mapping[str, str] = {},
        connect_timeout: float = 1.0,
    ) -> UpstreamResponse:
        """Send a request and wait for the response's head; redirects are not followed.

        ``path`` is joined to the base URL's path. A ``content-type`` of ``application/json`` is
        added where there is a body and no other type is given.

        :raises ConnectFailed: no connection within ``connect_timeout`` seconds.
        :raises StaleConnection: a kept-alive connection was closed before the head arrived.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """Close all connections."""
