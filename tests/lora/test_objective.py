"""The loss is the documented one, and times, captions and prior pictures enter it as the settings ask."""

import pytest
import torch

from lora.batches import CachedBatches
from lora.config import LoRASettings
from lora.task import lora_loss
from ptdit_diffusers.training.base_model import BaseModel


def test_the_loss_is_the_squared_error_of_x0_minus_noise_on_the_first_half_of_the_channels(cache, tiny_model_folder):
    base = BaseModel(str(tiny_model_folder))
    batch = CachedBatches(cache, LoRASettings(output_dir="x", batch_size=2), 0, 1)[0]
    batch["weight"] = torch.tensor([1.0, 3.0])
    transformer = base.load_transformer(torch.float32, "none", torch.device("cpu")).eval()
    calls = []
    transformer.register_forward_hook(
        lambda _, args, options, result: calls.append((options, result[0])), with_kwargs=True
    )
    with torch.no_grad():
        loss = lora_loss(transformer, batch, torch.float32)
    ((options, sample),) = calls
    time = batch["time"].view(2, 1, 1, 1, 1)
    torch.testing.assert_close(options["hidden_states"], (1 - time) * batch["latents"] + time * batch["noise"])
    torch.testing.assert_close(options["timestep"], batch["time"] * 1000)
    error = (sample[:, :4] - (batch["latents"] - batch["noise"])).square().mean((1, 2, 3, 4))
    torch.testing.assert_close(loss, (error[0] + 3 * error[1]) / 2)


def test_captions_are_dropped_and_times_follow_the_settings(cache):
    dropped = CachedBatches(cache, LoRASettings(output_dir="x", batch_size=2, caption_dropout=1.0), 0, 1)
    kept = CachedBatches(cache, LoRASettings(output_dir="x", batch_size=2, caption_dropout=0.0), 0, 1)
    late = CachedBatches(cache, LoRASettings(output_dir="x", batch_size=2, caption_dropout=0.0, time_mean=2.0), 0, 1)
    empty = cache.text("")
    for number in range(6):
        assert all(torch.equal(row[: len(empty)], empty) for row in dropped[number]["text"])
        assert (late[number]["time"] > kept[number]["time"]).all()
    assert any(kept[number]["text"].shape[1] > len(empty) for number in range(6))


def test_times_have_the_distribution_and_the_range_asked_for(cache):
    def times(**options) -> torch.Tensor:
        settings = LoRASettings(output_dir="x", batch_size=50, caption_dropout=0.0, **options)
        batches = CachedBatches(cache, settings, 0, 1)
        return torch.cat([batches[number]["time"] for number in range(4)])

    usual = times()
    assert torch.equal(times(min_timestep=200.0, max_timestep=600.0), 0.2 + (0.6 - 0.2) * usual)
    shift = cache.base.time_ratio((1, 64, 64))
    normal = torch.logit(usual / (shift + usual - shift * usual))
    expected = torch.special.ndtr(normal)
    uniform = times(timestep_sampling="uniform")
    torch.testing.assert_close(uniform, shift * expected / (1 + (shift - 1) * expected), atol=1e-5, rtol=1e-4)
    mode = times(timestep_sampling="mode")
    u = 1 - expected  # the paper's u
    wanted = 1 - u - 1.29 * (torch.cos(torch.pi / 2 * u) ** 2 - 1 + u)
    torch.testing.assert_close(mode, shift * wanted / (1 + (shift - 1) * wanted), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"min_timestep": 600.0, "max_timestep": 400.0},
            "min_timestep=600 and max_timestep=400 are no range in 0",
        ),
        ({"mode_scale": 3.0}, "mode_scale=3 must be in -1..1.75; nearest: 1.75"),
        (
            {"timestep_sampling": "mode", "time_mean": 1.0},
            "time_mean and time_std are for timestep_sampling='log",
        ),
        ({"timestep_sampling": "sigmoid"}, "timestep_sampling='sigmoid' must be one of logit_normal, uniform, mode"),
        ({"fps": 8.0}, "fps=8.0 is for clips, but num_frames=1; nearest: num_frames=17"),
        ({"frame_extraction": "slide"}, "frame_extraction='slide' must be one of head, chunk; nearest"),
    ],
)
def test_times_and_frames_that_are_not_possible_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(output_dir="x", **options)
