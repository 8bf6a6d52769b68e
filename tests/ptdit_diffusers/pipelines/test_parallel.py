"""A call of a pipeline on several devices gives the picture of one, or an error on all of them."""

import os
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import (
    FasterCacheConfig,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    SeaCacheConfig,
    TaylorSeerCacheConfig,
)
from torch import Tensor
from torch import distributed as dist

from ptdit_diffusers import PTDiTModularPipeline, PTDiTPipeline
from ptdit_diffusers.core.backbones.vae_tiling import tile_owners, tile_places
from tests.processes import CAN_FORK

START = "forkserver" if CAN_FORK else "spawn"
SIZE = {"height": 192, "width": 128}


def pipeline(model: Path) -> PTDiTPipeline:
    pipe = PTDiTPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generate(pipe: PTDiTPipeline, seed: int = 0, prompt: str = "a red circle", **options) -> Tensor:
    """Return latents, or what `output_type` says."""
    generator = [torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)]
    arguments = {"num_inference_steps": 2, "output_type": "latent", "generator": generator, **SIZE, **options}
    return pipe([prompt, "a blue square"], negative_prompt="star", **arguments).images


@torch.no_grad()
def check_same(rank: int, devices: int, guidance_halves: bool, model: Path) -> PTDiTPipeline:
    """Compare latents, and pixels from tiles, with those of one device; return the pipeline."""
    pipe = pipeline(model)
    pipe.vae.enable_tiling(64)
    calls = ({}, {"guidance_rescale": 0.5}, {"guidance_scale": 1.0})
    expected = [generate(pipe, **options) for options in calls]
    picture = pipe.decode_latents(expected[0], "np")
    pipe.enable_parallelism(guidance_halves=guidance_halves)
    assert (pipe.transformer.guidance_halves is not None) == guidance_halves
    assert (pipe.transformer._messages is not None) == (devices > 2 or not guidance_halves)
    for options, latents in zip(calls, expected, strict=True):
        assert (generate(pipe, **options) - latents).norm() < 1e-4 * latents.norm(), options
    runs = []
    hook = pipe.vae.decoder.register_forward_hook(lambda *_: runs.append(1))
    assert np.array_equal(pipe.decode_latents(expected[0], "np"), picture)
    assert len(runs) == tile_owners(24, 16, 8, devices).count(rank)  # and no tile of others
    hook.remove()
    return pipe


def check_errors(rank: int, pipe: PTDiTPipeline) -> None:
    """What differs between devices is an error on all of them, and nobody waits."""
    with pytest.raises(RuntimeError, match="parallelism is on already"):
        pipe.enable_parallelism()
    first = rank == 0

    def refused(match: str, **options) -> None:
        with pytest.raises(ValueError, match=f"the devices have different {match}.*: give all processes the same"):
            generate(pipe, **options)

    refused("latents, seeds", seed=rank)
    refused("prompts", prompt="a red circle" if first else "a green star")
    refused("sizes or settings, timesteps", num_inference_steps=2 + rank)
    refused("latents, sizes or settings", height=192 + 16 * rank)
    refused("sizes or settings", attention_kwargs={"scale": 1.0 - 0.1 * rank})
    refused("latents", latents=torch.full((2, 4, 1, 24, 16), 0.1 * rank))

    def change(pipe: PTDiTPipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        return {"latents": tensors["latents"] + 0.1 * rank}

    def change_guidance(pipe: PTDiTPipeline, *_) -> None:
        pipe._guidance_scale = 2.0 + rank

    refused("latents", callback_on_step_end=change)
    refused("guidance", callback_on_step_end=change_guidance)

    steps = []

    def stop(pipe: PTDiTPipeline, step: int, *_) -> None:
        steps.append(step)
        pipe._interrupt = rank == 1 and step == 1

    generate(pipe, num_inference_steps=4, callback_on_step_end=stop)
    assert steps == [0, 1]  # one device was interrupted, and all stopped

    pipe.transformer.set_windows(proxy_mode="random")
    with pytest.raises(ValueError, match="proxy_mode='random' draws other proxies on each device: give all processes"):
        generate(pipe, generator=None)
    with torch.no_grad():
        pipe.transformer.proj_out.bias.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="NaN"):
        generate(pipe)


def check_random_proxies(model: Path) -> None:
    """Both halves draw the proxies of one device."""
    pipe = pipeline(model)
    pipe.transformer.set_windows(proxy_mode="random")
    expected = generate(pipe)
    pipe.enable_parallelism(guidance_halves=True)
    assert (generate(pipe) - expected).norm() < 1e-4 * expected.norm()


def check_caches(model: Path) -> None:
    """Caches that skip by steps give the picture of one device with the same cache."""
    steps = 6

    def timestep() -> float:
        return float(pipe.current_timestep)

    caches = {
        "mag": MagCacheConfig(threshold=10.0, num_inference_steps=steps, mag_ratios=[1.0] * steps),
        "taylor": TaylorSeerCacheConfig(cache_interval=3, use_lite_mode=True),
        "pyramid": PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            cross_attention_block_skip_range=2,
            current_timestep_callback=timestep,
        ),
        "sea": SeaCacheConfig(
            threshold=0.5, raw_vision_callback=lambda module, args, kwargs: list(kwargs["hidden_states"].unbind(0))
        ),
        "faster": FasterCacheConfig(attention_weight_callback=lambda _: 0.3, current_timestep_callback=timestep),
    }

    def run(pipe: PTDiTPipeline, cache: str) -> tuple[Tensor, int]:
        calls = []
        hook = pipe.transformer.transformer_blocks[1].attn3.to_q.register_forward_hook(lambda *_: calls.append(1))
        pipe.transformer.enable_cache(caches[cache])
        latents = generate(pipe, num_inference_steps=steps)
        pipe.transformer.disable_cache()
        hook.remove()
        return latents, len(calls)

    pipe = pipeline(model)
    expected = {name: run(pipe, name) for name in caches}
    assert all(calls < steps for name, (_, calls) in expected.items() if name != "faster"), expected
    pipe.enable_parallelism()
    for name, (latents, calls) in expected.items():
        shared, shared_calls = run(pipe, name)
        assert shared_calls == calls, name
        assert (shared - latents).norm() < 1e-3 * latents.norm(), name
    halved = pipeline(model)
    halved.enable_parallelism(guidance_halves=True)
    with pytest.raises(ValueError, match="FasterCacheConfig needs both predictions in one batch"):
        halved.transformer.enable_cache(caches["faster"])


def check_odd(model: Path) -> None:
    with pytest.raises(ValueError, match="3 processes are not two halves.*nearest: 2 or 4 processes"):
        pipeline(model).enable_parallelism(guidance_halves=True)


def check_modular(model: Path) -> None:
    modular = PTDiTModularPipeline.from_pretrained(model)
    modular.load_components()
    modular.set_progress_bar_config(disable=True)
    call = {"prompt": "a red circle", "num_inference_steps": 2, "output": "images", "output_type": "latent"}
    whole = modular(**call, generator=torch.Generator().manual_seed(0))
    with pytest.raises(ValueError, match="guidance_halves=True is for PTDiTPipeline"):
        modular.enable_parallelism(guidance_halves=True)
    modular.enable_parallelism()
    shared = modular(**call, generator=torch.Generator().manual_seed(0))
    assert (shared - whole).norm() < 1e-4 * whole.norm()


def call_on_devices(rank: int, devices: int, meeting_point: str, model: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    place = {"init_method": meeting_point, "rank": rank, "world_size": devices}
    dist.init_process_group("gloo", timeout=timedelta(minutes=1), **place)
    pipe = check_same(rank, devices, devices != 3, model)
    if devices == 2:
        check_random_proxies(model)
        check_errors(rank, pipe)
        check_modular(model)
        check_caches(model)
    if devices == 3:
        check_odd(model)
    dist.barrier()  # neither leaves while the other still reads
    os._exit(0)  # gloo's threads may still hold tensors, and Python ending under them aborts now and then


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize("devices", [2, 3, 4])
def test_a_call_on_several_devices_gives_the_picture_of_one(tiny_model_folder: Path, tmp_path: Path, devices: int):
    arguments = devices, (tmp_path / "meeting_point").as_uri(), tiny_model_folder
    torch.multiprocessing.start_processes(call_on_devices, arguments, nprocs=devices, start_method=START)


def test_one_process_is_told_to_start_others(tiny_model_folder: Path):
    with pytest.raises(RuntimeError, match="torch.distributed is not initialized: start the processes with torchrun"):
        pipeline(tiny_model_folder).enable_parallelism()


@pytest.mark.parametrize(("devices", "balance"), [(2, 0.99), (4, 0.96), (8, 0.63)])
def test_tiles_of_1024_pixels_are_shared_evenly(devices: int, balance: float):
    areas = [rows * columns for _, _, rows, columns in tile_places(1024, 1024, 512)]
    owners = tile_owners(1024, 1024, 512, devices)
    load = [sum(area for area, owner in zip(areas, owners, strict=True) if owner == each) for each in range(devices)]
    assert len(areas) == 9 and min(load) > 0
    assert sum(areas) / devices / max(load) == pytest.approx(balance, abs=0.005)
