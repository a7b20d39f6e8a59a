"""What a training keeps on disk: where it stands, and its best weights.

Both agree whenever a run ends: the state of training holds the best weights too, and their file is
written again where it is not of this training.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from utils.archives import DAMAGE
from utils.checkpoint import (
    Checkpoint,
    CheckpointError,
    load_checkpoint,
    plain_state,
    save_checkpoint,
)
from utils.divergence import require_sound
from utils.logging import VerbosityLogger
from utils.manifest import Manifest
from utils.metrics import Score
from utils.optim import EarlyStopping
from utils.records import alike
from utils.resume import Progress, Resume, StateError
from utils.step import Step

Save = Callable[[nn.Module, int, Score], Path]
OF_CACHE = {field.name for field in fields(Checkpoint)} & {field.name for field in fields(Manifest)}


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


def score_of(best: dict[str, Any]) -> Score:
    """The score that a progress has of its best epoch.

    >>> score_of({"epoch": 3, "loss": 0.5, "iou": (1.0,), "dice": (1.0,)}).miou
    1.0
    """
    return Score(best["loss"], tuple(best["iou"]), tuple(best["dice"]))


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
            levels=len(manifest.layers),
            **{name: getattr(manifest, name) for name in OF_CACHE},
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
