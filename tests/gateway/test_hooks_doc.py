"""docs/hooks.md names every hook with its exact signature, and its examples load."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pluggy
import pytest

from forebay.api import Decision, Identity, Outcome, hooks
from forebay.config import Config, Model
from forebay.loader import GROUP, Loaded, load_plugins
from forebay.testing import make_request, make_snapshot

TESTS = Path(__file__).parents[1]
PAGE = (TESTS.parent / "docs" / "hooks.md").read_text()


def specified() -> dict[str, Callable[..., Any]]:
    manager = pluggy.PluginManager(hooks.PROJECT)
    manager.add_hookspecs(hooks)
    return {
        name: function
        for name, function in vars(hooks).items()
        if inspect.isfunction(function) and hasattr(manager.hook, name)
    }


HOOKS = sorted(specified())


def example(hook: str) -> ModuleType:
    section = PAGE.split(f"## `{hook}(")[1].split("\n## ")[0]
    (code,) = re.findall(r"^```python\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    module = ModuleType(f"example_{hook}")
    exec(compile(code, f"<{hook}>", "exec", dont_inherit=True), vars(module))
    return module


def test_the_page_has_every_hook_and_no_other() -> None:
    headings = re.findall(r"^## `(\w+)\(", PAGE, re.MULTILINE)
    assert sorted(headings) == HOOKS == ["adapters", "middleware", "observers", "policies"]


@pytest.mark.parametrize("hook", HOOKS)
def test_the_heading_is_the_exact_signature(hook: str) -> None:
    function = specified()[hook]
    assert f"## `{hook}{_signature(function)}`\n" in PAGE
    assert inspect.getdoc(function)


def _signature(function: Callable[..., Any]) -> str:
    """As written: annotations are strings, whose quotes are no part of it."""
    return str(inspect.signature(function)).replace("'", "")


@pytest.mark.parametrize("hook", HOOKS)
def test_the_example_loads_and_offers_something(hook: str) -> None:
    registry = load_plugins([], extra={"example": example(hook)})
    (entry,) = registry.report
    assert isinstance(entry, Loaded), entry
    assert len(entry.provides) == 1
    offered = getattr(registry, hook)
    assert len(offered) == 1


@pytest.mark.parametrize("hook", HOOKS)
def test_the_hook_is_used_in_another_test(hook: str) -> None:
    others = (path for path in TESTS.rglob("*.py") if path != Path(__file__))
    assert any(re.search(rf"def {hook}\(|\b{hook}=", path.read_text()) for path in others)


def test_the_entry_point_is_in_our_group() -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert list(tomllib.loads(text)["project"]["entry-points"]) == [GROUP]


def test_the_policy_prefers_in_order() -> None:
    registry = load_plugins([], extra={"example": example("policies")})
    policy = registry.policy("first_choice", Path())
    assert policy.score(make_request(), make_snapshot(4)) == [1.0, 0.75, 0.5, 0.25]


async def test_the_observer_keeps_the_slowest() -> None:
    (observer,) = load_plugins([], extra={"example": example("observers")}).observers
    for seconds in (1.0, 3.0, 2.0):
        await observer.finished(_decision(seconds))
    assert vars(observer) == {"seconds": {None: 3.0}}


def _decision(seconds: float) -> Decision:
    return Decision(
        request_id="r",
        time=0.0,
        endpoint="chat",
        model="m",
        identity=Identity(),
        policy="p",
        policy_version="1",
        seed=0,
        candidates=(),
        order=(),
        outcome=Outcome(result="ok", duration=seconds),
    )


async def test_adapter_and_middleware_serve(
    serve_gateway: Callable[..., Awaitable[Any]],
) -> None:
    plugins = {hook: example(hook) for hook in ("adapters", "middleware")}
    settings = load_plugins([], extra=plugins).adapter("parrot").settings(adapter="parrot")
    config = Config(backends={"polly": settings}, models={"m": Model(backends=["polly"])})
    gateway = await serve_gateway(config, extra=plugins)
    body = {"model": "m", "messages": [{"role": "user", "content": "Say it"}]}
    async with gateway.client() as client:
        answer = await client.post("/v1/chat/completions", json=body)
    assert answer.json()["choices"][0]["message"]["content"] == "Pieces of eight!"
    assert answer.headers["x-region"] == "eu-1"
    assert answer.headers["x-forebay-backend"] == "polly"
