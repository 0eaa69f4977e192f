"""The published API is what api.txt says, so that no change of it goes unnoticed.

Within a major version data grow at the end, with defaults, and base classes only gain methods with
defaults. After such a change, and an entry in the changelog's section on the plugin API:

    python tests/gateway/test_api_surface.py > tests/gateway/api.txt
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import msgspec

from forebay import api

RECORD = Path(__file__).with_name("api.txt")


def test_all_is_sorted_and_complete() -> None:
    assert list(api.__all__) == sorted(set(api.__all__))
    public = {
        name
        for name, value in vars(api).items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    }
    assert public == set(api.__all__)


def test_the_signatures_are_the_recorded_ones() -> None:
    assert "\n".join(surface()) + "\n" == RECORD.read_text(), (
        "the published API differs from tests/gateway/api.txt; if that is meant, see this module"
    )


def test_every_class_of_the_api_is_documented_for_plugin_authors() -> None:
    seams = (api.Adapter, api.Policy, api.Observer, api.Upstream, api.UpstreamResponse)
    for seam in seams:
        assert inspect.getdoc(seam)
        for name, member in vars(seam).items():
            if inspect.isfunction(member) and not name.startswith("_"):
                assert member.__doc__, f"{seam.__name__}.{name} has no docstring"


def surface() -> Iterator[str]:
    """The API as text, a block for each name."""
    for name in api.__all__:
        value = getattr(api, name)
        if isinstance(value, type):
            bases = ", ".join(base.__name__ for base in value.__bases__)
            yield f"class {name}({bases})"
            yield from (f"    {line}" for line in _members(value))
        elif name == "hookimpl":
            yield f"{name}: {type(value).__name__}"
        else:
            yield f"{name} = {re.sub(r'forebay[.]api[.][a-z]+[.]', '', repr(value))}"


def _members(kind: type) -> Iterator[str]:
    defaults = _defaults(kind)
    for name, annotation in inspect.get_annotations(kind).items():
        if not name.startswith("_"):
            yield f"{name}: {annotation}{defaults.get(name, '')}"
    for name, value in vars(kind).items():  # set again without a type, as errors do
        if _is_data(value) and not name.startswith("_") and name not in defaults:
            yield f"{name} = {value!r}"
    for name, member in vars(kind).items():
        plain = not name.startswith("_") or name == "__init__"
        if plain and inspect.isfunction(member):
            marks = "abstract " * getattr(member, "__isabstractmethod__", False)
            marks += "async " * inspect.iscoroutinefunction(member)
            # Annotations are strings here; their quotes are no part of them.
            yield f"{marks}{name}{str(inspect.signature(member)).replace(chr(39), '')}"
        elif plain and isinstance(member, property):
            yield f"property {name} -> {inspect.get_annotations(member.fget)['return']}"


def _defaults(kind: type) -> dict[str, str]:
    if not issubclass(kind, msgspec.Struct):
        typed = inspect.get_annotations(kind)
        return {name: f" = {_default(vars(kind)[name])}" for name in typed if name in vars(kind)}
    found = {}
    for name, default in zip(
        reversed(kind.__struct_fields__), reversed(kind.__struct_defaults__), strict=False
    ):
        if default is not msgspec.NODEFAULT:
            found[name] = f" = {_default(default)}"
    return found


def _default(value: object) -> str:
    if isinstance(value, frozenset):
        return f"{{{', '.join(sorted(map(repr, value)))}}}"
    return repr(value.factory()) if hasattr(value, "factory") else repr(value)


def _is_data(value: object) -> bool:
    return isinstance(value, str | int | float | bool)


if __name__ == "__main__":
    print("\n".join(surface()))
