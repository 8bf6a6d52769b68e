"""Ways to need less memory, in all three pipelines: parts that come when they are needed, slices, tiles.

Components are offloaded between the CPU and the CPU, where one that is used without its hook fails as well. Groups are
offloaded to disk: from memory to memory nothing is removed, so a layer that is used without its hook would not show.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from ptdit_diffusers import PTDiTImg2ImgPipeline, PTDiTInpaintPipeline, PTDiTPipeline
from tests.ptdit_diffusers.offloading import remove_offloaded

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


def offload_components(pipe: PTDiTPipeline, folder: Path) -> None:
    pipe.enable_model_cpu_offload(device="cpu")
    assert len(pipe._all_hooks) == 3


def offload_leaves(pipe: PTDiTPipeline, folder: Path) -> None:
    pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level", offload_to_disk_path=str(folder))


def offload_blocks(pipe: PTDiTPipeline, folder: Path) -> None:
    options = {"offload_type": "block_level", "num_blocks_per_group": 1, "offload_to_disk_path": str(folder)}
    pipe.enable_group_offload(torch.device("cpu"), **options)


@pytest.mark.parametrize("offload", [offload_components, offload_leaves, offload_blocks])
@pytest.mark.parametrize("pipeline", PIPELINES)
def test_every_way_to_offload_gives_the_same_pictures_twice(load, pipeline, offload, tmp_path):
    expected = run(load(pipeline))
    pipe = load(pipeline)
    offload(pipe, tmp_path)
    for _ in range(2):
        if offload is not offload_components:
            for part in (pipe.text_encoder, pipe.transformer, pipe.vae):
                remove_offloaded(part)
        torch.testing.assert_close(run(pipe), expected, atol=1e-5, rtol=0)


def tile(pipe: PTDiTPipeline) -> None:
    pipe.vae.enable_tiling(tile_sample_min_size=64)


def slice_batch(pipe: PTDiTPipeline) -> None:
    pipe.vae.enable_slicing()


def fuse(pipe: PTDiTPipeline) -> None:
    pipe.transformer.fuse_linear_layers()


def add_lora(pipe: PTDiTPipeline) -> None:
    name = "transformer.transformer_blocks.0.attn1.to_q.lora_"
    width = pipe.transformer.transformer_blocks[0].attn1.to_q.in_features
    pipe.load_lora_weights({name + "A.weight": torch.ones(2, width), name + "B.weight": torch.ones(width, 2)})


@pytest.mark.parametrize("offload", [offload_leaves, offload_blocks])
@pytest.mark.parametrize("change", [tile, slice_batch, fuse, add_lora])
def test_offloading_goes_with_what_else_can_be_switched_on_or_is_refused(load, change, offload, tmp_path):
    plain, pipe = load(PTDiTImg2ImgPipeline), load(PTDiTImg2ImgPipeline)
    change(plain)
    expected = run(plain, 96, samples=2)
    change(pipe)
    offload(pipe, tmp_path)
    if (change, offload) == (fuse, offload_leaves):
        with pytest.raises(ValueError, match="one by one: call unfuse_linear_layers"):
            run(pipe, 96, samples=2)
        return
    torch.testing.assert_close(run(pipe, 96, samples=2), expected, atol=1e-5, rtol=0)


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


@pytest.mark.parametrize("part", ["transformer", "vae", "text_encoder"])
def test_numbers_of_damaged_weights_name_the_weight(load, part):
    pipe = load(PTDiTPipeline)
    name, weight = list(getattr(pipe, part).named_parameters())[-1]
    weight.data.fill_(float("nan"))
    with pytest.raises(
        RuntimeError, match=f"because the weights of {type(getattr(pipe, part)).__name__} do, first {name}"
    ):
        run(pipe)
