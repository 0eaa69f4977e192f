"""What a configuration must satisfy across its sections."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from forebay.api import ForebayError, HttpBackendSettings
from forebay.config import Config, Model
from forebay.config_file.reader import item_path, key_path, nearest
from forebay.config_file.secrets import without_password

__all__ = ["anchored", "is_loopback", "listener_problems", "reference_problems", "warnings"]

ResolvePolicy = Callable[[str | dict[str, Any], Path], object]

# Names of backends go into response headers, metrics and URLs as they are.
_BACKEND_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


def anchored(config: Config, base: Path) -> Config:
    """The same, with policy files made absolute: a path is relative to the file it stands in."""
    models = {
        name: msgspec.structs.replace(model, policy=_anchored_policy(model.policy, base))
        for name, model in config.models.items()
    }
    return msgspec.structs.replace(config, models=models)


def _anchored_policy(spec: str | dict[str, Any], base: Path) -> str | dict[str, Any]:
    if isinstance(spec, dict):
        name = spec.get("name")
        return {**spec, "name": _anchored_policy(name, base)} if isinstance(name, str) else spec
    path, colon, cls = spec.rpartition(":")
    return f"{base / path}:{cls}" if colon and path.endswith(".py") else spec


def reference_problems(
    config: Config, declared: Iterable[object], resolve: ResolvePolicy, base: Path
) -> list[str]:
    """Names that lead nowhere, and values that only their neighbours show to be wrong.

    ``declared``: all names under ``backends``, those with problems of their own too.
    """
    names = [str(name) for name in declared]
    problems = [line for name in config.models for line in _model_problems(config, name, names)]
    problems += _policy_problems(config, resolve, base)
    problems += _backend_problems(config, names)
    problems += _key_problems(config)
    if config.health.ejection_max < config.health.ejection:
        problems.append(
            f"health.ejection_max: {config.health.ejection_max:g} is shorter than health.ejection "
            f"({config.health.ejection:g}); raise it"
        )
    if config.tracing.otlp_endpoint:
        problems += _url_problems("tracing.otlp_endpoint", config.tracing.otlp_endpoint)
    return problems


def _model_problems(config: Config, name: str, declared: list[str]) -> Iterator[str]:
    model = config.models[name]
    path = key_path(key_path("models", name), "backends")
    if not model.backends:
        yield f"{path}: names no backend; {nearest('', declared)}"
    for backend, where in _backend_paths(model, path):
        if backend not in declared:
            yield f"{where}: no backend named {backend}; {nearest(backend, declared)}"
    if isinstance(model.backends, list):
        for backend in sorted({b for b in model.backends if model.backends.count(b) > 1}):
            yield f"{path}: {backend} stands there twice; write {backend}: {{weight: 2}} instead"


def _backend_paths(model: Model, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(model.backends, dict):
        yield from ((backend, key_path(path, backend)) for backend in model.backends)
    else:
        yield from ((backend, item_path(path, i)) for i, backend in enumerate(model.backends))


def _policy_problems(config: Config, resolve: ResolvePolicy, base: Path) -> Iterator[str]:
    for name, model in config.models.items():
        try:
            resolve(model.policy, base)
        except ForebayError as error:
            yield f"{key_path(key_path('models', name), 'policy')}: {error.message}"


def _backend_problems(config: Config, declared: list[str]) -> Iterator[str]:
    for name in declared:
        if not _BACKEND_NAME.fullmatch(name):
            yield (
                f"{key_path('backends', name)}: not a good name for a backend; use up to 63 "
                "letters, digits, `.`, `_` and `-`"
            )
    for name, settings in config.backends.items():
        if isinstance(settings, HttpBackendSettings):
            path = key_path(key_path("backends", name), "url")
            yield from _url_problems(path, settings.url)
            if settings.url.rstrip("/").endswith("/v1"):
                yield f"{path}: leave out the /v1 at its end; Forebay adds it"


def _url_problems(path: str, url: str) -> Iterator[str]:
    shown = without_password(url)
    try:
        parts = urlsplit(url)
        valid = parts.scheme in ("http", "https") and bool(parts.hostname)
        valid = valid and parts.port != 0 and not any(c.isspace() for c in url)
    except ValueError:  # a port that is no number, a bracket left open
        valid = False
    if not valid:
        yield f"{path}: '{shown}' is not an http(s) URL; write one like http://127.0.0.1:8081"
    elif parts.query or parts.fragment:
        yield f"{path}: '{shown}' must not have a query or a fragment"


def _key_problems(config: Config) -> Iterator[str]:
    seen: dict[str, str] = {}
    for name, key in config.keys.items():
        first = seen.setdefault(key.hash.lower(), name)
        if first != name:
            yield f"{key_path('keys', name)}.hash: the same as that of {first}; make a key for each"


def listener_problems(config: Config, *, insecure: bool) -> Iterator[str]:
    """Ports that clash, and ports that anyone can reach and nobody guards."""
    if config.listen.port == config.admin.port != 0:
        yield f"admin.port: {config.admin.port} is the data port (listen.port); choose another"
    if insecure:
        return
    if not is_loopback(config.listen.host) and not config.keys:
        yield (
            f"listen.host: {config.listen.host or 'every address'} can be reached from other "
            "machines, and there are no keys; add one with `forebay key new`, or start with "
            "--insecure"
        )
    if not is_loopback(config.admin.host):
        yield (
            f"admin.host: {config.admin.host or 'every address'} can be reached from other "
            "machines, and the admin port asks nobody for a key; use 127.0.0.1, or start with "
            "--insecure"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a port bound to ``host``; names but localhost: no."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def warnings(config: Config) -> list[str]:
    """What is probably not meant, though nothing forbids it."""
    used = {backend for model in config.models.values() for backend in model.backends}
    lines = [
        f"{key_path('backends', name)}: used by no model"
        for name in config.backends
        if name not in used
    ]
    if not config.models:
        lines.append("models: there is none, so every request will be answered with 404")
    return lines
