"""A step of training: accumulation, mixed precision, clipping, averaged weights.

The loss of a step is the mean over all labelled pixels of its global batch, however that batch is
split into micro-batches and ranks: each part's loss is weighted by its share of those pixels.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import Train
from utils.data import Sample
from utils.devices import autocast, compiles
from utils.distributed import Runtime
from utils.divergence import DivergedError, diagnosis
from utils.losses import SegmentationLoss
from utils.manifest import Manifest
from utils.optim import build_optimizer, build_schedule
from utils.process import STOP
from utils.quantize import restored
from utils.records import alike
from utils.resume import Progress

Encode = Callable[[Tensor], list[Tensor]]


class Step:
    """What turns batches into an optimizer step: network, loss, optimizer, schedule, averaging.

    encode: a frozen backbone, from normalised images to feature maps, for a cache of tiles; no part
    of the network that learns.
    """

    def __init__(
        self, head: nn.Module, normalize: nn.Module, section: Train, manifest: Manifest, steps: int,
        run: Runtime, device: torch.device, class_weights: Sequence[float] | None = None,
        encode: Encode | None = None,
    ) -> None:  # fmt: skip
        self.encode = encode
        self.run, self.device, self.section = run, device, section
        self.precision = manifest.precision
        self.head = head.to(device)
        self.normalize = normalize.to(device)
        weights = section.loss
        self.loss = SegmentationLoss(
            manifest.num_classes, weights.ce_weight, weights.dice_weight, weights.aux_weight,
            manifest.ignore_index, class_weights=class_weights, focal_gamma=weights.focal_gamma,
            label_smoothing=weights.label_smoothing,
        )  # fmt: skip
        self.optimizer = build_optimizer(
            head, head.edge_parameters(), section.muon_lr, section.adamw_lr, section.momentum,
            section.weight_decay,
        )  # fmt: skip
        self.schedule = build_schedule(self.optimizer, steps)
        learner = torch.compile(head) if compiles(section.compile, device) else head
        self.model = run.wrap(learner, device)
        self.ema = ema_of(head, section.ema_decay) if section.ema_decay else None

    @property
    def evaluated(self) -> nn.Module:
        """The weights that validation judges and a checkpoint keeps."""
        return self.ema.module if self.ema else self.head

    def state_dict(self) -> dict[str, Any]:
        """All that learns, as it is now: tensors that the next step changes."""
        return {
            "head": self.head.state_dict(),
            "ema": self.ema.state_dict() if self.ema else {},
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def load_state_dict(self, parts: dict[str, Any]) -> None:
        """Go on from a `state_dict`; ValueError where it is of another head or optimizer."""
        ours = self.state_dict()
        odd = [name for name in ours if name != "optimizer" and not alike(parts[name], ours[name])]
        if odd:
            raise ValueError(f"{' and '.join(odd)} of other shapes or types")
        self.head.load_state_dict(parts["head"])
        if self.ema:
            self.ema.load_state_dict(parts["ema"])
        self.optimizer.load_state_dict(parts["optimizer"])
        self.schedule.load_state_dict(parts["schedule"])

    def __call__(self, window: list[Sample], save_due: bool = False) -> Tensor:
        """One optimizer step over micro-batches; their loss, ce, dice, aux × pixels, and pixels.

        What one rank is asked or finds due all do after the same step: `stopping`, `saving`.
        """
        pixels = [self.loss.labelled(batch.label) for batch in window]
        flags = [int(STOP.asked), int(save_due)]
        counts = torch.tensor([int(torch.stack(pixels).sum()), *flags])
        total, self.stopping, self.saving = self.run.sum(counts).tolist()
        total = max(total, 1)
        sums = torch.zeros(5, dtype=torch.float64)
        self.optimizer.zero_grad(set_to_none=True)
        for number, (batch, count) in enumerate(zip(window, pixels, strict=True), start=1):
            share = float(count / total) * self.run.world_size  # DDP averages over ranks
            with self.run.unsynced(self.model, last=number == len(window)):
                parts = self.forward(self.model, batch)
                # a loss that is no number makes every rank's gradient none
                factor = torch.where(parts.total.isfinite(), share, math.nan)
                (parts.total * factor).backward()
            values = torch.stack([parts.total.detach(), *parts[1:]]).double().cpu()
            sums += torch.cat([values * count, count.double()[None]])
        self.update(window)
        return sums

    def forward(self, model: nn.Module, batch: Sample, score: Callable | None = None):
        """Loss of a batch; `score` is given the logits and the label."""
        label = batch.label.to(self.device, non_blocking=True).long()
        image = self.normalize(batch.image.to(self.device, non_blocking=True))
        with autocast(self.device, self.precision):
            features = self.features(batch, image)
            output = model(image.contiguous(memory_format=torch.channels_last), features)
        if score is not None:
            score(output.logits, label)
        return self.loss(output, label)

    def features(self, batch: Sample, image: Tensor) -> list[Tensor]:
        """The maps of a batch as a head gets them, computed where the cache has none."""
        if self.encode is not None:
            return self.encode(image)
        levels, scales = (
            [each.to(self.device, non_blocking=True) for each in part]
            for part in (batch.features, batch.scales)
        )
        return restored(levels, scales)

    def update(self, window: list[Sample]) -> None:
        """Clip, step, average, and move the rates on."""
        limit = self.section.clip_grad or math.inf
        norm = nn.utils.clip_grad_norm_(self.head.parameters(), limit)
        if not torch.isfinite(norm):  # the same on every rank
            raise DivergedError(diagnosis(self, window))
        self.optimizer.step()
        self.schedule.step()
        if self.ema:
            self.ema.update_parameters(self.head)

    def stands_at(self, progress: Progress) -> bool:
        """Whether the schedule has come as far as a progress says."""
        epochs = self.section.epochs
        windows = (self.schedule.total_steps - 1) // epochs  # `build_schedule` adds one
        done = (progress.epoch - 1) * windows + progress.windows
        in_epoch = 0 <= progress.windows <= windows and progress.epoch <= epochs
        ended = progress.finished and progress.windows == 0
        return self.schedule.last_epoch == done and (in_epoch or ended)

    @property
    def place(self) -> str:
        """The step that is under way, and its rates."""
        rates = ", ".join(f"{rate:.2g}" for rate in self.schedule.get_last_lr())
        return f"step {self.schedule.last_epoch + 1} with rates {rates}"


def ema_of(head: nn.Module, decay: float) -> AveragedModel:
    """A running average of the head's weights; its decay grows to `decay` over the first steps.

    >>> ema = ema_of(nn.Conv2d(1024, 2, 1, bias=False), decay=0.999)
    >>> ema.module.weight.shape
    torch.Size([2, 1024, 1, 1])
    """

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, share)

    return AveragedModel(head, multi_avg_fn=average, use_buffers=False)
