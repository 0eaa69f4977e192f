"""What the loaded plugins offer, by name, and how a policy is built from its configuration."""

from __future__ import annotations

import difflib
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, TypeVar

import msgspec
from msgspec import Struct

from forebay.api import (
    AdapterKind,
    ConfigError,
    ForebayError,
    Observer,
    PluginError,
    Policy,
    PolicyKind,
    PolicySettings,
)

__all__ = ["Failed", "Loaded", "Middleware", "Offer", "Registry", "contained", "nearest", "origin"]

#: Wraps an ASGI application in another.
Middleware = Callable[[Any], Any]
_T = TypeVar("_T")


class Loaded(Struct, frozen=True):
    """A plugin that is in use. ``distribution`` is empty for one that was handed over as object."""

    name: str
    distribution: str
    version: str
    #: E.g. ``adapter vllm``, ``policy sticky``, ``observer Ledger``.
    provides: tuple[str, ...] = ()


class Failed(Struct, frozen=True):
    """A plugin that was found and could not be used."""

    name: str
    distribution: str
    version: str
    reason: str


class Offer(Struct):
    """What one plugin brings."""

    adapters: tuple[AdapterKind, ...] = ()
    policies: tuple[PolicyKind, ...] = ()
    observers: tuple[Observer, ...] = ()
    middleware: tuple[Middleware, ...] = ()

    def provides(self) -> tuple[str, ...]:
        return (
            *(f"adapter {kind.name}" for kind in self.adapters),
            *(f"policy {kind.name}" for kind in self.policies),
            *(f"observer {type(observer).__name__}" for observer in self.observers),
            *(f"middleware {getattr(each, '__name__', each)}" for each in self.middleware),
        )


class Registry:
    """Everything that the loaded plugins offer."""

    def __init__(
        self,
        offers: Iterable[Offer],
        report: Iterable[Loaded | Failed],
        left_out: Iterable[str] = (),
    ) -> None:
        offers = tuple(offers)
        self.adapters: Mapping[str, AdapterKind] = MappingProxyType(
            {kind.name: kind for offer in offers for kind in offer.adapters}
        )
        self.policies: Mapping[str, PolicyKind] = MappingProxyType(
            {kind.name: kind for offer in offers for kind in offer.policies}
        )
        self.observers = tuple(each for offer in offers for each in offer.observers)
        self.middleware = tuple(each for offer in offers for each in offer.middleware)
        #: In the order of loading; the failed too.
        self.report = tuple(report)
        self._left_out = tuple(left_out)

    def adapter(self, name: str) -> AdapterKind:
        """:raises ConfigError: no plugin that loaded offers it."""
        kind = self.adapters.get(name)
        if kind is None:
            raise self._unknown("adapter", name, self.adapters)
        return kind

    def policy(self, spec: str | Mapping[str, Any], base_dir: Path) -> Policy:
        """Build a policy from a name, ``{name: …, option: …}``, or ``./file.py:Class``.

        ``base_dir``: where relative files are looked for.

        :raises ConfigError: there is none of this name, its options are wrong, or it fails.
        """
        name, options = _name_and_options(spec)
        path, _, class_name = name.rpartition(":")
        if path.endswith(".py"):
            if options:
                raise ConfigError(
                    f"policy {name!r}: a policy from a file takes no options, but has "
                    f"{_listed(options)}; write them into the file"
                )
            return _policy_from_file(base_dir / path, class_name)
        kind = self.policies.get(name)
        if kind is None:
            raise self._unknown("policy", name, self.policies)
        return _build(kind, _settings(kind, options))

    def _unknown(self, what: str, name: str, known: Mapping[str, object]) -> ConfigError:
        parts = [f"no {what} is named {name!r}", nearest(name, known)]
        for failed in (entry for entry in self.report if isinstance(entry, Failed)):
            parts.append(f"plugin {origin(failed)} could not be loaded: {failed.reason}")
        if self._left_out:
            parts.append(f"plugins.only leaves out: {', '.join(self._left_out)}")
        return ConfigError("; ".join(parts))


def contained(call: Callable[[], _T]) -> _T:
    """Run a plugin's code; whatever it raises is told as a PluginError with the place."""
    try:
        return call()
    except ForebayError as error:
        raise PluginError(error.message) from error
    except (Exception, SystemExit) as error:  # a plugin that exits on import must not stop us
        frames = traceback.extract_tb(error.__traceback__)
        # Not the import machinery's own, nor ours: the last line of theirs.
        ours = ("<frozen", str(Path(importlib.__file__).parent), __file__)
        theirs = [frame for frame in frames if not frame.filename.startswith(ours)]
        place = f" ({theirs[-1].filename}:{theirs[-1].lineno})" if theirs else ""
        raise PluginError(f"{type(error).__name__}: {error}{place}") from error


def _name_and_options(spec: str | Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    if isinstance(spec, str):
        return spec, {}
    options = dict(spec)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ConfigError(f"a policy needs a name: {{name: …, option: …}}, not {spec!r}")
    return name, options


def _settings(kind: PolicyKind, options: Mapping[str, Any]) -> PolicySettings:
    known = [field.encode_name for field in msgspec.structs.fields(kind.settings)]
    for option in options:
        if option not in known:
            hint = nearest(option, known) if known else "it has no options"
            raise ConfigError(f"policy {kind.name!r} has no option {option!r}; {hint}")
    try:
        return msgspec.convert(options, kind.settings)
    except msgspec.ValidationError as error:
        problem, _, option = str(error).partition(" - at `$.")
        where = f"option {option.rstrip('`')!r}: " if option else ""
        raise ConfigError(f"policy {kind.name!r}: {where}{problem}") from error


def _build(kind: PolicyKind, settings: PolicySettings) -> Policy:
    try:
        policy = contained(lambda: kind.build(settings))
    except PluginError as error:
        raise ConfigError(f"policy {kind.name!r}: {error.message}") from error
    if not isinstance(policy, Policy):
        raise ConfigError(f"policy {kind.name!r}: build() returned {policy!r}, which is no Policy")
    return policy


def _policy_from_file(path: Path, class_name: str) -> Policy:
    where = f"policy {path}:{class_name}"
    if not path.is_file():
        raise ConfigError(f"{where}: there is no such file")
    try:
        found = vars(contained(lambda: _module(path))).get(class_name)
        if not (isinstance(found, type) and issubclass(found, Policy)):
            raise ConfigError(f"{where}: the file has no class {class_name!r} deriving from Policy")
        return contained(found)
    except PluginError as error:
        raise ConfigError(f"{where}: {error.message}") from error


def _module(path: Path) -> ModuleType:
    """Run a file as a module, named by its path so that two files never meet."""
    name = f"policy file {path.resolve()}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise PluginError("it cannot be read as a Python module")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses, among others, look up the module in which they stand.
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def origin(entry: Loaded | Failed) -> str:
    if not entry.distribution:
        return repr(entry.name)
    return f"{entry.name!r} of {entry.distribution} {entry.version}"


def nearest(name: str, known: Iterable[str]) -> str:
    names = sorted(known)
    if close := difflib.get_close_matches(name, names, n=1):
        return f"did you mean {close[0]!r}?"
    return f"there are: {', '.join(names)}" if names else "there are none"


def _listed(options: Iterable[str]) -> str:
    return ", ".join(sorted(map(str, options)))
