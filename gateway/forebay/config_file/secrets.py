"""What must never be shown of a configuration."""

from __future__ import annotations

import re

__all__ = ["is_secret", "without_password"]

_NAMES = ("api_key", "token", "secret", "password", "authorization", "api-key")
_USERINFO = re.compile(r"//[^/@\s]*@")


def is_secret(path: str) -> bool:
    """Whether the value at this path of the configuration must not be shown."""
    *sections, name = path.lower().split(".")
    return "headers" in sections or name.endswith(_NAMES)


def without_password(text: str) -> str:
    """The text with `user:password@` of a URL in it covered."""
    return _USERINFO.sub("//…@", text)
