"""Training: the loop over epochs, validation, when to stop, and the history of both."""

import csv
import io
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from config import Train
from utils.artefacts import write_artefact
from utils.data import Sample
from utils.devices import tell_of_compiling
from utils.distributed import Runtime
from utils.divergence import DivergedError, require_sound
from utils.keeping import Keeper, Save, score_of
from utils.loading import Loader, Loaders
from utils.logging import VerbosityLogger
from utils.losses import balanced_weights
from utils.manifest import Manifest
from utils.metrics import Score, SegmentationMetrics, best_class
from utils.optim import EarlyStopping
from utils.process import StoppedError
from utils.resume import Progress, Resume
from utils.space import Need, require_space
from utils.step import Encode, Step
from utils.tiling import batched

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
    tell_of_compiling("train: train.compile", section.compile, device, log)
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
    """An epoch in one line of the log.

    >>> losses, score = TrainLosses(0.61, 0.4, 0.21, 0.0, 35.2), Score(0.5, (0.8, 0.6), (0.9, 0.7))
    >>> epoch_line(3, 50, losses, score, better=True)[:59]
    'epoch 3/50: loss 0.6100 (ce 0.4000, dice 0.2100, aux 0.0000'
    """
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


