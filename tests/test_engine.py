"""Training: a step does not depend on how its batch is split, and a run keeps its best weights."""

import copy
import csv
import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import project
import pytest
import torch
from project import CLASSES, IGNORE, make_samples, manifest_of
from torch import nn
from torch.utils.data import DataLoader

import main
from config import Train
from models import HEADS, build_head
from models.backbone import Normalize
from utils import optim
from utils.checkpoint import load_checkpoint, load_weights, plain_state
from utils.distributed import Runtime
from utils.divergence import DivergedError
from utils.engine import evaluate, fit, train_one_epoch, write_history
from utils.keeping import Keeper, best_path, keep_best
from utils.loading import Loaders
from utils.logging import VerbosityLogger
from utils.losses import SegmentationLoss
from utils.metrics import Score, SegmentationMetrics
from utils.optim import EarlyStopping
from utils.quantize import as_cached, rounding
from utils.resume import Progress
from utils.step import Step, ema_of

CPU, QUIET = torch.device("cpu"), VerbosityLogger("error", silent=True)
NORMALIZE = Normalize([0.5] * 3, [0.25] * 3)
NORMS_EACH_SAMPLE = sorted(set(HEADS) - {"linear"})  # GroupNorm; `linear` has BatchNorm


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def head_of(name="unet", seed=0):
    torch.manual_seed(seed)
    return build_head(name, channels=32, levels=2, num_classes=CLASSES)


def section_of(folder=None, **keys):
    return Train(weights_dir=folder or "weights", num_workers=0, **keys)


def step_of(head, steps=20, **keys):
    return Step(head, NORMALIZE, section_of(**keys), manifest_of(), steps, Runtime(), CPU)


def batches_of(samples, batch_size):
    return list(DataLoader(samples, batch_size=batch_size))


def loaders_of(train, val, batch_size=2):
    sampler = SimpleNamespace(epoch=0)
    train, val = (DataLoader(samples, batch_size=batch_size) for samples in (train, val))
    return Loaders(train, val, sampler)


def fitted(head, train, val, folder, save=None, log=QUIET, manifest=None, **keys):
    section = section_of(folder, **keys)
    manifest = manifest or manifest_of()
    save = save or keep_best(folder / "best.pth", "unet", manifest, "config")
    loaders = loaders_of(train, val, section.batch_size)
    return fit(head, NORMALIZE, loaders, section, manifest, Runtime(), CPU, save, log)


def epoch_of(step, batches):
    """One epoch of a run of which nothing is kept."""
    keeper = Keeper(step, EarlyStopping(1), None, 10, save=lambda *_: Path())
    return train_one_epoch(step, batches, Progress(), keeper)


def distance(first, second):
    """The largest difference between two modules' weights."""
    pairs = zip(plain_state(first).values(), plain_state(second).values(), strict=True)
    return max((a.double() - b.double()).abs().max().item() for a, b in pairs)


# ---- a step is one step, however its batch is split ----

UNEVEN = (0.0, 0.9, 1.0, 0.3, 0.98, 0.0, 1.0, 1.0)  # ignored share of each tile


def newton_schulz_in_double(matrices, steps=5):
    """Muon's iteration without bfloat16, which makes 1e-3 out of differences of 1e-7."""
    tall = matrices.size(-2) > matrices.size(-1)
    wide = (matrices.mT if tall else matrices).double()
    wide = wide / torch.linalg.vector_norm(wide, dim=(-2, -1), keepdim=True).clamp(min=optim.EPS)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = optim.A * wide + (optim.B * gram + optim.C * gram @ gram) @ wide
    return (wide.mT if tall else wide).float()


@pytest.mark.parametrize("name", NORMS_EACH_SAMPLE)
@pytest.mark.parametrize("shares", [(0.0,), UNEVEN], ids=["even", "uneven"])
def test_two_batches_of_two_make_the_step_of_one_batch_of_four(name, shares, monkeypatch):
    monkeypatch.setattr(optim, "newton_schulz", newton_schulz_in_double)
    samples = make_samples(8, ignored=lambda number: shares[number % len(shares)])
    whole, parts = head_of(name), head_of(name)
    rates = {"muon_lr": 2e-3, "adamw_lr": 1e-3}
    one = step_of(whole, batch_size=4, **rates)
    two = step_of(parts, batch_size=2, grad_accum_steps=2, **rates)
    for _ in range(2):
        first = epoch_of(one, batches_of(samples, 4))
        second = epoch_of(two, batches_of(samples, 2))
        for key in ("loss", "ce", "dice", "aux"):
            assert getattr(first, key) == pytest.approx(getattr(second, key), abs=1e-5)
    assert distance(whole, head_of(name)) > 1e-3
    assert distance(whole, parts) < 2e-6


@pytest.mark.parametrize("split", [(4,), (1, 3), (3, 1), (1, 1, 1, 1)])
def test_a_steps_gradient_is_that_of_the_mean_over_labelled_pixels(split):
    samples = make_samples(4, ignored=lambda number: UNEVEN[number])
    head = head_of()
    step = step_of(head, clip_grad=0.0)
    kept = {}
    step.update = lambda window: kept.update(
        {name: p.grad.clone() for name, p in head.named_parameters()}
    )
    starts = [sum(split[:number]) for number in range(len(split))]
    pieces = [samples[a : a + n] for a, n in zip(starts, split, strict=True)]
    head.train()
    step([batches_of(piece, len(piece))[0] for piece in pieces])

    twin = head_of().train()
    total, pixels = 0.0, 0
    for sample in samples:
        output = twin(NORMALIZE(sample.image[None]), [level[None] for level in sample.features])
        label = sample.label[None].long()
        count = (label != IGNORE).sum()
        total = total + SegmentationLoss(CLASSES)(output, label).total * count
        pixels += count
    (total / pixels).backward()
    for name, parameter in twin.named_parameters():
        scale = parameter.grad.abs().max()
        assert (kept[name] - parameter.grad).abs().max() <= 1e-4 * scale + 1e-7, name


def test_features_in_bytes_are_restored_before_the_head():
    [batch] = batches_of(make_samples(3), 3)
    parts = as_cached(batch.features, "int8")
    seen = []

    def head(_, features):
        seen.extend(features)
        return SimpleNamespace(logits=torch.zeros(3, CLASSES, 64, 64), aux=())

    step_of(head_of("linear")).forward(head, batch._replace(**parts))
    assert {level.dtype for level in seen} == {torch.float16}
    assert all(map(torch.equal, seen, rounding("int8")(batch.features)))


def test_a_batch_without_a_labelled_pixel_contributes_nothing():
    labelled, ignored = make_samples(2), make_samples(2, ignored=lambda number: 1.0, seed=1)
    step = step_of(head_of(), clip_grad=0.0, muon_lr=1e-9, adamw_lr=1e-9)
    step.head.train()
    [batch], [empty] = batches_of(labelled, 2), batches_of(ignored, 2)
    alone = step([batch])
    gradients = [p.grad.clone() for p in step.head.parameters()]
    again = step_of(head_of(), clip_grad=0.0, muon_lr=1e-9, adamw_lr=1e-9)
    again.head.train()
    assert torch.allclose(again([empty, batch]), alone, atol=1e-6)
    for parameter, wanted in zip(again.head.parameters(), gradients, strict=True):
        assert torch.allclose(parameter.grad, wanted, atol=1e-7)


def test_a_step_of_nothing_but_ignored_pixels_has_loss_zero_and_zero_gradients():
    step = step_of(head_of(), batch_size=2)
    step.head.train()
    sums = step(batches_of(make_samples(4, ignored=lambda number: 1.0), 2))
    assert sums.tolist() == [0, 0, 0, 0, 0]
    assert all((p.grad == 0).all() for p in step.head.parameters())


def test_a_step_knows_nothing_of_the_gradients_of_the_one_before():
    first, second = (batches_of(make_samples(2, seed=seed), 2) for seed in (0, 1))
    gradients = []
    for batches in ((first, second), (second,)):
        step = step_of(head_of(), clip_grad=0.0, muon_lr=1e-12, adamw_lr=1e-12, weight_decay=0.0)
        step.head.train()
        for batch in batches:
            step(batch)
        gradients.append([p.grad for p in step.head.parameters()])
    for ours, theirs in zip(*gradients, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-6)


def test_an_epochs_losses_are_means_over_its_labelled_pixels():
    samples = make_samples(5, ignored=lambda number: UNEVEN[number])
    step = step_of(head_of(), muon_lr=1e-12, adamw_lr=1e-12, weight_decay=0.0)
    losses = epoch_of(step, batches_of(samples, 2))
    twin, total, pixels = head_of().train(), torch.zeros(4, dtype=torch.float64), 0
    for sample in samples:
        output = twin(NORMALIZE(sample.image[None]), [level[None] for level in sample.features])
        parts = SegmentationLoss(CLASSES)(output, sample.label[None].long())
        count = int((sample.label != IGNORE).sum())
        total += torch.stack([part.detach().double() for part in parts]) * count
        pixels += count
    found = (losses.loss, losses.ce, losses.dice, losses.aux)
    assert found == pytest.approx((total / pixels).tolist(), abs=1e-5)


# ---- compile, EMA, clipping, schedule ----


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on the CPU needs g++")
def test_a_compiled_head_learns_what_an_eager_one_learns(tmp_path):
    samples = make_samples(4, size=32)
    val = make_samples(2, size=32, seed=1)
    heads = {}
    for compiled in (False, True):
        head = heads[compiled] = head_of("linear")
        folder = tmp_path / str(compiled)
        best = fitted(
            head, samples, val, folder, batch_size=2, epochs=2, compile=compiled, muon_lr=2e-3
        )
        assert all("_orig_mod" not in key for key in load_checkpoint(best.path).state)
    assert distance(heads[False], heads[True]) < 1e-4
    rows = [rows_of(tmp_path / str(compiled)) for compiled in (False, True)]
    for eager, other in zip(*rows, strict=True):
        for key in ("train_loss", "val_loss", "miou", "mdice"):
            assert float(eager[key]) == pytest.approx(float(other[key]), abs=1e-4)


def test_averaged_weights_follow_the_decay_that_warms_up():
    layer = nn.Linear(1, 1, bias=False)
    ema = ema_of(layer, decay=0.3)
    wanted = None
    for number in range(12):
        value = float(number**2)
        nn.init.constant_(layer.weight, value)
        ema.update_parameters(layer)
        decay = min(0.3, (1 + number) / (10 + number))
        wanted = value if wanted is None else decay * wanted + (1 - decay) * value
        assert ema.module.weight.item() == pytest.approx(wanted, rel=1e-5)


def test_the_checkpoint_keeps_the_averaged_weights_that_validation_judged(tmp_path):
    train, val = make_samples(4), make_samples(2, seed=1)
    head = head_of()
    best = fitted(head, train, val, tmp_path, batch_size=2, epochs=3, ema_decay=0.9)
    kept = head_of(seed=5)
    load_weights(kept, load_checkpoint(best.path), best.path)
    assert distance(kept, head) > 1e-4
    score = evaluate(step_of(kept), batches_of(val, 2), CLASSES, IGNORE)
    assert score.miou == pytest.approx(best.score.miou, abs=1e-9)
    assert score.loss == pytest.approx(best.score.loss, abs=1e-6)


def test_without_averaging_the_checkpoint_keeps_the_heads_own_weights(tmp_path):
    head = head_of()
    best = fitted(head, make_samples(4), make_samples(2), tmp_path, batch_size=2, epochs=1)
    kept = head_of(seed=5)
    load_weights(kept, load_checkpoint(best.path), best.path)
    assert distance(kept, head) == 0


def test_gradients_are_clipped_to_the_configured_norm():
    norms = {}
    for limit in (0.0, 0.05):
        step = step_of(head_of(), clip_grad=limit)
        step.head.train()
        step(batches_of(make_samples(2), 2))
        squares = sum(p.grad.double().square().sum() for p in step.head.parameters())
        norms[limit] = math.sqrt(squares)
    assert norms[0.0] > 0.06
    assert norms[0.05] == pytest.approx(0.05, rel=1e-3)


@pytest.mark.parametrize(("tiles", "batch", "accumulate", "epochs"), [
    (1, 4, 1, 1), (1, 1, 1, 3), (5, 2, 2, 2), (7, 1, 3, 2), (3, 2, 8, 4),
])  # fmt: skip
def test_the_schedule_ends_with_the_last_step_for_any_number_of_tiles(
    tmp_path, tiles, batch, accumulate, epochs
):
    kept = []

    def save(head, epoch, score):
        kept.append(epoch)
        return tmp_path / "best.pth"

    fitted(
        head_of("linear"), make_samples(tiles, size=32), make_samples(2, size=32), tmp_path, save,
        batch_size=batch, grad_accum_steps=accumulate, epochs=epochs, patience=epochs,
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert len(rows) == epochs
    rates = [float(row["lr_adamw"]) for row in rows]
    assert rates[-1] < 1e-7
    assert kept


def test_the_optimizer_steps_once_for_each_window_and_the_last_may_be_short():
    step = step_of(head_of("linear"), grad_accum_steps=3)
    epoch_of(step, batches_of(make_samples(8, size=32), 2))
    assert step.schedule.last_epoch == 2  # four batches: three and one


# ---- evaluation ----


@pytest.mark.parametrize("batch_size", [1, 3, 5])
def test_evaluation_equals_one_count_over_all_tiles(batch_size):
    samples = make_samples(5, ignored=lambda number: UNEVEN[number])
    head = head_of()
    score = evaluate(step_of(head), batches_of(samples, batch_size), CLASSES, IGNORE)
    metrics, total, pixels = SegmentationMetrics(CLASSES, IGNORE), 0.0, 0
    with torch.no_grad():
        [batch] = batches_of(samples, 5)
        output = head.eval()(NORMALIZE(batch.image), [level.float() for level in batch.features])
        metrics.update(output.logits.argmax(1), batch.label)
        for number in range(5):
            label = batch.label[number : number + 1].long()
            part = SimpleNamespace(logits=output.logits[number : number + 1], aux=())
            count = int((label != IGNORE).sum())
            total += float(SegmentationLoss(CLASSES)(part, label).total) * count
            pixels += count
    wanted = metrics.score(total / pixels)
    assert score.iou == wanted.iou
    assert score.dice == wanted.dice
    assert score.loss == pytest.approx(wanted.loss, abs=1e-5)


def test_evaluation_changes_no_weight_and_training_goes_on_in_training_mode(tmp_path):
    head = head_of("linear")
    before = copy.deepcopy(head)
    step = step_of(head)
    evaluate(step, batches_of(make_samples(3), 2), CLASSES, IGNORE)
    assert distance(head, before) == 0
    epoch_of(step, batches_of(make_samples(2), 2))
    assert head.training
    assert int(head.norms[0].num_batches_tracked) == 1


# ---- the best epoch, early stopping, metrics.csv ----


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class Recorder:
    """A log that keeps its lines."""

    def __init__(self) -> None:
        self.lines = []

    def info(self, line) -> None:
        self.lines.append(line)

    warning = info

    def progress(self, items, *_, **__):
        return items


def scripted(monkeypatch, mious):
    """Let validation say these mIoUs, one an epoch."""
    left = iter(mious)

    def said(*_):
        miou = next(left)
        return Score(1.0, (miou, math.nan, miou), (miou,) * 3)

    monkeypatch.setattr("utils.engine.evaluate", said)


@pytest.mark.parametrize(("mious", "patience", "epochs", "best"), [
    ((0.1, 0.4, 0.3, 0.2), 10, 4, 2),  # the peak is in the middle
    ((0.1, 0.2, 0.3, 0.4), 10, 4, 4),  # and at the end
    ((0.4, 0.4, 0.4, 0.4), 2, 3, 1),  # a tie is not better
    ((0.1, 0.2, 0.1, 0.1), 1, 3, 2),
    ((math.nan, 0.2, 0.3, 0.1), 3, 4, 3),
    ((0.5, 0.500001, 0.2, 0.2), 2, 4, 2),  # however small the gain
])  # fmt: skip
def test_the_best_checkpoint_is_of_the_epoch_with_the_highest_miou(
    tmp_path, monkeypatch, mious, patience, epochs, best
):
    scripted(monkeypatch, mious)
    log, head = Recorder(), head_of("linear")
    found = fitted(
        head, make_samples(2, size=32), [], tmp_path, log=log, epochs=4, patience=patience
    )
    assert found.epoch == best
    assert load_checkpoint(found.path).epoch == best
    assert load_checkpoint(found.path).metrics["miou"] == pytest.approx(mious[best - 1])
    assert len(rows_of(tmp_path)) == epochs
    assert any("stopped early" in line for line in log.lines) == (epochs - best == patience)
    marked = [number for number, line in enumerate(log.lines, 1) if "(best)" in line]
    assert marked[-1] == best


def test_saved_weights_are_those_of_the_best_epoch_and_not_of_the_last(tmp_path, monkeypatch):
    scripted(monkeypatch, (0.9, 0.1, 0.1))
    head, kept = head_of("linear"), []

    def save(module, epoch, score):
        kept.append(plain_state(module))
        return keep_best(tmp_path / "best.pth", "linear", manifest_of(), "")(module, epoch, score)

    best = fitted(head, make_samples(4, size=32), [], tmp_path, save, epochs=3, batch_size=2)
    state = load_checkpoint(best.path).state
    assert all(torch.equal(state[key], kept[0][key]) for key in state)
    assert distance(head, head_of("linear")) > 0
    assert any(not torch.equal(state[key], tensor) for key, tensor in plain_state(head).items())


def test_metrics_csv_has_a_row_an_epoch_with_the_numbers_of_the_log(tmp_path):
    log = Recorder()
    fitted(
        head_of(), make_samples(6), make_samples(3, seed=1), tmp_path, log=log, epochs=3,
        batch_size=2,
    )  # fmt: skip
    rows = rows_of(tmp_path)
    assert list(rows[0]) == [
        "epoch", "train_loss", "train_ce", "train_dice", "train_aux", "val_loss", "miou", "mdice",
        "iou_0", "iou_1", "iou_2", "lr_muon", "lr_adamw", "lr_adamw_1d",
    ]  # fmt: skip
    assert [row["epoch"] for row in rows] == ["1", "2", "3"]
    for row, line in zip(rows, log.lines, strict=True):
        number = {key: f"{float(value):.4f}" for key, value in row.items()}
        wanted = (
            f"epoch {row['epoch']}/3: loss {number['train_loss']} (ce {number['train_ce']}, dice "
            f"{number['train_dice']}, aux {number['train_aux']}), validation loss "
            f"{number['val_loss']}, mIoU {number['miou']}, mDice {number['mdice']}"
        )
        assert line.startswith(wanted)
        present = [float(row[f"iou_{k}"]) for k in range(3) if row[f"iou_{k}"] != "nan"]
        assert float(row["miou"]) == pytest.approx(sum(present) / len(present), abs=1e-5)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_metrics_csv_is_replaced_whole(tmp_path):
    write_history([{"epoch": 1, "miou": 0.5}], tmp_path / "weights" / "metrics.csv")
    write_history([{"epoch": 1, "miou": 0.25}], tmp_path / "weights" / "metrics.csv")
    assert (tmp_path / "weights" / "metrics.csv").read_text() == "epoch,miou\n1,0.25\n"
    assert len(list((tmp_path / "weights").iterdir())) == 1


def test_a_run_learns_what_the_features_tell(tmp_path):
    best = fitted(
        head_of("linear"), make_samples(12), make_samples(4, seed=1), tmp_path, epochs=8,
        batch_size=4, adamw_lr=0.05,
    )  # fmt: skip
    assert best.score.miou > 0.6
    rows = rows_of(tmp_path)
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])


def test_the_same_seed_gives_the_same_weights(tmp_path):
    states = []
    for number in range(2):
        head = head_of("maskformer", seed=3)
        fitted(head, make_samples(4), make_samples(2), tmp_path / str(number), epochs=2)
        states.append(plain_state(head))
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# ---- divergence ----


def poisoned(samples, number, what="features"):
    """The samples with one whose features or image are no numbers."""
    broken = [level.clone() for level in samples[number].features]
    broken[-1][0, 0, 0] = math.nan
    return [*samples[:number], samples[number]._replace(features=broken), *samples[number + 1 :]]


@pytest.mark.parametrize("name", HEADS)
def test_features_that_are_no_numbers_stop_the_run_and_name_the_tiles(tmp_path, name):
    head = head_of(name)
    before = {key: p.detach().clone() for key, p in head.named_parameters()}
    train = poisoned(make_samples(4, size=32), 2)
    with pytest.raises(DivergedError, match="loss is nan at step 2 .*land__r000002, ") as caught:
        fitted(head, train, make_samples(2, size=32), tmp_path, batch_size=2, epochs=2)
    assert caught.value.exit_code == 5
    assert "land__r000001" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []
    assert all(p.isfinite().all() for p in head.parameters())
    assert any(not torch.equal(before[key], p) for key, p in head.named_parameters())  # step 1


def test_a_poisoned_epoch_leaves_the_checkpoint_of_the_one_before(tmp_path):
    clean, broken = make_samples(4, size=32), poisoned(make_samples(4, size=32), 0)
    epochs = iter([clean, broken])

    class Turning:
        def __len__(self):
            return 2

        def __iter__(self):
            return iter(batches_of(next(epochs), 2))

    loaders = Loaders(Turning(), batches_of(clean, 2), SimpleNamespace(epoch=0))
    section, manifest = section_of(tmp_path, epochs=3), manifest_of()
    save = keep_best(tmp_path / "best.pth", "linear", manifest, "")
    arguments = (head_of("linear"), NORMALIZE, loaders, section, manifest, Runtime(), CPU, save)
    with pytest.raises(DivergedError, match="at step 3"):
        fit(*arguments, QUIET)
    assert load_checkpoint(tmp_path / "best.pth").epoch == 1
    assert all(t.isfinite().all() for t in load_checkpoint(tmp_path / "best.pth").state.values())
    assert len(rows_of(tmp_path)) == 1


def test_validation_tiles_that_are_no_numbers_stop_the_run_and_are_named(tmp_path):
    val = poisoned(make_samples(3, size=32, seed=1), 1)
    said = "validation loss is nan before step 5 with rates .*; look at the tiles land__r000001$"
    with pytest.raises(DivergedError, match=said):
        fitted(head_of(), make_samples(4, size=32), val, tmp_path, batch_size=1, epochs=2)
    assert list(tmp_path.iterdir()) == []


def test_a_gradient_that_is_no_number_stops_before_the_weights(tmp_path):
    head = head_of()
    step = step_of(head)
    head.train()
    head.classifier.weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(DivergedError, match="gradient is nan at step 1 .*land__r000000"):
        step(batches_of(make_samples(2, size=32), 2))
    assert distance(head, head_of()) == 0


def test_rates_that_are_too_high_diverge_and_say_so(tmp_path):
    with pytest.raises(DivergedError, match=r"rates .*lower train\.muon_lr and train\.adamw_lr"):
        fitted(
            head_of(), make_samples(4, size=32), make_samples(2, size=32), tmp_path, epochs=30,
            batch_size=1, muon_lr=1e30, adamw_lr=1e30,
        )  # fmt: skip
    for path in tmp_path.glob("*.pth"):
        assert all(tensor.isfinite().all() for tensor in load_checkpoint(path).state.values())


# ---- what a checkpoint says ----


def test_a_checkpoint_says_all_that_is_needed_to_use_it_again(tmp_path):
    manifest = manifest_of(tile_size=32, layers=[1, 3], backbone_hash="abc")
    head = head_of("unet_v2")
    score = Score(0.5, (0.1, math.nan, 0.3), (0.2, math.nan, 0.4))
    path = best_path(tmp_path / "weights", "unet_v2")
    assert keep_best(path, "unet_v2", manifest, "resources: {}\n")(head, 7, score) == path
    kept = load_checkpoint(path)
    rebuilt = build_head(kept.head, kept.channels, kept.levels, kept.num_classes)
    load_weights(rebuilt, kept, path)
    assert distance(rebuilt, head) == 0
    for name in ("backbone", "backbone_hash", "layers", "norm", "image_mean", "image_std",
                 "patch_size", "tile_size", "precision", "feature_dtype",
                 "ignore_index"):  # fmt: skip
        assert getattr(kept, name) == getattr(manifest, name)
    assert (kept.epoch, kept.config) == (7, "resources: {}\n")
    assert kept.metrics["miou"] == pytest.approx(0.2)
    assert kept.metrics["mdice"] == pytest.approx(0.3)


def test_the_real_loaders_and_fit_take_the_same_order_for_the_same_seed(tmp_path):
    config = project.write_project(tmp_path, height=128, width=192, train={"epochs": 2})
    off = ("inference.enable=false", "verify.enable=false")
    states = []
    for name, prepare in (("a", "true"), ("b", "false"), ("c", "false")):
        changes = (*off, f"prepare.enable={prepare}", f"train.weights_dir={tmp_path / name}")
        seed = "resources.seed=2" if name == "c" else "resources.seed=1337"
        assert project.run(config, *changes, seed) == 0
        states.append(load_checkpoint(best_path(tmp_path / name, "linear")).state)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert any(not torch.equal(states[0][key], states[2][key]) for key in states[0])
    assert main.parse([]).set == []
