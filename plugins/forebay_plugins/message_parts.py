"""Parts of messages that are no text, for backends that want their bytes and not OpenAI's form."""

from __future__ import annotations

import re

from msgspec import Struct

from forebay.api import BackendLacks, ContentPart, Message

__all__ = ["Inline", "image_of", "parts_of"]

_DATA_URL = re.compile(r"data:(image/[\w.+-]+);base64,([A-Za-z0-9+/=\s]*)\Z")


class Inline(Struct, frozen=True):
    """An image that came with the request: its media type, and its bytes as base64."""

    media_type: str
    data: str


def parts_of(message: Message) -> tuple[ContentPart, ...]:
    """The message's parts in order; a plain text is one."""
    if isinstance(message.content, str):
        return (ContentPart("text", message.content),) if message.content else ()
    return message.content or ()


def image_of(part: ContentPart, backend: str) -> Inline | str:
    """The image that this part is; one that is not inline as its URL.

    :raises BackendLacks: it is none.
    """
    if part.type != "image_url" or part.image_url is None:
        raise BackendLacks(
            f"the {backend} backend takes text and image_url parts, and none of type {part.type!r}",
            param="messages",
        )
    url = part.image_url.url
    if not url.startswith("data:"):
        return url
    found = _DATA_URL.match(url)
    if found is None:
        raise BackendLacks(
            f"the {backend} backend takes images as data:image/...;base64,... alone",
            param="messages",
        )
    return Inline(found[1], found[2])
