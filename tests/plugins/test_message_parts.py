"""Images in messages, in the words of the two backends that do not take OpenAI's."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from forebay.api import BackendRefused, GenerateRequest, Message
from forebay_plugins import anthropic_request, ollama_shape

PNG = "data:image/png;base64,QUJD"
AUDIO = {"type": "input_audio", "input_audio": {"data": "QQ==", "format": "wav"}}


def image(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url, "detail": "low"}}


def asking(*parts: dict[str, Any], role: str = "user") -> GenerateRequest:
    text = {"type": "text", "text": "Look:"}
    message = {"role": role, "content": [text, *parts], "tool_call_id": "c"}
    messages = msgspec.convert([message], tuple[Message, ...])
    return GenerateRequest(
        id="r", endpoint="chat", model="m", created=1, messages=messages, needs_multimodal=True
    )


def for_ollama(request: GenerateRequest) -> Any:
    body = ollama_shape.body_of(request, model="m", num_ctx=0, keep_alive="")
    return body["messages"]


def for_anthropic(request: GenerateRequest) -> Any:
    return anthropic_request.body_of(request, "m", 9)["messages"]


def test_ollama_gets_the_bytes_beside_the_text() -> None:
    (message,) = for_ollama(asking(image(PNG), {"type": "text", "text": " well"}, image(PNG)))
    assert message["content"] == "Look: well"
    assert message["images"] == ["QUJD", "QUJD"]


def test_anthropic_gets_blocks_in_their_order() -> None:
    parts = (image(PNG), {"type": "text", "text": ""}, image("https://x/y.jpg"))
    (message,) = for_anthropic(asking(*parts))
    assert message["content"] == [
        {"type": "text", "text": "Look:"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "QUJD"}},
        {"type": "image", "source": {"type": "url", "url": "https://x/y.jpg"}},
    ]


@pytest.mark.parametrize(
    ("translate", "part", "says"),
    [
        (for_ollama, AUDIO, "'input_audio'"),
        (for_anthropic, AUDIO, "'input_audio'"),
        (for_ollama, {"type": "image_url"}, "'image_url'"),
        (for_ollama, image("https://x/y.jpg"), "fetches no images"),
        (for_ollama, image("data:image/png,raw"), "base64"),
        (for_anthropic, image("data:text/plain;base64,QQ=="), "base64"),
    ],
)
def test_what_cannot_be_said_is_refused_by_name(translate: Any, part: Any, says: str) -> None:
    with pytest.raises(BackendRefused, match=says) as refused:
        translate(asking(part))
    assert refused.value.param == "messages"


def test_a_tools_result_is_text_to_anthropic() -> None:
    with pytest.raises(BackendRefused, match="user's"):
        for_anthropic(asking(image(PNG), role="tool"))
