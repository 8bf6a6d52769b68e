"""The modular blocks: the pipeline's own numbers under CFG, every kind of guider, blocks alone, saving."""

import copy

import pytest
import torch
from diffusers import (
    AdaptiveProjectedGuidance,
    ClassifierFreeGuidance,
    ClassifierFreeZeroStarGuidance,
    DiffusionPipeline,
    FirstBlockCacheConfig,
    LayerSkipConfig,
    ModularPipeline,
    PerturbedAttentionGuidance,
    SkipLayerGuidance,
)
from torch import Tensor

from ptdit_diffusers import PTDiTBlocks, PTDiTModularPipeline, PTDiTPipeline

SAME = {"atol": 2e-5, "rtol": 0}
STEPS = 3


@pytest.fixture(scope="module")
def pipe(tiny_model_folder) -> PTDiTPipeline:
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    torch.manual_seed(0)
    for parameter in pipe.transformer.parameters():  # as built, the network's output is zero
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def modular(pipe, tiny_model_folder) -> PTDiTModularPipeline:
    modular = ModularPipeline.from_pretrained(str(tiny_model_folder))
    modular.update_components(**pipe.components)
    modular.set_progress_bar_config(disable=True)
    return modular


@pytest.fixture
def forwards(pipe, monkeypatch) -> list[int]:
    """Samples of each forward of the transformer."""
    sizes, forward = [], pipe.transformer.forward

    def count(hidden_states: Tensor, *rest, **named):
        sizes.append(len(hidden_states))
        return forward(hidden_states, *rest, **named)

    monkeypatch.setattr(pipe.transformer, "forward", count)
    return sizes


def run(pipe, prompt: str | list[str] | None = "a red star", **arguments) -> Tensor:
    defaults = {"num_inference_steps": STEPS, "output_type": "latent", "generator": torch.manual_seed(0)}
    if isinstance(pipe, ModularPipeline):
        return pipe(prompt=prompt, output="images", **{**defaults, **arguments})
    return pipe(prompt, **{**defaults, **arguments}).images


class TestLikeThePipeline:
    def test_an_ordinary_folder_makes_our_modular_pipeline(self, modular, tiny_model_folder):
        assert type(modular) is PTDiTModularPipeline and type(modular._blocks) is PTDiTBlocks
        again = PTDiTModularPipeline.from_pretrained(tiny_model_folder)
        assert type(again) is PTDiTModularPipeline and "transformer" in again.null_component_names
        again.load_components()
        assert again.null_component_names == []

    @pytest.mark.parametrize("prompt", ["a red star", ["a red star", "two small blue stars"]])
    def test_classifier_free_guidance_gives_the_numbers_of_the_pipeline(self, pipe, modular, prompt):
        arguments = {"negative_prompt": "green", "num_images_per_prompt": 2}
        torch.testing.assert_close(run(modular, prompt, **arguments), run(pipe, prompt, **arguments), **SAME)

    def test_without_guidance_the_negative_prompt_is_not_computed(self, pipe, modular, forwards):
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=1.0))
        without = modular(prompt="a red star", num_inference_steps=STEPS, generator=torch.manual_seed(0))
        assert without.get("negative_prompt_embeds") is None and forwards == [1] * STEPS
        expected = run(pipe, guidance_scale=1.0, output_type="pil")[0]
        assert without.get("images")[0].tobytes() == expected.tobytes()

    def test_given_times_sizes_and_windows_reach_the_network(self, pipe, modular):
        arguments = {"height": 32, "width": 64, "timesteps": [900.0, 500.0], "window_size": (1, 2, 1)}
        torch.testing.assert_close(run(modular, **arguments), run(pipe, **arguments), **SAME)

    def test_a_video_comes_under_its_own_name(self, modular):
        state = modular(prompt="a red star", num_frames=5, num_inference_steps=1, output_type="pt")
        assert state.get("images") is None and state.get("videos").shape == (1, 5, 3, 64, 64)

    def test_bad_input_is_refused_before_anything_is_computed(self, modular, monkeypatch):
        monkeypatch.setattr(modular, "encode_prompt", None)
        with pytest.raises(ValueError, match="height=33 is not a multiple of 16"):
            run(modular, height=33)
        with pytest.raises(ValueError, match="`prompt` and `prompt_embeds` are both None"):
            run(modular, None)


class TestGuiders:
    @pytest.mark.parametrize(
        "guider, predictions",
        [
            (AdaptiveProjectedGuidance(guidance_scale=4.0, eta=0.0), 2),
            (ClassifierFreeZeroStarGuidance(guidance_scale=4.0), 2),
            (SkipLayerGuidance(4.0, skip_layer_config=LayerSkipConfig([1]), skip_layer_guidance_stop=1.0), 3),
            (PerturbedAttentionGuidance(4.0, perturbed_guidance_layers=[1], perturbed_guidance_stop=1.0), 3),
        ],
        ids=lambda value: type(value).__name__ if not isinstance(value, int) else "",
    )
    def test_a_guider_gets_its_predictions_and_leaves_the_network_as_it_was(
        self, pipe, modular, forwards, guider, predictions
    ):
        plain = run(modular)
        forwards.clear()
        modular.update_components(guider=guider)
        guided = run(modular)
        assert STEPS * predictions - 2 <= len(forwards) <= STEPS * predictions  # some begin after the first step
        assert torch.isfinite(guided).all() and not torch.allclose(guided, plain, atol=1e-3)
        torch.testing.assert_close(run(modular), guided, **SAME)
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0))
        torch.testing.assert_close(run(modular), plain, **SAME)

    @pytest.mark.parametrize(
        "guider, message",
        [
            (ClassifierFreeGuidance(float("nan")), r"ClassifierFreeGuidance\(guidance_scale\)=nan must be a finite"),
            (ClassifierFreeGuidance(-1.0), "=-1.0 must be a finite number of at least 0; nearest: 0.0"),
            (ClassifierFreeGuidance(4.0, guidance_rescale=2.0), "=2.0 must be a number from 0 to 1; nearest: 1.0"),
            (AdaptiveProjectedGuidance(float("inf")), r"AdaptiveProjectedGuidance\(guidance_scale\)=inf"),
        ],
    )
    def test_a_guider_with_scales_that_mean_nothing_is_refused(self, modular, forwards, guider, message):
        modular.update_components(guider=guider)
        with pytest.raises(ValueError, match=message):
            run(modular)
        assert not forwards

    def test_a_second_call_at_the_same_time_is_refused_with_a_remedy_that_works(self, modular):
        failures = []

        def call_again(*_):
            with pytest.raises(RuntimeError, match="give each thread a pipeline of its own") as failure:
                run(modular)
            failures.append(str(failure.value))

        hook = modular.transformer.register_forward_hook(call_again)
        once = run(modular)
        hook.remove()
        remedy = failures[0].partition("shares the weights: ")[2].rstrip(".")
        names = {"pipe": modular, "copy": copy}
        exec(remedy, names)  # noqa: S102 (our own message)
        other = names["other"]
        other.set_progress_bar_config(disable=True)
        assert other.transformer is modular.transformer and other.scheduler is not modular.scheduler
        assert other.guider is not modular.guider
        torch.testing.assert_close(run(other), once, **SAME)

    def test_guidance_in_a_part_of_the_steps_needs_no_second_prediction_in_the_others(self, modular, forwards):
        modular.update_components(guider=ClassifierFreeGuidance(guidance_scale=4.0, start=0.34, stop=0.67))
        once = run(modular)
        assert forwards == [1] + [1, 1] + [1]
        torch.testing.assert_close(run(modular), once, **SAME)

    def test_a_cache_keeps_the_predictions_apart_and_is_emptied_after_a_call(self, modular):
        plain = run(modular)
        modular.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.0))
        try:
            for _ in range(2):
                torch.testing.assert_close(run(modular), plain, **SAME)
        finally:
            modular.transformer.disable_cache()


def test_a_block_can_be_used_alone(pipe, tiny_model_folder):
    alone = PTDiTBlocks().sub_blocks["text_encoder"].init_pipeline(str(tiny_model_folder))
    assert set(alone.component_names) == {"tokenizer", "text_encoder", "guider"}
    alone.load_components()
    state = alone(prompt="a red star")
    torch.testing.assert_close(state.get("prompt_embeds"), pipe.encode_prompt("a red star")[0], **SAME)


def test_what_is_saved_loads_as_either_pipeline(modular, tmp_path):
    modular.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(str(tmp_path))
    again.set_progress_bar_config(disable=True)
    assert type(again) is PTDiTPipeline
    torch.testing.assert_close(run(again), run(modular), **SAME)
