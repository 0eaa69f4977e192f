"""Chat bodies on their way in: what has two names among clients and servers has one afterwards."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from forebay.api import GenerateRequest, Identity, RequestError
from forebay.config import Limits
from forebay.http.decode import decode_chat
from forebay.http.reply import Arrival


def decoded(**body: Any) -> GenerateRequest:
    arrival = Arrival(
        body=json.dumps({"model": "m", **body}).encode(),
        request_id="r",
        created=1,
        identity=Identity(),
        headers={},
        parameters={},
    )
    request, _ = decode_chat(arrival, Limits())
    assert isinstance(request, GenerateRequest)
    return request


@pytest.mark.parametrize(
    ("said", "meant"),
    [
        ({"reasoning": "hm"}, "hm"),
        ({"reasoning_content": "hm"}, "hm"),
        ({"reasoning": "no", "reasoning_content": "hm"}, "hm"),
        ({"reasoning": None}, None),
        ({"content": 'a "reasoning" b'}, None),
    ],
)
def test_an_assistants_reasoning(said: dict[str, Any], meant: str | None) -> None:
    """In the typed message and in the fields that are passed on."""
    history = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!", **said}]
    request = decoded(messages=history, unheard_of={"reasoning": 1})
    assert request.messages[1].reasoning_content == meant
    (_, passed) = msgspec.json.decode(request.fields["messages"])
    assert passed.get("reasoning_content") == meant
    assert "reasoning" not in passed
    assert msgspec.json.decode(request.fields["unheard_of"]) == {"reasoning": 1}


def test_reasoning_of_another_type() -> None:
    with pytest.raises(RequestError) as refused:
        decoded(messages=[{"role": "assistant", "reasoning": 3}])
    assert refused.value.param == "messages[0].reasoning_content"
