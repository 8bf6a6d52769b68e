"""Picture to picture and inpainting: what strength and masks mean, every form of input, and the other schedulers."""

import numpy as np
import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    AutoPipelineForInpainting,
    AutoPipelineForText2Image,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from torch import Tensor

from ptdit_diffusers import PTDiTImg2ImgPipeline, PTDiTInpaintPipeline, PTDiTPipeline

SIZE = {"height": 32, "width": 64}
SAME = {"atol": 2e-5, "rtol": 0}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def latents_of(pipe, *arguments, **named) -> Tensor:
    defaults = {**SIZE, "num_inference_steps": 4, "output_type": "latent", "generator": seeded(0)}
    return pipe("a red star", *arguments, **{**defaults, **named}, return_dict=False)[0]


@pytest.fixture(scope="module")
def text_pipe(tiny_model_folder) -> PTDiTPipeline:
    pipe = PTDiTPipeline.from_pretrained(str(tiny_model_folder))
    torch.manual_seed(0)
    for parameter in pipe.transformer.parameters():  # as built, the network's output is zero
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def changer(text_pipe) -> PTDiTImg2ImgPipeline:
    pipe = PTDiTImg2ImgPipeline(**text_pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def painter(text_pipe) -> PTDiTInpaintPipeline:
    pipe = PTDiTInpaintPipeline(**text_pipe.components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))


@pytest.fixture
def mask() -> Image.Image:
    mask = Image.new("L", (64, 32), 0)
    mask.paste(255, (32, 0, 64, 32))
    return mask


class TestConversion:
    def test_the_three_pipelines_convert_into_each_other_over_the_same_parts(self, text_pipe):
        changer = AutoPipelineForImage2Image.from_pipe(text_pipe)
        painter = AutoPipelineForInpainting.from_pipe(changer)
        back = AutoPipelineForText2Image.from_pipe(painter)
        assert [type(pipe) for pipe in (changer, painter, back)] == [
            PTDiTImg2ImgPipeline,
            PTDiTInpaintPipeline,
            PTDiTPipeline,
        ]
        for pipe in (changer, painter, back, PTDiTPipeline.from_pipe(PTDiTInpaintPipeline.from_pipe(changer))):
            assert all(pipe.components[name] is part for name, part in text_pipe.components.items())

    @pytest.mark.parametrize(
        "loader, expected",
        [(AutoPipelineForImage2Image, PTDiTImg2ImgPipeline), (AutoPipelineForInpainting, PTDiTInpaintPipeline)],
    )
    def test_a_folder_loads_for_each_task_and_is_saved_under_that_name(
        self, tiny_model_folder, tmp_path, loader, expected
    ):
        pipe = loader.from_pretrained(str(tiny_model_folder))
        assert type(pipe) is expected
        pipe.save_pretrained(tmp_path)
        assert type(PTDiTPipeline.from_pretrained(str(tmp_path))) is PTDiTPipeline
        assert type(loader.from_pretrained(str(tmp_path))) is expected


class TestStrength:
    def test_full_strength_is_text_to_picture(self, text_pipe, changer, picture):
        assert torch.equal(latents_of(changer, picture, strength=1.0), latents_of(text_pipe))

    def test_the_first_latents_are_the_picture_at_the_noise_level_of_the_first_step(self, changer, picture):
        starts = []
        hook = changer.transformer.register_forward_pre_hook(
            lambda module, arguments, named: starts.append(named["hidden_states"]), with_kwargs=True
        )
        noise = torch.randn(1, 4, 1, 4, 8, generator=seeded(1))
        latents_of(changer, picture, strength=0.5, latents=noise, guidance_scale=1)
        hook.remove()
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
        with torch.no_grad():
            clean = changer.encode_picture(pixels)
        level = float(changer.scheduler.sigmas[2])
        assert 0 < level < 1 and len(starts) == 2
        torch.testing.assert_close(starts[0], (1 - level) * clean + level * noise, **SAME)

    @pytest.mark.parametrize("strength, steps", [(0.25, 1), (0.5, 2), (0.75, 3), (1.0, 4)])
    def test_strength_is_the_part_of_the_steps_that_is_run(self, changer, picture, strength, steps):
        run_steps = []

        def count(pipe, step, time, tensors):
            run_steps.append(step)

        latents_of(changer, picture, strength=strength, callback_on_step_end=count)
        assert run_steps == list(range(steps)) and changer.num_timesteps == steps

    @pytest.mark.parametrize("strength", [0, -0.5, 1.01, "half", float("nan")])
    def test_a_strength_that_means_nothing_is_refused(self, changer, picture, strength):
        with pytest.raises(ValueError, match="above 0 and at most 1; nearest"):
            latents_of(changer, picture, strength=strength)


class TestPictureInput:
    def test_every_form_of_a_picture_means_the_same(self, changer, picture):
        array = np.asarray(picture).astype(np.float32) / 255
        tensor = torch.from_numpy(array).permute(2, 0, 1)
        expected = latents_of(changer, picture, strength=0.5)
        for form in ([picture], array, array[None], tensor, tensor[None], picture.convert("RGBA")):
            torch.testing.assert_close(latents_of(changer, form, strength=0.5), expected, **SAME)

    def test_a_picture_of_another_size_is_resized_to_the_size_of_the_call(self, changer, picture):
        assert latents_of(changer, picture.resize((50, 70)), strength=0.5).shape == (1, 4, 1, 4, 8)
        made = changer("a star", picture, num_inference_steps=2, generator=seeded(0)).images[0]
        assert made.size == (64, 64)  # the tiny model's own

    def test_picture_i_of_a_batch_equals_the_single_run(self, changer, picture):
        pictures = [picture, picture.rotate(180)]
        options = {"strength": 0.5, "num_inference_steps": 4, "output_type": "latent", **SIZE}
        prompts, seeds = ["a red star", "a ring"], [5, 6, 7, 8]
        generators = [seeded(seed) for seed in seeds]
        batch = changer(prompts, pictures, num_images_per_prompt=2, generator=generators, **options).images
        for index, seed in enumerate(seeds):
            alone = changer(prompts[index // 2], pictures[index // 2], generator=seeded(seed), **options).images
            torch.testing.assert_close(batch[index : index + 1], alone, **SAME)

    @pytest.mark.parametrize(
        "image, message",
        [
            (None, "`image` is missing"),
            ([], "`image` is missing"),
            ("picture.png", "`image` of type str cannot be read"),
            (torch.zeros(3, 3, 32, 64), "holds 3 images for 1 prompts .1 samples.; pass 1"),
        ],
    )
    def test_what_is_no_picture_is_refused_by_name(self, changer, image, message):
        with pytest.raises(ValueError, match=message):
            latents_of(changer, image)

    def test_a_pipeline_without_a_vae_says_so(self, text_pipe, picture):
        with pytest.raises(ValueError, match="without a VAE"):
            latents_of(PTDiTImg2ImgPipeline(**{**text_pipe.components, "vae": None}), picture)


class TestMask:
    def test_what_the_mask_leaves_out_stays_and_the_rest_is_made_new(self, painter, picture, mask):
        out = latents_of(painter, picture, mask)
        with torch.no_grad():
            pixels = painter.image_processor.preprocess(picture, 32, 64)
            known = painter.encode_picture(pixels)
        torch.testing.assert_close(out[..., :4], known[..., :4], **SAME)
        assert (out[..., 4:] - known[..., 4:]).abs().max() > 0.1

    def test_a_white_mask_is_picture_to_picture_and_a_black_one_gives_the_picture(self, painter, changer, picture):
        white = latents_of(painter, picture, Image.new("L", picture.size, 255), strength=0.5)
        torch.testing.assert_close(white, latents_of(changer, picture, strength=0.5), **SAME)
        black = latents_of(painter, picture, Image.new("L", picture.size, 0))
        with torch.no_grad():
            known = painter.encode_picture(painter.image_processor.preprocess(picture, 32, 64))
        torch.testing.assert_close(black, known, **SAME)

    def test_every_form_of_a_mask_means_the_same(self, painter, picture, mask):
        array = np.asarray(mask).astype(np.float32) / 255
        expected = latents_of(painter, picture, mask)
        for form in ([mask], array, torch.from_numpy(array), torch.from_numpy(array)[None, None] * 0.6):
            assert torch.equal(latents_of(painter, picture, form), expected)

    def test_a_callback_sees_and_may_change_the_mask(self, painter, picture, mask):
        shapes = []

        def everything_stays(pipe, step, time, tensors):
            shapes.append({name: tuple(value.shape) for name, value in tensors.items()})
            return {"mask": torch.zeros_like(tensors["mask"])}

        names = ["mask", "image_latents", "noise"]
        out = latents_of(
            painter, picture, mask, callback_on_step_end=everything_stays, callback_on_step_end_tensor_inputs=names
        )
        assert shapes[0] == {"mask": (1, 1, 1, 4, 8), "image_latents": (1, 4, 1, 4, 8), "noise": (1, 4, 1, 4, 8)}
        with torch.no_grad():
            known = painter.encode_picture(painter.image_processor.preprocess(picture, 32, 64))
        torch.testing.assert_close(out, known, **SAME)

    def test_a_crop_around_the_mask_leaves_the_rest_of_the_picture_untouched(self, painter):
        pixels = np.random.default_rng(1).integers(0, 256, (96, 96, 3), dtype=np.uint8)
        mask = Image.new("L", (96, 96), 0)
        mask.paste(255, (40, 40, 60, 60))
        options = {"height": 32, "width": 32, "num_inference_steps": 2, "generator": seeded(0)}
        made = painter("a star", Image.fromarray(pixels), mask, padding_mask_crop=4, **options).images[0]
        outside = np.asarray(mask) == 0
        assert made.size == (96, 96) and np.array_equal(np.asarray(made)[outside], pixels[outside])
        assert not np.array_equal(np.asarray(made)[~outside], pixels[~outside])

    def test_a_crop_of_something_that_is_no_pil_picture_is_refused(self, painter, picture, mask):
        with pytest.raises(ValueError, match="padding_mask_crop=4 needs one PIL image"):
            painter("a star", [picture], mask, padding_mask_crop=4)
        with pytest.raises(ValueError, match="`mask_image` is missing"):
            latents_of(painter, picture)


OTHER_SCHEDULERS = {
    "heun": FlowMatchHeunDiscreteScheduler(shift=1.0),
    "unipc": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
    "dpm": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0),
}


class TestSchedulers:
    @pytest.mark.parametrize("name", OTHER_SCHEDULERS)
    def test_other_flow_matching_schedulers_go_to_the_same_picture(self, text_pipe, painter, picture, mask, name):
        """The paths of the solvers meet as the steps grow; their start is the same noise."""
        parts = {**text_pipe.components, "scheduler": OTHER_SCHEDULERS[name]}
        other = PTDiTPipeline(**parts)
        other.set_progress_bar_config(disable=True)
        parts["scheduler"] = FlowMatchEulerDiscreteScheduler()
        euler = PTDiTPipeline(**parts)
        euler.set_progress_bar_config(disable=True)
        reference = latents_of(euler, num_inference_steps=40)
        moved = (reference - torch.randn(1, 4, 1, 4, 8, generator=seeded(0))).std()
        assert (latents_of(other, num_inference_steps=20) - reference).std() < 0.1 * moved
        inpainter = PTDiTInpaintPipeline(**{**parts, "scheduler": OTHER_SCHEDULERS[name]})
        inpainter.set_progress_bar_config(disable=True)
        with torch.no_grad():
            known = painter.encode_picture(painter.image_processor.preprocess(picture, 32, 64))
        out = latents_of(inpainter, picture, mask, strength=0.5)
        torch.testing.assert_close(out[..., :4], known[..., :4], **SAME)

    def test_given_times_are_the_times_the_network_sees_whatever_the_shift(self, text_pipe):
        for scheduler in (FlowMatchEulerDiscreteScheduler(shift=3.0), text_pipe.scheduler):
            pipe = PTDiTPipeline(**{**text_pipe.components, "scheduler": scheduler})
            times = pipe.prepare_timesteps(30, None, 128, 128, 1, [1000.0, 600.0, 250.0])
            torch.testing.assert_close(times, torch.tensor([1000.0, 600.0, 250.0]), atol=1e-3, rtol=0)
            torch.testing.assert_close(scheduler.sigmas, torch.tensor([1.0, 0.6, 0.25, 0.0]), atol=1e-6, rtol=0)

    def test_a_scheduler_that_takes_no_sigmas_says_so(self, text_pipe):
        pipe = PTDiTPipeline(**{**text_pipe.components, "scheduler": OTHER_SCHEDULERS["heun"]})
        with pytest.raises(ValueError, match="FlowMatchHeun.*takes no `sigmas`"):
            latents_of(pipe, sigmas=[1.0, 0.5])

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"timesteps": [1000, 500], "sigmas": [1.0, 0.5]}, "both given"),
            ({"timesteps": [500, 1000]}, "must fall strictly"),
            ({"timesteps": []}, "must fall strictly"),
        ],
    )
    def test_times_that_do_not_fall_are_refused(self, text_pipe, arguments, message):
        with pytest.raises(ValueError, match=message):
            latents_of(text_pipe, **arguments)


def test_rescaled_guidance_has_the_spread_of_the_positive_prediction():
    from ptdit_diffusers.core.sampling import apply_guidance

    flow = torch.randn(4, 4, 1, 4, 8, generator=seeded(0))
    plain, full, half = (apply_guidance(flow, 5.0, rescale) for rescale in (0.0, 1.0, 0.5))
    positive = flow.chunk(2)[1]
    torch.testing.assert_close(full.flatten(1).std(1), positive.flatten(1).std(1))
    torch.testing.assert_close(half, (plain + full) / 2)


def test_rescaled_guidance_reaches_the_loop(text_pipe):
    strong = latents_of(text_pipe, guidance_scale=9.0)
    assert not torch.equal(latents_of(text_pipe, guidance_scale=9.0, guidance_rescale=0.7), strong)


def test_a_pipeline_made_of_another_one_leaves_number_formats_as_they_are(tiny_model_folder):
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder, dtype=torch.bfloat16)
    before = {name: weight.dtype for name, weight in pipe.transformer.named_parameters()}
    assert set(before.values()) == {torch.bfloat16, torch.float32}
    other = PTDiTImg2ImgPipeline.from_pipe(pipe)
    assert other.vae is pipe.vae and other.vae.dtype == torch.bfloat16
    assert {name: weight.dtype for name, weight in other.transformer.named_parameters()} == before
    assert PTDiTInpaintPipeline.from_pipe(pipe, dtype=torch.float32).transformer.dtype == torch.float32
