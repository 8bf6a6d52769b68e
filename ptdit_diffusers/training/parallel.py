"""Weights shared by processes (FSDP2), copied between groups of them (HSDP), and their checkpoints in parts (DCP).

Every process keeps and writes its own part; a checkpoint is read by any number of processes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

STATE = "state"  # folder in a checkpoint


def shard_size(shard: int, processes: int) -> int:
    """Return how many processes share the weights: as many as asked for, or all where there are fewer.

    Raises:
        ValueError: The processes cannot be divided into such groups.
    """
    size = min(shard, processes)
    if processes % size:
        most = max(each for each in range(1, size + 1) if processes % each == 0)
        raise ValueError(
            f"parallel.shard={shard}: {processes} processes are no groups of {shard}; nearest: {most}, or start "
            f"{(processes // size + 1) * size} processes."
        )
    return size


def share_weights(module: nn.Module, blocks: Sequence[nn.Module], shard: int, accelerator: Accelerator) -> None:
    """Divide the weights of a module among groups of `shard` processes; the groups have copies of each other.

    Args:
        module: All of it.
        blocks: Parts of it whose weights are gathered one after another.
        shard: Processes in a group; it divides the number of all.
        accelerator: Knows the processes. With bf16 the forward is under autocast, as with DDP: times and noise stay in
            float32, which a policy of FSDP2 would cast.
    """
    from torch.distributed.device_mesh import init_device_mesh  # not in every build of torch
    from torch.distributed.fsdp import fully_shard

    copies, kind = accelerator.num_processes // shard, accelerator.device.type
    shape, names = ((copies, shard), ("copies", "shard")) if copies > 1 else ((shard,), ("shard",))
    if accelerator.mixed_precision == "bf16":
        module.forward = torch.autocast(kind, dtype=torch.bfloat16)(module.forward)
    mesh = init_device_mesh(kind, shape, mesh_dim_names=names)
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(module, mesh=mesh)


def tensors(
    model: nn.Module, optimizers: Sequence[Optimizer], averages: Sequence[Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the state of model and optimizers, and all tensors of a checkpoint, which are the same ones."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict

    options = StateDictOptions(ignore_frozen_params=True, flatten_optimizer_state_dict=True)
    weights, states = get_state_dict(model, list(optimizers), options=options)
    state = {"weights": weights, "states": states}
    return state, {**state, "averages": {str(number): value for number, value in enumerate(averages)}}


def save_parts(
    folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], averages: Sequence[Tensor], group: Any = None
) -> Callable[[], None]:
    """Write every process's part of weights, optimizers and averages; all processes must call this.

    Args:
        folder: Of the checkpoint.
        model, optimizers, averages: What is written.
        group: Processes as a group of their own, which writes in the background; None = write now.

    Returns:
        A function that waits until all parts are written. It raises OSError where one of them could not be.
    """
    import torch.distributed.checkpoint as parts
    from torch.distributed.checkpoint.api import CheckpointException

    everything, place = tensors(model, optimizers, averages)[1], folder / STATE
    begun = parts.async_save(everything, checkpoint_id=place, process_group=group) if group else None

    def finish() -> None:
        try:
            begun.result() if begun else parts.save(everything, checkpoint_id=place)
        except CheckpointException as error:  # no Exception
            raise OSError(f"the checkpoint could not be written ({first_reason(error)})") from error

    return finish


def background_group() -> Any:
    """Return all processes as a group for `save_parts` in the background, which never waits for the training's."""
    import torch.distributed as processes

    return processes.new_group(backend="gloo")


def load_parts(folder: Path, model: nn.Module, optimizers: Sequence[Optimizer], averages: Sequence[Tensor]) -> None:
    """Take up what `save_parts` wrote, with any number of processes; all of them must call this.

    Raises:
        OSError: It cannot be read.
    """
    import torch.distributed.checkpoint as parts
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_state_dict

    state, everything = tensors(model, optimizers, averages)
    try:
        parts.load(everything, checkpoint_id=folder / STATE)
    except CheckpointException as error:
        raise OSError(
            f"{folder} is damaged ({first_reason(error)}); remove it to go on from the one before"
        ) from error
    set_state_dict(
        model,
        list(optimizers),
        model_state_dict=state["weights"],
        optim_state_dict=state["states"],
        options=StateDictOptions(strict=False, flatten_optimizer_state_dict=True),
    )


def first_reason(error: BaseException) -> str:
    """Return the text of the first failure of an exception that holds those of all processes."""
    failures = getattr(error, "failures", {})
    reason = next(iter(failures.values()), (error,))
    return str(reason[0] if isinstance(reason, tuple) else reason).strip().split("\n")[0]
