"""The loader: plugins are found, isolated from each other, and what failed is told."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import pytest
from msgspec import Meta

from forebay.api import (
    Adapter,
    AdapterKind,
    BackendSettings,
    ConfigError,
    GenerateRequest,
    Observer,
    Policy,
    PolicyKind,
    PolicySettings,
    Score,
    Snapshot,
    hookimpl,
)
from forebay.loader import GROUP, Failed, Loaded, Registry, load_plugins
from forebay.testing.policy import make_request, make_snapshot

HERE = Path(__file__).parent

Install = Callable[..., None]

GOOD = """
from forebay.api import Policy, PolicyKind, hookimpl

class {name}(Policy):
    def score(self, request, snapshot):
        return [1.0] * len(snapshot.backends)

@hookimpl
def policies():
    return [PolicyKind(name="{name}", build=lambda settings: {name}())]
"""


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution with one plugin onto the path."""
    monkeypatch.syspath_prepend(str(tmp_path))
    before = set(sys.modules)

    def add(
        distribution: str, code: str, *, plugin: str = "", group: str = GROUP, version: str = "1.0"
    ) -> None:
        module = f"{distribution}_module"
        (tmp_path / f"{module}.py").write_text(code)
        info = tmp_path / f"{distribution}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Name: {distribution}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[{group}]\n{plugin or distribution} = {module}\n")

    yield add
    for name in set(sys.modules) - before:
        del sys.modules[name]


def entry(registry: Registry, name: str, distribution: str = "") -> Loaded | Failed:
    return next(
        e
        for e in registry.report
        if e.name == name and (not distribution or e.distribution == distribution)
    )


class Chosen(Policy):
    def score(self, request: GenerateRequest, snapshot: Snapshot) -> list[Score]:
        return [1.0] * len(snapshot.backends)


class Options(PolicySettings, frozen=True):
    share: Annotated[float, Meta(gt=0)] = 1.0
    mode: str = "plain"


class OfUnknownType(PolicySettings, frozen=True):
    share: Unheard = 1  # type: ignore[name-defined] # noqa: F821 - the mistake that is tested


class WithOptions(Chosen):
    def __init__(self, options: Options) -> None:
        if options.mode == "impossible":
            raise ConfigError("mode impossible is not possible")
        if options.mode == "bug":
            raise ZeroDivisionError("one over none")
        self.options = options


def plugin(**hooks: Callable[..., Any]) -> ModuleType:
    """A plugin of the given hooks."""
    module = ModuleType("plugin")
    for name, function in hooks.items():
        setattr(module, name, hookimpl(function))
    return module


def offering(*names: str) -> ModuleType:
    kinds = [PolicyKind(name=name, build=lambda settings: Chosen()) for name in names]
    return plugin(policies=lambda: kinds)


def only(**extra: object) -> Registry:
    return load_plugins(only=[], extra=extra)


# What comes with Forebay


def test_the_built_in_policies_are_there() -> None:
    registry = load_plugins(only=["policies"])
    assert set(registry.policies) >= {
        "round_robin",
        "least_connections",
        "power_of_two",
        "prefix_affinity",
    }
    (loaded,) = registry.report
    assert isinstance(loaded, Loaded)
    assert loaded.distribution == "forebay"
    assert loaded.version
    assert "policy prefix_affinity" in loaded.provides


def test_every_entry_point_of_ours_loads() -> None:
    own = [e for e in load_plugins().report if e.distribution == "forebay"]
    assert [e for e in own if isinstance(e, Failed)] == []
    assert {e.name for e in own} >= {"native", "openai", "llamacpp", "vllm", "simulated"}


def test_two_loads_share_nothing() -> None:
    first, second = only(a=offering("x")), only()
    assert "x" in first.policies
    assert "x" not in second.policies


# Isolation


def test_broken_plugins_are_told_apart_and_leave_the_others_up(install: Install) -> None:
    install("good", GOOD.format(name="fair"))
    install("no_such_import", "import surely_not_installed\n")
    install("wrong_syntax", "def (:\n")
    install("leaves", "raise SystemExit(3)\n")
    install(
        "misspelt", "from forebay.api import hookimpl\n@hookimpl\ndef polices():\n    return []\n"
    )
    install("idle", "")
    install("from_the_future", GOOD.format(name="later"), group="forebay.v9")
    registry = load_plugins()
    assert entry(registry, "good") == Loaded("good", "good", "1.0", ("policy fair",))
    reasons = {e.name: e.reason for e in registry.report if isinstance(e, Failed)}
    assert "No module named 'surely_not_installed'" in reasons["no_such_import"]
    assert "no_such_import_module.py:1" in reasons["no_such_import"]
    assert reasons["wrong_syntax"].startswith("SyntaxError")
    assert reasons["leaves"].startswith("SystemExit: 3")
    assert reasons["misspelt"] == "there is no hook 'polices'; did you mean 'policies'?"
    assert "@hookimpl" in reasons["idle"]
    assert "forebay.v9" in reasons["from_the_future"]
    assert "later" not in registry.policies
    assert "prefix_affinity" in registry.policies
    assert isinstance(registry.policy("fair", HERE), Policy)


def test_of_two_plugins_with_one_name_the_first_distribution_wins(install: Install) -> None:
    install("beta", GOOD.format(name="second"), plugin="same")
    install("alpha", GOOD.format(name="first"), plugin="same")
    registry = load_plugins()
    assert isinstance(entry(registry, "same", "alpha"), Loaded)
    failed = entry(registry, "same", "beta")
    assert isinstance(failed, Failed)
    assert failed.reason == "another plugin is already named 'same'"


def test_nobody_can_take_the_name_of_a_built_in(install: Install) -> None:
    install("aaa", GOOD.format(name="round_robin"))
    registry = load_plugins()
    failed = entry(registry, "aaa")
    assert isinstance(failed, Failed)
    assert "already offered by 'policies' of forebay" in failed.reason
    assert type(registry.policy("round_robin", HERE)).__module__.startswith("forebay_policies")


def test_a_plugin_is_taken_as_a_whole_or_not_at_all() -> None:
    registry = only(a=offering("x"), b=offering("y", "x"))
    assert set(registry.policies) == {"x"}
    assert isinstance(entry(registry, "b"), Failed)


def kind(**changes: Any) -> PolicyKind:
    return PolicyKind(**{"name": "x", "build": lambda settings: Chosen(), **changes})


@pytest.mark.parametrize(
    ("hooks", "reason"),
    [
        ({"policies": lambda: None}, "policies() must return a list or tuple, not None"),
        ({"policies": lambda: ["x"]}, "policies() must return PolicyKind objects, not 'x'"),
        ({"adapters": lambda: [kind()]}, "adapters() must return AdapterKind objects"),
        ({"observers": lambda: [Observer]}, "observers() must return Observer objects"),
        ({"middleware": lambda: [3]}, "middleware() must return callables, not 3"),
        ({"policies": lambda: 1 / 0}, "ZeroDivisionError: division by zero"),
        ({"policies": lambda config: []}, "PluginValidationError"),
        ({"policies": lambda: [kind(), kind()]}, "the policy 'x' is offered twice"),
        ({"policies": lambda: [kind(settings=BackendSettings)]}, "must derive from PolicySettings"),
        ({"policies": lambda: [kind(settings=OfUnknownType)]}, "'Unheard' is not defined"),
    ],
)
def test_wrong_hooks_are_named(hooks: dict[str, Any], reason: str) -> None:
    registry = only(bad=plugin(**hooks), good=offering("fine"))
    failed = entry(registry, "bad")
    assert isinstance(failed, Failed)
    assert reason in failed.reason
    assert set(registry.policies) == {"fine"}


def test_a_plugin_may_fail_while_its_generator_runs() -> None:
    def policies() -> Iterable[PolicyKind]:
        yield kind()
        raise RuntimeError("half way")

    registry = only(bad=plugin(policies=policies))
    assert "half way" in str(entry(registry, "bad"))
    assert registry.policies == {}


def test_observers_and_middleware_come_in_the_order_of_the_plugins() -> None:
    first, second = Observer(), Observer()
    wraps = [lambda app: app, lambda app: app]
    registry = only(
        a=plugin(observers=lambda: [first], middleware=lambda: wraps[:1]),
        b=plugin(observers=lambda: [second], middleware=lambda: wraps[1:]),
    )
    assert registry.observers == (first, second)
    assert list(registry.middleware) == wraps
    loaded = entry(registry, "a")
    assert isinstance(loaded, Loaded)
    assert "observer Observer" in loaded.provides


# The allow-list


def test_only_those_named_are_imported(install: Install) -> None:
    install("wanted", GOOD.format(name="fair"))
    install("unwanted", "raise AssertionError('imported')\n")
    registry = load_plugins(only=["wanted"])
    assert [e.name for e in registry.report] == ["wanted"]
    with pytest.raises(ConfigError, match=r"plugins.only leaves out: .*unwanted"):
        registry.policy("round_robin", HERE)


def test_a_name_that_is_not_installed_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"plugins.only: .*'polices'; did you mean 'policies'\?"):
        load_plugins(only=["polices"])


# Looking things up


def test_an_unknown_kind_is_told_with_its_neighbour_and_with_what_failed() -> None:
    registry = only(a=offering("nearby"), lost=plugin(policies=lambda: 1 / 0))
    with pytest.raises(ConfigError) as caught:
        registry.policy("nearbye", HERE)
    assert "no policy is named 'nearbye'; did you mean 'nearby'?" in caught.value.message
    assert "plugin 'lost' could not be loaded: ZeroDivisionError" in caught.value.message
    with pytest.raises(ConfigError, match="no adapter is named 'vlm'; there are none"):
        registry.adapter("vlm")


def test_an_adapter_is_found_by_name() -> None:
    def build(settings: BackendSettings, context: object) -> Adapter:
        raise AssertionError("not asked for")

    offered = AdapterKind(name="x", settings=BackendSettings, build=build)
    assert only(a=plugin(adapters=lambda: [offered])).adapter("x") is offered


@pytest.fixture
def tuned() -> Registry:
    return only(
        a=plugin(policies=lambda: [kind(build=WithOptions, settings=Options)]), b=offering("plain")
    )


def test_options_become_settings(tuned: Registry) -> None:
    policy = tuned.policy({"name": "x", "share": 2}, HERE)
    assert isinstance(policy, WithOptions)
    assert policy.options == Options(share=2.0)
    default = tuned.policy("x", HERE)
    assert isinstance(default, WithOptions)
    assert default.options == Options()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"name": "x", "shares": 1}, "policy 'x' has no option 'shares'; did you mean 'share'?"),
        ({"name": "plain", "share": 1}, "policy 'plain' has no option 'share'; it has no options"),
        ({"name": "x", "share": "big"}, "policy 'x': option 'share': Expected `float`, got `str`"),
        ({"name": "x", "share": 0}, "policy 'x': option 'share': Expected `float` > 0.0"),
        ({"name": "x", "mode": "impossible"}, "policy 'x': mode impossible is not possible"),
        ({"name": "x", "mode": "bug"}, "policy 'x': ZeroDivisionError: one over none"),
        ({"share": 1}, "a policy needs a name"),
        ({"name": "./p.py:P", "share": 1}, "takes no options, but has share"),
        ("./missing.py:P", "missing.py:P: there is no such file"),
    ],
)
def test_wrong_specs_are_refused(tuned: Registry, spec: Any, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tuned.policy(spec, HERE)
    assert message in caught.value.message


def test_what_builds_no_policy_is_refused() -> None:
    registry = only(a=plugin(policies=lambda: [kind(build=lambda settings: Observer())]))
    with pytest.raises(ConfigError, match="which is no Policy"):
        registry.policy("x", HERE)


# Policies from a file

FILE = """
from __future__ import annotations
from dataclasses import dataclass
from forebay.api import Policy

@dataclass
class Limits:
    soft: int = 3

class Mine(Policy):
    def score(self, request, snapshot):
        return [1.0 if b.in_flight < Limits().soft else 0.5 for b in snapshot.backends]

class Fails(Mine):
    def __init__(self):
        raise RuntimeError("not today")

class Other:
    pass
"""


@pytest.mark.parametrize("form", ["./mine.py:Mine", {"name": "mine.py:Mine"}, "absolute"])
def test_a_policy_from_a_file(tmp_path: Path, form: Any) -> None:
    (tmp_path / "mine.py").write_text(FILE)
    spec = f"{tmp_path}/mine.py:Mine" if form == "absolute" else form
    policy = only().policy(spec, HERE if form == "absolute" else tmp_path)
    assert policy.score(make_request(), make_snapshot(in_flight=[2, 3])) == [1.0, 0.5]


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(FILE)
    one, two = (only().policy("./mine.py:Mine", tmp_path / folder) for folder in ("a", "b"))
    assert type(one) is not type(two)


@pytest.mark.parametrize(
    ("name", "code", "message"),
    [
        ("Missing", FILE, "the file has no class 'Missing' deriving from Policy"),
        ("Other", FILE, "the file has no class 'Other' deriving from Policy"),
        ("Fails", FILE, "RuntimeError: not today"),
        ("", FILE, "the file has no class ''"),
        ("Mine", "import surely_not_installed", "No module named 'surely_not_installed'"),
        ("Mine", "class (:", "SyntaxError"),
        ("Policy", FILE, "TypeError: Can't instantiate abstract class"),
    ],
)
def test_files_that_hold_no_policy(tmp_path: Path, name: str, code: str, message: str) -> None:
    (tmp_path / "mine.py").write_text(code)
    with pytest.raises(ConfigError) as caught:
        only().policy(f"./mine.py:{name}", tmp_path)
    assert message in caught.value.message
    assert "mine.py" in caught.value.message
