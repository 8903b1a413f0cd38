"""A YAML loader that reads plain values as people write them, and raises an error for a repeated key.

YAML 1.1 reads 010 as 8, 1:30 as 90, and no as false. Here these values stay text, marked as PlainText, until the type of
their option is known (config/validate.py). Values that PyYAML writes are read back unchanged.
"""

from __future__ import annotations

import re
from collections import deque
from typing import Any, ClassVar

import yaml

MAX_NAME_CHARS = 200
"""Maximum length of a key's full name in a message."""


class PlainText(str):
    """Unquoted YAML text. It may be meant as a number or as a boolean."""

    __slots__ = ()


class RepeatedKeyError(ValueError):
    """A mapping has a key twice; YAML would keep the last one. The message names the key, `lines` its two lines."""

    def __init__(self, name: str, lines: tuple[int, int], both_mappings: bool):
        advice = "put its options under one" if both_mappings else "keep one"
        displayed_name = name if len(name) <= MAX_NAME_CHARS else f"...{name[3 - MAX_NAME_CHARS :]}"
        super().__init__(f"{displayed_name} is given twice; {advice}")
        self.lines = f"lines {lines[0]} and {lines[1]}" if lines[0] != lines[1] else f"line {lines[0]}"


_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""PyYAML's loader for plain values; the one in C if PyYAML was built with it."""


class SafeLoader(_Base):
    """PyYAML's safe loader with fewer words that are numbers or booleans, and without repeated keys."""

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}
    """Patterns of plain scalars that are no text, by first character."""

    def get_single_node(self) -> yaml.Node | None:
        """Return the root node of the document. Raises RepeatedKeyError, and YAMLError for invalid YAML."""
        node = super().get_single_node()
        # Before the construction: that replaces a merge key (<<) by the keys it stands for, which others may override.
        _check_keys(node)
        return node

    def construct_text(self, node: yaml.ScalarNode) -> str:
        text = self.construct_scalar(node)
        return text if node.style else PlainText(text)

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        return int(self.construct_scalar(node), 10)

    def construct_float(self, node: yaml.ScalarNode) -> float:
        if ":" in node.value:  # YAML 1.1 has numbers to the base 60
            raise ValueError(f"'{node.value:.80}' is no number")
        return self.construct_yaml_float(node)


def _check_keys(root: yaml.Node | None) -> None:
    """Raise RepeatedKeyError for a mapping below `root` that has a key twice."""
    # No recursion: the nesting may be deeper than Python's stack. An alias is its anchor's node, which is visited once.
    queue, visited = deque([("", root)]), set()
    while queue:
        prefix, node = queue.popleft()
        if id(node) in visited:
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            queue.extend((prefix, item) for item in node.value if isinstance(item, yaml.CollectionNode))
        elif isinstance(node, yaml.MappingNode):
            first: dict[tuple[str, str], tuple[yaml.Node, yaml.Node]] = {}
            for key, value in node.value:
                name = prefix
                if isinstance(key, yaml.ScalarNode):
                    name, identity = f"{prefix}{key.value}", (key.tag, key.value)
                    if identity in first:
                        first_key, first_value = first[identity]
                        lines = (first_key.start_mark.line + 1, key.start_mark.line + 1)
                        both = isinstance(first_value, yaml.MappingNode) and isinstance(value, yaml.MappingNode)
                        raise RepeatedKeyError(name, lines, both)
                    first[identity] = key, value
                    name = f"{name[-MAX_NAME_CHARS:]}."
                queue.extend((name, part) for part in (key, value) if isinstance(part, yaml.CollectionNode))


_NUMBER_STARTS = list("-+.0123456789")
for _tag, _pattern, _starts in (
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"-?(?:0|[1-9][0-9]*)", _NUMBER_STARTS),
    ("float", r"[-+]?[0-9]+\.[0-9]*(?:[eE][-+][0-9]+)?|\.[0-9]+(?:[eE][-+][0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
     _NUMBER_STARTS),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", ["<"]),
):  # fmt: skip
    SafeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _starts)
SafeLoader.add_constructor("tag:yaml.org,2002:str", SafeLoader.construct_text)
SafeLoader.add_constructor("tag:yaml.org,2002:merge", SafeLoader.construct_text)  # << where it is no key
SafeLoader.add_constructor("tag:yaml.org,2002:int", SafeLoader.construct_decimal)
SafeLoader.add_constructor("tag:yaml.org,2002:float", SafeLoader.construct_float)
