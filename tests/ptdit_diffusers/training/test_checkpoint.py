"""Checkpoints: rotation, unfinished ones, and those of earlier versions."""

from pathlib import Path

import pytest
import torch

from ptdit_diffusers.training.checkpoint import (
    checkpoints,
    gathered,
    load_checkpoint,
    remove_unfinished,
    save_checkpoint,
)


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "unfinished-checkpoint").mkdir()
    (tmp_path / "unfinished-checkpoint" / "state.pt").write_bytes(b"cut off")
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    remove_unfinished(tmp_path)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-00000010", "checkpoint-00000100"]
    assert load_checkpoint(tmp_path) == {"step": 100}


def test_a_folder_of_the_user_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-00000009-copy").mkdir()
    save_checkpoint(tmp_path, 9, {"step": 9}, keep=1)
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000009"]


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_damaged_checkpoint_is_passed_over_and_never_kept_in_place_of_a_sound_one(tmp_path, caplog, keep) -> None:
    for step in (5, 10):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    file = tmp_path / "checkpoint-00000010" / "state.pt"
    file.write_bytes(file.read_bytes()[:100])
    assert load_checkpoint(tmp_path) == {"step": 5}
    assert "checkpoint-00000010 is damaged and passed over" in caplog.text
    save_checkpoint(tmp_path, 7, {"step": 7}, keep=keep)
    kept = ["checkpoint-00000005", "checkpoint-00000007"][-keep:]
    assert [path.name for path in checkpoints(tmp_path)] == kept
    for path in checkpoints(tmp_path):
        (path / "state.pt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged \(.*checkpoint-00000007\); remove them"):
        load_checkpoint(tmp_path)


def test_two_writers_share_no_temporary_folder(tmp_path: Path, monkeypatch) -> None:
    save = torch.save

    def other_first(state, file):
        monkeypatch.setattr(torch, "save", save)
        save_checkpoint(tmp_path, 2, {"step": 2}, keep=2)
        save(state, file)

    monkeypatch.setattr(torch, "save", other_first)
    save_checkpoint(tmp_path, 3, {"step": 3}, keep=2)
    assert load_checkpoint(tmp_path) == {"step": 3}
    assert [path.name for path in checkpoints(tmp_path)] == ["checkpoint-00000002", "checkpoint-00000003"]


def test_a_checkpoint_of_the_lora_training_from_before_the_common_loop_is_read(tmp_path: Path) -> None:
    adapter, average = {"a": torch.ones(2)}, [torch.zeros(2)]
    old = {"adapter": adapter, "optimizer": {"state": {}}, "average": average, "schedule": {"last_epoch": 3}}
    save_checkpoint(tmp_path, 3, {**old, "step": 3}, keep=1)
    state = load_checkpoint(tmp_path)
    assert state.keys() == {"model", "optimizers", "ema", "schedule", "step"}
    assert torch.equal(state["model"]["a"], adapter["a"]) and torch.equal(state["ema"][0], average[0])
    assert state["optimizers"] == [{"state": {}}]


class Coded(torch.Tensor):
    """A tensor made of another, as 8-bit moments are; its .to() does not copy."""

    @staticmethod
    def __new__(cls, codes):
        return torch.Tensor._make_wrapper_subclass(cls, codes.shape)

    def __init__(self, codes):
        self.codes = codes

    def __tensor_flatten__(self):
        return ["codes"], None

    @classmethod
    def __tensor_unflatten__(cls, parts, facts, size, stride):
        return cls(parts["codes"])

    @classmethod
    def __torch_dispatch__(cls, operation, types, arguments=(), options=None):
        return cls(arguments[0].codes)


def test_a_copy_for_a_background_write_does_not_change_with_the_next_step() -> None:
    plain, coded = torch.zeros(3), Coded(torch.zeros(3))
    kept = gathered({"plain": plain, "moments": [coded]}, copy=True)
    plain.fill_(1)
    coded.codes.fill_(1)
    assert not kept["plain"].any() and not kept["moments"][0].codes.any()
