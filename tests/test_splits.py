"""Splits: lists mean what they say; blocks are contiguous, seeded and of the size asked for."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.splits import Split, SplitError, serpentine, split_by_blocks, split_by_lists


def grid(scene: str, rows: int, cols: int) -> list[str]:
    return [f"{scene}__r{64 * r:06d}_c{64 * c:06d}" for r in range(rows) for c in range(cols)]


NAMES = grid("north", 2, 3) + grid("south", 1, 2) + grid("a b__c", 1, 1)


@pytest.fixture
def split(tmp_path):
    """Split NAMES by the text of two lists."""

    def by(train: str | bytes, val: str | bytes) -> Split:
        for name, text in (("train.txt", train), ("val.txt", val)):
            data = text if isinstance(text, bytes) else text.encode()
            (tmp_path / name).write_bytes(data)
        return split_by_lists(NAMES, tmp_path / "train.txt", tmp_path / "val.txt")

    return by


def test_a_list_names_tiles_and_whole_scenes(split):
    found = split(f"{NAMES[2]}\n{NAMES[0]}\nsouth\n", f"{NAMES[1]}\na b__c\n")
    assert found == Split(sorted([NAMES[0], NAMES[2], *grid("south", 1, 2)]),
                          sorted([NAMES[1], *grid("a b__c", 1, 1)]))  # fmt: skip


@pytest.mark.parametrize(
    "text",
    ["# all of it\nsouth # both tiles\n\n   \n#north\n", "\r\nsouth\r\n\r\n", "\n\n  south\t\n",
     "\ufeffsouth\n", b"\xef\xbb\xbf# made on Windows\r\nsouth\r\n", "south", "south\nsouth\n"],
)  # fmt: skip
def test_comments_blank_lines_and_windows_files_are_understood(split, text):
    assert split("north", text).val == grid("south", 1, 2)


def test_an_unknown_name_is_told_with_its_line_and_the_nearest_one(split, tmp_path):
    with pytest.raises(SplitError) as caught:
        split("# train\n\nnorht\n", "south")
    assert str(caught.value) == (
        f"{tmp_path / 'train.txt'}:3: no cached tile or scene is called 'norht', "
        "did you mean 'north'?"
    )
    with pytest.raises(SplitError, match=r"val\.txt:1: .*'elsewhere'$"):
        split("north", "elsewhere")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("text", ["", "# nothing\n", "\ufeff\n"])
def test_an_empty_side_is_an_error(split, text):
    with pytest.raises(SplitError, match=r"val\.txt: names no tile"):
        split("north", text)
    with pytest.raises(SplitError, match=r"train\.txt: names no tile"):
        split(text, "north")


def test_a_tile_on_both_sides_is_an_error(split):
    with pytest.raises(SplitError, match="1 tile.s. are in .*on one side only") as caught:
        split("north", f"south\n{NAMES[1]}")
    assert NAMES[1] in str(caught.value)


def test_a_missing_or_foreign_list_is_named(split, tmp_path):
    with pytest.raises(SplitError, match=r"gone\.txt: no such file"):
        split_by_lists(NAMES, tmp_path / "gone.txt", tmp_path / "gone.txt")
    with pytest.raises(SplitError, match=r"val\.txt: not a UTF-8 text file"):
        split("north", b"s\xfcd\n")


# Blocks


@given(st.integers(2, 40), st.floats(0.01, 0.99), st.integers(0, 99))
def test_the_fraction_is_met_to_half_a_tile_and_no_side_is_empty(count, fraction, seed):
    names = grid("north", 1, count)
    found = split_by_blocks(names, fraction, seed)
    assert found.train
    assert found.val
    assert sorted(found.train + found.val) == names
    wanted = min(max(fraction * count, 1), count - 1)
    assert abs(len(found.val) - wanted) <= 0.5 + 1e-9


scenes = st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5)), min_size=1, max_size=4)


@settings(max_examples=60)
@given(scenes, st.floats(0.05, 0.6), st.integers(0, 99))
def test_held_out_tiles_of_a_scene_touch_each_other(shapes, fraction, seed):
    names = [name for n, shape in enumerate(shapes) for name in grid(f"scene{n}", *shape)]
    if len(names) < 2:
        return
    found = split_by_blocks(names, fraction, seed)
    assert abs(len(found.val) - min(max(fraction * len(names), 1), len(names) - 1)) <= 0.5 + 1e-9
    for number in range(len(shapes)):
        held = {place(name) for name in found.val if name.startswith(f"scene{number}__")}
        assert reachable(held) == held


def place(name: str) -> tuple[int, int]:
    return int(name[-14:-8]) // 64, int(name[-6:]) // 64


def reachable(places: set[tuple[int, int]]) -> set[tuple[int, int]]:
    """What can be walked to from one of the places, over their sides."""
    front = {next(iter(places))} if places else set()
    seen = set()
    while front:
        seen |= front
        front = {
            (r + dr, c + dc) for r, c in front for dr, dc in ((0, 1), (1, 0), (0, -1), (-1, 0))
        } & places - seen
    return seen


def test_blocks_are_the_same_for_a_seed_and_others_for_others():
    names = grid("north", 6, 6) + grid("south", 6, 6)
    assert split_by_blocks(names, 0.2, 5) == split_by_blocks(names[::-1], 0.2, 5)
    assert len({tuple(split_by_blocks(names, 0.2, seed).val) for seed in range(20)}) > 10


def test_every_large_scene_gives_its_share():
    names = [name for scene in "abcd" for name in grid(scene, 5, 5)]
    for seed in range(10):
        held = split_by_blocks(names, 0.2, seed).val
        assert [sum(name.startswith(scene) for name in held) for scene in "abcd"] == [5] * 4


@pytest.mark.parametrize("names", [[], NAMES[:1]])
def test_fewer_than_two_tiles_cannot_be_split(names):
    with pytest.raises(SplitError, match="cannot be split in two"):
        split_by_blocks(names, 0.2, 0)


@given(st.integers(1, 7), st.integers(1, 7))
def test_a_serpentine_visits_every_tile_by_single_steps(rows, cols):
    names = grid("north", rows, cols)
    path = serpentine(names[::-1])
    assert sorted(path) == names
    places = [place(name) for name in path]
    steps = [abs(a - c) + abs(b - d) for (a, b), (c, d) in zip(places, places[1:], strict=False)]
    assert set(steps) <= {1}
