"""What label values mean: which class a raster value or a polygon's attribute stands for."""

from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from config import Dataset
from utils.opening import RasterError
from utils.vectors import value_key

UNCOVERED = -1  # as an id: pixels that a file says nothing about
UNLISTED = -2  # as an id: values that are no class
HOLE = -(2**40)  # as a value: pixels that a file says nothing about
LARGEST_TABLE = 65536  # values up to here are looked up in a table
VALUES_OF_TABLE = frozenset(map(str, range(LARGEST_TABLE)))


@dataclass(frozen=True, slots=True)
class LabelRules:
    """What label values mean, from `dataset.classes`, `dataset.labels` and `ignore_index`.

    ids: class id by value as text; background: class of what no polygon covers, None for ignore.

    >>> rules = LabelRules(num_classes=2, ids={"4": 1, "1": 0})
    >>> rules.id_of(4.0), rules.id_of("255"), rules.id_of("7") == UNLISTED
    (1, 255, True)
    """

    num_classes: int
    ids: dict[str, int] = field(default_factory=dict)
    ignore_index: int = 255
    unlisted: str = "error"
    background: int | None = 0
    nodata: str | float = "auto"
    attribute: str | None = None
    layer: str | None = None
    all_touched: bool = False
    erode_borders: int = 0

    def id_of(self, value: Any) -> int:
        """The class id of a raster value or an attribute; ignore_index and UNLISTED stay so."""
        text = value_key(value)
        known = self.ids.get(text)
        if known is None and text == str(self.ignore_index):
            known = self.ignore_index
        if known is not None or self.unlisted == "error":
            return UNLISTED if known is None else known
        fallback = self.background if self.unlisted == "background" else None
        return self.ignore_index if fallback is None else fallback


def label_rules(dataset: Dataset, num_classes: int) -> LabelRules:
    """The rules of a configuration; where no class lists values they are the class ids.

    >>> label_rules(Dataset(), num_classes=3).ids
    {'0': 0, '1': 1, '2': 2}
    """
    section = dataset.labels
    ids = {str(number): number for number in range(num_classes)}
    if any(each.values for each in dataset.classes or ()):
        ids = {
            value_key(value): number
            for number, each in enumerate(dataset.classes)
            for value in each.values
        }
    background = None if section.background == "ignore" else section.background
    return LabelRules(
        num_classes, ids, dataset.ignore_index, section.unlisted, background, section.nodata,
        section.attribute, section.layer, section.all_touched, section.erode_borders,
    )  # fmt: skip


def hole_in(dtype: str) -> float:
    """A value that a label raster of this type cannot hold, or holds for no class.

    >>> hole_in("uint8"), hole_in("int16"), hole_in("float32")
    (-1, -32768, nan)
    """
    kind = np.dtype(dtype).kind
    if kind == "f":
        return float("nan")
    return -1 if kind == "u" else int(np.iinfo(dtype).min)


def value_table(rules: LabelRules, silent: Collection[float] = ()) -> np.ndarray:
    """Class ids by value, int32; UNCOVERED for the silent values, which say nothing.

    >>> table = value_table(LabelRules(2, {"0": 0, "1": 1}), silent=[9, -9999])
    >>> table[[0, 1, 2, 9, 255]].tolist()
    [0, 1, -2, -1, 255]
    """
    table = np.full(LARGEST_TABLE, rules.id_of("no such value"), np.int32)
    for text, number in ({str(rules.ignore_index): rules.ignore_index} | rules.ids).items():
        if text in VALUES_OF_TABLE:
            table[int(text)] = number
    for value in silent:
        if 0 <= value < LARGEST_TABLE and value == int(value):
            table[int(value)] = UNCOVERED
    return table


def ids_by_table(values: np.ndarray, table: np.ndarray) -> np.ndarray | None:
    """Class ids of whole numbers, or None where the table does not reach to all of them.

    Nothing is looked up where all between the least and the greatest are class ids already.

    >>> ids_by_table(np.array([1, 0], np.uint8), np.array([5, 6]))
    array([6, 5])
    >>> ids_by_table(np.array([1, 0], np.uint8), np.array([0, 1, -2]))
    array([1, 0])
    """
    low, high = int(values.min()), int(values.max())
    if low < 0 or high >= len(table):
        return None
    if np.array_equal(table[low : high + 1], np.arange(low, high + 1)):
        return values.astype(table.dtype)
    ids = np.empty(values.shape, table.dtype)
    for row in range(0, len(values), 64):  # NumPy's 64-bit indices stay small
        table.take(values[row : row + 64], out=ids[row : row + 64], mode="clip")
    return ids


def class_of_shape(value: Any, rules: LabelRules) -> int:
    """The class id of a polygon; without an attribute every polygon is class 1."""
    return 1 if rules.attribute is None else rules.id_of(value)


def whole_numbers(values: np.ndarray, valid: np.ndarray, path: Path) -> np.ndarray:
    """Label values as int64, HOLE where not valid; a broken number is an error.

    >>> whole_numbers(np.array([1.0, np.nan]), np.array([True, False]), Path("a.tif")).tolist()
    [1, -1099511627776]
    """
    if values.dtype.kind == "f":
        values = np.where(valid, values, 0)
        broken = values[values != np.rint(values)]
        if broken.size:
            raise RasterError(f"{path}: holds {broken[0]:g}, labels are whole class numbers")
        values = values.clip(HOLE + 1, -HOLE)  # what lies beyond is no class either
    return np.where(valid, values.astype(np.int64), HOLE)
