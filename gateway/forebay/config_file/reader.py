"""Plain data to typed data, with all that is wrong in it.

msgspec stops at the first error and knows no nearest key, so this walks the types itself and leaves
only single values to msgspec.
"""

from __future__ import annotations

import difflib
import math
import types
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Final, Literal, Protocol, Union, get_args, get_origin

import msgspec
from msgspec import Meta, Struct

from forebay.api import AdapterKind, BackendSettings, ForebayError
from forebay.config_file.secrets import is_secret, without_password

__all__ = [
    "INVALID",
    "AdapterSource",
    "FromEnvironment",
    "Reader",
    "expectation",
    "item_path",
    "key_path",
    "nearest",
]

#: Stands for a value whose problem has been noted.
INVALID: Final[Any] = object()

_NAMES = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


class FromEnvironment(str):
    """A text with something from the environment in it; it may stand for a number."""

    __slots__ = ()


def key_path(path: str, key: object) -> str:
    """``models`` and ``gemma`` to ``models.gemma``; keys with dots or blanks are quoted."""
    text = f'"{key}"' if any(c in str(key) for c in '. "') or key == "" else str(key)
    return f"{path}.{text}" if path else text


def item_path(path: str, index: int) -> str:
    return f"{path}[{index}]"


def nearest(name: object, known: Iterable[str]) -> str:
    """What to write instead: ``did you mean …?``, or all that is known."""
    names = sorted(known)
    close = difflib.get_close_matches(str(name), names, n=1)
    if close:
        return f"did you mean {close[0]}?"
    return f"known: {', '.join(names)}" if names else "there is none"


class AdapterSource(Protocol):
    """Where the settings of a backend's adapter are found."""

    @property
    def adapters(self) -> Mapping[str, AdapterKind]: ...

    def adapter(self, name: str) -> AdapterKind:
        """:raises ForebayError: there is none of this name; the message says which there are."""


class Reader:
    """Reads values by their types and appends what is wrong to ``problems``.

    A struct with a wrong field is still built with the field's default if it has one, so that the
    checks that follow see as much as possible.
    """

    def __init__(self, adapters: AdapterSource, problems: list[str]) -> None:
        self._adapters = adapters
        self._problems = problems

    def read(self, value: Any, kind: Any, path: str) -> Any:
        """The typed value, or :data:`INVALID` with its problem noted."""
        if value is INVALID:
            return INVALID
        shape = _arm(value, kind)
        origin = get_origin(shape)
        if isinstance(shape, type) and issubclass(shape, Struct):
            return self._struct(value, shape, path)
        if origin is dict and get_args(shape)[1] is not Any:
            return self._mapping(value, shape, path)
        if origin is list:
            return self._list(value, shape, path)
        return self._value(value, kind, path)

    def _struct(self, value: Any, cls: type[Struct], path: str) -> Any:
        if not isinstance(value, dict):
            return self._wrong(value, cls, path)
        if cls is BackendSettings:
            found = self._settings_type(value, path)
            if found is None:
                return INVALID
            cls = found
        fields = {field.encode_name: field for field in msgspec.structs.fields(cls)}
        arguments: dict[str, Any] = {}
        for key, inner in value.items():  # in the file's order, and so are the problems
            where = key_path(path, key)
            if key not in fields:
                self._note(where, f"unknown key; {nearest(key, fields)}")
                continue
            read = self.read(inner, fields[key].type, where)
            if read is not INVALID:
                arguments[fields[key].name] = read
        for key, field in fields.items():
            if field.required and key not in value:
                self._note(key_path(path, key), f"missing; give {expectation(field.type)}")
        complete = all(f.name in arguments for f in fields.values() if f.required)
        return self._built(cls, arguments, path) if complete else INVALID

    def _built(self, cls: type[Struct], arguments: dict[str, Any], path: str) -> Any:
        try:
            return cls(**arguments)
        except (TypeError, ValueError, ForebayError) as error:  # from a __post_init__
            return self._note(path, str(error))

    def _settings_type(self, value: dict[Any, Any], path: str) -> type[BackendSettings] | None:
        where, adapter = key_path(path, "adapter"), value.get("adapter")
        if adapter is None:
            self._note(where, f"missing; {nearest('', self._adapters.adapters)}")
        elif adapter is not INVALID:
            try:
                return self._adapters.adapter(str(adapter)).settings
            except ForebayError as error:
                self._note(where, error.message)
        return None

    def _mapping(self, value: Any, kind: Any, path: str) -> Any:
        if not isinstance(value, dict):
            return self._wrong(value, kind, path)
        result: dict[str, Any] = {}
        for key, inner in value.items():
            where = key_path(path, key)
            if not isinstance(key, str) or not key:
                self._note(where, f"a name must be a text, not {_shown(key, '')}; put it in quotes")
                continue
            read = self.read(inner, get_args(kind)[1], where)
            if read is not INVALID:
                result[key] = read
        return result

    def _list(self, value: Any, kind: Any, path: str) -> Any:
        if not isinstance(value, list):
            return self._wrong(value, kind, path)
        (inner,) = get_args(kind)
        read = [self.read(item, inner, item_path(path, i)) for i, item in enumerate(value)]
        return [item for item in read if item is not INVALID]

    def _value(self, value: Any, kind: Any, path: str) -> Any:
        # A number from the environment comes as text; one in the file must be a number.
        strict = not isinstance(value, FromEnvironment)
        try:
            read = msgspec.convert(_ordinary(value), kind, strict=strict)
        except msgspec.ValidationError:
            return self._wrong(value, kind, path)
        if isinstance(read, float) and not math.isfinite(read):
            return self._note(path, f"expected a finite number, got {value}")
        return read

    def _wrong(self, value: Any, kind: Any, path: str) -> Any:
        where = path or "the configuration"
        got = _shown(value, path)
        return self._note(where, f"expected {expectation(kind)}, got {got}{_remedy(value, kind)}")

    def _note(self, path: str, text: str) -> Any:
        self._problems.append(f"{path}: {text}")
        return INVALID


def _ordinary(value: Any) -> Any:
    """The same without :class:`FromEnvironment`, which no encoder knows."""
    if isinstance(value, dict):
        return {key: _ordinary(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_ordinary(inner) for inner in value]
    return str(value) if isinstance(value, FromEnvironment) else value


def _plain(kind: Any) -> Any:
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


def _is_union(kind: Any) -> bool:
    return get_origin(kind) in (Union, types.UnionType)


def _arm(value: Any, kind: Any) -> Any:
    """Of a union, the type that a mapping or a list can only be meant for; else the type itself."""
    kind = _plain(kind)
    if not _is_union(kind):
        return kind
    for arm in map(_plain, get_args(kind)):
        container = get_origin(arm) or arm
        if isinstance(value, dict) and (container is dict or _is_struct(arm)):
            return arm
        if isinstance(value, list) and container is list:
            return arm
    return kind


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, Struct)


def expectation(kind: Any) -> str:
    """What a value of this type looks like, in words."""
    if get_origin(kind) is Annotated:
        inner, *rest = get_args(kind)
        meta = next((item for item in rest if isinstance(item, Meta)), Meta())
        return meta.description or f"{expectation(inner)}{_range(meta)}"
    if _is_union(kind):
        return " or ".join(expectation(arm) for arm in get_args(kind))
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    if kind is type(None):
        return "nothing"
    if get_origin(kind) in (list, tuple, set, frozenset):
        inner = get_args(kind)[0]
        choices = f" of {', '.join(get_args(inner))}" if get_origin(inner) is Literal else ""
        return f"a list{choices}"
    if get_origin(kind) is dict or _is_struct(kind):
        return "a mapping"
    return _NAMES.get(kind, str(kind))


def _range(meta: Meta) -> str:
    low, high = meta.ge, meta.le
    if low is not None and high is not None:
        return f" from {low:g} to {high:g}"
    limits = {
        "of at least": low,
        "greater than": meta.gt,
        "of at most": high,
        "less than": meta.lt,
    }
    return "".join(f" {words} {limit:g}" for words, limit in limits.items() if limit is not None)


def _shown(value: Any, path: str) -> str:
    if value is None:
        return "nothing"
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else "a list"
    if is_secret(path):
        return "something else (not shown)"
    if isinstance(value, bool):
        return str(value).lower()
    return f"'{without_password(value)}'" if isinstance(value, str) else str(value)


def _remedy(value: Any, kind: Any) -> str:
    plain = _plain(kind)
    if value is None:
        return "; fill it in or remove the key"
    if plain is str and not isinstance(value, dict | list | str):
        return "; put it in quotes"
    if get_origin(plain) is Literal:
        close = difflib.get_close_matches(str(value), map(str, get_args(plain)), n=1)
        return f"; did you mean {close[0]}?" if close else ""
    if plain in (int, float) and isinstance(value, str) and not isinstance(value, FromEnvironment):
        return "; write it without quotes" if value.strip().replace(".", "").isdigit() else ""
    return ""
