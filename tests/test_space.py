"""Room on the disk is compared with what a phase will write, before it writes."""

from collections import namedtuple
from pathlib import Path

import project
import pytest

from utils.manifest import read_manifest
from utils.space import Need, SpaceError, bytes_below, free_at, require_space

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch):
    """Sets how many bytes every disk is said to have free."""

    def say(size: int) -> None:
        monkeypatch.setattr("shutil.disk_usage", lambda _: Usage(size, 0, size))

    return say


def test_what_goes_on_one_disk_is_added_up_and_its_keys_are_named(tmp_path, free):
    free(100)
    needs = [Need(tmp_path / "a", "inference.output_tif", 60), Need(tmp_path, "inference.b", 40)]
    require_space(needs, "maps")
    with pytest.raises(SpaceError) as caught:
        require_space([*needs, Need(tmp_path, "inference.b", 1)], "maps")
    assert str(caught.value) == (
        f"{tmp_path / 'a'}: maps need up to 101 bytes, 100 bytes are free; make room, or name a "
        "folder on another disk (inference.output_tif, inference.b)"
    )


def test_a_folder_that_is_yet_to_be_made_is_looked_at_where_it_will_be(tmp_path):
    assert free_at(tmp_path / "no" / "such" / "folder") > 0
    assert bytes_below(tmp_path / "no" / "such" / "folder") == 0
    (tmp_path / "file").write_bytes(b"abc")
    assert bytes_below(tmp_path) == 3


def test_files_that_another_run_renames_meanwhile_are_no_error(tmp_path, monkeypatch):
    """A second run looks at the finished rows that the first is just adding."""
    (tmp_path / "rows").write_bytes(b"abc")
    (tmp_path / "folder").mkdir()
    passing, look = tmp_path / ".rows.tmp", Path.stat
    passing.write_bytes(b"abc")

    def looked_at(path, **options):
        found = look(path, **options)
        if path == passing:
            path.unlink()
        return found

    monkeypatch.setattr(Path, "stat", looked_at)
    assert bytes_below(tmp_path) in (3, 6)
    listed = list(tmp_path.glob("*"))
    monkeypatch.setattr(Path, "glob", lambda folder, pattern: [*listed, passing])
    assert bytes_below(tmp_path) == 3


def reason(capsys) -> str:
    """The one error line of a run."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    return line


def test_each_phase_ends_with_4_before_it_writes_and_goes_on_when_there_is_room(
    tmp_path, free, capsys
):
    path = project.write_project(tmp_path, height=100, width=130)
    for phase, key in (("prepare", "paths.processed_dir"), ("train", "train.weights_dir"),
                       ("inference", "inference.output_tif")):  # fmt: skip
        free(9)
        assert project.run(path, *project.only(phase)) == 4
        said = reason(capsys)
        assert "9 bytes are free" in said
        assert key in said
        assert not list(tmp_path.glob("cache/*.pt")) or phase != "prepare"
        free(10**12)
        assert project.run(path, *project.only(phase)) == 0
    free(9)
    assert project.run(path, "inference.enable=false") == 0  # all is there already


def test_tiles_that_will_be_left_out_need_no_room(tmp_path, free, capsys):
    """Where all would not fit, some are looked at: here all but a few have too few labels."""
    path = project.write_project(tmp_path, height=200, width=260, train={"enable": False})
    sparse = ("inference.enable=false", "prepare.min_labeled=0.9")
    assert project.run(path, *sparse) == 0
    made = read_manifest(Path(tmp_path, "cache"))
    kept = len(made.tiles)
    assert 0 < kept < 20
    for tile in Path(tmp_path, "cache").glob("*.pt"):
        tile.unlink()
    free(kept * made.tile_bytes - 1)
    assert project.run(path, *sparse) == 4
    assert f"{kept} tiles left to make need" in reason(capsys)
    free(kept * made.tile_bytes)
    assert project.run(path, *sparse) == 0
