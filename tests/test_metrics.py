"""Metrics: equal to counting pixel by pixel and to the figures of torchmetrics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.strategies import integers

from utils.metrics import Score, SegmentationMetrics

IGNORE = 255
LABEL = torch.tensor(
    [
        [[0, 0, 1, 1], [0, 2, 1, 255], [2, 2, 1, 255]],
        [[0, 0, 0, 0], [1, 1, 0, 2], [255, 1, 0, 2]],
    ]
)
PREDICTION = torch.tensor(
    [
        [[3, 1, 1, 1], [0, 2, 0, 3], [2, 1, 1, 1]],
        [[0, 0, 2, 0], [1, 0, 0, 2], [1, 1, 0, 0]],
    ]
)


def counted(prediction, label, num_classes):
    """Per-class IoU and Dice from loops over pixels."""
    pairs = list(zip(prediction.flatten().tolist(), label.flatten().tolist(), strict=True))
    pairs = [(p, y) for p, y in pairs if y != IGNORE]
    iou, dice = [], []
    for k in range(num_classes):
        both = sum(p == k and y == k for p, y in pairs)
        either = sum(p == k or y == k for p, y in pairs)
        iou.append(both / either if either else math.nan)
        dice.append(2 * both / (either + both) if either else math.nan)
    return iou, dice


def mean(values):
    present = [value for value in values if value == value]
    return sum(present) / len(present) if present else math.nan


@settings(max_examples=60, deadline=None)
@given(
    seed=integers(0, 10**6),
    num_classes=integers(1, 6),
    batches=st.lists(st.tuples(integers(1, 3), integers(1, 7), integers(1, 7)), max_size=3),
    dtype=st.sampled_from([torch.int64, torch.uint8, torch.int32]),
)
def test_equal_to_counting_pixel_by_pixel(seed, num_classes, batches, dtype):
    generator = torch.Generator().manual_seed(seed)
    metrics = SegmentationMetrics(num_classes)
    predictions, labels = [torch.zeros(0)], [torch.zeros(0)]
    for shape in batches:
        prediction = torch.randint(0, num_classes, shape, generator=generator)
        label = torch.randint(0, num_classes, shape, generator=generator)
        label[torch.rand(shape, generator=generator) < 0.3] = IGNORE
        metrics.update(prediction.to(dtype), label.to(dtype))
        predictions.append(prediction.flatten())
        labels.append(label.flatten())
    iou, dice = counted(torch.cat(predictions), torch.cat(labels), num_classes)
    score = metrics.score(loss=0.5)
    assert score.iou == pytest.approx(iou, nan_ok=True)
    assert score.dice == pytest.approx(dice, nan_ok=True)
    assert score.miou == pytest.approx(mean(iou), nan_ok=True)
    assert score.mdice == pytest.approx(mean(dice), nan_ok=True)


def test_equal_to_the_figures_of_torchmetrics():
    # torchmetrics 1.9.0, num_classes=5, ignore_index=255: MulticlassJaccardIndex and
    # MulticlassF1Score with average=None, and "macro" for the means. Class 3 is predicted but not
    # labelled (0, counted), class 4 is nowhere (0 there, but left out of "macro": NaN here).
    metrics = SegmentationMetrics(num_classes=5)
    metrics.update(PREDICTION, LABEL)
    score = metrics.score(loss=0.0)
    assert score.iou[:4] == pytest.approx([0.5, 0.55555558, 0.5, 0.0], abs=1e-6)
    assert score.dice[:4] == pytest.approx([0.66666669, 0.71428573, 0.66666669, 0.0], abs=1e-6)
    assert math.isnan(score.iou[4])
    assert math.isnan(score.dice[4])
    assert score.miou == pytest.approx(0.38888890, abs=1e-6)
    assert score.mdice == pytest.approx(0.51190478, abs=1e-6)


def test_confusion_has_labels_in_rows_and_predictions_in_columns():
    metrics = SegmentationMetrics(num_classes=3)
    metrics.update(torch.tensor([[[0, 2, 2, 1]]]), torch.tensor([[[0, 1, 1, IGNORE]]]))
    assert metrics.confusion.dtype == torch.int64
    assert metrics.confusion.tolist() == [[1, 0, 0], [0, 0, 2], [0, 0, 0]]


def test_ranks_add_their_confusions_up():
    whole, first, second = (SegmentationMetrics(num_classes=5) for _ in range(3))
    whole.update(PREDICTION, LABEL)
    first.update(PREDICTION[:1], LABEL[:1])
    second.update(PREDICTION[1:], LABEL[1:])
    first.confusion = first.confusion + second.confusion
    assert torch.equal(first.confusion, whole.confusion)
    assert torch.equal(first.iou()[:4], whole.iou()[:4])


def test_uint8_maps_of_many_classes_do_not_wrap_around():
    metrics = SegmentationMetrics(num_classes=200)
    last = torch.full((1, 2, 2), 199, dtype=torch.uint8)
    metrics.update(last, last)
    assert metrics.confusion[199, 199] == 4


def test_counts_are_exact_beyond_float32():
    metrics = SegmentationMetrics(num_classes=2)
    metrics.confusion[0, 0] = 2**40
    metrics.update(torch.zeros(1, 1, 1, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.long))
    assert metrics.confusion[0, 0] == 2**40 + 1


def test_predictions_where_nothing_is_labelled_do_not_matter():
    metrics = SegmentationMetrics(num_classes=2)
    metrics.update(torch.full((1, 4, 4), 255), torch.full((1, 4, 4), IGNORE))
    score = metrics.score(loss=0.0)
    assert math.isnan(score.miou)
    assert math.isnan(score.mdice)


@pytest.mark.parametrize(
    ("prediction", "label", "message"),
    [
        (2, 0, "prediction: class 2 in 4 pixels, there are classes 0..1"),
        (-1, 0, "prediction: class -1 in 4 pixels"),
        (0, 2, "label: class 2 in 4 pixels"),
    ],
)
def test_classes_out_of_range_are_named(prediction, label, message):
    metrics = SegmentationMetrics(num_classes=2)
    with pytest.raises(ValueError, match=message):
        metrics.update(torch.full((1, 2, 2), prediction), torch.full((1, 2, 2), label))
    assert metrics.confusion.sum() == 0


def test_maps_of_different_shapes_are_refused():
    with pytest.raises(ValueError, match="shapes differ"):
        SegmentationMetrics(num_classes=2).update(torch.zeros(1, 4, 4), torch.zeros(1, 2, 2))


def test_table_lines_are_aligned_and_name_every_class():
    lines = Score(0.1, (1.0, math.nan), (1.0, math.nan)).table(["a long class name", "b"])
    assert len({len(line) for line in lines}) == 1
    assert [line.split()[-1] for line in lines] == ["Dice", "1.0000", "-", "1.0000"]
    with pytest.raises(ValueError, match="zip"):
        Score(0.1, (1.0, math.nan), (1.0, math.nan)).table(["one name too few"])
