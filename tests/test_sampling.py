"""Sampling: classes met equally often, a class's tiles in turn, the same order in any process."""

from collections import Counter

import project
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from utils.sampling import balanced_order, class_counts


def disjoint(sizes: list[int]) -> torch.Tensor:
    """Counts of tiles that show one class each, so that a draw tells which class it was for."""
    classes = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    return 4096 * torch.nn.functional.one_hot(classes, len(sizes))


SIZES = st.lists(st.integers(0, 7), min_size=1, max_size=6).filter(any)
DRAWS = {"length": st.integers(0, 90), "seed": st.integers(0, 10**6), "epoch": st.integers(0, 99)}


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, **DRAWS)
def test_after_any_draw_classes_present_differ_by_one_draw_at_most(sizes, length, seed, epoch):
    counts = disjoint(sizes)
    met = [0] * len(sizes)
    for position in balanced_order(counts, length, seed, epoch):
        met[int(counts[position].argmax())] += 1
        present = [number for number, size in zip(met, sizes, strict=True) if size]
        assert max(present) - min(present) <= 1
    assert sum(met) == length


@settings(max_examples=60, deadline=None)
@given(sizes=SIZES, **DRAWS)
def test_no_tile_of_a_class_is_drawn_again_before_all_its_others(sizes, length, seed, epoch):
    counts = disjoint(sizes)
    order = balanced_order(counts, length, seed, epoch)
    for number, size in enumerate(sizes):
        drawn = [position for position in order if counts[position, number]]
        for start in range(max(len(drawn) - size, 0)):
            assert len(set(drawn[start : start + size])) == size


@settings(max_examples=60, deadline=None)
@example(rows=[[1, 1], [0, 0], [0, 3]], length=5, seed=0, epoch=0)
@given(
    rows=st.lists(st.lists(st.sampled_from([0, 0, 1, 4096]), min_size=4, max_size=4), min_size=1)
    .filter(lambda rows: any(map(any, rows))),
    **DRAWS,
)  # fmt: skip
def test_tiles_that_show_nothing_are_never_drawn_and_the_others_enough(rows, length, seed, epoch):
    counts = torch.tensor(rows)
    order = balanced_order(counts, length, seed, epoch)
    assert len(order) == length
    assert all(any(rows[position]) for position in order)
    present = int((counts.sum(0) > 0).sum())
    for column in counts.T:
        shown = set(column.nonzero().flatten().tolist())
        draws = [position for position in order if position in shown]
        if shown:
            assert len(draws) >= length // present
            assert len(set(draws)) >= min(len(shown), length // present)


def test_a_tile_counts_for_each_class_it_shows():
    counts = torch.tensor([[4095, 1], [4096, 0], [4096, 0]])
    met = Counter(balanced_order(counts, length=60, seed=3, epoch=1))
    assert met == {0: 40, 1: 10, 2: 10}  # 30 draws for class 1, and a third of class 0's


def test_the_order_is_the_same_in_another_process():
    code = (
        "import torch; from utils.sampling import balanced_order; "
        "print(balanced_order(torch.eye(5).long(), 40, 7, 2))"
    )
    assert project.printed_by(code).strip() == str(balanced_order(torch.eye(5).long(), 40, 7, 2))


def test_the_order_leaves_other_random_numbers_alone():
    state = torch.get_rng_state()
    balanced_order(disjoint([3, 2]), 20, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_epochs_and_seeds_differ_and_fewer_draws_are_the_first_of_more():
    counts = disjoint([40, 5, 1])
    order = balanced_order(counts, 60, seed=1, epoch=1)
    assert order == balanced_order(counts, 60, seed=1, epoch=1)
    assert order != balanced_order(counts, 60, seed=1, epoch=2)
    assert order != balanced_order(counts, 60, seed=2, epoch=1)
    assert order == balanced_order(counts, 90, seed=1, epoch=1)[:60]


def test_a_common_class_shows_other_tiles_in_other_epochs():
    counts = disjoint([40, 1])
    drawn = [set(balanced_order(counts, 20, seed=0, epoch=epoch)) for epoch in range(30)]
    assert set.union(*drawn) == set(range(41))


@pytest.mark.parametrize("world_size", [2, 3])
def test_each_rank_meets_every_class_with_as_many_classes_as_ranks(world_size):
    counts = disjoint([4] * world_size)
    order = balanced_order(counts, 120, seed=0, epoch=1)
    for rank in range(world_size):
        met = counts[order[rank::world_size]].sum(0)
        assert (met > 0).all(), f"rank {rank} of {world_size} meets {met.tolist()}"


def test_a_single_class_is_a_shuffle_of_its_tiles():
    order = balanced_order(disjoint([0, 12]), 24, seed=0, epoch=0)
    assert order[:12] == order[12:]
    assert sorted(order[:12]) == list(range(12)) != order[:12]


@pytest.mark.parametrize("shape", [(3, 2), (0, 2)])
def test_no_tile_that_shows_a_class_is_an_error(shape):
    with pytest.raises(ValueError, match=f"none of {shape[0]} tiles shows a class"):
        balanced_order(torch.zeros(shape, dtype=torch.int64), 4, seed=0, epoch=0)


@settings(max_examples=60, deadline=None)
@given(
    ids=st.lists(st.sampled_from([0, 1, 3, 255])),
    dtype=st.sampled_from([torch.uint8, torch.int16, torch.int32, torch.int64]),
)
def test_class_counts_are_counts(ids, dtype):
    found = class_counts(torch.tensor(ids, dtype=dtype), num_classes=4, ignore_index=255)
    assert found.tolist() == [ids.count(number) for number in range(4)]
    assert found.dtype == torch.int64


@pytest.mark.parametrize("wrong", [4, -1, 254])
def test_class_counts_name_a_value_that_is_no_class(wrong):
    with pytest.raises(ValueError, match=rf"value {wrong}: expected 0\.\.3 or 255"):
        class_counts(torch.tensor([[0, wrong], [255, 3]]), num_classes=4, ignore_index=255)
