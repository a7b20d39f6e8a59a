"""Faults of config keys in plain words, read off the sections' own fields.

`root` is the class of the whole config, a pydantic model whose sections are models too.
"""

import difflib
import json
from collections.abc import Iterator
from itertools import accumulate
from operator import getitem
from typing import Any

from utils.strict_yaml import Keys, named

NOUNS = {"integer": "a whole number", "number": "a number", "boolean": "true or false"}
BOUNDS = {
    "minimum": "of at least",
    "exclusiveMinimum": "above",
    "maximum": "at most",
    "exclusiveMaximum": "below",
}


def rule(schema: dict) -> str:
    """What a key's schema asks for.

    >>> rule({"type": "number", "minimum": 0, "exclusiveMaximum": 1})
    'a number of at least 0 and below 1'
    """
    if "anyOf" in schema:
        return f"{rule(schema['anyOf'][0])} or null"
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema.get("type") == "string":
        return "a path" if schema.get("format") == "path" else "text"
    bounds = [f"{word} {schema[bound]}" for bound, word in BOUNDS.items() if bound in schema]
    noun = NOUNS.get(schema.get("type"), "a section of keys")
    return f"{noun} {' and '.join(bounds)}".strip()


def shown(value: object) -> str:
    """A value as a fault names it: in YAML's words, and cut where it is long."""
    if isinstance(value, dict):
        return "a section of keys"
    text = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def shown_part(value: object, inner: Keys) -> str:
    """The value; of a list of sections the part that the inner keys lead to.

    >>> shown_part([{"name": "wood", "color": "red"}], (0, "color"))
    "color: 'red'"
    """
    steps = list(accumulate(inner, getitem, initial=value))
    if not any(isinstance(step, dict) for step in steps[1:]):
        return shown(value)
    if isinstance(steps[-1], dict):
        return shown([steps[-1]])
    return f"{inner[-1]}: {shown(steps[-1])}" if isinstance(inner[-1], str) else shown(steps[-1])


def section_class(root: Any, keys: Keys) -> Any:
    """The class of the section that these keys lead to."""
    section = root
    for key in keys:
        section = section.model_fields[key].annotation
    return section


def key_paths(section: Any, above: str = "") -> Iterator[str]:
    """Every section and key there is, dotted."""
    for name, info in section.model_fields.items():
        yield above + name
        if info.default_factory:
            yield from key_paths(info.annotation, f"{above}{name}.")


def wrong_value(root: Any, keys: Keys, value: object, inner: Keys = ()) -> str:
    """The fault of a key whose value is unfit; inner leads to the unfit part of it."""
    section = section_class(root, keys[:-1])
    schema = section.model_json_schema()["properties"][keys[-1]]
    expected = section.model_fields[keys[-1]].title or rule(schema)
    return f"{named(keys)}: found {shown_part(value, inner)}, expected {expected}"


def unknown_key(root: Any, keys: Keys) -> str:
    """The fault of a key that does not exist, with the one that was probably meant."""
    siblings = list(section_class(root, keys[:-1]).model_fields)
    elsewhere = [path for path in key_paths(root) if path.split(".")[-1] == keys[-1]]
    near = difflib.get_close_matches(keys[-1], siblings, 1, 0.75)
    guesses = near or elsewhere or difflib.get_close_matches(keys[-1], siblings, 1)
    hint = f"expected one of {', '.join(siblings)}"
    if guesses:
        hint = f"did you mean {' or '.join(map(repr, guesses))}?"
    return f"{named(keys)}: unknown key, {hint}"


def key_at(root: Any, location: Keys) -> Keys:
    """The sections and the key of a validation error's location, without what lies inside a value.

    >>> from config import Config
    >>> key_at(Config, ("dataset", "input_range", "tuple", 0))
    ('dataset', 'input_range')
    """
    section = root
    for depth, name in enumerate(location, start=1):
        info = section.model_fields.get(name)
        if info is None or not info.default_factory:
            return location[:depth]
        section = info.annotation
    return location
