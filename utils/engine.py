"""Training: the loop, accumulation, mixed precision, EMA, validation, when to stop.

The loss of a step is the mean over all labelled pixels of its global batch, however that batch is
split into micro-batches and ranks: each part's loss is weighted by its share of those pixels.
"""

import copy
import csv
import io
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from config import Train
from utils.artefacts import write_artefact
from utils.cache import DAMAGE, Manifest
from utils.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    plain_state,
    save_checkpoint,
)
from utils.data import Sample
from utils.devices import autocast, compiles, tell_of_compiling
from utils.distributed import Runtime
from utils.divergence import DivergedError, diagnosis, require_sound
from utils.loading import Loader, Loaders
from utils.logging import VerbosityLogger
from utils.losses import SegmentationLoss, balanced_weights
from utils.metrics import Score, SegmentationMetrics, best_class
from utils.optim import EarlyStopping, build_optimizer, build_schedule
from utils.process import STOP, StoppedError
from utils.quantize import restored
from utils.records import alike
from utils.resume import Progress, Resume, StateError
from utils.space import Need, require_space
from utils.tiling import batched

Encode = Callable[[Tensor], list[Tensor]]
Save = Callable[[nn.Module, int, Score], Path]
STATES = 17  # times the weights: three states of 5, with average, optimizer and best; two bests


@dataclass(frozen=True, slots=True)
class Best:
    """The epoch (from 1) with the best validation score, and where its weights lie."""

    epoch: int
    score: Score
    path: Path


@dataclass(frozen=True, slots=True)
class TrainLosses:
    """Means over an epoch's labelled pixels, and the pace."""

    loss: float
    ce: float
    dice: float
    aux: float
    tiles_per_second: float


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
    """A running average of the head's weights; its decay grows to `decay` over the first steps."""

    @torch.no_grad()
    def average(averaged: list[Tensor], current: list[Tensor], count: Tensor | int) -> None:
        share = 1 - min(decay, (1 + int(count)) / (10 + int(count)))
        torch._foreach_lerp_(averaged, current, share)

    return AveragedModel(head, multi_avg_fn=average, use_buffers=False)


class Keeper:
    """Keeps progress: after each epoch, every so often, and where the run is asked to end.

    resume: where; None keeps nothing. Only the first rank writes.
    """

    def __init__(
        self, step: Step, stopping: EarlyStopping, resume: Resume | None, minutes: float, save: Save
    ) -> None:
        self.step, self.stopping, self.resume, self.minutes = step, stopping, resume, minutes
        self.save, self.best_path = save, Path()
        self._kept = time.monotonic()

    @property
    def due(self) -> bool:
        """Whether the last state is older than `train.checkpoint_minutes`; asked of rank 0."""
        return self.step.run.is_main and time.monotonic() - self._kept > 60 * self.minutes

    def find(self, log: VerbosityLogger) -> Progress:
        """The progress of an earlier run, put in force, or that of a new one."""
        run, found = self.step.run, None
        if self.resume is not None and run.is_main:
            found = self.resume.find(log)
        found = run.agree(found)
        if found is None:
            return Progress()
        try:
            self.step.load_state_dict(found.parts)
            self.stopping.load_state_dict(found.stopping)
            if found.best and not alike(found.best_weights, self.step.head.state_dict()):
                raise ValueError("the best weights are of other shapes or types")
            if not self.step.stands_at(found):
                raise ValueError(f"it is not in epoch {found.epoch} after {found.windows} steps")
        except DAMAGE as error:
            raise StateError(
                f"{self.resume.path}: does not fit the head and its optimizer "
                f"({' '.join(str(error).split())[:200]}); delete it, or train.resume: never"
            ) from error
        if found.best and run.is_main:
            self._restore_best(found, log)
        if not found.finished:
            log.info(f"train: going on in epoch {found.epoch} after {found.windows} steps of it")
        return found

    def _restore_best(self, found: Progress, log: VerbosityLogger) -> None:
        """Write the best weights so far again, unless they are there as the state has them."""
        self.best_path = self.resume.best_path
        if odd := other_than(found, self.best_path):
            log.warning(f"{odd}; it is written again from the state of training")
            head = copy.deepcopy(self.step.head)
            head.load_state_dict(found.best_weights)
            self.save(head, found.best["epoch"], score_of(found.best))

    def keep_best(self, progress: Progress, score: Score) -> None:
        """Put the weights that validation just judged on record as the best."""
        head, epoch = self.step.evaluated, progress.epoch
        progress.best = {"epoch": epoch, **asdict(score)}
        if self.step.run.is_main:
            progress.best_weights = plain_state(head)
            self.best_path = self.save(head, epoch, score)

    def keep(self, progress: Progress) -> None:
        """Write where training stands now."""
        require_sound(self.step)
        if self.resume is not None and self.step.run.is_main:
            progress.parts, progress.stopping = self.step.state_dict(), self.stopping.state_dict()
            self.resume.keep(progress)
        self._kept = time.monotonic()


def other_than(progress: Progress, path: Path) -> str:
    """What to say of a file that does not hold a progress's best weights; nothing of one that does.

    A run that was killed between the two may have left newer ones.
    """
    try:
        kept = load_checkpoint(path)
    except CheckpointError as error:
        return str(error) if path.exists() else f"{path}: is gone"
    weights, epoch = progress.best_weights, progress.best["epoch"]
    same = kept.epoch == epoch and alike(kept.state, weights)
    if same and all(torch.equal(kept.state[name], weights[name]) for name in weights):
        return ""
    return f"{path}: holds other weights than the best of this training, of epoch {epoch}"


def train_one_epoch(
    step: Step, batches: Iterable[Sample], progress: Progress, keeper: Keeper
) -> TrainLosses:
    """The training batches that are left; gradients of `train.grad_accum_steps` make a step."""
    step.model.train()
    start, count, run = time.monotonic(), 0, step.run
    sums = torch.zeros(5, dtype=torch.float64)
    if progress.sums:
        sums += torch.tensor(progress.sums[run.rank], dtype=torch.float64)
    for window in batched(batches, step.section.grad_accum_steps):
        sums += step(window, keeper.due)
        count += sum(len(batch.name) for batch in window)
        progress.windows += 1
        if step.stopping or step.saving:
            progress.sums = run.gather(sums.tolist())
            keeper.keep(progress)
        if step.stopping:
            raise StoppedError
    progress.sums = run.gather(sums.tolist())
    *parts, pixels = run.sum(sums).tolist()
    count = float(run.sum(torch.tensor(count)))
    means = [part / max(pixels, 1) for part in parts]
    return TrainLosses(*means, count / max(time.monotonic() - start, 1e-9))


@torch.inference_mode()
def evaluate(step: Step, batches: Loader, num_classes: int, ignore_index: int) -> Score:
    """Loss, IoU and Dice over all ranks' validation tiles: exact sums, the same on every rank.

    Each rank goes through its own share; asked to end, all do together.
    """
    model = step.evaluated.eval()
    step.run.align(model)
    metrics = SegmentationMetrics(num_classes, ignore_index, step.device)
    sums = torch.zeros(2, dtype=torch.float64)
    broken: list[str] = []
    for batch in step.run.apart(batches):
        parts = step.forward(
            model, batch,
            lambda logits, label: metrics.update(torch.stack(list(map(best_class, logits))), label),
        )  # fmt: skip
        count = step.loss.labelled(batch.label).double()
        sums += torch.stack([parts.total.double().cpu() * count, count])
        broken += [] if torch.isfinite(parts.total) else batch.name
    metrics.confusion = step.run.sum(metrics.confusion)
    loss, pixels = step.run.sum(sums).tolist()
    if not math.isfinite(loss):
        names = ", ".join(name for of_rank in step.run.gather(broken) for name in of_rank)
        raise DivergedError(
            f"validation loss is {loss} before {step.place}; look at the tiles {names}"
        )
    return metrics.score(loss / max(pixels, 1))


def fit(
    head: nn.Module, normalize: nn.Module, loaders: Loaders, section: Train, manifest: Manifest,
    run: Runtime, device: torch.device, save: Save, log, encode: Encode | None = None,
    resume: Resume | None = None,
) -> Best:  # fmt: skip
    """Train until the epochs are over or `patience` of them brought no better validation mIoU.

    With `resume`, from where an earlier run of the same settings came to.
    """
    tell_of_compiling("train.compile", section.compile, device, log)
    windows = math.ceil(len(loaders.train) / section.grad_accum_steps)
    weights = class_weights_of(section, manifest, loaders)
    steps = section.epochs * windows
    step = Step(head, normalize, section, manifest, steps, run, device, weights, encode)
    stopping, minutes = EarlyStopping(section.patience), section.checkpoint_minutes
    keeper = Keeper(step, stopping, resume, minutes, save)
    progress = keeper.find(log)
    if progress.history and run.is_main:  # as the state has it, whatever became of the file
        write_history(progress.history, section.weights_dir / "metrics.csv")
    if progress.finished:
        log.info(f"train: already complete, {progress.epoch - 1} epochs")
    elif run.is_main:
        needed = STATES * sum(each.nbytes for each in head.parameters())
        require_space([Need(section.weights_dir, "train.weights_dir", needed)], "weights")
    while not progress.finished:
        epoch, skipped = progress.epoch, progress.windows * section.grad_accum_steps
        loaders.sampler.epoch, loaders.sampler.skipped = epoch, skipped * section.batch_size
        batches = log.progress(loaders.train, f"epoch {epoch}/{section.epochs}")
        losses = train_one_epoch(step, batches, progress, keeper)
        try:
            score = evaluate(step, loaders.val, manifest.num_classes, manifest.ignore_index)
        except StoppedError:
            keeper.keep(progress)
            raise
        conclude(progress, losses, score, keeper, log)
    run.wait()
    return best_of(progress, keeper.best_path)


def conclude(
    progress: Progress, losses: TrainLosses, score: Score, keeper: Keeper, log: VerbosityLogger
) -> None:
    """Put an epoch on record: the best weights, metrics.csv, a line, and the progress."""
    step, stopping, epoch = keeper.step, keeper.stopping, progress.epoch
    run, section = step.run, step.section
    require_sound(step)
    better = stopping.update(run.agree(score.miou))
    progress.history.append(row_of(epoch, losses, score, step))
    if better:
        keeper.keep_best(progress, score)
    if run.is_main:
        write_history(progress.history, section.weights_dir / "metrics.csv")
    log.info(epoch_line(epoch, section.epochs, losses, score, better))
    if stopping.stop:
        log.info(f"no better mIoU for {section.patience} epochs: stopped early")
    progress.epoch, progress.windows, progress.sums = epoch + 1, 0, []
    progress.finished = stopping.stop or epoch >= section.epochs
    keeper.keep(progress)


def best_of(progress: Progress, path: Path) -> Best:
    """The best epoch so far."""
    if progress.best is None:
        raise DivergedError("no epoch had a validation mIoU; the validation tiles show no class")
    return Best(progress.best["epoch"], score_of(progress.best), path)


def score_of(best: dict[str, Any]) -> Score:
    """The score that a progress has of its best epoch.

    >>> score_of({"epoch": 3, "loss": 0.5, "iou": (1.0,), "dice": (1.0,)}).miou
    1.0
    """
    return Score(best["loss"], tuple(best["iou"]), tuple(best["dice"]))


def class_weights_of(
    section: Train, manifest: Manifest, loaders: Loaders
) -> Sequence[float] | None:
    """Weights of the classes in the cross-entropy: none, given, or from the training tiles."""
    wanted = section.loss.class_weights
    if wanted == "auto":
        names = loaders.train.dataset.names
        return balanced_weights(torch.tensor([manifest.tiles[name] for name in names]).sum(0))
    return None if wanted == "none" else wanted


def epoch_line(epoch: int, epochs: int, losses: TrainLosses, score: Score, better: bool) -> str:
    """An epoch in one line of the log."""
    return (
        f"epoch {epoch}/{epochs}: loss {losses.loss:.4f} (ce {losses.ce:.4f}, dice "
        f"{losses.dice:.4f}, aux {losses.aux:.4f}), validation loss {score.loss:.4f}, "
        f"mIoU {score.miou:.4f}, mDice {score.mdice:.4f}{' (best)' if better else ''}, "
        f"{losses.tiles_per_second:.1f} tiles/s"
    )


def row_of(epoch: int, losses: TrainLosses, score: Score, step: Step) -> dict[str, float]:
    """An epoch as a row of metrics.csv."""
    row = {
        "epoch": epoch,
        "train_loss": losses.loss,
        "train_ce": losses.ce,
        "train_dice": losses.dice,
        "train_aux": losses.aux,
        "val_loss": score.loss,
        "miou": score.miou,
        "mdice": score.mdice,
    }
    row |= {f"iou_{number}": value for number, value in enumerate(score.iou)}
    return row | {f"lr_{group['name']}": group["lr"] for group in step.optimizer.param_groups}


def write_history(history: list[dict[str, float]], path: Path) -> None:
    """Write metrics.csv, all of it; one that says the same is left alone."""
    text = io.StringIO()
    table = csv.DictWriter(text, fieldnames=list(history[0]), lineterminator="\n")
    table.writeheader()
    table.writerows({key: f"{value:.9g}" for key, value in row.items()} for row in history)
    content = text.getvalue().encode()
    there = path.is_file() and path.stat().st_size == len(content)
    if not there or path.read_bytes() != content:
        write_artefact(path, content)


def best_path(weights_dir: Path, head: str) -> Path:
    """Where the best weights of a head lie.

    >>> best_path(Path("weights"), "unet_v2").as_posix()
    'weights/unet_v2_best.pth'
    """
    return weights_dir / f"{head}_best.pth"


def keep_best(path: Path, head_name: str, manifest: Manifest, config_text: str) -> Save:
    """A function that saves a head's weights with all that is needed to use them again."""

    def save(head: nn.Module, epoch: int, score: Score) -> Path:
        checkpoint = Checkpoint(
            head=head_name,
            num_classes=manifest.num_classes,
            channels=manifest.channels,
            levels=len(manifest.layers),
            backbone=manifest.backbone,
            backbone_hash=manifest.backbone_hash,
            layers=manifest.layers,
            norm=manifest.norm,
            image_mean=manifest.image_mean,
            image_std=manifest.image_std,
            patch_size=manifest.patch_size,
            tile_size=manifest.tile_size,
            precision=manifest.precision,
            feature_dtype=manifest.feature_dtype,
            bands=manifest.bands,
            rgb=manifest.rgb,
            ranges=manifest.ranges,
            nodata=manifest.nodata,
            gsd=manifest.gsd,
            ground_gsd=manifest.ground_gsd,
            class_names=manifest.class_names,
            class_colors=manifest.class_colors,
            ignore_index=manifest.ignore_index,
            epoch=epoch,
            metrics={
                "loss": score.loss,
                "miou": score.miou,
                "mdice": score.mdice,
                "iou": list(score.iou),
                "dice": list(score.dice),
            },
            config=config_text,
            state=plain_state(head),
        )
        save_checkpoint(checkpoint, path)
        return path

    return save
