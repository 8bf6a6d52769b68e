"""Ways to need less memory, in all three pipelines: parts that come when they are needed, slices, tiles.

They are tried between the CPU and the CPU: a component that is used without its hook fails there as well.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ptdit_diffusers import PTDiTImg2ImgPipeline, PTDiTInpaintPipeline, PTDiTPipeline

PIPELINES = (PTDiTPipeline, PTDiTImg2ImgPipeline, PTDiTInpaintPipeline)


def picture(size: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8))


def mask(size: int) -> Image.Image:
    white_right = np.zeros((size, size), dtype=np.uint8)
    white_right[:, size // 2 :] = 255
    return Image.fromarray(white_right)


@pytest.fixture
def load(tiny_model_folder) -> Callable[[type], PTDiTPipeline]:
    """Loads a pipeline whose network does something; as built, its output is zero."""

    def load(pipeline: type) -> PTDiTPipeline:
        pipe = pipeline.from_pretrained(tiny_model_folder)
        torch.manual_seed(0)
        for parameter in pipe.transformer.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return load


def run(pipe: PTDiTPipeline, size: int = 64, samples: int = 1) -> Tensor:
    arguments = {"height": size, "width": size, "num_inference_steps": 2, "output_type": "pt"}
    if not isinstance(pipe, PTDiTPipeline):
        arguments["image"] = picture(size)
    if isinstance(pipe, PTDiTInpaintPipeline):
        arguments["mask_image"] = mask(size)
    generators = [torch.Generator().manual_seed(seed) for seed in range(samples)]
    return pipe(["a red star"] * samples, generator=generators, **arguments).images


def offload_components(pipe: PTDiTPipeline) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe._all_hooks) == 3


def offload_leaves(pipe: PTDiTPipeline) -> None:
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")


def offload_blocks(pipe: PTDiTPipeline) -> None:
    pipe.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1)


@pytest.mark.parametrize("offload", [offload_components, offload_leaves, offload_blocks])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_way_to_offload_gives_the_same_pictures_twice(load, pipeline, offload):
    expected = run(load(pipeline))
    pipe = load(pipeline)
    offload(pipe)
    for _ in range(2):
        torch.testing.assert_close(run(pipe), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("fused", [False, True])
def test_every_weight_waits_outside_where_layers_come_in_turn(load, fused):
    # accelerate cannot run this from the CPU to the CPU, with any model: its hooks are all that can be checked here
    pipe = load(PTDiTPipeline)
    if fused:
        pipe.transformer.fuse_linear_layers()
    pipe.enable_sequential_cpu_offload(device="cpu")
    for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
        assert all(weight.is_meta for weight in part.parameters())


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_slices_change_nothing_and_tiles_little_that_can_be_switched_off_again(load, pipeline):
    pipe = load(pipeline)
    whole = run(pipe, 96, samples=2)
    pipe.vae.enable_slicing()
    torch.testing.assert_close(run(pipe, 96, samples=2), whole, atol=1e-5, rtol=0)
    pipe.vae.enable_tiling(tile_sample_min_size=64)
    tiled = run(pipe, 96, samples=2)
    assert not torch.equal(tiled, whole) and (tiled - whole).abs().mean() < 0.1
    pipe.vae.disable_tiling()
    pipe.vae.disable_slicing()
    assert torch.equal(run(pipe, 96, samples=2), whole)
