"""Files are read no further than they may go; texts show as one line."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from utils.limits import limited_bytes, spelt_out


@pytest.mark.parametrize("size", [0, 1, 9, 10])
def test_a_file_within_the_limit_is_read_whole(tmp_path, size):
    path = tmp_path / "list.txt"
    path.write_bytes(os.urandom(size))
    assert limited_bytes(path, 10) == path.read_bytes()


def test_a_file_over_the_limit_is_refused_unread(tmp_path):
    path = tmp_path / "list.txt"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        limited_bytes(path, 10)
    with pytest.raises(ValueError, match="larger than 2 MiB"):
        limited_bytes(path, 2**21)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_refused_unopened(tmp_path, make):
    make(tmp_path / "list.txt")
    with pytest.raises(ValueError, match="not a plain file"):
        limited_bytes(tmp_path / "list.txt", 10)


@given(st.text(st.characters(exclude_categories=[])))
def test_any_text_becomes_one_that_shows_and_stays_if_it_does(text):
    shown = spelt_out(text)
    assert shown.isprintable() and (shown == text or not text.isprintable())
    shown.encode()
