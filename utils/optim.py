"""Muon for hidden matrices, AdamW for the rest, in one optimizer; its schedule and early stopping.

Muon replaces the momentum of a weight matrix by its nearest semi-orthogonal matrix, found by a few
Newton-Schulz steps (Keller Jordan et al. 2024, https://kellerjordan.github.io/posts/muon). What is
no hidden matrix goes to AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101): biases and norms,
layers that read pixels or write classes, embeddings. Both are ordinary `param_groups`, told apart
by `kind`, so zero_grad, GradScaler, schedules, state_dict and resume see every parameter.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw
from torch.optim.lr_scheduler import OneCycleLR

from utils.records import alike

A, B, C = 3.4445, -4.7750, 2.0315  # Jordan's quintic a·x + b·x³ + c·x⁵, as steep as can be at zero
EPS = 1e-7
DEFAULTS = {  # what a group of this kind has unless it says otherwise
    "muon": {
        "lr": 0.02,
        "momentum": 0.95,
        "nesterov": True,
        "weight_decay": 0.0,
        "ns_steps": 5,
        "transposed": False,  # weights of transposed convolutions: (in, out, height, width)
    },
    "adamw": {
        "lr": 1e-3,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "fused": True,  # one kernel for all; torch then keeps `step` on the parameter's device
    },
}
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def newton_schulz(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearly orthogonal versions of a batch (n, rows, cols) of matrices, in bfloat16.

    With M = U S Vᵀ the result is about U Vᵀ: most singular values end within 0.7..1.2. Each matrix
    is normalised by its own norm, so its result does not depend on the rest of the batch. Matrices
    at least twice as long as wide take two steps at once (`two_steps`). Others equal the result of
    torch.optim.Muon's loop (but for a last bit where batched kernels sum in another order).

    >>> small = torch.eye(16, 144) * 2**-9                     # a 3x3 kernel, 16 -> 16 channels
    >>> updates = newton_schulz(torch.stack([small, 1024 * small]))
    >>> updates.shape, updates.dtype
    (torch.Size([2, 16, 144]), torch.bfloat16)
    >>> torch.equal(updates[0], updates[1])                    # a gradient's scale is of no account
    True
    """
    tall = matrices.size(-2) > matrices.size(-1)
    wide = matrices.bfloat16()
    if tall:
        wide = wide.mT
    norms = torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True)
    wide = wide / norms.clamp(min=EPS)
    pairs = steps // 2 if wide.size(-1) >= 2 * wide.size(-2) else 0
    for _ in range(pairs):
        wide = two_steps(wide)
    for _ in range(steps - 2 * pairs):
        wide = torch.baddbmm(wide, beyond_linear(wide @ wide.mT), wide, beta=A)
    return wide.mT if tall else wide


def two_steps(wide: Tensor) -> Tensor:
    """Two Newton-Schulz steps of matrices X (n, rows, cols) with two products as long as X, not 4.

    Polynomials of the Gram matrix G = X Xᵀ commute, so both steps can be made on it: a step
    P = a + b G + c G² turns X into P X and G into P G P (Gram Newton-Schulz, Dao-AILab 2026). G is
    then made anew: what bfloat16 rounds off it is no longer positive, and grows twelvefold a step
    where a matrix of low rank has nothing.
    """
    gram = wide @ wide.mT
    first = beyond_linear(gram)
    half = torch.baddbmm(gram, first, gram, beta=A)  # P₁ G
    second = beyond_linear(torch.baddbmm(half, half, first, beta=A))  # of P₁ G P₁
    first.diagonal(dim1=-2, dim2=-1).add_(A)  # P₁: where it is about 0.7, a bfloat16 is finest
    return torch.baddbmm(first, second, first, beta=A) @ wide


def beyond_linear(gram: Tensor) -> Tensor:
    """b G + c G² of Gram matrices G: with a on its diagonal it makes one step on X.

    >>> beyond_linear(torch.eye(4)[None])[0, 0].round(decimals=4)                # b + c
    tensor([-2.7435,  0.0000,  0.0000,  0.0000])
    """
    return torch.baddbmm(gram, gram, gram, beta=B, alpha=C)


def as_matrix(gradient: Tensor, transposed: bool = False) -> Tensor:
    """A weight's gradient as a matrix (out, everything that is summed over).

    >>> as_matrix(torch.zeros(64, 32, 3, 3)).shape                      # Conv2d(32, 64, 3)
    torch.Size([64, 288])
    >>> as_matrix(torch.zeros(32, 64, 2, 2), transposed=True).shape     # ConvTranspose2d(32, 64, 2)
    torch.Size([64, 128])
    """
    return (gradient.transpose(0, 1) if transposed else gradient).flatten(1)


def from_matrix(matrix: Tensor, shape: torch.Size, transposed: bool = False) -> Tensor:
    """The inverse of `as_matrix` for a weight of this shape.

    >>> kernel = torch.arange(24.0).view(2, 3, 2, 2)
    >>> torch.equal(from_matrix(as_matrix(kernel, True), kernel.shape, True), kernel)
    True
    """
    if not transposed:
        return matrix.reshape(shape)
    return matrix.reshape(shape[1], shape[0], *shape[2:]).transpose(0, 1)


def laid_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The same values in the parameter's memory layout: fused kernels read both as flat arrays.

    >>> kernel = torch.zeros(8, 3, 4, 4).to(memory_format=torch.channels_last)
    >>> laid_as(torch.ones(8, 3, 4, 4), kernel).stride() == kernel.stride()
    True
    """
    if tensor.stride() == parameter.stride():
        return tensor
    return torch.empty_like(parameter).copy_(tensor)


class Muon(torch.optim.Optimizer):
    """Muon and AdamW side by side: each param group says which by `kind`.

    Equals torch.optim.Muon (adjust_lr_fn="original": the rate of a matrix is
    lr * sqrt(max(1, rows / cols))) and torch.optim.AdamW, but takes convolution kernels as well and
    orthogonalises matrices of the same shape as one batch. Weight decay is decoupled in both kinds.
    AdamW is torch's fused one, on every device.

    >>> kernel, bias = nn.Parameter(torch.zeros(64, 32, 3, 3)), nn.Parameter(torch.zeros(64))
    >>> groups = [{"kind": "muon", "params": [kernel]}, {"kind": "adamw", "params": [bias]}]
    >>> optimizer = Muon(groups)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.02, 0.001]
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; keys of its kind that it leaves out take the value in `DEFAULTS`."""
        kind = param_group.get("kind")
        if kind not in DEFAULTS:
            raise ValueError(f"param group of kind {kind!r}: give kind='muon' or kind='adamw'")
        super().add_param_group({**DEFAULTS[kind], **param_group})
        if kind == "muon" and any(p.ndim < 2 for p in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise ValueError("Muon needs weights of two dimensions or more; 1-D: kind='adamw'")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a `state_dict`; ValueError where it is not of these parameters and groups."""
        ours = self.state_dict()["param_groups"]
        if not alike(state_dict["param_groups"], ours):
            raise ValueError("param groups are not this optimizer's")
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, held in state_dict["state"].items():
            kept = {name: tensor.shape for name, tensor in held.items()}
            shape, scalar = parameters[number].shape, torch.Size()
            averages = {"step": scalar, "exp_avg": shape, "exp_avg_sq": shape}
            if kept not in ({"momentum_buffer": shape}, averages):
                raise ValueError(f"what is remembered of parameter {number} has other shapes")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if not parameters:
                continue
            if group["kind"] == "muon":
                self._muon(parameters, group)
            else:
                self._adamw(parameters, group)
        return loss

    def _muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        gradients = [p.grad for p in parameters]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter.grad)
        buffers = [self.state[p]["momentum_buffer"] for p in parameters]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        if group["nesterov"]:
            buffers = torch._foreach_lerp(gradients, buffers, group["momentum"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])

        batches = defaultdict(list)  # same shape, one batch
        for parameter, buffer in zip(parameters, buffers, strict=True):
            matrix = as_matrix(buffer, group["transposed"])
            batches[matrix.shape].append((parameter, matrix))
        for (rows, cols), batch in batches.items():
            rate = group["lr"] * math.sqrt(max(1, rows / cols))
            updates = newton_schulz(torch.stack([matrix for _, matrix in batch]), group["ns_steps"])
            for (parameter, _), update in zip(batch, updates, strict=True):
                parameter.add_(
                    from_matrix(update, parameter.shape, group["transposed"]), alpha=-rate
                )

    def _adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            state.setdefault("step", torch.zeros((), device=parameter.device))
            for name in ("exp_avg", "exp_avg_sq"):
                average = state[name] if name in state else torch.zeros_like(parameter)
                state[name] = laid_as(average, parameter)
        states = [self.state[p] for p in parameters]
        adamw(
            parameters,
            [laid_as(p.grad, p) for p in parameters],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=group["fused"],
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def is_hidden_matrix(parameter: Tensor) -> bool:
    """Whether a weight is one matrix from several channels to several: what Muon is made for.

    >>> is_hidden_matrix(torch.zeros(64, 32, 3, 3)), is_hidden_matrix(torch.zeros(64, 32))
    (True, True)
    >>> is_hidden_matrix(torch.zeros(64)), is_hidden_matrix(torch.zeros(64, 1, 3, 3))   # depthwise
    (False, False)
    """
    return parameter.ndim >= 2 and min(parameter.shape[:2]) > 1


def build_optimizer(
    head: nn.Module,
    edge: Iterable[nn.Parameter],
    muon_lr: float,
    adamw_lr: float,
    momentum: float,
    weight_decay: float,
) -> Muon:
    """One optimizer for a head: Muon for its hidden matrices, AdamW for the rest.

    `edge` are the weights of layers that read pixels or write classes, and embeddings (Muon's
    authors keep those with AdamW). Groups, empty ones left out: muon, muon_transposed, adamw,
    adamw_1d (no weight decay). Frozen parameters are in none.

    >>> head = nn.Sequential(nn.Conv2d(3, 32, 3), nn.Conv2d(32, 64, 3), nn.Conv2d(64, 5, 1))
    >>> edge = [head[0].weight, head[2].weight]                     # pixels, classes
    >>> optimizer = build_optimizer(head, edge, 0.02, 0.001, momentum=0.95, weight_decay=0.01)
    >>> [(group["name"], len(group["params"])) for group in optimizer.param_groups]
    [('muon', 1), ('adamw', 2), ('adamw_1d', 3)]
    """
    edge_ids = {id(parameter) for parameter in edge}
    strangers = len(edge_ids - {id(parameter) for parameter in head.parameters()})
    if strangers:
        raise ValueError(f"edge: {strangers} of {len(edge_ids)} are no parameters of the head")
    upward = [module for module in head.modules() if isinstance(module, TRANSPOSED)]
    upward_ids = {id(module.weight) for module in upward}
    edge_ids |= {id(module.weight) for module in upward if module.groups > 1}  # several matrices

    muon = {"kind": "muon", "lr": muon_lr, "momentum": momentum, "weight_decay": weight_decay}
    adam = {"kind": "adamw", "lr": adamw_lr, "weight_decay": weight_decay}
    groups = {
        "muon": {**muon, "params": []},
        "muon_transposed": {**muon, "params": [], "transposed": True},
        "adamw": {**adam, "params": []},
        "adamw_1d": {**adam, "params": [], "weight_decay": 0.0},
    }
    for parameter in filter(lambda parameter: parameter.requires_grad, head.parameters()):
        if id(parameter) not in edge_ids and is_hidden_matrix(parameter):
            name = "muon_transposed" if id(parameter) in upward_ids else "muon"
        else:
            name = "adamw" if parameter.ndim >= 2 else "adamw_1d"
        groups[name]["params"].append(parameter)
    return Muon({"name": name, **group} for name, group in groups.items() if group["params"])


def build_schedule(optimizer: torch.optim.Optimizer, total_steps: int) -> OneCycleLR:
    """One-cycle schedule whose peak in each group is the group's own rate; momentum is left alone.

    Made for `total_steps` optimizer steps, each followed by `schedule.step()`: from peak/25 up to
    the peak in the first 30 %, then down to almost zero, which the rate reaches after the last step
    (so that none is wasted, and a single one learns). To resume, build this first and only then
    load both states: the peaks are read here. (Smith & Topin 2018, arXiv:1708.07120.)

    >>> weight = nn.Parameter(torch.zeros(64, 288))
    >>> optimizer = Muon([{"kind": "muon", "params": [weight], "lr": 0.02}])
    >>> schedule = build_schedule(optimizer, total_steps=300)
    >>> round(schedule.get_last_lr()[0], 6), schedule.total_steps     # one more than will be used
    (0.0008, 301)
    """
    if total_steps < 1:
        raise ValueError(f"a schedule needs one optimizer step at least, got {total_steps}")
    peaks = [group["lr"] for group in optimizer.param_groups]
    # pct_start must not be 1/n: OneCycleLR divides by zero when its rise is exactly one step long
    return OneCycleLR(
        optimizer, peaks, total_steps=total_steps + 1, pct_start=0.3, cycle_momentum=False
    )


class EarlyStopping:
    """Keeps the best score of a run and says when `patience` epochs in a row did not beat it.

    >>> stopping = EarlyStopping(patience=2)
    >>> [stopping.update(miou) for miou in (0.41, 0.52, float("nan"), 0.52)]   # a tie is not better
    [True, True, False, False]
    >>> stopping.stop, stopping.best, stopping.best_epoch                      # epochs count from 1
    (True, 0.52, 2)
    """

    def __init__(self, patience: int) -> None:
        if patience < 1:
            raise ValueError(f"patience counts epochs, at least 1, got {patience}")
        self.patience = patience
        self.best = -math.inf
        self.best_epoch = 0
        self.epoch = 0

    def update(self, score: float) -> bool:
        """Count one epoch; whether its score is the best so far (NaN never is)."""
        self.epoch += 1
        better = float(score) > self.best
        if better:
            self.best, self.best_epoch = float(score), self.epoch
        return better

    @property
    def stop(self) -> bool:
        """Whether the last `patience` epochs brought no new best."""
        return self.epoch - self.best_epoch >= self.patience

    def state_dict(self) -> dict[str, float | int]:
        """Plain numbers; `patience` is not among them, so that a resumed run may change it."""
        return {"best": self.best, "best_epoch": self.best_epoch, "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, float | int]) -> None:
        """Continue from a `state_dict`."""
        self.best = float(state["best"])
        self.best_epoch, self.epoch = int(state["best_epoch"]), int(state["epoch"])
