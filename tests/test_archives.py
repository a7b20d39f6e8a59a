"""Archives of torch's are unpacked only if they are what they seem to Python and to torch alike."""

import io
import zipfile

import pytest

from utils.archives import checked_zip


def archive(kind: int = zipfile.ZIP_STORED, content: bytes = b"weights") -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as written:
        written.writestr("data/0", content)
    return file.getvalue()


def test_a_member_that_is_marked_as_a_folder_is_refused():
    """Its checksum is met, and yet torch would read no bytes of it."""
    stored = archive()
    assert checked_zip(stored).read() == stored
    entry = stored.index(b"PK\x01\x02")
    marked = stored[: entry + 38] + b"\x10" + stored[entry + 39 :]
    with pytest.raises(ValueError, match="marked as a folder"):
        checked_zip(marked)


def test_an_archive_that_would_swell_is_refused_before_it_is_unpacked():
    with pytest.raises(ValueError, match="claim more bytes|compressed"):
        checked_zip(archive(zipfile.ZIP_DEFLATED, bytes(10**6)))
