"""Whether what a file gives has the types that a dataclass declares, all the way down.

A file that others made may hold anything under the right names.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin


def unfit(kind: type, content: Mapping[str, Any]) -> list[str]:
    """The names of the fields of a dataclass whose values have not the type declared.

    >>> from dataclasses import dataclass
    >>> @dataclass
    ... class Reading:
    ...     bands: list[int]
    ...     nodata: float | None
    >>> unfit(Reading, {"bands": [1, 2], "nodata": 0}), unfit(Reading, {"bands": "12", "nodata": 0})
    ([], ['bands'])
    """
    return [each.name for each in fields(kind) if not fits(content[each.name], each.type)]


def fits(value: Any, wanted: Any) -> bool:
    """Whether a value has a type: a class, Any, or a union, list or dict of such.

    >>> fits({"north": [3, 1]}, dict[str, list[int]]), fits(None, float | None), fits(2.5, int)
    (True, True, False)
    """
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return True
    if origin is UnionType:
        return any(fits(value, each) for each in inner)
    if origin is list:
        return isinstance(value, list) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    return isinstance(value, int | float if wanted is float else wanted)
