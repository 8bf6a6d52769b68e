"""Checkpoints of a run: written to a temporary folder, renamed, rotated; and tensors that processes share (FSDP2)."""

import logging
import os
import re
import shutil
import uuid
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ptdit_diffusers.core.folder_files import move

logger = logging.getLogger(__name__)

UNFINISHED = "unfinished-checkpoint"  # beginning of the names of temporary folders


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if re.fullmatch(r"checkpoint-\d+", path.name)]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def remove_unfinished(folder: Path) -> None:
    """Remove what runs left that were killed while they wrote a checkpoint; no run may be writing one now."""
    for leftover in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def unfinished(folder: Path, token: str) -> Path:
    """Return a temporary folder for a checkpoint; the token tells it from others."""
    return folder / f"{UNFINISHED}-{token[:8]}"


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int, temporary: Path | None = None) -> Path:
    """Write `state` as checkpoint of `step` and delete all but the newest `keep` up to this step.

    A checkpoint of a later step is deleted, too: it was damaged, or this run would not stand before it. A run that is
    killed while it writes leaves only a temporary folder, which is never read. `temporary` is one that was begun.

    Raises:
        OSError: It could not be written.
    """
    target = folder / f"checkpoint-{step:08d}"
    temporary = temporary or unfinished(folder, uuid.uuid4().hex)
    temporary.mkdir(parents=True, exist_ok=True)
    try:
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the data
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a write that failed
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint could not be written ({error.__context__ or error})") from error
    shutil.rmtree(target, ignore_errors=True)
    move(temporary, target)
    others = [path for path in checkpoints(folder) if path != target]
    earlier = [path for path in others if _step(path) < step]
    kept = earlier[max(0, len(earlier) - keep + 1) :]
    for old in [path for path in others if path not in kept]:
        shutil.rmtree(old, ignore_errors=True)  # the next save tries again
    return target


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint in `folder` that can be read, on the CPU; None when there is none.

    Raises:
        ValueError: There are checkpoints, and none can be read.
    """
    found = checkpoints(folder)
    for path in reversed(found):
        try:
            state = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
            break
        except Exception as error:  # of many kinds: cut off, empty, of another format
            reason = str(error).strip().split("\n")[0] or type(error).__name__
            logger.warning("%s is damaged and passed over (%s)", path, reason)
    else:
        if found:
            names = ", ".join(path.name for path in found)
            raise ValueError(f"every checkpoint in {folder} is damaged ({names}); remove them to begin anew.")
        return None
    if "adapter" in state:  # of a LoRA, from the time when it had a loop of its own
        state |= {"model": state.pop("adapter"), "optimizers": [state.pop("optimizer")], "ema": state.pop("average")}
    return state


def is_shared(tensor: Any) -> bool:
    """Return whether processes share a tensor, each having a part of it (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a CPU copy of a tensor, gathered first where processes share it; all of them must call this."""
    tensor = tensor.detach()
    tensor = tensor.full_tensor() if is_shared(tensor) else tensor
    if hasattr(tensor, "__tensor_flatten__"):  # made of other tensors, as 8-bit moments are; its .to() may not copy
        names, facts = tensor.__tensor_flatten__()
        parts = {name: whole(getattr(tensor, name)) for name in names}
        return type(tensor).__tensor_unflatten__(parts, facts, tensor.size(), tensor.stride())
    return tensor.to("cpu", copy=True)


def gathered(state: Any, copy: bool = False) -> Any:
    """Return nested dictionaries and lists with every shared tensor gathered; all processes must call this.

    With `copy` every other tensor is a copy on the CPU, too, which later steps do not change.
    """
    if isinstance(state, dict):
        return {name: gathered(value, copy) for name, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(gathered(value, copy) for value in state)
    return whole(state) if is_shared(state) or (copy and isinstance(state, Tensor)) else state


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor on the device of a parameter, divided as the parameter is where the shapes agree."""
    value = value.to(parameter.device)
    if not is_shared(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
