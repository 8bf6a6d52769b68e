"""Checkpoints of a run: written to a temporary folder, renamed, rotated; and tensors that processes share (FSDP2)."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints in `folder`, oldest first."""
    return sorted(folder.glob("checkpoint-[0-9]*"), key=lambda path: int(path.name.rpartition("-")[2]))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write `state` as checkpoint of `step` and delete all but the newest `keep`.

    A run that is killed while it writes leaves only a temporary folder, which is never read and is removed by the next
    save.

    Raises:
        OSError: It could not be written.
    """
    target, temporary = folder / f"checkpoint-{step:08d}", folder / "unfinished-checkpoint"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        with open(temporary / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())  # the rename must not reach the disk before the data
    except (OSError, RuntimeError) as error:  # torch.save makes a RuntimeError of a write that failed
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(f"the checkpoint could not be written ({error.__context__ or error})") from error
    shutil.rmtree(target, ignore_errors=True)
    temporary.rename(target)
    for old in checkpoints(folder)[:-keep]:
        shutil.rmtree(old)
    return target


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Return the state of the newest checkpoint in `folder`, on the CPU; None when there is none."""
    if not (found := checkpoints(folder)):
        return None
    state = torch.load(found[-1] / "state.pt", map_location="cpu", weights_only=True)
    if "adapter" in state:  # of a LoRA, from the time when it had a loop of its own
        state |= {"model": state.pop("adapter"), "optimizers": [state.pop("optimizer")], "ema": state.pop("average")}
    return state


def is_shared(tensor: Any) -> bool:
    """Return whether processes share a tensor, each having a part of it (FSDP2)."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a CPU copy of a tensor, gathered first where processes share it; all of them must call this."""
    tensor = tensor.detach()
    return (tensor.full_tensor() if is_shared(tensor) else tensor).cpu().clone()


def gathered(state: Any) -> Any:
    """Return nested dictionaries and lists with every shared tensor gathered; all processes must call this."""
    if isinstance(state, dict):
        return {name: gathered(value) for name, value in state.items()}
    if isinstance(state, list):
        return [gathered(value) for value in state]
    return whole(state) if is_shared(state) else state


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole tensor on the device of a parameter, divided as the parameter is where the shapes agree."""
    value = value.to(parameter.device)
    if not is_shared(parameter) or value.shape != parameter.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value, parameter.device_mesh, parameter.placements)
