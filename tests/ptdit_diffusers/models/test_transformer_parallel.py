"""Context parallelism: two processes share the tokens of one forward and get the numbers of a single one."""

import os

import pytest
import torch

from ptdit_diffusers.models.parallel_ptdit import SharedWindows
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from tests.processes import CAN_FORK
from tests.ptdit_diffusers.models.test_transformer_ptdit import arguments, tiny

START = "forkserver" if CAN_FORK else "spawn"


def share_tokens(rank: int, devices: int, meeting_point: str) -> None:
    """One of the processes: compares its forward with the undivided one, for pictures, video and ragged windows."""
    from diffusers import ContextParallelConfig

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=devices)
    torch.accelerator.device_count = lambda: devices  # diffusers counts accelerators; a CPU-only machine has none
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    ragged = {"window_size": (2, 3, 3), "proxy_ratio": (1, 3, 3)}
    for settings, size in (
        ({}, (16, 16, 1)),
        (ragged, (20, 12, 2)),
        ({"shift_window": False}, (16, 16, 1)),
    ):
        transformer, inputs = tiny(**settings), arguments(*size)
        with torch.no_grad():
            whole = transformer(**inputs, encoder_attention_mask=mask).sample
            transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=devices))
            seen = []
            block = transformer.transformer_blocks[0]
            for layer in (block.pvisual_attn2.to_q, block.attn1.to_q, block.attn2.to_q, block.ff.net[0].proj):
                layer.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].shape[1]))
            shared = transformer(**inputs, encoder_attention_mask=mask).sample
        tokens = inputs["hidden_states"][0, 0].numel() // 4
        assert seen == [tokens // devices] * 4, f"layers saw {seen} of {tokens} tokens"
        assert torch.allclose(shared, whole, atol=1e-5), f"{settings}: {(shared - whole).abs().max()}"
    torch.distributed.barrier()  # neither leaves while the other still reads
    torch.distributed.destroy_process_group()
    os._exit(0)  # gloo's threads may still hold tensors, and Python ending under them aborts now and then


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
def test_two_processes_share_the_tokens_and_get_the_same_numbers(tmp_path):
    meeting_point = (tmp_path / "meeting_point").as_uri()
    torch.multiprocessing.start_processes(share_tokens, args=(2, meeting_point), nprocs=2, start_method=START)


def test_the_plan_names_layers_that_the_model_has():
    from diffusers.hooks.context_parallel import _get_submodule_by_name

    for shift_window in (True, False):
        with torch.device("meta"):
            transformer = PTDiTTransformer3DModel(num_layers=2, shift_window=shift_window)
        for name in transformer._cp_plan:
            assert len(_get_submodule_by_name(transformer, name)) == 2
    assert len(PTDiTTransformer3DModel._cp_plan) == 10


def test_what_cannot_share_windows_is_refused_by_name():
    from diffusers import ContextParallelConfig

    with pytest.raises(ValueError, match="16 heads cannot be shared by 3 devices; nearest smaller number: 2"):
        SharedWindows(None, 16, ContextParallelConfig(ulysses_degree=3))
    with pytest.raises(ValueError, match="ulysses_anything .* unequal parts"):
        SharedWindows(None, 16, ContextParallelConfig(ulysses_degree=2, ulysses_anything=True))
