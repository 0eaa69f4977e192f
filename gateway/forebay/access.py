"""API keys: who is asking."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping

from forebay.api import Identity, Unauthorized
from forebay.config import Key

__all__ = ["Access", "hash_of", "new_key"]

_PREFIX = "sha256:"


def new_key() -> str:
    """A fresh key: ``fb-`` and 32 random bytes in 43 URL-safe characters."""
    return f"fb-{secrets.token_urlsafe(32)}"


def hash_of(key: str) -> str:
    """The hash by which the configuration knows a key.

    A plain digest is enough: with 256 random bits there is nothing to guess.
    """
    return f"{_PREFIX}{_digest(key).hex()}"


class Access:
    """Tells who asks by the API key. Without configured keys everyone is ``anonymous``."""

    def __init__(self, keys: Mapping[str, Key]) -> None:
        self._known = [
            (bytes.fromhex(key.hash.removeprefix(_PREFIX)), Identity(key=name, tenant=key.tenant))
            for name, key in keys.items()
        ]

    def identify(self, headers: Mapping[str, str]) -> Identity:
        """Who sent a request with these headers (lower-case names).

        The key is a bearer token in ``authorization`` (RFC 6750 section 2.1) or the whole of
        ``x-api-key``.

        :raises Unauthorized: keys are configured, and the request has none of them.
        """
        if not self._known:
            return Identity()
        key = _presented(headers)
        if not key:
            raise Unauthorized(
                "no API key: send it as `Authorization: Bearer KEY` or as `x-api-key: KEY`"
            )
        digest = _digest(key)
        found: Identity | None = None
        for known, identity in self._known:  # never left early: the time must not tell which
            if hmac.compare_digest(known, digest):
                found = identity
        if found is None:
            raise Unauthorized("the API key is not known here")
        return found


def _presented(headers: Mapping[str, str]) -> str:
    scheme, _, token = headers.get("authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    return headers.get("x-api-key", "").strip()


def _digest(key: str) -> bytes:
    # Header values can hold any byte; a key that is not UTF-8 must be refused, not crash.
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
