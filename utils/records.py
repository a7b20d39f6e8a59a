"""Whether what a file gives has the types that a dataclass declares, all the way down.

A file that others made may hold anything under the right names.
"""

from collections.abc import Mapping
from dataclasses import fields
from types import UnionType
from typing import Any, get_args, get_origin

from torch import Tensor


def has_format(content: Any, number: int) -> bool:
    """Whether what a file gives is a record of a format.

    >>> has_format({"format": 3}, 3), has_format({"format": "3"}, 3), has_format([], 3)
    (True, False, False)
    """
    found = content.get("format") if isinstance(content, dict) else None
    return isinstance(found, int) and found == number


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
    """Whether a value has a type: a class, Any, or a union, list, tuple or dict of such.

    A truth value is no number here, a number has 64 bits at most, and a text can be written.

    >>> fits({"north": [3, 1]}, dict[str, list[int]]), fits(None, float | None), fits(2.5, int)
    (True, True, False)
    >>> fits(True, int), fits(10**400, float), fits((0.5, 1), tuple[float, ...])
    (False, False, True)
    """
    origin, inner = get_origin(wanted), get_args(wanted)
    if wanted is Any:
        return True
    if origin is UnionType:
        return any(fits(value, each) for each in inner)
    if origin in (list, tuple):
        return isinstance(value, origin) and all(fits(each, inner[0]) for each in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            fits(key, inner[0]) and fits(each, inner[1]) for key, each in value.items()
        )
    if wanted in (int, float):
        return _is_number(value, wanted)
    if wanted is str:
        return isinstance(value, str) and _can_be_written(value)
    return isinstance(value, wanted)


def is_plain(value: Any) -> bool:
    """Whether a value is one that JSON has: a text, a number, nothing, a list or dict of such.

    >>> is_plain({"patience": [3, None]}), is_plain({"patience": {3}})
    (True, False)
    """
    if isinstance(value, dict):
        return all(fits(key, str) and is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(is_plain, value))
    return value is None or isinstance(value, bool) or fits(value, str | float)


def _is_number(value: Any, wanted: type) -> bool:
    if isinstance(value, int):
        return not isinstance(value, bool) and abs(value) < 2**63
    return wanted is float and isinstance(value, float)


def _can_be_written(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def alike(found: Any, ours: Any) -> bool:
    """Whether a state_dict is laid out like another one: keys, shapes, dtypes and types.

    >>> from torch import zeros
    >>> ours = {"weight": zeros(64, 32), "steps": 3, "rates": [0.02]}
    >>> alike({"weight": zeros(64, 32), "steps": 9, "rates": [0.5]}, ours), alike({}, ours)
    (True, False)
    """
    if isinstance(ours, Tensor):
        same = isinstance(found, Tensor) and found.shape == ours.shape
        return same and (found.dtype, found.layout) == (ours.dtype, ours.layout)
    if isinstance(ours, Mapping):
        same = isinstance(found, Mapping) and set(found) == set(ours)
        return same and all(alike(found[key], ours[key]) for key in ours)
    if isinstance(ours, list | tuple):
        same = isinstance(found, list | tuple) and len(found) == len(ours)
        return same and all(alike(*pair) for pair in zip(found, ours, strict=True))
    kind = float if isinstance(ours, float) else type(ours)
    return fits(found, kind)
