"""What must never be shown of a configuration."""

from __future__ import annotations

import re
from typing import Any

__all__ = ["is_secret", "masked", "without_password"]

_NAMES = ("api_key", "token", "secret", "password", "authorization", "api-key")
_USERINFO = re.compile(r"//[^/@\s]*@")


def is_secret(path: str) -> bool:
    """Whether the value at this path of the configuration must not be shown."""
    *sections, name = path.lower().split(".")
    return "headers" in sections or name.endswith(_NAMES)


def without_password(text: str) -> str:
    """The text with `user:password@` of a URL in it covered."""
    return _USERINFO.sub("//…@", text)


def masked(tree: Any, path: str = "") -> Any:
    """A copy of plain data in which no secret can be read."""
    if isinstance(tree, dict):
        return {key: masked(value, f"{path}.{key}") for key, value in tree.items()}
    if isinstance(tree, list):
        return [masked(value, path) for value in tree]
    if not isinstance(tree, str):
        return tree
    return "…" if tree and is_secret(path) else without_password(tree)
