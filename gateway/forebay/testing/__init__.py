"""What authors of plugins test with: needs pytest, and hypothesis for policies.

Imported name by name, so that whoever writes an adapter need not install what policies need.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forebay.testing.adapter import (
        AdapterContract,
        Bench,
        Scenario,
        adapter_context,
        chat_request,
    )
    from forebay.testing.policy import PolicyContract, make_request, make_snapshot
    from forebay.testing.recording import Recorded, recorder, replay
    from forebay.testing.server import Exchange, ScriptedServer

__all__ = [
    "AdapterContract",
    "Bench",
    "Exchange",
    "PolicyContract",
    "Recorded",
    "Scenario",
    "ScriptedServer",
    "adapter_context",
    "chat_request",
    "make_request",
    "make_snapshot",
    "recorder",
    "replay",
]

_HOMES = {
    "AdapterContract": "adapter",
    "Bench": "adapter",
    "Exchange": "server",
    "PolicyContract": "policy",
    "Recorded": "recording",
    "Scenario": "adapter",
    "ScriptedServer": "server",
    "adapter_context": "adapter",
    "chat_request": "adapter",
    "make_request": "policy",
    "make_snapshot": "policy",
    "recorder": "recording",
    "replay": "recording",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
