"""Torch files that grow when they are unpacked, or hold more objects than weights need."""

import zipfile

import pytest
import torch

from ptdit_diffusers.core import archives
from ptdit_diffusers.core.archives import check_archive
from ptdit_diffusers.core.checkpoint_names import ConversionError


def test_what_torch_writes_is_taken(tmp_path):
    torch.save({"a": torch.zeros(3), "b": [torch.ones(2, 2)]}, tmp_path / "a.pt")
    check_archive(tmp_path / "a.pt")


def test_a_compressed_archive_is_refused_without_unpacking_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", bytes(2**24))
    assert (tmp_path / "bomb.pt").stat().st_size < 2**16
    with pytest.raises(ConversionError, match="unpacked it would have 16,777,216 bytes"):
        check_archive(tmp_path / "bomb.pt")
    with zipfile.ZipFile(tmp_path / "small.pt", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/data.pkl", b"abc")
    with pytest.raises(ConversionError, match="a/data.pkl in it is compressed"):
        check_archive(tmp_path / "small.pt")


def test_members_that_share_their_bytes_are_counted_each(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as file:
        file.writestr("a/data/0", bytes(10_000))
        (member,) = file.filelist
        file.filelist.extend([member] * 50)  # the list of contents names it 51 times
    with pytest.raises(ConversionError, match="unpacked it would have 510,000 bytes"):
        check_archive(tmp_path / "a.pt")


def test_more_objects_than_weights_need_are_refused(tmp_path, monkeypatch):
    torch.save({str(number): number for number in range(1000)}, tmp_path / "a.pt")
    check_archive(tmp_path / "a.pt")
    monkeypatch.setattr(archives, "LARGEST_PICKLE", 5000)
    with pytest.raises(ConversionError, match="no checkpoint of weights: it has .* bytes of objects"):
        check_archive(tmp_path / "a.pt")


def test_an_archive_without_its_end_is_refused(tmp_path):
    torch.save({"a": torch.zeros(3)}, tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:-100])
    with pytest.raises(ConversionError, match="cut off or damaged"):
        check_archive(tmp_path / "a.pt")
