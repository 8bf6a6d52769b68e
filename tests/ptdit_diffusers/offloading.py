"""Group offloading that can fail: weights wait on disk, and where they were there is NaN until a hook brings them.

From the CPU to the CPU nothing is removed, so a layer that runs without its hook would not show.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

GROUPS = pytest.mark.parametrize(
    "groups", [{"offload_type": "leaf_level"}, {"offload_type": "block_level", "num_blocks_per_group": 1}], ids=str
)


def offload_to_disk(model: nn.Module, folder: Path, **groups) -> None:
    """Offload a model of diffusers in groups, and put NaN where its weights were."""
    model.enable_group_offload(torch.device("cpu"), torch.device("cpu"), offload_to_disk_path=str(folder), **groups)
    remove_offloaded(model)


def remove_offloaded(model: nn.Module) -> None:
    """Put NaN into every weight of a model, which its hooks are to bring again."""
    for weight in model.parameters():
        weight.data = torch.full_like(weight.data, float("nan"))


def check_offloading(model: nn.Module, run: Callable[[], Tensor], folder: Path, groups: dict) -> None:
    """Assert that offloading changes nothing in two runs, and that it would show if one layer's hook were missing."""
    plain = run()
    offload_to_disk(model, folder, **groups)
    for _ in range(2):
        assert torch.equal(run(), plain)
        remove_offloaded(model)
    hooked = [layer for layer in model.modules() if hook_of(layer) is not None]
    hook_of(hooked[-1]).remove_hook("group_offloading", recurse=False)
    assert not torch.equal(run(), plain)


def hook_of(layer: nn.Module):
    """Return the registry of a layer that is offloaded, or None."""
    registry = getattr(layer, "_diffusers_hook", None)
    return registry if registry is not None and registry.get_hook("group_offloading") is not None else None
