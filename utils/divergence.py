"""Losses, gradients and weights that are no numbers: found before they are kept, told by tile."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from utils.data import Sample


class DivergedError(Exception):
    """Training produced a loss, a gradient or weights that are no numbers, on whichever rank."""

    exit_code = 5
    everywhere = True  # every rank finds it in the same step, and names the same tiles


def diagnosis(step: Any, window: Sequence[Sample]) -> str:
    """What is no number in a step, where training stands, and on which tiles of whichever ranks.

    The weights are still those before the step, so that each of its batches is looked at again.
    """
    found = [fault for batch in window if (fault := fault_of(step, batch))]
    found = [fault for of_rank in step.run.gather(found) for fault in of_rank]
    what = found[0][0] if found else "gradient is too large"
    names = [name for _, names in found for name in names] or ["of any batch"]
    return (
        f"{what} at {step.place} (tiles {', '.join(names)}); lower train.muon_lr and "
        "train.adamw_lr, or look at these tiles"
    )


def fault_of(step: Any, batch: Sample) -> tuple[str, list[str]] | None:
    """Which of a batch's loss and own gradient is no number, and the names of its tiles."""
    step.optimizer.zero_grad(set_to_none=True)
    with step.run.unsynced(step.model, last=False):
        loss = step.forward(step.model, batch).total
        loss.backward()
    if not torch.isfinite(loss):
        return f"loss is {loss.item()}", batch.name
    gradients = [each.grad for each in step.head.parameters() if each.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return None if torch.isfinite(norm) else (f"gradient is {norm.item()}", batch.name)


def require_sound(step: Any) -> None:
    """Refuse to keep weights, or what the optimizer remembers, where some are no numbers."""
    if not all(bool(torch.isfinite(each).all()) for each in tensors_in(step.state_dict())):
        raise DivergedError(
            f"weights are no numbers before {step.place}; lower train.muon_lr and train.adamw_lr; "
            "what was kept before is whole"
        )


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors that nested dicts and lists hold.

    >>> [each.item() for each in tensors_in({"a": [torch.tensor(1)], "b": {"c": torch.tensor(2)}})]
    [1, 2]
    """
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list | tuple):
        for each in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(each)
