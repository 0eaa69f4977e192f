"""What a model's configuration says where its clients say nothing: to all backends the same."""

from __future__ import annotations

import msgspec
from msgspec import Raw, structs

from forebay.api import GenerateRequest, Request
from forebay.config import SamplingDefaults

__all__ = ["with_defaults"]


def with_defaults(request: Request, defaults: SamplingDefaults) -> Request:
    """The request as if its client had said, too, what the configuration says."""
    if not isinstance(request, GenerateRequest):
        return request
    said = request.sampling
    missing = {
        name: value
        for name, value in structs.asdict(defaults).items()
        if value is not None and getattr(said, name) is None
    }
    if not missing:
        return request
    added = {name: Raw(msgspec.json.encode(value)) for name, value in missing.items()}
    return structs.replace(
        request,
        sampling=structs.replace(said, **missing),
        fields={**request.fields, **added},
    )
