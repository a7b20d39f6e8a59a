"""What training minimises: cross entropy and soft Dice, where every labelled pixel counts the same.

Law: the loss of a batch is the mean of its images' losses weighted by their labelled pixels. So a
batch may be split into micro-batches or over ranks in any way: the parts' losses, weighted by
`SegmentationLoss.labelled`, give the value and the gradient of the whole.
"""

from typing import NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Output(Protocol):
    """What a head returns: logits and auxiliary logits, all (B, K, H, W) at the image's size."""

    logits: Tensor
    aux: tuple[Tensor, ...]


class LossParts(NamedTuple):
    """Scalars: `total` is to be minimised, the others are its parts, detached and unweighted."""

    total: Tensor
    ce: Tensor
    dice: Tensor
    aux: Tensor


def cross_entropy(logits: Tensor, label: Tensor, ignore_index: int) -> Tensor:
    """Mean over the labelled pixels of logits (B, K, H, W), label (B, H, W); 0 where there is none.

    >>> logits, label = torch.zeros(2, 4, 64, 64), torch.full((2, 64, 64), 255)
    >>> cross_entropy(logits, label, ignore_index=255).item()
    0.0
    """
    labelled = (label != ignore_index).sum()
    total = F.cross_entropy(logits.float(), label, ignore_index=ignore_index, reduction="sum")
    return total / labelled.clamp(min=1)


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
    ) -> None:
        super().__init__()
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
        ce = cross_entropy(logits, label, self.ignore_index)
        dice = self.dice(logits, label)
        return self.ce_weight * ce + self.dice_weight * dice, ce, dice

    def labelled(self, label: Tensor) -> Tensor:
        """Number of labelled pixels: the weight of this batch's loss among others (scalar, int64).

        >>> SegmentationLoss(num_classes=4).labelled(torch.tensor([[[0, 3], [255, 1]]])).item()
        3
        """
        return (label != self.ignore_index).sum()
