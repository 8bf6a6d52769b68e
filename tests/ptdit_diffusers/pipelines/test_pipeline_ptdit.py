"""The pipeline: the end-to-end golden, the sampler's goldens, and every argument of a call."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import PipelineCallback
from safetensors.torch import load_file
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

from ptdit_diffusers.core.sampling import apply_guidance
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline, PTDiTPipelineOutput

GOLDEN = Path(__file__).parents[2] / "golden"
TIMESTEP_CASES = json.loads((GOLDEN / "rflow_timesteps.json").read_text(encoding="utf-8"))["cases"]
# Limits of the goldens; the reference's own float32 rounding is 6e-6 (end to end), 1e-6 (sampler).
LATENT_LIMIT, TIMESTEP_LIMIT, TRAJECTORY_LIMIT = 2e-4, 1e-3, 1e-5
SAME = {"atol": 2e-5, "rtol": 0}  # equal up to the order of float32 sums, which the batch size may change
PROMPTS = ["A Red Sphere  (left)", "one cat"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def letter_tokenizer() -> PreTrainedTokenizerFast:
    """The golden's stand-in: 3 + code point mod 61 for each letter, 1 at the end."""
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {a: 3 + ord(a) % 61 for a in "abcdefghijklmnopqrstuvwxyz "}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(GOLDEN / "pipeline_e2e.safetensors")


@pytest.fixture(scope="module")
def rflow() -> dict[str, Tensor]:
    return load_file(GOLDEN / "rflow.safetensors")


@pytest.fixture(scope="module")
def golden_pipe(golden) -> PTDiTPipeline:
    config = T5Config(
        vocab_size=64,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )
    text_encoder = T5EncoderModel(config).eval()
    weights = {key.removeprefix("t5."): value for key, value in golden.items() if key.startswith("t5.")}
    text_encoder.load_state_dict({**weights, "encoder.embed_tokens.weight": weights["shared.weight"]})
    windows = {"window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4), "num_windows": 4}
    transformer = PTDiTTransformer3DModel(4, 12, num_layers=2, caption_channels=32, **windows).eval()
    weights = load_file(GOLDEN / "dit_weights.safetensors")
    transformer.load_state_dict({key: value for key, value in weights.items() if key != "pos_embed.pos_embed"})
    vae = AutoencoderKLOpenSoraPlan(hidden_size=32, hidden_size_mult=(1, 2, 1, 1), num_res_blocks=1).eval()
    weights = load_file(GOLDEN / "causalvae.safetensors")
    vae.load_state_dict({key[8:]: value.float() for key, value in weights.items() if key.startswith("weights.")})
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=1024)
    pipe = PTDiTPipeline(letter_tokenizer(), text_encoder, vae, transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def pipe(golden_pipe) -> PTDiTPipeline:
    """A fresh pipeline over the golden's components; makes 64 x 64 pixels in two steps by default."""
    fresh = PTDiTPipeline(**golden_pipe.components)
    fresh.set_progress_bar_config(disable=True)
    yield fresh
    fresh.transformer.reset_windows()
    fresh.transformer.set_windows(proxy_mode="mean")


def run(pipe: PTDiTPipeline, prompt: str | list[str] | None = "one cat", **arguments) -> Tensor:
    defaults = {"height": 64, "width": 64, "num_inference_steps": 2, "output_type": "latent", "generator": seeded(0)}
    return pipe(prompt, **{**defaults, **arguments}, return_dict=False)[0]


class CallRecorder:
    """Keyword arguments of every call of a transformer, while the pipeline runs for real."""

    def __init__(self, pipe: PTDiTPipeline):
        self.calls = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: self.calls.append(kwargs), with_kwargs=True
        )
        self.stop = hook.remove


@pytest.fixture
def calls(pipe) -> list[dict]:
    recorder = CallRecorder(pipe)
    yield recorder.calls
    recorder.stop()


class TestGoldens:
    def test_prompts_are_embedded_as_by_the_reference(self, golden_pipe, golden):
        with torch.no_grad():
            embeds, mask, negative_embeds, negative_mask = golden_pipe.encode_prompt(PROMPTS, max_sequence_length=24)
        reference, reference_mask = (golden[f"prompt_{part}_cond_then_uncond"] for part in ("embeds", "mask"))
        length = embeds.shape[1]
        assert torch.equal(mask, reference_mask[:2, :length].bool()) and not reference_mask[:2, length:].any()
        assert (embeds - reference[:2, :length])[mask].abs().max() <= TRAJECTORY_LIMIT
        assert negative_mask.tolist() == [[True], [True]]
        assert (negative_embeds - reference[2:, :1]).abs().max() <= TRAJECTORY_LIMIT

    def test_every_step_and_the_final_latents_equal_the_reference(self, golden_pipe, golden):
        steps, times = [], []

        def keep(pipe, step, timestep, tensors):
            steps.append(tensors["latents"])
            times.append(timestep.item())

        final = golden_pipe(
            PROMPTS,
            num_inference_steps=6,
            latents=golden["noise"],
            max_sequence_length=24,
            output_type="latent",
            callback_on_step_end=keep,
        ).images
        assert np.abs(np.array(times) - golden["model_timesteps"][:, 0].numpy()).max() <= TIMESTEP_LIMIT
        reference = torch.cat([golden["latents_before_each_step"][1:], golden["final_latents"][None]])
        assert (torch.stack(steps) - reference).abs().max() <= LATENT_LIMIT
        assert torch.equal(final, steps[-1])

    def test_pictures_equal_the_reference_within_one_level(self, golden_pipe, golden):
        pictures = golden_pipe(PROMPTS, num_inference_steps=6, latents=golden["noise"], max_sequence_length=24).images
        pixels = np.stack([np.asarray(picture, dtype=int) for picture in pictures])
        assert np.abs(pixels - golden["returned_uint8"][:, :, 0].numpy().astype(int)).max() <= 1

    @pytest.mark.parametrize("case", TIMESTEP_CASES, ids=lambda case: case["key"].partition(".")[2])
    def test_timesteps_equal_the_reference(self, golden_pipe, case):
        scheduler = golden_pipe.scheduler
        if case["kwargs_dtype"] == "float32":
            times = golden_pipe.prepare_timesteps(case["N"], None, case["H"], case["W"], case["F"])
        else:  # the reference rounds the ratio here, the pipeline never does; the schedule itself is the same
            scheduler.set_timesteps(sigmas=levels(case["N"]), mu=math.log(rounded_ratio(case)))
            times = scheduler.timesteps
        assert (times - torch.tensor(case["timesteps"])).abs().max() <= TIMESTEP_LIMIT

    @pytest.mark.parametrize(
        "name, size, frames",
        [
            ("img1024_N10", 1024, 1),
            ("img512_N10", 512, 1),
            ("vid17x512_N10", 512, 17),
            ("vid17x512_N10_bf16kw", 512, 17),
        ],
    )
    def test_trajectories_equal_the_reference(self, golden_pipe, rflow, name, size, frames):
        case = {key.removeprefix(f"traj.{name}."): value for key, value in rflow.items() if f"traj.{name}." in key}
        times = golden_pipe.prepare_timesteps(10, None, size, size, frames)
        if name.endswith("bf16kw"):
            ratio = rounded_ratio({"H": size, "W": size, "F": frames})
            golden_pipe.scheduler.set_timesteps(sigmas=levels(10), mu=math.log(ratio))
            times = golden_pipe.scheduler.timesteps
        for latents, reference in zip(trajectory(golden_pipe, case, times), case["latents"][1:], strict=True):
            assert (latents - reference).abs().max() <= TRAJECTORY_LIMIT

    def test_frames_that_are_put_back_after_each_step_equal_the_masked_reference(self, golden_pipe, rflow):
        """The pipeline has no frame mask; a `callback_on_step_end` that puts given frames back does the same."""
        case = {key.removeprefix("traj.masked_N10."): value for key, value in rflow.items()}
        given = case["mask"][:, None, :, None, None] == 0
        times = golden_pipe.prepare_timesteps(10, None, 512, 512, 17)
        *_, last = trajectory(golden_pipe, case, times, lambda latents: torch.where(given, case["noise"], latents))
        assert (last - case["final"]).abs().max() <= TRAJECTORY_LIMIT


def trajectory(pipe, case, times, on_step_end=lambda latents: latents):
    """Latents after each step of guidance 4 with the analytic velocity of the recorded trajectories."""
    text = torch.cat([case["embeds_uncond"], case["embeds_cond"]]).mean(dim=(1, 2)).reshape(-1, 1, 1, 1, 1)
    latents = case["noise"]
    for time in times:
        batch = torch.cat([latents, latents])
        velocity = 0.6 * torch.sin(1.7 * batch + 0.004 * time) - 0.25 * batch + 0.5 * text
        sample = torch.cat([velocity, 1000 * batch + 7], dim=1)  # the second half must not count
        flow = apply_guidance(pipe.transformer.flow(sample), 4.0)
        latents = on_step_end(pipe.scheduler.step(flow, time, latents, return_dict=False)[0])
        yield latents


def levels(steps: int) -> list[float]:
    return [1 - step / steps for step in range(steps)]


def rounded_ratio(case: dict) -> float:
    space, time = case["H"] * case["W"] / 512**2, case["F"] // 17 * 5 or 1
    return float(torch.tensor(space, dtype=torch.bfloat16).sqrt() * torch.tensor(time, dtype=torch.bfloat16).sqrt())


class TestNoise:
    def test_picture_i_of_a_batch_equals_the_single_run_with_its_generator(self, pipe):
        prompts = ["one cat", "a red sphere", "left"]
        batch = run(pipe, prompts, generator=[seeded(seed) for seed in (5, 6, 7)])
        for index, seed in enumerate((5, 6, 7)):
            single = run(pipe, prompts[index], generator=seeded(seed))
            torch.testing.assert_close(batch[index : index + 1], single, **SAME)

    def test_the_first_picture_of_one_generator_does_not_depend_on_the_batch_size(self, pipe):
        batch = run(pipe, num_images_per_prompt=3, generator=seeded(5))
        torch.testing.assert_close(batch[:1], run(pipe, generator=seeded(5)), **SAME)
        assert (batch[0] - batch[1]).abs().max() > 0.1

    def test_pictures_per_prompt_repeat_each_prompt_in_place(self, pipe):
        repeated = run(pipe, PROMPTS, num_images_per_prompt=2, generator=[seeded(seed) for seed in range(4)])
        spelled_out = run(pipe, np.repeat(PROMPTS, 2).tolist(), generator=[seeded(seed) for seed in range(4)])
        torch.testing.assert_close(repeated, spelled_out, **SAME)

    def test_given_latents_are_the_noise_that_would_have_been_sampled(self, pipe):
        latents = torch.randn(1, 4, 1, 8, 8, generator=seeded(3))
        assert torch.equal(run(pipe, latents=latents, generator=None), run(pipe, generator=seeded(3)))

    def test_latents_stay_float32_and_time_is_not_rounded_when_the_transformer_is_bfloat16(self, pipe, calls):
        kept = []

        def keep(pipe, step, timestep, tensors):
            kept.append(tensors["latents"].dtype)

        try:
            pipe.transformer.to(torch.bfloat16)
            run(pipe, num_inference_steps=3, callback_on_step_end=keep)
        finally:
            pipe.transformer.to(torch.float32)
        assert kept == [torch.float32] * 3
        assert [call["hidden_states"].dtype for call in calls] == [torch.bfloat16] * 3
        assert [call["timestep"].dtype for call in calls] == [torch.float32] * 3


class TestText:
    def test_guidance_runs_once_per_step_with_the_negative_prompt_first(self, pipe, calls):
        embeds, _, negative_embeds, _ = pipe.encode_prompt("one cat", "left")
        run(pipe, negative_prompt="left")
        assert [len(call["hidden_states"]) for call in calls] == [2, 2]
        torch.testing.assert_close(calls[0]["encoder_hidden_states"][0, :5], negative_embeds[0], **SAME)
        torch.testing.assert_close(calls[0]["encoder_hidden_states"][1], embeds[0], **SAME)

    @pytest.mark.parametrize("guidance_scale", [1.0, 0.5, 0.0])
    def test_guidance_of_one_or_less_leaves_the_negative_prompt_out(self, pipe, calls, guidance_scale):
        alone = run(pipe, guidance_scale=guidance_scale)
        assert [len(call["hidden_states"]) for call in calls] == [1, 1]
        with pytest.warns(UserWarning, match="guidance is off"):
            assert torch.equal(run(pipe, guidance_scale=guidance_scale, negative_prompt="left"), alone)

    def test_tokens_that_every_sample_masks_are_not_computed(self, pipe, calls):
        run(pipe, ["one cat", "left"])
        text, mask = calls[0]["encoder_hidden_states"], calls[0]["encoder_attention_mask"]
        assert text.shape[1] == len("one cat") + 1
        assert mask.dtype == torch.bool and mask.sum(dim=1).tolist() == [1, 1, 8, 5]

    def test_no_mask_is_passed_when_nothing_is_masked(self, pipe, calls):
        run(pipe, ["left", "ring"], guidance_scale=1)
        assert calls[0]["encoder_attention_mask"] is None

    def test_embeddings_with_masked_padding_give_the_same_picture_as_the_prompt(self, pipe):
        names = "prompt_embeds prompt_attention_mask negative_prompt_embeds negative_prompt_attention_mask".split()
        text = dict(zip(names, pipe.encode_prompt(["one cat", "left"]), strict=True))
        for name in text:
            padding = torch.full_like(text[name], 0 if "mask" in name else 99)
            text[name] = torch.cat([text[name], padding], dim=1)
        from_embeds = run(pipe, None, **text, num_images_per_prompt=2)
        torch.testing.assert_close(from_embeds, run(pipe, ["one cat", "left"], num_images_per_prompt=2), **SAME)

    def test_one_negative_prompt_serves_all_prompts_and_a_list_one_each(self, pipe):
        together = run(pipe, ["one cat", "ring"], negative_prompt="left")
        one_each = run(pipe, ["one cat", "ring"], negative_prompt=["left", "left"])
        torch.testing.assert_close(together, one_each, **SAME)
        assert (run(pipe, negative_prompt="left") - run(pipe)).abs().max() > 1e-3

    def test_cleaning_can_be_switched_off(self, pipe):
        cleaned, plain = (pipe.encode_prompt("(one) cat", clean_caption=clean)[0] for clean in (True, False))
        assert cleaned.shape[1] == len("one cat") + 1 and plain.shape[1] == len("(one) cat") + 1

    def test_a_prompt_that_is_too_long_is_cut_with_a_warning(self, pipe):
        with pytest.warns(UserWarning, match="leaves room for 3"):
            assert pipe.encode_prompt("one cat", max_sequence_length=4)[0].shape[1] == 4

    def test_a_pipeline_without_other_components_encodes_and_one_without_text_encoder_draws(self, pipe):
        parts = {"vae": None, "transformer": None, "scheduler": None}
        encoder = PTDiTPipeline(pipe.tokenizer, pipe.text_encoder, **parts)
        embeds, mask, negative_embeds, negative_mask = encoder.encode_prompt("one cat")
        without_text = PTDiTPipeline(None, None, pipe.vae, pipe.transformer, pipe.scheduler)
        without_text.set_progress_bar_config(disable=True)
        latents = run(without_text, None, prompt_embeds=embeds, negative_prompt_embeds=negative_embeds)
        torch.testing.assert_close(latents, run(pipe), **SAME)
        with pytest.raises(ValueError, match="without text encoder.*`negative_prompt_embeds` or guidance_scale=1"):
            run(without_text, None, prompt_embeds=embeds)
        with pytest.raises(ValueError, match="without a transformer"):
            encoder("one cat")


class TestCallbacks:
    def test_a_callback_sees_what_it_asks_for_and_may_replace_it(self, pipe):
        names = list(pipe._callback_tensor_inputs)
        calls = []

        def empty_at_the_end(pipe, step, timestep, tensors):
            calls.append((step, list(tensors)))
            assert torch.equal(timestep, pipe.current_timestep)
            return {"latents": torch.zeros_like(tensors["latents"]), "unknown": 1} if step == 1 else None

        result = run(pipe, callback_on_step_end=empty_at_the_end, callback_on_step_end_tensor_inputs=names)
        assert calls == [(0, names), (1, names)] and not result.any()
        assert pipe.num_timesteps == 2 and pipe.current_timestep is None

    def test_a_callback_may_stop_the_run_and_what_is_there_is_returned(self, pipe):
        steps = []

        def stop(pipe, step, timestep, tensors):
            steps.append(tensors["latents"])
            pipe._interrupt = True

        assert torch.equal(run(pipe, num_inference_steps=4, callback_on_step_end=stop), steps[0])
        assert len(steps) == 1
        run(pipe)
        assert pipe.interrupt is False

    def test_a_callback_object_may_switch_guidance_off_half_way(self, pipe, calls):
        class GuidanceOff(PipelineCallback):
            tensor_inputs = ["prompt_embeds"]

            def callback_fn(self, pipeline, step_index, timestep, callback_kwargs):
                pipeline._guidance_scale = 1.0
                return callback_kwargs

        run(pipe, callback_on_step_end=GuidanceOff())
        assert [len(call["hidden_states"]) for call in calls] == [2, 1]


class TestOutput:
    def test_a_picture_comes_in_every_form(self, pipe):
        shown = pipe("one cat", height=64, width=96, num_inference_steps=1, generator=seeded(0))
        assert isinstance(shown, PTDiTPipelineOutput) and shown.frames is None
        assert shown.images[0].size == (96, 64)
        size = {"height": 64, "width": 96, "num_inference_steps": 1}
        array, tensor = run(pipe, **size, output_type="np"), run(pipe, **size, output_type="pt")
        assert array.shape == (1, 64, 96, 3) and tensor.shape == (1, 3, 64, 96)
        assert np.abs(array - tensor.permute(0, 2, 3, 1).numpy()).max() == 0
        assert np.abs(array[0] * 255 - np.asarray(shown.images[0])).max() <= 0.5
        assert run(pipe, **size).shape == (1, 4, 1, 8, 12)

    def test_a_video_comes_in_every_form(self, pipe):
        shown = pipe(["one cat", "ring"], height=32, width=32, num_frames=5, num_inference_steps=1)
        assert shown.images is None and [len(video) for video in shown.frames] == [5, 5]
        assert shown.frames[1][4].size == (32, 32)
        size = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1}
        assert run(pipe, **size, output_type="np").shape == (1, 5, 32, 32, 3)
        assert run(pipe, **size, output_type="pt").shape == (1, 5, 3, 32, 32)
        assert run(pipe, **size).shape == (1, 4, 2, 4, 4)

    @pytest.mark.parametrize("output_type", ["latent", "pil"])
    def test_a_result_that_is_not_a_number_is_an_error_and_not_a_black_picture(self, pipe, output_type):
        latents = torch.randn(2, 4, 1, 8, 8, generator=seeded(0))
        latents[1, 0, 0, 0, 0] = float("nan")
        with pytest.raises(RuntimeError, match="latents of 1 of 2 results hold NaN.*torch.float32"):
            run(pipe, ["ring", "one cat"], latents=latents, output_type=output_type, generator=None)
        with pytest.raises(RuntimeError, match="decoded pixels of 1 of 1 results"):
            pipe.decode_latents(torch.full((1, 4, 1, 8, 8), 1e38), "pt")


class TestSizesAndWindows:
    def test_the_default_size_is_the_one_where_the_trained_windows_fit(self, pipe):
        assert pipe.default_size() == (128, 128)
        official = {"window_size": (1, 8, 8), "proxy_ratio": (1, 8, 8), "num_windows": 64}
        small = PTDiTTransformer3DModel(2, 8, num_layers=1, caption_channels=8, **official)
        assert PTDiTPipeline(None, None, None, small, pipe.scheduler).default_size() == (1024, 1024)

    @pytest.mark.parametrize(
        "size, arguments, expected",
        [
            ((128, 128), {}, ((1, 4, 4), (1, 4, 4))),
            ((64, 128), {}, ((1, 3, 3), (1, 3, 3))),
            ((64, 64), {}, ((1, 2, 2), (1, 2, 2))),
            ((64, 64), {"window_size": (1, 4, 2)}, ((1, 4, 2), (1, 4, 2))),
            ((64, 64), {"proxy_ratio": (1, 1, 1)}, ((1, 2, 2), (1, 1, 1))),
            ((64, 64), {"window_size": [1, 1, 2], "proxy_ratio": [1, 1, 1]}, ((1, 1, 2), (1, 1, 1))),
        ],
    )
    def test_windows_are_chosen_for_the_size_or_taken_as_given(self, pipe, calls, size, arguments, expected):
        run(pipe, height=size[0], width=size[1], num_inference_steps=1, **arguments)
        assert (calls[0]["window_size"], calls[0]["proxy_ratio"]) == expected

    def test_a_model_with_added_conditions_gets_the_picture_size(self, pipe):
        sizes = {"num_layers": 1, "caption_channels": 32, "window_size": (1, 4, 4), "proxy_ratio": (1, 4, 4)}
        torch.manual_seed(0)
        conditioned = PTDiTTransformer3DModel(3, 16, sample_size=128, num_windows=4, **sizes).eval()
        for parameter in conditioned.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
        pipe = PTDiTPipeline(**{**pipe.components, "transformer": conditioned})
        pipe.set_progress_bar_config(disable=True)
        calls = CallRecorder(pipe).calls
        run(pipe, height=64, width=128)
        assert calls[0]["resolution"].tolist() == [[64, 128]] and calls[0]["aspect_ratio"].tolist() == [[0.5]]

    def test_random_proxies_repeat_with_the_seed(self, pipe):
        pipe.transformer.set_windows(proxy_mode="random")
        assert torch.equal(run(pipe, generator=seeded(1)), run(pipe, generator=[seeded(1)]))

    def test_random_proxies_of_a_batch_equal_the_single_runs(self, pipe):
        pipe.transformer.set_windows(proxy_mode="random")
        together = run(pipe, prompt=["a red circle", "a red circle"], generator=[seeded(1), seeded(2)])
        for index, seed in enumerate((1, 2)):
            alone = run(pipe, prompt="a red circle", generator=[seeded(seed)])
            assert torch.allclose(together[index : index + 1], alone, atol=1e-4)

    def test_a_scheduler_without_dynamic_shifting_keeps_its_own_shift(self, pipe):
        pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
        times = pipe.prepare_timesteps(4, None, 64, 64, 1)
        assert times.tolist() == pytest.approx([1000, 900, 750, 500])

    def test_given_noise_levels_replace_the_number_of_steps(self, pipe, calls):
        run(pipe, height=512, width=512, sigmas=[1.0, 0.25], window_size=(1, 8, 8))
        assert [call["timestep"][0].item() for call in calls] == [1000, 250]


class TestErrors:
    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"height": 1000}, "height=1000 is not a multiple of 16 .VAE 8 x patch 2.; nearest: 992 or 1008"),
            ({"width": 8}, "width=8 is not a multiple of 16 .*; nearest: 16 or 32"),
            ({"width": -16}, "width=-16 is not a multiple of 16"),
            ({"height": 64.0}, "height=64.0 must be an integer"),
            ({"num_frames": 4}, "num_frames=4 is not of the form 4n . 1 .*; nearest: 1 or 5"),
            ({"num_frames": 0}, "num_frames=0 .*nearest: 1 or 5"),
            ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
            ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must"),
            ({"max_sequence_length": 0}, "max_sequence_length=0 must"),
            ({"sigmas": [0.5, 1.0]}, "must fall strictly"),
            ({"sigmas": []}, "must fall strictly"),
            ({"window_size": (1, 0, 4)}, "window_size=.1, 0, 4. must be"),
            ({"proxy_ratio": "trained"}, "proxy_ratio='trained' must be"),
            ({"output_type": "jpg"}, "output_type='jpg' is unknown; choose one of pil, np, pt, latent"),
            ({"prompt": None}, "both None"),
            ({"prompt": 3}, "`prompt` must be a string or a list of strings, got int"),
            ({"prompt": []}, "`prompt` must be a string or a list"),
            ({"negative_prompt": ["left", "ring"]}, "has 2 members for a batch of 1; pass 1 or one string"),
            ({"negative_prompt": 1}, "`negative_prompt` must be"),
            ({"prompt_embeds": torch.zeros(1, 2, 32)}, "`prompt` and `prompt_embeds` were both given"),
            ({"prompt": None, "prompt_embeds": torch.zeros(2, 32)}, "shape .batch, tokens, 32., got .2, 32."),
            ({"prompt": None, "prompt_embeds": torch.zeros(1, 2, 8)}, "shape .batch, tokens, 32., got .1, 2, 8."),
            ({"prompt_attention_mask": torch.ones(1, 2)}, "given without `prompt_embeds`"),
            ({"negative_prompt_embeds": torch.zeros(2, 2, 32)}, "`negative_prompt_embeds` has 2 members"),
            ({"generator": [seeded(0)] * 2}, "`generator` has 2 members for a batch of 1"),
            ({"latents": torch.zeros(1, 4, 8, 8)}, "must have shape .1, 4, 1, 8, 8. for this call, got .1, 4, 8, 8."),
            ({"callback_on_step_end_tensor_inputs": ["pixels"]}, "'pixels'. are unknown; choose from"),
        ],
    )
    def test_what_is_not_legal_is_refused_with_the_value_and_the_rule(self, pipe, calls, arguments, message):
        with pytest.raises(ValueError, match=message):
            run(pipe, **{"prompt": "one cat", **arguments})
        assert not calls

    def test_a_mask_must_fit_and_keep_something(self, pipe):
        embeds = torch.zeros(1, 3, 32)
        with pytest.raises(ValueError, match="must have shape .1, 3., got .1, 2."):
            run(pipe, None, prompt_embeds=embeds, prompt_attention_mask=torch.ones(1, 2))
        with pytest.raises(ValueError, match="without a single kept token"):
            run(pipe, None, prompt_embeds=embeds, prompt_attention_mask=torch.zeros(1, 3))

    def test_pixels_without_a_vae_are_refused(self, pipe):
        pipe.vae = None
        with pytest.raises(ValueError, match='needs a VAE, but this pipeline has none; pass "latent"'):
            run(pipe, output_type="pil")


class TestLoading:
    def test_a_saved_pipeline_names_its_own_classes_as_diffusers_and_loads_again(self, tiny_model_folder, tmp_path):
        pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
        pipe.transformer = pipe.transformer.to(torch.float32)
        pipe.save_pretrained(tmp_path)
        index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
        assert index["_class_name"] == "PTDiTPipeline"
        assert index["transformer"] == ["diffusers", "PTDiTTransformer3DModel"]
        assert index["vae"] == ["diffusers", "AutoencoderKLOpenSoraPlan"]
        assert index["text_encoder"] == ["transformers", "T5EncoderModel"]
        again = PTDiTPipeline.from_pretrained(tmp_path)
        for one in (pipe, again):
            one.set_progress_bar_config(disable=True)
        assert pipe.default_size() == (64, 64)
        assert torch.equal(run(pipe, "a red circle"), run(again, "a red circle"))
