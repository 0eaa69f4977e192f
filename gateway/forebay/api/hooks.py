"""The hooks of a plugin: each is called once, at start, and returns objects.

A plugin is a module (or object) named by an entry point of group ``forebay.v1`` that implements
some of these with ``@hookimpl``. ``docs/hooks.md`` has an example of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pluggy

from forebay.api.adapter import AdapterKind
from forebay.api.observer import Observer
from forebay.api.policy import PolicyKind

__all__ = ["PROJECT", "hookimpl", "hookspec"]

PROJECT = "forebay"
hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def adapters() -> Iterable[AdapterKind]:  # type: ignore[empty-body]
    """Kinds of backend this plugin can talk to."""


@hookspec
def policies() -> Iterable[PolicyKind]:  # type: ignore[empty-body]
    """Routing policies this plugin offers."""


@hookspec
def observers() -> Iterable[Observer]:  # type: ignore[empty-body]
    """Objects told of each request: started, first token, finished."""


@hookspec
def middleware() -> Iterable[Callable[[Any], Any]]:  # type: ignore[empty-body]
    """Functions that wrap the data port's ASGI application, outermost first."""
