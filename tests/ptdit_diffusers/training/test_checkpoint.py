"""Checkpoints: rotation, unfinished ones, and those of earlier versions."""

from pathlib import Path

import torch

from ptdit_diffusers.training.checkpoint import load_checkpoint, save_checkpoint


def test_only_the_newest_checkpoints_are_kept_and_unfinished_ones_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "unfinished-checkpoint").mkdir()
    (tmp_path / "unfinished-checkpoint" / "state.pt").write_bytes(b"cut off")
    for step in (9, 10, 100):
        save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["checkpoint-00000010", "checkpoint-00000100"]
    assert load_checkpoint(tmp_path) == {"step": 100}


def test_a_checkpoint_of_the_lora_training_from_before_the_common_loop_is_read(tmp_path: Path) -> None:
    adapter, average = {"a": torch.ones(2)}, [torch.zeros(2)]
    old = {"adapter": adapter, "optimizer": {"state": {}}, "average": average, "schedule": {"last_epoch": 3}}
    save_checkpoint(tmp_path, 3, {**old, "step": 3}, keep=1)
    state = load_checkpoint(tmp_path)
    assert state.keys() == {"model", "optimizers", "ema", "schedule", "step"}
    assert torch.equal(state["model"]["a"], adapter["a"]) and torch.equal(state["ema"][0], average[0])
    assert state["optimizers"] == [{"state": {}}]
