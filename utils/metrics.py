"""How good a map is: IoU and Dice of each class from an integer confusion matrix.

A class is absent when no pixel is labelled so and none predicted so (its union is empty): its IoU
is 0/0, given as NaN and left out of the means. A class that was predicted but is nowhere in the
labels has IoU 0 and counts. (The rule of torchmetrics' and mmsegmentation's means.)
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def mean_of_present(values: tuple[float, ...]) -> float:
    """Mean over the classes that are present; NaN when none is.

    >>> mean_of_present((0.5, math.nan, 1.0)), mean_of_present((math.nan, math.nan))
    (0.75, nan)
    """
    present = [value for value in values if not math.isnan(value)]
    return math.fsum(present) / len(present) if present else math.nan


@dataclass(frozen=True, slots=True)
class Score:
    """Loss and per-class IoU and Dice (NaN for absent classes) of one pass over labelled tiles.

    >>> score = Score(loss=0.41, iou=(0.5, 0.9, math.nan), dice=(2 / 3, 18 / 19, math.nan))
    >>> round(score.miou, 3), round(score.mdice, 3)
    (0.7, 0.807)
    """

    loss: float
    iou: tuple[float, ...]
    dice: tuple[float, ...]

    @property
    def miou(self) -> float:
        """Mean IoU of the classes present."""
        return mean_of_present(self.iou)

    @property
    def mdice(self) -> float:
        """Mean Dice of the classes present."""
        return mean_of_present(self.dice)

    def table(self, names: list[str]) -> list[str]:
        """Aligned lines for a log, one a class; `-` for absent classes.

        >>> score = Score(loss=0.41, iou=(0.5, math.nan), dice=(2 / 3, math.nan))
        >>> print(*score.table(["field", "road"]), sep="|")
        class     IoU    Dice|field  0.5000  0.6667|road        -       -|mean   0.5000  0.6667
        """
        rows = [*zip(names, self.iou, self.dice, strict=True), ("mean", self.miou, self.mdice)]
        width = max(len(name) for name in ("class", *(row[0] for row in rows)))
        lines = [f"{'class':{width}}  {'IoU':>6}  {'Dice':>6}"]
        for name, *values in rows:
            cells = ["-" if math.isnan(value) else f"{value:.4f}" for value in values]
            lines.append(f"{name:{width}}  {cells[0]:>6}  {cells[1]:>6}")
        return lines


def best_class(probabilities: Tensor) -> Tensor:
    """The most probable class (height, width) of (K, height, width), of equal ones the first.

    torch's argmax over the first axis takes one value at a time on a CPU.

    >>> best_class(torch.tensor([[[0.2, 0.4]], [[0.5, 0.4]], [[0.3, 0.2]]])).tolist()
    [[1, 0]]
    """
    if probabilities.device.type != "cpu":
        return probabilities.argmax(0)
    top = probabilities.amax(0)
    dtype = torch.uint8 if len(probabilities) <= 256 else torch.int32
    classes = torch.zeros(top.shape, dtype=dtype)
    for number in reversed(range(len(probabilities))):
        classes.masked_fill_(probabilities[number] == top, number)
    return classes


class SegmentationMetrics:
    """Accumulates `confusion` (K, K), int64: rows are labels, columns predictions.

    `confusion` is a plain tensor and sums are exact, so ranks may add theirs up.

    >>> metrics = SegmentationMetrics(num_classes=4)
    >>> label = torch.zeros(2, 64, 64, dtype=torch.long)
    >>> label[0], label[1, :32] = 255, 3                    # ignored; half of class 3, half of 0
    >>> metrics.update(torch.zeros(2, 64, 64, dtype=torch.long), label)
    >>> metrics.iou().tolist(), metrics.score(loss=0.0).miou
    ([0.5, nan, nan, 0.0], 0.25)
    """

    def __init__(
        self, num_classes: int, ignore_index: int = 255, device: torch.device | str = "cpu"
    ) -> None:
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, prediction: Tensor, label: Tensor) -> None:
        """Count the labelled pixels of class maps of the same shape, such as (B, H, W)."""
        if prediction.shape != label.shape:
            raise ValueError(
                f"prediction {tuple(prediction.shape)}, label {tuple(label.shape)}: shapes differ"
            )
        valid = label != self.ignore_index
        rows = self._checked(label[valid], "label")
        columns = self._checked(prediction[valid], "prediction")
        pairs = rows * self.num_classes + columns
        counts = pairs.bincount(minlength=self.num_classes**2)
        self.confusion += counts.view_as(self.confusion).to(self.confusion.device)

    def _checked(self, classes: Tensor, what: str) -> Tensor:
        classes = classes.long()  # before any arithmetic: uint8 would wrap around
        outside = classes[(classes < 0) | (classes >= self.num_classes)]
        if len(outside):
            raise ValueError(
                f"{what}: class {outside[0].item()} in {len(outside)} pixels, "
                f"there are classes 0..{self.num_classes - 1}"
            )
        return classes

    def iou(self) -> Tensor:
        """Intersection over union of each class (K,), float64; NaN for absent classes."""
        hits, labelled, predicted = self._counts()
        return hits / (labelled + predicted - hits)

    def dice(self) -> Tensor:
        """Dice coefficient, also called F1, of each class (K,), float64; NaN for absent classes."""
        hits, labelled, predicted = self._counts()
        return 2 * hits / (labelled + predicted)

    def _counts(self) -> tuple[Tensor, Tensor, Tensor]:
        confusion = self.confusion.double()
        return confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0)

    def score(self, loss: float) -> Score:
        """All figures so far, with the loss that the caller averaged."""
        return Score(float(loss), tuple(self.iou().tolist()), tuple(self.dice().tolist()))
