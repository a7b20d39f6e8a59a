"""Finished rows of a map: taken again only where they are whole and of the same plan."""

import errno
import os

import pytest

from utils import artefacts
from utils.journal import Journal, Stored, journal_folder, journal_held

PLAN = {"tile": 64}
LAYOUTS = {
    (0, row): [Stored((1, 48, 130), "uint8"), Stored((3, 48, 130), "uint16")]
    for row in (0, 48, 96)
}


@pytest.fixture
def output(tmp_path):
    return tmp_path / "map.tif"


@pytest.fixture
def rows(rng):
    return [rng.integers(0, 200, layout.shape).astype(layout.dtype) for layout in LAYOUTS[0, 0]]


def again(output) -> Journal:
    return Journal(output, PLAN, LAYOUTS)


def test_rows_come_back_as_they_were(output, rows):
    again(output).keep((0, 48), [each[:, ::-1] for each in rows])  # not contiguous
    found = again(output)
    assert found.places == {(0, 48)}
    for one, other in zip(found.read((0, 48)), rows, strict=True):
        assert one.dtype == other.dtype
        assert (one == other[:, ::-1]).all()


@pytest.mark.parametrize("damage", ["flipped", "cut", "longer", "empty", "folder", "pipe", "place"])
def test_rows_that_are_not_whole_are_deleted(output, rows, damage):
    again(output).keep((0, 0), rows)
    [path] = journal_folder(output).glob("*.rows")
    stored = bytearray(path.read_bytes())
    stored[len(stored) // 3] ^= 4
    changed = {"flipped": stored, "cut": stored[:-9], "longer": stored + b"odd", "empty": b""}
    if damage == "place":  # which the map does not have
        path.rename(path.with_name(path.name.replace("r00000000", "r00000007")))
    elif damage in changed:
        path.write_bytes(changed[damage])
    else:
        path.unlink()
        os.mkfifo(path) if damage == "pipe" else path.mkdir()
    if damage == "folder":
        with pytest.raises(OSError, match="rows"):  # none that a run of ours makes
            again(output)
        return
    assert again(output).places == set()
    assert not list(journal_folder(output).iterdir())


def test_rows_of_another_plan_are_not_taken_under_this_one(output, rows):
    """A second run beside this one, where no lock kept it away, left its rows in the folder."""
    ours = again(output)
    ours.keep((0, 0), rows)
    other = Journal(output, {"tile": 32}, LAYOUTS)
    other.keep((0, 48), rows)
    ours.keep((0, 96), rows)
    assert again(output).places == {(0, 96)}
    assert [path.name[:20] for path in journal_folder(output).glob("*")] == ["c00000000_r00000096_"]


def test_a_read_that_fails_deletes_nothing(output, rows, monkeypatch):
    again(output).keep((0, 0), rows)
    tries = []

    def failing(path, most):
        tries.append(path)
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(artefacts, "limited_bytes", failing)
        patched.setattr("utils.artefacts.WAITS", (0.0, 0.0))
        with pytest.raises(OSError, match=r"\.rows"):
            again(output)
    assert len(tries) == 3
    assert again(output).places == {(0, 0)}


def test_a_journal_without_a_row_does_not_stay(output, rows):
    with journal_held(output, "inference.output_tif"):
        assert journal_folder(output).is_dir()
    assert not journal_folder(output).exists()
    with journal_held(output, "inference.output_tif"):
        again(output).keep((0, 0), rows)
    assert again(output).places == {(0, 0)}
