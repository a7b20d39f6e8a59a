"""Archives of torch's are unpacked only if they are what they seem to Python and to torch alike."""

import io
import zipfile

import pytest
import torch

from utils.archives import checked_zip, load_plain


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


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.zeros(4, 4, device="meta"), "a tensor has no values"),
        (torch.zeros(1).expand(4, 4), "a tensor of 16 values is stored as 1"),
    ],
)
def test_weights_that_are_not_all_there_are_refused(tmp_path, tensor, said):
    torch.save({"head": [{"weight": torch.ones(2)}, {"weight": tensor}]}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match=said):
        load_plain(tmp_path / "weights.pt")
