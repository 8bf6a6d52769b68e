"""The guider with DiffiT's schedule, in the modular pipeline of PT-DiT."""

import pytest
import torch

from ptdit_diffusers import PowerCosineGuidance, PTDiTModularPipeline
from ptdit_diffusers.core.diffusion import power_cosine

PREDICTIONS = torch.ones(1, 4, 2, 2), torch.zeros(1, 4, 2, 2)  # so that the guided prediction is the strength


@pytest.mark.parametrize("timestep", [torch.tensor(300.0), torch.tensor([300])])
def test_it_guides_as_strongly_as_the_timestep_says_on_the_channels_that_are_asked_for(timestep):
    for channels in (None, 3):
        guider = PowerCosineGuidance(4.4, guidance_channels=channels)
        guider.set_state(step=3, num_inference_steps=10, timestep=timestep)
        guided = guider.forward(*PREDICTIONS).pred
        assert torch.allclose(guided[:, :3], power_cosine(torch.tensor(300), 4.4).expand(1, 3, 2, 2))
        assert torch.equal(guided[:, 3:], PREDICTIONS[0][:, 3:]) == (channels == 3)


def test_without_guidance_one_prediction_is_asked_for_and_returned():
    for guider in (PowerCosineGuidance(1.0), PowerCosineGuidance(4.4, enabled=False)):
        assert guider.num_conditions == 1
        assert torch.equal(guider.forward(PREDICTIONS[0]).pred, PREDICTIONS[0])


def test_it_guides_pt_dit(tiny_model_folder):
    pipe = PTDiTModularPipeline.from_pretrained(str(tiny_model_folder))
    pipe.load_components()
    for parameter in pipe.transformer.parameters():  # as built, the network's output is zero
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    results = []
    for scale in (1.0, 4.4):
        pipe.update_components(guider=PowerCosineGuidance(scale))
        options = {"num_inference_steps": 3, "output_type": "latent", "generator": torch.manual_seed(0)}
        results.append(pipe(prompt="a red star", output="images", **options))
    assert not torch.allclose(*results)


def test_an_exponent_that_is_no_number_above_0_is_refused():
    with pytest.raises(ValueError, match="guidance_power=-1 must be a number above 0"):
        PowerCosineGuidance(guidance_power=-1)
