"""YAML text to plain data, and `${NAME}` to what the environment says."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from typing import Any

import yaml

from forebay.config_file.reader import INVALID, FromEnvironment, item_path, key_path

_MERGE = "tag:yaml.org,2002:merge"
# `$${` | `${NAME}` | `${NAME:-default}` | a `${` that is none of them
_REFERENCE = re.compile(r"\$\$\{|\$\{([A-Za-z_]\w*)(:-([^}]*))?\}|\$\{")


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, made to notice a key that stands twice, which it would let pass."""

    def __init__(self, text: str, problems: list[str]) -> None:
        super().__init__(text)
        self.problems = problems
        # Depth first, so that an alias within its own anchor is an error and not an endless tree.
        self.deep_construct = True

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        first: dict[Hashable, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE or not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = self.construct_object(key_node), key_node.start_mark.line + 1
            if key in first:
                self.problems.append(
                    f"line {line}: the key `{key}` stands here again, after line {first[key]}; "
                    "remove one of them"
                )
            first.setdefault(key, line)
        return super().construct_mapping(node, deep=deep)


def read_document(text: str, problems: list[str]) -> dict[str, Any]:
    """One YAML document with a mapping at its top; an empty one is an empty mapping."""
    try:
        # bandit's rule looks for `load`; the loader derives from SafeLoader.
        loader = _Loader(text, problems)
        try:
            tree = loader.get_single_data()
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        problems.append(f"{place}not valid YAML: {error.problem or error.context}")
        return {}
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        problems.append(f"not valid YAML: {str(error).splitlines()[0]}")
        return {}
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        problems.append("the file must be a mapping of keys to values, such as `listen: {…}`")
        return {}
    return tree


def expand(value: Any, environ: Mapping[str, str], problems: list[str], path: str = "") -> Any:
    """Replace references to the environment in all strings that are values.

    A string in which something was replaced becomes a :class:`FromEnvironment`, one with an
    unknown variable :data:`INVALID`.
    """
    if isinstance(value, dict):
        return {
            key: expand(inner, environ, problems, key_path(path, key))
            for key, inner in value.items()
        }
    if isinstance(value, list):
        return [
            expand(inner, environ, problems, item_path(path, i)) for i, inner in enumerate(value)
        ]
    if not isinstance(value, str) or "${" not in value:
        return value
    count = len(problems)

    def replacement(match: re.Match[str]) -> str:
        whole, name, default = match[0], match[1], match[3]
        if whole == "$${":
            return "${"
        if name is None:
            problems.append(
                f"{path}: `${{` begins no reference; write ${{NAME}}, or $${{ for the characters"
            )
            return whole
        # As in a shell: the default also stands in for a variable that is set to nothing.
        found = environ.get(name) or default if default is not None else environ.get(name)
        if found is None:
            problems.append(
                f"{path}: the environment variable {name} is not set; "
                f"set it, or write ${{{name}:-default}}"
            )
        return found or ""

    text = _REFERENCE.sub(replacement, value)
    return FromEnvironment(text) if len(problems) == count else INVALID
