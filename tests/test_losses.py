"""Losses: equal to a dense float64 reference, and the same however a batch is split.

What holds for the plain loss holds with class weights, label smoothing and focal loss too.
"""

import math
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from utils.losses import (
    DiceLoss,
    SegmentationLoss,
    balanced_weights,
    cross_entropy,
    focal_factor,
)

CLASSES, IGNORE = 4, 255
WEIGHTS = [0.2, 3.0, 0.0, 1.5]
OPTIONS = [
    {},
    {"class_weights": WEIGHTS},
    {"label_smoothing": 0.1},
    {"focal_gamma": 2.0},
    {"class_weights": WEIGHTS, "label_smoothing": 0.2, "focal_gamma": 0.5},
]
every_option = pytest.mark.parametrize("options", OPTIONS, ids=lambda one: "+".join(one) or "plain")


class Output(NamedTuple):
    logits: Tensor
    aux: tuple[Tensor, ...] = ()


def batch(seed: int, ignored: tuple[float, ...], size: tuple[int, int] = (6, 5)):
    """Random logits and labels, one image per share of ignored pixels."""
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(len(ignored), CLASSES, *size, generator=generator)
    label = torch.randint(0, CLASSES, (len(ignored), *size), generator=generator)
    noise = torch.rand(label.shape, generator=generator)
    label[noise < torch.tensor(ignored).view(-1, 1, 1)] = IGNORE
    return logits, label


def dice_of_image(logits: Tensor, label: Tensor) -> float:
    """Dice loss of one image (K, H, W), class by class and in float64."""
    valid = label != IGNORE
    probabilities = logits.double().softmax(dim=0)[:, valid]
    losses = []
    for k, p in enumerate(probabilities):
        y = (label[valid] == k).double()
        if y.sum():
            losses.append(1 - 2 * (p * y).sum() / (p.sum() + y.sum()))
    return float(sum(losses) / len(losses)) if losses else 0.0


def ce_of_pixel(logits: Tensor, true: int, weights: list[float], smoothing: float, gamma: float):
    """Cross entropy of one pixel (K,), class by class and in float64."""
    p = logits.double().softmax(dim=0)
    wanted = [smoothing / CLASSES + (1 - smoothing) * (k == true) for k in range(CLASSES)]
    parts = [-w * q * math.log(x) for w, q, x in zip(weights, wanted, p.tolist(), strict=True)]
    return (1 - p[true].item()) ** gamma * math.fsum(parts)


SHARES = st.lists(st.sampled_from([0.0, 0.3, 0.9, 1.0]), min_size=1, max_size=5).map(tuple)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), ignored=SHARES)
def test_dice_is_the_mean_over_images_weighted_by_labelled_pixels(seed, ignored):
    logits, label = batch(seed, ignored)
    weights = [(one != IGNORE).sum().item() for one in label]
    pairs = zip(weights, logits, label, strict=True)
    wanted = sum(w * dice_of_image(x, y) for w, x, y in pairs) / max(sum(weights), 1)
    assert DiceLoss(CLASSES, IGNORE)(logits, label).item() == pytest.approx(wanted, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), ignored=SHARES)
def test_cross_entropy_equals_torch_and_is_zero_without_labels(seed, ignored):
    logits, label = batch(seed, ignored)
    ours = cross_entropy(logits, label, IGNORE)
    if (label != IGNORE).any():
        torch.testing.assert_close(ours, F.cross_entropy(logits, label, ignore_index=IGNORE))
    else:
        assert ours.item() == 0.0


@settings(max_examples=40, deadline=None)
@example(seed=0, ignored=(1.0, 0.2, 1.0), cuts=[1])
@given(
    seed=st.integers(0, 10**6),
    ignored=SHARES.filter(lambda shares: len(shares) > 1),
    cuts=st.lists(st.integers(1, 4), min_size=1, max_size=3),
)
@every_option
def test_any_split_recombined_by_labelled_pixels_gives_the_same_loss_and_gradient(
    options, seed, ignored, cuts
):
    logits, label = batch(seed, ignored)
    loss = SegmentationLoss(CLASSES, **options)
    whole = logits.clone().requires_grad_()
    total = loss(Output(whole, (0.5 * whole, whole.flip(1))), label).total
    total.backward()

    split = logits.clone().requires_grad_()
    everything = loss.labelled(label).clamp(min=1)
    parts = 0
    bounds = sorted({0, len(label), *(min(cut, len(label)) for cut in cuts)})
    for start, stop in zip(bounds, bounds[1:], strict=False):
        x, y = split[start:stop], label[start:stop]
        part = loss(Output(x, (0.5 * x, x.flip(1))), y).total * loss.labelled(y) / everything
        part.backward()
        parts += part.detach()
    torch.testing.assert_close(parts, total.detach(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(split.grad, whole.grad, rtol=1e-5, atol=1e-7)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    ignored=SHARES,
    weights=st.lists(st.floats(0, 10), min_size=CLASSES, max_size=CLASSES),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    gamma=st.sampled_from([0.0, 0.5, 1.0, 2.0, 5.0]),
)
def test_cross_entropy_with_every_option_equals_a_sum_over_pixels(
    seed, ignored, weights, smoothing, gamma
):
    logits, label = batch(seed, ignored, size=(3, 2))
    pixels = zip(logits.movedim(1, -1)[label != IGNORE], label[label != IGNORE], strict=True)
    losses = [ce_of_pixel(x, int(k), weights, smoothing, gamma) for x, k in pixels]
    ours = cross_entropy(logits, label, IGNORE, torch.tensor(weights), smoothing, gamma)
    wanted = math.fsum(losses) / max(len(losses), 1)
    assert ours.item() == pytest.approx(wanted, rel=1e-5, abs=1e-6)


def test_label_smoothing_is_that_of_torch():
    logits, label = batch(8, (0.3, 0.0))
    wanted = F.cross_entropy(logits, label, ignore_index=IGNORE, label_smoothing=0.1)
    torch.testing.assert_close(cross_entropy(logits, label, IGNORE, label_smoothing=0.1), wanted)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_class_weights_are_those_of_torch_but_divided_by_pixels(smoothing):
    logits, label = batch(9, (0.3, 0.0))
    weights, labelled = torch.tensor(WEIGHTS), label[label != IGNORE]
    mean = F.cross_entropy(
        logits, label, weights, ignore_index=IGNORE, label_smoothing=smoothing
    )  # divided by the weights of the labelled pixels
    wanted = mean * weights[labelled].sum() / len(labelled)
    torch.testing.assert_close(cross_entropy(logits, label, IGNORE, weights, smoothing), wanted)


def test_defaults_are_plain_cross_entropy_bit_for_bit():
    logits, label = batch(10, (0.3, 0.0), size=(64, 48))
    total = F.cross_entropy(logits, label, ignore_index=IGNORE, reduction="sum")
    off = {"class_weights": None, "label_smoothing": 0.0, "focal_gamma": 0.0}
    found = SegmentationLoss(CLASSES)(Output(logits), label)
    assert torch.equal(found.ce, total / (label != IGNORE).sum())
    assert torch.equal(found.dice, DiceLoss(CLASSES, IGNORE)(logits, label))
    assert torch.equal(found.total, found.ce + found.dice)
    assert found == SegmentationLoss(CLASSES, **off)(Output(logits), label)


@every_option
def test_options_leave_dice_alone_and_reach_the_auxiliary_outputs(options):
    logits, label = batch(11, (0.3, 0.0))
    plain = SegmentationLoss(CLASSES)(Output(logits, (logits,)), label)
    found = SegmentationLoss(CLASSES, **options)(Output(logits, (logits,)), label)
    assert torch.equal(found.dice, plain.dice)
    assert torch.equal(found.aux, found.ce + found.dice)
    assert torch.equal(found.ce, plain.ce) == (not options)


@pytest.mark.parametrize("gamma", [0.1, 1.0, 2.0, 5.0])
def test_focal_gradient_is_right(gamma):
    logits, label = batch(12, (0.0,), size=(3, 2))
    logits = logits.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: focal_factor(x, label, gamma), (logits,))


@every_option
@pytest.mark.parametrize("size", [20.0, 65504.0, 1e30])
@pytest.mark.parametrize("right", [True, False])
def test_extreme_logits_keep_loss_and_gradient_finite(options, size, right):
    label = torch.arange(CLASSES).view(1, 2, 2)
    confident = size * (2.0 * F.one_hot(label, CLASSES).permute(0, 3, 1, 2) - 1)
    logits = (confident if right else -confident).requires_grad_()
    parts = SegmentationLoss(CLASSES, **options)(Output(logits), label)
    parts.total.backward()
    assert all(part.isfinite() for part in parts)
    assert logits.grad.isfinite().all()


@given(counts=st.lists(st.integers(0, 10**12), min_size=1, max_size=9).filter(any))
def test_balanced_weights_average_one_over_the_pixels_and_fall_with_the_root(counts):
    weights = balanced_weights(torch.tensor(counts))
    pairs = list(zip(counts, weights, strict=True))
    assert sum(n * w for n, w in pairs) / sum(counts) == pytest.approx(1)
    constant = [w * math.sqrt(n) for n, w in pairs if n]
    assert constant == pytest.approx([constant[0]] * len(constant))
    assert {w for n, w in pairs if n == 0} <= {max(w for n, w in pairs if n)}


@pytest.mark.parametrize("counts", [[0, 0], [[3, 1], [2, 2]], []])
def test_balanced_weights_name_counts_that_are_none(counts):
    with pytest.raises(ValueError, match="expected one number a class"):
        balanced_weights(torch.tensor(counts, dtype=torch.int64))


def test_class_weights_must_be_one_a_class():
    with pytest.raises(ValueError, match="3 class weights for 4 classes"):
        SegmentationLoss(CLASSES, class_weights=[1.0, 1.0, 1.0])


def test_class_weights_follow_the_logits_and_are_no_state():
    loss = SegmentationLoss(CLASSES, class_weights=[1, 2, 3, 4])
    label = torch.zeros(1, 4, 4, dtype=torch.long, device="meta")
    logits = torch.zeros(1, CLASSES, 4, 4, device="meta")
    assert loss(Output(logits), label).total.device.type == "meta"
    assert not loss.state_dict()


@every_option
def test_an_ignored_batch_contributes_zero_and_a_zero_gradient(options):
    logits, label = batch(0, (1.0, 1.0))
    logits.requires_grad_()
    parts = SegmentationLoss(CLASSES, **options)(Output(logits, (2 * logits,)), label)
    parts.total.backward()
    assert [part.item() for part in parts] == [0.0] * 4
    assert torch.equal(logits.grad, torch.zeros_like(logits))


@every_option
def test_ignored_pixels_change_nothing(options):
    logits, label = batch(1, (0.4, 0.4))
    other = torch.where((label == IGNORE).unsqueeze(1), 10 * torch.randn_like(logits), logits)
    loss = SegmentationLoss(CLASSES, **options)
    torch.testing.assert_close(loss(Output(other), label), loss(Output(logits), label))


def test_classes_the_label_lacks_are_left_out_of_the_dice_mean():
    label = torch.zeros(1, 4, 4, dtype=torch.long)
    label[0, 2:] = 1
    confident = 50.0 * F.one_hot(label, CLASSES).permute(0, 3, 1, 2)
    confident[0, :, 0, 0] = torch.tensor([0.0, 0.0, 50.0, 0.0])  # one pixel of 0 given to class 2
    found = DiceLoss(CLASSES, IGNORE)(confident, label).item()
    assert found == pytest.approx((1 - 14 / 15) / 2, abs=1e-6)  # not / 3 and not / 4


def test_dice_gradient_is_right():
    logits, label = batch(2, (0.3, 1.0, 0.0), size=(3, 2))
    logits = logits.double().requires_grad_()
    plain = DiceLoss(CLASSES, IGNORE)

    def as_double(x):  # the module works in float32: compare with differences in float32
        return plain(x, label).double()

    assert torch.autograd.gradcheck(as_double, (logits,), eps=1e-2, atol=1e-3)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_total_is_the_weighted_sum_and_aux_a_mean_for_any_number_of_outputs(count):
    logits, label = batch(3, (0.1, 0.5))
    loss = SegmentationLoss(CLASSES, ce_weight=0.7, dice_weight=2.0, aux_weight=0.3)
    parts = loss(Output(logits, (logits,) * count), label)
    main = 0.7 * parts.ce + 2.0 * parts.dice
    torch.testing.assert_close(parts.aux, main if count else torch.zeros(()))
    torch.testing.assert_close(parts.total, main + 0.3 * parts.aux)
    assert not any(part.requires_grad for part in parts[1:])


def test_aux_stays_in_the_graph_at_weight_zero():
    logits, label = batch(4, (0.1,))
    aux = logits.clone().requires_grad_()
    SegmentationLoss(CLASSES, aux_weight=0.0)(Output(logits, (aux,)), label).total.backward()
    assert torch.equal(aux.grad, torch.zeros_like(aux))


@every_option
def test_computes_in_float32_under_autocast_and_from_bfloat16(options):
    logits, label = batch(5, (0.2, 0.0), size=(64, 48))
    half = logits.bfloat16()
    loss = SegmentationLoss(CLASSES, **options)
    wanted = loss(Output(half.float()), label)
    for autocast in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = loss(Output(half), label)
        assert all(part.dtype == torch.float32 for part in found)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
@pytest.mark.parametrize("wrong", [CLASSES, -1])
def test_labels_outside_the_classes_raise(wrong, gamma):
    logits, label = batch(6, (0.0,))
    label[0, 0, 0] = wrong
    with pytest.raises(IndexError):
        cross_entropy(logits, label, IGNORE, focal_gamma=gamma)
    with pytest.raises(RuntimeError):
        DiceLoss(CLASSES, IGNORE)(logits, label)


@pytest.mark.parametrize("shape", [(2, CLASSES + 1, 6, 5), (2, CLASSES, 6, 10)])
def test_dice_names_the_shapes_that_do_not_fit(shape):
    with pytest.raises(ValueError, match=r"\(2, 6, 5\) of 4 classes"):
        DiceLoss(CLASSES, IGNORE)(torch.zeros(shape), torch.zeros(2, 6, 5, dtype=torch.long))


@every_option
def test_nan_logits_are_not_hidden(options):
    logits, label = batch(7, (0.0,))
    logits[0, 0, 0, 0] = math.nan
    parts = SegmentationLoss(CLASSES, **options)(Output(logits), label)
    assert all(part.isnan() for part in parts[:3])
