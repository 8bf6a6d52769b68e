"""The pipeline of DiffiT's image-space model: EDM's sampler, stock schedulers, classes, saving, bad input."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, EDMDPMSolverMultistepScheduler, EDMEulerScheduler

from ptdit_diffusers import DiffiTImagePipeline
from ptdit_diffusers.commands.models import class_settings
from ptdit_diffusers.core.edm import denoised, noise_levels
from tests.ptdit_diffusers.models.test_unet_diffit import tiny

NAMES = {0: "red star", 1: "blue disk", 2: "crane"}


def tiny_pipeline(scheduler=None, **options) -> DiffiTImagePipeline:
    pipe = DiffiTImagePipeline(tiny(**options), scheduler or EDMEulerScheduler(), NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pixels_of(pipe, labels=(2, 1), **options) -> torch.Tensor:
    return pipe([*labels], **{"num_inference_steps": 4, "output_type": "latent", **options}).images


@torch.no_grad()
def edm_run(unet, labels: list[int], steps: int, generator) -> torch.Tensor:
    """EDM's sampler, written as in its paper (algorithm 1)."""
    levels, labels = noise_levels(steps), torch.tensor(labels)

    def slope(state, level):
        def network(scaled, noise_level):
            return unet(scaled.float(), noise_level.float(), labels).sample

        sigma = torch.full((len(state),), level, dtype=torch.float64)
        return (state - denoised(network, state, sigma)) / level

    state = torch.randn(len(labels), 3, 8, 8, generator=generator).double() * levels[0]
    for level, lower in zip(levels, levels[1:], strict=False):
        first = slope(state, level)
        moved = state + (lower - level) * first
        state = moved if lower == 0 else state + (lower - level) * (first + slope(moved, lower)) / 2
    return state.float()


def test_heun_is_the_sampler_of_the_paper():
    pipe = tiny_pipeline()
    expected = edm_run(pipe.unet, [2, 1], 4, seeded(3))
    assert (pixels_of(pipe, generator=seeded(3)) - expected).abs().max() < 1e-4


def test_heun_and_stock_schedulers_go_to_the_same_pictures_in_many_steps():
    class Shrink(torch.nn.Module):  # D(x) = a known denoiser: F = 0
        config, dtype, device = tiny().config, torch.float32, torch.device("cpu")
        parameters_of = tiny().parameters_of

        def forward(self, sample, timestep, class_labels=None, return_dict=False):
            return (torch.zeros_like(sample),)

    results = []
    for solver, scheduler in (("heun", None), ("scheduler", None), ("scheduler", EDMDPMSolverMultistepScheduler())):
        pipe = tiny_pipeline(scheduler)
        pipe.unet = None
        pipe.unet = Shrink()
        results.append(pixels_of(pipe, solver=solver, num_inference_steps=200, generator=seeded(0)))
    assert (results[0] - results[1]).abs().max() < 0.05 and (results[0] - results[2]).abs().max() < 0.05


def test_the_network_runs_as_often_as_the_solver_says():
    pipe, batches = tiny_pipeline(), []
    pipe.unet.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    pixels_of(pipe)
    assert batches == [2] * 7  # 2 N - 1
    batches.clear()
    pixels_of(pipe, solver="scheduler", guidance_scale=1.5)
    assert batches == [4] * 4


def test_a_sample_with_its_own_generator_equals_its_single_run():
    pipe = tiny_pipeline()
    together = pixels_of(pipe, generator=[seeded(5), seeded(6)])
    for index, label in enumerate((2, 1)):
        assert (together[index] - pixels_of(pipe, (label,), generator=seeded(5 + index))[0]).abs().max() < 1e-4


def test_guidance_moves_away_from_the_null_class():
    pipe = tiny_pipeline()
    plain = pixels_of(pipe, generator=seeded(0))
    null = pipe(num_images_per_prompt=2, num_inference_steps=4, output_type="latent", generator=seeded(0)).images
    assert (plain - null).abs().max() > 1e-3
    assert (pixels_of(pipe, generator=seeded(0), guidance_scale=2.0) - plain).abs().max() > 1e-3


def test_a_folder_knows_its_own_guidance_which_pictures_without_classes_do_not_use(tmp_path):
    unguided = tiny_pipeline()
    DiffiTImagePipeline(unguided.unet, EDMEulerScheduler(), NAMES, guidance_scale=2.0).save_pretrained(tmp_path)
    pipe = DiffiTImagePipeline.from_pretrained(tmp_path)
    guided = pixels_of(unguided, generator=seeded(0), guidance_scale=2.0)
    torch.testing.assert_close(pixels_of(pipe, generator=seeded(0)), guided)
    assert class_settings(tmp_path).guidance == 2.0 and unguided.config.guidance_scale == 1.0
    options = {"num_inference_steps": 2, "output_type": "latent"}
    without = unguided(generator=seeded(0), **options).images
    torch.testing.assert_close(pipe(generator=seeded(0), **options).images, without, rtol=1e-4, atol=1e-4)


def test_defaults_sizes_outputs_and_callbacks():
    pipe, seen = tiny_pipeline(), []

    def look(pipe, step, timestep, tensors):
        seen.append((float(timestep), pipe.num_timesteps, tensors["latents"].dtype))
        pipe._interrupt = step == 1
        return {"latents": torch.zeros_like(tensors["latents"])}

    images = pipe("red star", 12, 8, output_type="np", callback_on_step_end=look).images
    assert isinstance(images, np.ndarray) and images.shape == (1, 12, 8, 3) and images.max() == 0.5
    assert [steps for _, steps, _ in seen] == [18, 18] and seen[0][2] == torch.float64
    assert seen[0][0] == pytest.approx(np.log(80) / 4, abs=1e-4)
    (images,) = pipe(1, num_inference_steps=1, return_dict=False)
    assert images[0].size == (8, 8)


def test_an_unconditional_model_counts_its_pictures():
    pipe = tiny_pipeline(num_classes=0)
    images = pipe(num_images_per_prompt=3, num_inference_steps=2, output_type="pt").images
    assert images.shape == (3, 3, 8, 8) and 0 <= images.min() <= images.max() <= 1


def test_a_saved_pipeline_loads_as_one_of_diffusers(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    for loader in (DiffusionPipeline, DiffiTImagePipeline):
        again = loader.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert type(again) is DiffiTImagePipeline and again.config.id2label["1"] == "blue disk"
        assert torch.equal(pixels_of(again, generator=seeded(0)), pixels_of(pipe, generator=seeded(0)))
    tiny_pipeline(num_classes=0).save_pretrained(tmp_path / "unconditional")
    assert DiffiTImagePipeline.from_pretrained(tmp_path / "unconditional").unet.config.num_classes == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"class_labels": "blu disk"}, "there is no class 'blu disk'; nearest: blue disk"),
        ({"height": 10}, "height=10 gives 5 cells per side at stage 2, .* the window 2; nearest: 8 or 12"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
        ({"solver": "euler"}, "solver='euler' is unknown; choose one of heun, scheduler"),
        ({"class_labels": None, "guidance_scale": 2.0}, "guidance_scale=2.0 needs class_labels to guide to"),
        ({"guidance_scale": -1}, "guidance_scale=-1 must be a finite number of at least 0"),
        ({"latents": torch.zeros(1, 3, 8, 10)}, r"`latents` must have shape \(1, 3, 8, 8\) for this call"),
        ({"generator": [seeded(0)] * 2}, "`generator` has 2 members for a batch of 1"),
        ({"output_type": "jpg"}, "output_type='jpg' is unknown"),
    ],
)
def test_illegal_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(**{"class_labels": 1, **arguments})


def test_models_and_schedulers_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match="DDPMScheduler is no scheduler of EDM; use EDMEulerScheduler"):
        tiny_pipeline(DDPMScheduler())(1)
    with pytest.raises(ValueError, match="this model is unconditional .num_classes=0.; leave class_labels out"):
        tiny_pipeline(num_classes=0)(1)
    pipe = tiny_pipeline(class_dropout_prob=0.0)
    with pytest.raises(ValueError, match="without a null class, so it cannot be guided"):
        pipe(1, guidance_scale=2.0)
    with pytest.raises(ValueError, match="without a null class; pass class_labels"):
        pipe()
