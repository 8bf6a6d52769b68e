"""Files are written whole or not at all, with the usual rights, and never by two writers under one temporary name."""

import json
import os
import sys

import pytest
import torch
from safetensors.torch import load_file

from ptdit_diffusers.core.files import new_file, replace_json
from ptdit_diffusers.training.latents import write_tensors


def test_two_writers_of_one_file_share_no_temporary_name_and_an_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.json"
    replace_json(path, {"by": 0})
    with new_file(path) as first, new_file(path) as second:
        assert first != second
        first.write_text('{"by": 1}')
        second.write_text('{"by": 2}')
    assert json.loads(path.read_text()) == {"by": 1}  # the last one to finish
    with pytest.raises(TypeError):
        replace_json(path, {"by": object()})
    assert json.loads(path.read_text()) == {"by": 1} and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX rights")
@pytest.mark.parametrize("mask", [0o022, 0o027])
def test_every_file_has_the_rights_that_the_umask_leaves(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)}, {"format": "pt"})
        replace_json(tmp_path / "a.json", [])
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o666 & ~mask}
    assert torch.equal(load_file(tmp_path / "a.safetensors")["x"], torch.zeros(2))


def test_a_failed_write_of_tensors_is_the_systems_error_and_leaves_nothing(tmp_path, monkeypatch):
    from safetensors import SafetensorError

    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr("ptdit_diffusers.training.latents.save_file", full)
    with pytest.raises(OSError, match=r"a\.safetensors cannot be written: .*No space left on device"):
        write_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(2)})
    assert not list(tmp_path.iterdir())
