"""Optimizer: equal to torch's Muon and AdamW; routing, schedule and resume."""

import copy
import io
import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim._muon import _zeropower_via_newtonschulz
from torch.utils.flop_counter import FlopCounterMode

from utils.optim import (
    EarlyStopping,
    Muon,
    as_matrix,
    build_optimizer,
    build_schedule,
    from_matrix,
    newton_schulz,
)

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


class Head(nn.Module):
    """One of each kind of layer that routing must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.pixels = nn.Conv2d(3, 8, 3)
        self.hidden = nn.Conv2d(8, 12, 3)
        self.same = nn.Conv2d(8, 12, 3)
        self.depthwise = nn.Conv2d(12, 12, 3, groups=12)
        self.up = nn.ConvTranspose2d(12, 6, 2)
        self.grouped_up = nn.ConvTranspose2d(6, 6, 2, groups=2)
        self.one_out = nn.ConvTranspose2d(6, 1, 2)
        self.norm = nn.BatchNorm2d(6)
        self.linear = nn.Linear(6, 10)
        self.queries = nn.Embedding(5, 10)
        self.position = nn.Parameter(torch.zeros(1, 7, 10))
        self.scale = nn.Parameter(torch.ones(()))
        self.classify = nn.Linear(10, 4)
        self.frozen = nn.Linear(10, 10).requires_grad_(False)

    def edge(self):
        return iter([self.pixels.weight, self.queries.weight, self.classify.weight])


def optimizer_of(head, **changes):
    settings = {"muon_lr": 0.02, "adamw_lr": 1e-3, "momentum": 0.95, "weight_decay": 0.01}
    return build_optimizer(head, head.edge(), **{**settings, **changes})


def fill_gradients(parameters, generator, skip=()):
    for index, parameter in enumerate(parameters):
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if index in skip else gradient


def names_by_group(head, optimizer):
    names = {id(parameter): name for name, parameter in head.named_parameters()}
    return {g["name"]: [names[id(p)] for p in g["params"]] for g in optimizer.param_groups}


def batches_and_torch(shapes, seed):
    """Our updates and torch's, matrix by matrix, for batches whose members' norms are far apart."""
    generator = torch.Generator().manual_seed(seed)
    for count, rows, cols in shapes:
        matrices = torch.randn(count, rows, cols, generator=generator)
        matrices *= 10.0 ** torch.arange(-count, count, 2).view(-1, 1, 1)
        for turned in (matrices, matrices.mT, matrices.mT.contiguous()):
            updates = newton_schulz(turned)
            for matrix, update in zip(turned, updates, strict=True):
                yield update, _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7)


def test_batched_newton_schulz_is_bit_equal_to_torch_at_the_shapes_of_heads():
    shapes = [(4, 32, 32), (3, 96, 96), (2, 64, 96), (1, 192, 128), (3, 192, 256)]
    for update, wanted in batches_and_torch(shapes, seed=0):
        assert torch.equal(update, wanted)


def test_batched_newton_schulz_equals_torch_to_a_rounding_at_odd_sizes():
    # batched products sum in another order at a few odd sizes: a last bit in 1 matrix of 1000
    rng = random.Random(0)
    rows = [rng.randint(2, 150) for _ in range(30)]
    shapes = [(rng.randint(1, 4), size, rng.randint(size, 2 * size - 1)) for size in rows]
    for update, wanted in batches_and_torch(shapes, seed=1):
        assert (update.float() - wanted.float()).norm() <= 0.01 * wanted.float().norm()


def exact(matrix, steps=5):
    """The plain iteration in double precision."""
    a, b, c = COEFFICIENTS
    wide = matrix.double() if matrix.shape[0] <= matrix.shape[1] else matrix.double().mT
    wide = wide / wide.norm()
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide if wide.shape == matrix.shape else wide.mT


def long_matrices(kind, count, rows, cols):
    """Matrices of one kind, already rounded to what the iteration starts from."""
    generator = torch.Generator().manual_seed(3)

    def noise(*shape):
        return torch.randn(count, *shape, generator=generator)

    left, _, right = torch.linalg.svd(noise(rows, cols).double(), full_matrices=False)
    scales = torch.logspace(0, -8, rows, dtype=torch.float64)
    rank = rows // 8
    return {
        "random": noise(rows, cols),
        "rank one": noise(rows, 1) @ noise(1, cols),
        "low rank": noise(rows, rank) @ noise(rank, cols),
        "low rank and noise": noise(rows, 2) @ noise(2, cols) + 1e-3 * noise(rows, cols),
        "ill-conditioned": (left * scales) @ right,
    }[kind].bfloat16()


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize(
    "kind", ["random", "rank one", "low rank", "low rank and noise", "ill-conditioned"]
)
def test_gram_form_is_as_near_to_the_exact_iteration_as_the_plain_form(kind, turned):
    # at full rank both are bfloat16's rounding (0.01 to 0.04 of the norm); else plain errs by 0.1
    # and more, and the Gram form by no more than that
    shapes = [(3, 16, 32), (3, 16, 144), (3, 32, 288), (2, 64, 128), (2, 96, 864), (2, 256, 768)]
    for shape in shapes:
        matrices = long_matrices(kind, *shape)
        matrices = matrices.mT if turned else matrices
        for update, matrix in zip(newton_schulz(matrices), matrices, strict=True):
            plain = _zeropower_via_newtonschulz(matrix, COEFFICIENTS, 5, 1e-7)
            wanted = exact(matrix)
            ours, theirs = ((each.double() - wanted).norm() for each in (update, plain))
            assert ours <= max(1.05 * theirs, 0.05 * wanted.norm()), shape


@pytest.mark.parametrize("steps", range(8))
def test_gram_form_takes_any_number_of_steps(steps):
    for matrix in long_matrices("random", 2, 32, 96):
        wanted = exact(matrix, steps)
        error = newton_schulz(matrix[None], steps)[0].double() - wanted
        assert error.norm() <= 0.05 * wanted.norm()


def test_long_matrices_multiply_less():
    def flop_a_column(cols):
        with FlopCounterMode(display=False) as counter:
            newton_schulz(torch.ones(2, 64, cols))
        return counter.get_total_flops() / cols

    assert flop_a_column(128) < 0.95 * flop_a_column(127)
    assert flop_a_column(9 * 64) < 0.6 * flop_a_column(127)


def test_newton_schulz_makes_singular_values_nearly_one_and_keeps_its_input():
    matrices = torch.randn(2, 48, 96, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = matrices.clone()
    values = torch.linalg.svdvals(newton_schulz(matrices).float())
    assert values.min() > 0.6
    assert values.max() < 1.3
    assert torch.equal(matrices, before)
    assert newton_schulz(torch.zeros(1, 8, 8)).isfinite().all()


@pytest.mark.parametrize("transposed", [False, True])
def test_matrix_rows_are_output_channels(transposed):
    kind = nn.ConvTranspose2d if transposed else nn.Conv2d
    layer = kind(3, 5, 2, bias=False)
    with torch.no_grad():
        silent = as_matrix(layer.weight, transposed).clone()
        silent[1] = 0
        layer.weight.copy_(from_matrix(silent, layer.weight.shape, transposed))
    outputs = layer(torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0)))
    assert [channel.any().item() for channel in outputs[0]] == [True, False, True, True, True]
    assert silent.shape == (5, 12)


def reference_step(optimizers, factor):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        optimizer.step()


@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch_muon_and_adamw_over_many_steps(nesterov):
    generator = torch.Generator().manual_seed(0)
    shapes = [(32, 48), (48, 32), (32, 48), (40, 32), (32, 32)]
    hidden = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    other = [nn.Parameter(torch.randn(s, generator=generator)) for s in [(9,), (3, 5), (2, 1, 3)]]
    theirs = copy.deepcopy((hidden, other))

    muon = {"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov}
    adam = {"lr": 1e-3, "weight_decay": 0.05}
    ours = Muon(
        [{"kind": "muon", "params": hidden, **muon}, {"kind": "adamw", "params": other, **adam}]
    )
    references = (
        torch.optim.Muon(theirs[0], **muon, adjust_lr_fn="original"),
        torch.optim.AdamW(theirs[1], **adam),
    )
    for optimizer in (ours, *references):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    for step in range(60):
        skip = {step % 5} if step < 20 else ()  # one matrix and one other have no gradient
        for parameters, copies in ((hidden, theirs[0]), (other, theirs[1])):
            fill_gradients(parameters, generator, skip)
            for parameter, other_one in zip(parameters, copies, strict=True):
                other_one.grad = None if parameter.grad is None else parameter.grad.clone()
        factor = 1 + math.sin(step / 7)
        reference_step([ours], factor)
        reference_step(references, factor)
    for parameter, other_one in zip(hidden + other, theirs[0] + theirs[1], strict=True):
        torch.testing.assert_close(parameter, other_one, rtol=0, atol=1e-6)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_kernel_moves_as_its_matrix_would(transposed):
    generator = torch.Generator().manual_seed(1)
    shape = (8, 16, 3, 3)
    kernel = nn.Parameter(torch.randn(shape, generator=generator))
    kernel.data = kernel.data.to(memory_format=torch.channels_last)
    matrix = nn.Parameter(as_matrix(kernel.detach(), transposed).clone())
    ours = Muon([{"kind": "muon", "params": [kernel], "transposed": transposed, "lr": 0.1}])
    theirs = Muon([{"kind": "muon", "params": [matrix], "lr": 0.1}])
    for _ in range(10):
        fill_gradients([kernel], generator)
        matrix.grad = as_matrix(kernel.grad, transposed).clone()
        ours.step()
        theirs.step()
    torch.testing.assert_close(as_matrix(kernel, transposed), matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("loaded", [False, True])
def test_fused_adamw_does_not_mix_up_memory_layouts(loaded):
    generator = torch.Generator().manual_seed(1)
    plain = nn.Parameter(torch.randn(8, 3, 4, 4, generator=generator))
    kernel = nn.Parameter(plain.detach().clone(memory_format=torch.channels_last))
    optimizers = [Muon([{"kind": "adamw", "params": [each]}]) for each in (plain, kernel)]
    for _ in range(5):
        fill_gradients([plain], generator)
        kernel.grad = plain.grad.clone(memory_format=torch.contiguous_format)
        for optimizer in optimizers:
            optimizer.step()
        if loaded:  # a state that was saved before the weights were channels_last
            optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    torch.testing.assert_close(kernel, plain, rtol=0, atol=1e-6)


def test_every_trainable_parameter_is_in_exactly_one_group():
    head = Head()
    grouped = [id(p) for g in optimizer_of(head).param_groups for p in g["params"]]
    assert sorted(grouped) == sorted(id(p) for p in head.parameters() if p.requires_grad)


def test_routing_of_each_kind_of_layer():
    head = Head()
    optimizer = optimizer_of(head)
    groups = names_by_group(head, optimizer)
    assert groups["muon"] == ["hidden.weight", "same.weight", "linear.weight"]
    assert groups["muon_transposed"] == ["up.weight"]
    assert set(groups["adamw"]) == {
        "pixels.weight", "depthwise.weight", "grouped_up.weight", "one_out.weight",
        "queries.weight", "position", "classify.weight",
    }  # fmt: skip
    assert {head.get_parameter(name).ndim for name in groups["adamw_1d"]} == {0, 1}
    decays = {group["name"]: group["weight_decay"] for group in optimizer.param_groups}
    assert decays == {"muon": 0.01, "muon_transposed": 0.01, "adamw": 0.01, "adamw_1d": 0.0}
    assert [g["transposed"] for g in optimizer.param_groups[:2]] == [False, True]


def test_empty_groups_are_left_out_and_a_shared_weight_is_taken_once():
    layer = nn.Linear(4, 4, bias=False)
    optimizer = build_optimizer(nn.Sequential(layer, layer), [], 0.02, 1e-3, 0.95, 0.0)
    assert [(g["name"], len(g["params"])) for g in optimizer.param_groups] == [("muon", 1)]


def test_wrong_groups_are_refused():
    with pytest.raises(ValueError, match="edge: 1 of 1"):
        build_optimizer(Head(), [nn.Parameter(torch.zeros(3, 3))], 0.02, 1e-3, 0.95, 0.0)
    with pytest.raises(ValueError, match="kind='muon' or kind='adamw'"):
        Muon([{"params": [nn.Parameter(torch.zeros(3, 3))]}])
    with pytest.raises(ValueError, match="two dimensions"):
        Muon([{"kind": "muon", "params": [nn.Parameter(torch.zeros(3))]}])


def test_zero_grad_and_closure_reach_every_group():
    head = Head()
    optimizer = optimizer_of(head)

    def closure():
        loss = sum((p**2).sum() for p in head.parameters() if p.requires_grad)
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert first.requires_grad  # the closure ran with gradients on
    optimizer.zero_grad()
    assert all(p.grad is None for p in head.parameters())
    assert optimizer.step(closure) < first


def test_gradient_scaler_skips_a_step_with_infinite_gradients():
    head = Head()
    optimizer = optimizer_of(head)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for value, moves in ((math.inf, False), (1.0, True)):
        before = head.hidden.weight.detach().clone()
        loss = value * sum(p.sum() for p in head.parameters() if p.requires_grad)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert torch.equal(head.hidden.weight, before) is not moves


def test_a_resumed_run_continues_bit_for_bit():
    generator = torch.Generator().manual_seed(2)
    head = Head()
    optimizer = optimizer_of(head)
    schedule = build_schedule(optimizer, total_steps=12)

    def advance(head, optimizer, schedule, generator, steps):
        for _ in range(steps):
            fill_gradients(head.parameters(), generator)
            optimizer.step()
            schedule.step()

    advance(head, optimizer, schedule, generator, 5)
    file = io.BytesIO()
    torch.save(
        [head.state_dict(), optimizer.state_dict(), schedule.state_dict(), generator.get_state()],
        file,
    )
    advance(head, optimizer, schedule, generator, 7)

    file.seek(0)
    weights, *states, noise = torch.load(file, weights_only=True)
    resumed = Head()
    resumed.load_state_dict(weights)
    resumed_optimizer = optimizer_of(resumed)
    resumed_schedule = build_schedule(resumed_optimizer, total_steps=12)
    resumed_optimizer.load_state_dict(states[0])
    resumed_schedule.load_state_dict(states[1])
    generator.set_state(noise)
    advance(resumed, resumed_optimizer, resumed_schedule, generator, 7)
    assert resumed_schedule.get_last_lr() == schedule.get_last_lr()
    for name, wanted in head.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], wanted), name


@pytest.mark.parametrize("total_steps", [*range(1, 11), 100])
def test_schedule_runs_exactly_its_steps_with_rates_that_learn(total_steps):
    optimizer = optimizer_of(Head())
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = build_schedule(optimizer, total_steps)
    rates = []
    for _ in range(total_steps):
        rates.append(schedule.get_last_lr())
        optimizer.step()
        schedule.step()
    for group, peak, used in zip(
        optimizer.param_groups, peaks, zip(*rates, strict=True), strict=True
    ):
        assert all(peak / 1000 < rate <= peak for rate in used[:-1])
        assert 0.5 * peak < max(used) <= peak
        assert used[-1] > group["lr"] == pytest.approx(peak / 25 / 1e4)


def test_schedule_rises_to_each_groups_own_peak_and_leaves_momentum_alone():
    optimizer = optimizer_of(Head())
    schedule = build_schedule(optimizer, total_steps=99)
    rates = []
    for _ in range(99):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
        assert {g["momentum"] for g in optimizer.param_groups if g["kind"] == "muon"} == {0.95}
        assert {g["betas"] for g in optimizer.param_groups if g["kind"] == "adamw"} == {
            (0.9, 0.999)
        }
    peaks = [0.02, 0.02, 1e-3, 1e-3]
    assert rates[0] == pytest.approx([peak / 25 for peak in peaks])
    assert rates[29] == pytest.approx(peaks)


def test_schedule_without_steps_is_refused():
    with pytest.raises(ValueError, match="one optimizer step at least, got 0"):
        build_schedule(optimizer_of(Head()), total_steps=0)


def test_smallest_improvement_is_the_best_and_nan_never_is():
    stopping = EarlyStopping(patience=3)
    scores = [math.nan, 0.5, 0.5 + 1e-12, 0.1, math.nan]
    assert [stopping.update(score) for score in scores] == [False, True, True, False, False]
    assert not stopping.stop
    assert not stopping.update(0.5)
    assert stopping.stop
    assert (stopping.best, stopping.best_epoch) == (0.5 + 1e-12, 3)


@settings(max_examples=40, deadline=None)
@given(
    scores=st.lists(st.floats(0, 1) | st.just(math.nan), max_size=12),
    cut=st.integers(0, 12),
    patience=st.integers(1, 4),
)
def test_stopping_resumes_where_it_was(scores, cut, patience):
    whole, first, second = (EarlyStopping(patience) for _ in range(3))
    wanted = [(whole.update(score), whole.stop) for score in scores]
    found = [(first.update(score), first.stop) for score in scores[:cut]]
    second.load_state_dict(first.state_dict())
    found += [(second.update(score), second.stop) for score in scores[cut:]]
    assert found == wanted


def test_patience_below_one_is_refused():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        EarlyStopping(patience=0)
