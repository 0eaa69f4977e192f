"""Finds the plugins, loads each in isolation, and says what became of every one.

Whatever a plugin does wrong (an import that fails, a hook misspelt, a name taken twice) is put into
the report under its name and its distribution; the others stay up. Only a configuration that uses
something of it is refused, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from importlib.metadata import EntryPoint, distributions, entry_points
from typing import TypeVar

import msgspec
import pluggy

from forebay.api import (
    API_VERSION,
    AdapterKind,
    BackendSettings,
    ConfigError,
    Observer,
    PluginError,
    PolicyKind,
    PolicySettings,
    hooks,
)
from forebay.registry import Failed, Loaded, Middleware, Offer, Registry, contained, nearest, origin

__all__ = ["GROUP", "Failed", "Loaded", "Registry", "load_plugins"]

#: The entry-point group; its number is the API's major version.
GROUP = f"forebay.v{API_VERSION}"

_T = TypeVar("_T")

# Our own plugins go first, so that nobody else's can take a name from them.
_OWN = "forebay"


def load_plugins(
    only: list[str] | None = None, extra: Mapping[str, object] | None = None
) -> Registry:
    """Load all installed plugins of this API version, or ``only`` those named.

    ``extra``: plugins by name that are objects or modules already; ``only`` does not concern them.
    Nothing is remembered between two calls but what Python imported.

    :raises ConfigError: ``only`` names a plugin that is not installed.
    """
    found = sorted(entry_points(group=GROUP), key=_precedence)
    _check_only(only, [entry.name for entry in found])
    wanted = [entry for entry in found if only is None or entry.name in only]
    loading = _Loading()
    for entry in wanted:
        loading.add(entry.name, *_distribution(entry), entry.load)
    for name, plugin in (extra or {}).items():
        loading.add(name, "", "", _given(plugin))
    report = loading.report + (list(_other_versions()) if only is None else [])
    left_out = [entry.name for entry in found if only is not None and entry.name not in only]
    return Registry(loading.offers, report, left_out)


class _Loading:
    """One run of loading: a fresh pluggy manager and what has come of it so far."""

    def __init__(self) -> None:
        self._plugins = pluggy.PluginManager(hooks.PROJECT)
        self._plugins.add_hookspecs(hooks)
        self.offers: list[Offer] = []
        self.report: list[Loaded | Failed] = []

    def add(self, name: str, distribution: str, version: str, load: Callable[[], object]) -> None:
        """Load one plugin; it is taken as a whole or not at all."""
        try:
            if self._plugins.has_plugin(name):
                raise PluginError(f"another plugin is already named {name!r}")
            offer = self._register(name, contained(load))
        except PluginError as error:
            self.report.append(Failed(name, distribution, version, error.message))
        else:
            self.offers.append(offer)
            self.report.append(Loaded(name, distribution, version, offer.provides()))

    def _register(self, name: str, plugin: object) -> Offer:
        contained(lambda: self._plugins.register(plugin, name))
        try:
            self._check_hooks(plugin)
            offer = Offer(
                adapters=_typed("adapters", self._call(plugin, "adapters"), AdapterKind),
                policies=_typed("policies", self._call(plugin, "policies"), PolicyKind),
                observers=_typed("observers", self._call(plugin, "observers"), Observer),
                middleware=_callables(self._call(plugin, "middleware")),
            )
            self._check_kinds("adapter", offer.adapters, BackendSettings)
            self._check_kinds("policy", offer.policies, PolicySettings)
        except PluginError:
            self._plugins.unregister(plugin)
            raise
        return offer

    def _check_hooks(self, plugin: object) -> None:
        callers = self._plugins.get_hookcallers(plugin) or []
        if not callers:
            raise PluginError("it implements no hook; mark its functions with @hookimpl")
        for caller in callers:
            if not caller.has_spec():
                known = (name for name in vars(hooks) if hasattr(self._plugins.hook, name))
                raise PluginError(
                    f"there is no hook {caller.name!r}; {nearest(caller.name, known)}"
                )

    def _call(self, plugin: object, hook: str) -> list[object]:
        """Call one hook of one plugin, by itself: pluggy would mix it with the others'."""
        impls = getattr(self._plugins.hook, hook).get_hookimpls()
        calls = [partial(_items, hook, impl.function) for impl in impls if impl.plugin is plugin]
        return [item for call in calls for item in contained(call)]

    def _check_kinds(
        self, what: str, kinds: Iterable[AdapterKind | PolicyKind], settings: type
    ) -> None:
        loaded = [entry for entry in self.report if isinstance(entry, Loaded)]
        owners = {provided: entry for entry in loaded for provided in entry.provides}
        seen = set()
        for kind in kinds:
            claim = f"the {what} {kind.name!r}"
            owner = owners.get(f"{what} {kind.name}")
            if owner is not None:
                raise PluginError(f"{claim} is already offered by {origin(owner)}")
            if kind.name in seen:
                raise PluginError(f"{claim} is offered twice")
            seen.add(kind.name)
            if not (isinstance(kind.settings, type) and issubclass(kind.settings, settings)):
                raise PluginError(f"the settings of {claim} must derive from {settings.__name__}")
            contained(partial(msgspec.structs.fields, kind.settings))  # its types must be known


def _items(hook: str, function: Callable[[], object]) -> list[object]:
    returned = function()
    if not isinstance(returned, Iterable):
        raise PluginError(f"{hook}() must return a list or tuple, not {returned!r}")
    return list(returned)


def _typed(hook: str, items: Iterable[object], kind: type[_T]) -> tuple[_T, ...]:
    typed = []
    for item in items:
        if not isinstance(item, kind):
            raise PluginError(f"{hook}() must return {kind.__name__} objects, not {item!r}")
        typed.append(item)
    return tuple(typed)


def _callables(items: Iterable[object]) -> tuple[Middleware, ...]:
    wrappers: list[Middleware] = []
    for item in items:
        if not callable(item):
            raise PluginError(f"middleware() must return callables, not {item!r}")
        wrappers.append(item)
    return tuple(wrappers)


def _given(plugin: object) -> Callable[[], object]:
    return lambda: plugin


def _precedence(entry: EntryPoint) -> tuple[bool, str, str]:
    distribution, _ = _distribution(entry)
    return distribution != _OWN, entry.name, distribution


def _distribution(entry: EntryPoint) -> tuple[str, str]:
    return (entry.dist.name, entry.dist.version) if entry.dist else ("", "")


def _check_only(only: list[str] | None, installed: list[str]) -> None:
    for name in only or ():
        if name not in installed:
            raise ConfigError(
                f"plugins.only: no plugin is named {name!r}; {nearest(name, installed)}"
            )


def _other_versions() -> Iterator[Failed]:
    """Plugins made for another major version of the API: seen, never imported."""
    # To read the names of 300 distributions takes 0.2 s, and hardly ever is there such a plugin.
    if not any(_is_other(entry) for found in distributions() for entry in found.entry_points):
        return
    seen = set()
    for distribution in distributions():
        if distribution.name in seen:  # an older copy, further back on the path
            continue
        seen.add(distribution.name)
        for entry in filter(_is_other, distribution.entry_points):
            reason = (
                f"it is made for {entry.group}, this Forebay loads {GROUP}; "
                f"install a version of {distribution.name} for {GROUP}"
            )
            yield Failed(entry.name, distribution.name, distribution.version, reason)


def _is_other(entry: EntryPoint) -> bool:
    return entry.group.startswith("forebay.v") and entry.group != GROUP
