"""The transports behind :class:`forebay.api.Upstream`.

Plain HTTP, which is nearly all of a serving fleet, goes through our own HTTP/1.1 client: it costs
a third of the CPU per request (`docs/adr/0004`). HTTPS goes through httpx over aiohttp, which knows
certificates and the environment's proxies.
"""

from __future__ import annotations

from forebay.api import ConfigError, Upstream


def connect(base_url: str) -> Upstream:
    """Open (lazily) the transport to a base URL.

    :raises ConfigError: its scheme is neither http nor https.
    """
    scheme = base_url.partition("://")[0].lower()
    if scheme == "http":
        from forebay.transport.http1 import Http1Upstream

        return Http1Upstream(base_url)
    if scheme == "https":
        from forebay.transport.httpx_aiohttp import HttpxUpstream

        return HttpxUpstream(base_url)
    raise ConfigError(f"{base_url!r} must begin with http:// or https://", param="url")
