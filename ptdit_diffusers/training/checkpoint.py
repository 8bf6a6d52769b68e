"""Checkpoints of a run: written to a temporary folder, renamed, rotated. Must not know any stage."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as checkpoint of `step` and delete all but the newest `keep`.

    A run killed while writing leaves only a temporary folder, which is never read and is removed by the next save.
    """
    target, temporary = folder / f"checkpoint-{step:08d}", folder / "unfinished-checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    with open(temporary / "state.pt", "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())  # the rename must not reach the disk before the data
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """State of the newest checkpoint in `folder`, on the CPU; None when there is none."""
    found = checkpoints(folder)
    return torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True) if found else None
