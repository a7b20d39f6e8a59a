"""Where a training run stands: enough to go on as if it had never ended, bit for bit on a CPU.

`{head}_last.pth` is written after each epoch, every `train.checkpoint_minutes` and when a signal
asks the run to end; the one before it is kept beside it. Order and augmentation of the tiles are
functions of (seed, epoch, step), so a state need not hold them. Like a checkpoint, the file holds
plain tensors, numbers, strings, lists and dicts only.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from config import Augmentations, Resources, Train
from utils.archives import load_plain
from utils.artefacts import write_artefact
from utils.manifest import Manifest, hash_of
from utils.metrics import Score
from utils.records import fits, has_format, is_plain, unfit

FORMAT = 2
HARMLESS = {  # what a run may change and go on
    "enable", "processed_dir", "weights_dir", "device", "num_workers", "patience", "compile",
    "val_fraction", "resume", "checkpoint_minutes",
}  # fmt: skip
OF_CACHE = (
    "backbone_hash", "layers", "channels", "tile_size", "precision", "feature_dtype", "cache",
    "views", "num_classes", "ignore_index",
)  # fmt: skip


BEST = {"epoch": int} | {each.name: each.type for each in fields(Score)}
SUMS = 5  # loss, ce, dice, aux, pixels


class StateError(Exception):
    """A state of training that is damaged, or of a run with other settings."""

    exit_code = 3


@dataclass(slots=True)
class Progress:
    """How far training has come: `epoch` is under way, `windows` of its optimizer steps are done.

    sums has the losses so far of each rank, best the score of the best epoch, best_weights what the
    head was then, history a row for each whole epoch, parts the state_dicts of everything that
    learns.
    """

    epoch: int = 1
    windows: int = 0
    sums: list[list[float]] = field(default_factory=list)
    best: dict[str, Any] | None = None
    best_weights: dict[str, Tensor] = field(default_factory=dict)
    stopping: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    finished: bool = False
    parts: dict[str, Any] = field(default_factory=dict)


def last_path(weights_dir: Path, head: str) -> Path:
    """Where the state of a head's training lies.

    >>> last_path(Path("weights"), "unet_v2").as_posix()
    'weights/unet_v2_last.pth'
    """
    return weights_dir / f"{head}_last.pth"


def before(path: Path) -> Path:
    """Where the state before the last one is kept.

    >>> before(Path("unet_last.pth")).name
    'unet_last_before.pth'
    """
    return path.with_name(f"{path.stem}_before.pth")


def identity_of(
    head: str, section: Train, manifest: Manifest, augmentations: Augmentations,
    resources: Resources, train: Sequence[str], val: Sequence[str], world_size: int,
) -> dict[str, Any]:  # fmt: skip
    """All that must be the same for training to go on."""
    settings = section.model_dump(mode="json", exclude=HARMLESS)
    return {
        "model.head": head,
        "resources.seed": resources.seed,
        "resources.matmul_precision": resources.matmul_precision,
        "number of processes": world_size,
        "dataset.augmentations": augmentations.model_dump(),
        "tiles to train on": digest(train),
        "tiles to validate on": digest(val),
        "the cache's content": content_of(manifest),
        **{f"the cache's {name}": getattr(manifest, name) for name in OF_CACHE},
        **{f"train.{name}": value for name, value in settings.items()},
    }


def content_of(manifest: Manifest) -> str:
    """A hash that tells what the tiles of two caches hold apart: how they were made, pixels by
    class, and bytes of the sources. Times do not count: a project that was copied goes on.
    """
    sizes = {
        name: [about.get("bytes"), [each["bytes"] for each in about.get("labels", {}).values()]]
        for name, about in manifest.scenes.items()
    }
    return hash_of([manifest.fingerprint, manifest.tiles, sizes], 8)


def digest(names: Sequence[str]) -> str:
    """A number and a hash that tell two lists of tiles apart.

    >>> digest(["b", "a"]) == digest(["a", "b"]), digest(["a"])
    (True, '1 tiles, ca978112')
    """
    found = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    return f"{len(names)} tiles, {found[:8]}"


class Resume:
    """Keeps a run's progress at a path, and finds it again.

    identity: what must be the same; anew: whether an older run's progress is passed over.
    """

    def __init__(self, path: Path, identity: dict[str, Any], anew: bool = False) -> None:
        self.path, self.anew = path, anew
        self.identity = json.loads(json.dumps(identity))  # as a file gives it back
        self.best_path = path.with_name(f"{path.stem.removesuffix('_last')}_best.pth")
        self._sound = False  # whether the file at the path is known to be one to go back to

    def keep(self, progress: Progress) -> None:
        """Write the progress; the file before it stays as `before(path)`."""
        content = {"format": FORMAT, "identity": self.identity, **asdict_shallow(progress)}
        if self._sound:  # a damaged one must not take the place of the one before it
            self.path.replace(before(self.path))
        write_artefact(self.path, lambda file: torch.save(content, file))
        self._sound = True

    def find(self, log: Any) -> Progress | None:
        """The progress to go on with, None where there is none.

        Of two files the later one that is whole; that of a run with other settings is an error, and
        so are damaged ones alone: what they stood for is not written over.
        """
        if self.anew:
            return None
        damaged = None
        for path in (self.path, before(self.path)):
            if not path.exists():
                continue
            try:
                content = load(path)
            except StateError as error:
                damaged = damaged or error
                if before(path).exists():
                    log.warning(f"{error}; the state before it is tried")
                continue
            self._require_same(path, content.pop("identity"))
            self._sound = path == self.path
            return Progress(**content)
        if damaged:
            raise StateError(f"{damaged}; no other state is left: train.resume: never starts anew")
        return None

    def _require_same(self, path: Path, found: dict[str, Any]) -> None:
        ours = self.identity
        odd = [key for key in ours | found if ours.get(key) != found.get(key)]
        if odd:
            told = (f"{key} was {found.get(key)!r} and is {ours.get(key)!r}" for key in odd)
            raise StateError(
                f"{path}: the training that it would go on with had other settings: "
                f"{'; '.join(told)}; set them back, or train.resume: never to start anew"
            )


def asdict_shallow(progress: Progress) -> dict[str, Any]:
    """The fields of a progress without copies of what they hold.

    >>> asdict_shallow(Progress())["epoch"]
    1
    """
    return {each.name: getattr(progress, each.name) for each in fields(progress)}


def load(path: Path) -> dict[str, Any]:
    """The content of a state's file, but for its format; anything but a whole one is an error."""
    try:
        content = load_plain(path)
    except ValueError as error:
        raise StateError(f"{path}: damaged, or no state of training ({error})") from error
    wanted = {"identity", *(each.name for each in fields(Progress))}
    if not has_format(content, FORMAT):
        raise StateError(f"{path}: no state of training of format {FORMAT}")
    del content["format"]
    if set(content) != wanted:
        odd = ", ".join(sorted(wanted ^ set(content)))
        raise StateError(f"{path}: missing or unknown entries: {odd}")
    if not isinstance(content["identity"], dict) or not is_plain(content["identity"]):
        raise StateError(f"{path}: entries that no training writes: identity")
    if odd := unfit(Progress, content) or contradicting(content):
        raise StateError(f"{path}: entries that no training writes: {', '.join(odd)}")
    return content


def contradicting(content: dict[str, Any]) -> list[str]:
    """The entries of a state that do not go with others, or mean nothing."""
    best, history, epoch = content["best"], content["history"], content["epoch"]
    ranks = content["identity"].get("number of processes")
    as_kept = best is None or (
        set(best) == set(BEST) and all(fits(best[name], kind) for name, kind in BEST.items())
    )
    sound = {
        "epoch and history": epoch == len(history) + 1,
        "history": all(list(row) == list(history[0]) for row in history),
        "windows": content["windows"] >= 0,
        "sums": len(content["sums"]) in (0, ranks)
        and all(len(each) == SUMS for each in content["sums"]),
        "best": as_kept,
        "best and best_weights": (best is None) == (not content["best_weights"]),
    }
    return [name for name, right in sound.items() if not right]
