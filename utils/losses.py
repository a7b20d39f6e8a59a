"""What training minimises: cross entropy and soft Dice, where every labelled pixel counts the same.

Law: the loss of a batch is the mean of its images' losses weighted by their labelled pixels. So a
batch may be split into micro-batches or over ranks in any way: the parts' losses, weighted by
`SegmentationLoss.labelled`, give the value and the gradient of the whole. Class weights, label
smoothing and focal loss change the cross entropy alone, and keep the law: each of them changes a
pixel's loss, none the number of labelled pixels by which the sum is divided.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Output(Protocol):
    """What a head returns: logits and auxiliary logits, all (B, K, H, W) at the image's size."""

    logits: Tensor
    aux: tuple[Tensor, ...]


class LossParts(NamedTuple):
    """Scalars: `total` is to be minimised, the others are its parts, detached.

    Each part is without its own weight in `total`; `ce` has its class weights, label smoothing and
    focal factor.
    """

    total: Tensor
    ce: Tensor
    dice: Tensor
    aux: Tensor


def balanced_weights(counts: Tensor) -> list[float]:
    """Class weights from the training pixels of each class (K,): rarer classes weigh more.

    w_k = 1 / (√s_k · Σ_j √s_j), s_k being the class's share of the pixels. Proportional to 1/√s_k,
    the smoothed inverse frequency that Cui et al. 2019 (arXiv:1901.05555) describe: with 1/s_k a
    few pixels of a rare class would rule. Σ_k s_k·w_k = 1: the mean over the training pixels is 1,
    so that cross entropy keeps its size beside Dice. A class without a pixel gets the largest of
    the others' weights.

    >>> [round(weight, 4) for weight in balanced_weights(torch.tensor([810_000, 90_000, 0]))]
    [0.8333, 2.5, 2.5]
    """
    if counts.ndim != 1 or not counts.sum() > 0:
        raise ValueError(
            f"pixels by class are {counts.tolist()}: expected one number a class, not all of them 0"
        )
    roots = (counts.double() / counts.sum()).sqrt()
    weights = 1 / (roots * roots.sum())
    return weights.where(counts > 0, weights[counts > 0].max()).tolist()


def cross_entropy(
    logits: Tensor,
    label: Tensor,
    ignore_index: int,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
) -> Tensor:
    """Mean over the labelled pixels of logits (B, K, H, W), label (B, H, W); 0 where there is none.

    class_weights (K,) and label_smoothing are those of torch's cross_entropy, but the sum is always
    divided by the number of labelled pixels, never by the sum of their weights. focal_gamma: each
    pixel's term times `focal_factor`.

    >>> logits, label = torch.zeros(2, 4, 64, 64), torch.full((2, 64, 64), 255)
    >>> cross_entropy(logits, label, ignore_index=255).item()
    0.0
    >>> label[:, 0] = 1                                   # (1 - 1/4)² · log 4
    >>> round(cross_entropy(logits, label, ignore_index=255, focal_gamma=2.0).item(), 4)
    0.7798
    """
    valid = label != ignore_index
    logits = logits.float()
    total = F.cross_entropy(
        logits,
        label,
        class_weights,
        ignore_index=ignore_index,
        reduction="none" if focal_gamma else "sum",
        label_smoothing=label_smoothing,
    )
    if focal_gamma:
        total = (focal_factor(logits, label.where(valid, 0), focal_gamma) * total).sum()
    return total / valid.sum().clamp(min=1)


def focal_factor(logits: Tensor, classes: Tensor, gamma: float) -> Tensor:
    """(1 - p_t)^gamma, p_t the probability of a pixel's class (Lin et al. 2017, arXiv:1708.02002).

    From the margin m between the other classes together and the true one: 1 - p_t = sigmoid(m). So
    it stays exact where p_t rounds to 1, and its gradient finite for any gamma.

    >>> logits = torch.tensor([0.0, 40.0]).view(1, 2, 1, 1)
    >>> classes = torch.tensor([[[1]]])                   # 1 - p_t = e⁻⁴⁰, which 1 - softmax loses
    >>> f"{focal_factor(logits, classes, 2.0).item():.4e}"
    '1.8049e-35'
    """
    true = classes.unsqueeze(1)
    others = logits.scatter(1, true, torch.finfo(logits.dtype).min).logsumexp(dim=1)
    margin = others - logits.gather(1, true).squeeze(1)
    return (gamma * F.logsigmoid(margin)).exp()


def sum_by_class(values: Tensor, classes: Tensor, num_classes: int) -> Tensor:
    """Sums (B, K) over the pixels of each class, of values and classes (B, H, W), in float64.

    >>> label = torch.tensor([[0, 0, 2, 2]] * 64).view(1, 64, 4)
    >>> sum_by_class(torch.full((1, 64, 4), 0.5), label, num_classes=3).tolist()
    [[64.0, 0.0, 64.0]]
    """
    values = values.flatten(1).double()  # one bin takes a million addends: too many for float32
    sums = values.new_zeros(len(values), num_classes)
    return sums.scatter_add(1, classes.flatten(1), values)


class DiceLoss(nn.Module):
    """Soft Dice loss of each image, averaged with the images' labelled pixels as weights.

    Of each class in the image's label, 1 - 2 Σ p·y / (Σ p + Σ y) over labelled pixels (Milletari et
    al. 2016, arXiv:1606.04797, with plain sums below as in nnU-Net); classes that the label lacks
    are left out of the mean. No smoothing term: a class in the label has at least one pixel.

    >>> label = torch.zeros(1, 64, 64, dtype=torch.long)
    >>> label[:, 32:] = 1
    >>> confident = 100.0 * F.one_hot(label, 5).permute(0, 3, 1, 2)       # right everywhere
    >>> loss = DiceLoss(num_classes=5, ignore_index=255)
    >>> round(loss(confident, label).item(), 4), round(loss(confident, 1 - label).item(), 4)
    (0.0, 1.0)
    """

    def __init__(self, num_classes: int, ignore_index: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.ignore_index = ignore_index

    def forward(self, logits: Tensor, label: Tensor) -> Tensor:
        """Scalar loss of logits (B, K, H, W) and label (B, H, W); 0 where no pixel is labelled."""
        if logits.shape[1] != self.num_classes or logits.shape[2:] != label.shape[1:]:
            raise ValueError(
                f"logits {tuple(logits.shape)} for a label {tuple(label.shape)} of "
                f"{self.num_classes} classes: they must be (B, {self.num_classes}, H, W), (B, H, W)"
            )
        valid = label != self.ignore_index
        classes = label.where(valid, 0)
        probabilities = logits.float().softmax(dim=1) * valid.unsqueeze(1)
        hits = probabilities.gather(1, classes.unsqueeze(1)).squeeze(1)  # p of the true class

        overlap = sum_by_class(hits, classes, self.num_classes)  # (B, K), as are the next three
        pixels = sum_by_class(valid, classes, self.num_classes)
        predicted = probabilities.sum(dim=(2, 3))
        loss = 1 - 2 * overlap / (predicted + pixels).clamp(min=1)  # below 1: no pixel, left out

        present = pixels > 0
        image_loss = (loss * present).sum(dim=1) / present.sum(dim=1).clamp(min=1)
        weights = pixels.sum(dim=1)
        return ((image_loss * weights).sum() / weights.sum().clamp(min=1)).float()


class SegmentationLoss(nn.Module):
    """Cross entropy and Dice, weighted, of a head's logits and of its auxiliary logits.

    total = ce_weight·ce + dice_weight·dice + aux_weight·aux, where aux is the mean over the
    auxiliary outputs of the same sum (so the weight means the same for any number of them). They
    stay in the graph when `aux_weight` is 0, as DistributedDataParallel wants every parameter used.
    class_weights (one a class, 1 on average over the training pixels: `balanced_weights`),
    label_smoothing and focal_gamma are for the cross entropies; Dice is what it is without them.

    >>> from types import SimpleNamespace
    >>> label = torch.zeros(2, 64, 64, dtype=torch.long)
    >>> output = SimpleNamespace(logits=torch.zeros(2, 4, 64, 64), aux=())
    >>> parts = SegmentationLoss(num_classes=4)(output, label)
    >>> [round(part.item(), 4) for part in parts]        # ce = log 4, dice = 1 - 2·(1/4)/(1/4 + 1)
    [1.9863, 1.3863, 0.6, 0.0]
    """

    def __init__(
        self,
        num_classes: int,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        aux_weight: float = 0.4,
        ignore_index: int = 255,
        *,
        class_weights: Sequence[float] | None = None,
        label_smoothing: float = 0.0,
        focal_gamma: float = 0.0,
    ) -> None:
        super().__init__()
        if class_weights is not None and len(class_weights) != num_classes:
            raise ValueError(
                f"{len(class_weights)} class weights for {num_classes} classes: give one a class"
            )
        weights = None if class_weights is None else torch.tensor(class_weights).float()
        self.register_buffer("class_weights", weights, persistent=False)
        self.label_smoothing = label_smoothing
        self.focal_gamma = focal_gamma
        self.dice = DiceLoss(num_classes, ignore_index)
        self.ce_weight = ce_weight
        self.dice_weight = dice_weight
        self.aux_weight = aux_weight
        self.ignore_index = ignore_index

    def forward(self, output: Output, label: Tensor) -> LossParts:
        """Loss of a head's output for label (B, H, W), int64."""
        main, ce, dice = self.terms(output.logits, label)
        aux = main.new_zeros(())
        if output.aux:
            aux = torch.stack([self.terms(logits, label)[0] for logits in output.aux]).mean()
        total = main + self.aux_weight * aux
        return LossParts(total, ce.detach(), dice.detach(), aux.detach())

    def terms(self, logits: Tensor, label: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weighted sum, cross entropy and Dice of one set of logits (B, K, H, W)."""
        weights = self.class_weights
        if weights is not None:
            weights = weights.to(logits.device)  # where the loss itself was never moved
        ce = cross_entropy(
            logits, label, self.ignore_index, weights, self.label_smoothing, self.focal_gamma
        )
        dice = self.dice(logits, label)
        return self.ce_weight * ce + self.dice_weight * dice, ce, dice

    def labelled(self, label: Tensor) -> Tensor:
        """Number of labelled pixels: the weight of this batch's loss among others (scalar, int64).

        >>> SegmentationLoss(num_classes=4).labelled(torch.tensor([[[0, 3], [255, 1]]])).item()
        3
        """
        return (label != self.ignore_index).sum()
