"""The loss is the documented one, and times, captions and prior pictures enter it as the settings ask."""

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
