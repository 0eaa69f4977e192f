"""A model's own sampling defaults reach every backend as if its clients had said them."""

from __future__ import annotations

import json

from forebay.api import EmbedRequest, GenerateRequest, Identity, Sampling
from forebay.config import Limits, SamplingDefaults
from forebay.http.decode import decode_chat
from forebay.http.reply import Arrival
from forebay.sampling import with_defaults

DEFAULTS = SamplingDefaults(temperature=0.6, top_k=20, min_p=0.0, max_tokens=32)


def chat(**fields: object) -> GenerateRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    arrival = Arrival(
        body=json.dumps(body).encode(),
        request_id="r",
        created=1,
        identity=Identity(),
        headers={},
        parameters={},
    )
    request, _ = decode_chat(arrival, Limits())
    assert isinstance(request, GenerateRequest)
    return request


def body_of(request: GenerateRequest) -> dict[str, object]:
    made: dict[str, object] = json.loads(request.openai_body())
    del made["model"], made["messages"]
    return made


def test_what_the_client_leaves_out() -> None:
    """For adapters that read the typed request, and for those that pass its fields on."""
    request = with_defaults(chat(), DEFAULTS)
    assert isinstance(request, GenerateRequest)
    assert request.sampling == Sampling(temperature=0.6, top_k=20, min_p=0.0, max_tokens=32)
    assert body_of(request) == {"temperature": 0.6, "top_k": 20, "min_p": 0.0, "max_tokens": 32}


def test_what_the_client_says_stays() -> None:
    said = {"temperature": 0, "top_k": -1, "max_completion_tokens": 5}
    request = with_defaults(chat(**said, min_p=None), DEFAULTS)
    assert isinstance(request, GenerateRequest)
    assert request.sampling == Sampling(temperature=0, top_k=-1, min_p=0.0, max_tokens=5)
    assert body_of(request) == {**said, "min_p": 0.0}


def test_nothing_configured_changes_nothing() -> None:
    request = chat(seed=1)
    assert with_defaults(request, SamplingDefaults()) is request


def test_other_work_has_no_sampling() -> None:
    request = EmbedRequest(id="r", model="m", created=1, inputs=("a",))
    assert with_defaults(request, DEFAULTS) is request
