"""Random crops, transparency as a mask, and files that are too small."""

import numpy as np
import pytest
import torch
from PIL import Image

from lora.batches import CachedBatches, fixed_batches
from lora.cache import Cache
from lora.config import LoRASettings
from lora.precompute import plan_data
from lora.task import lora_errors
from ptdit_diffusers.training.base_model import BaseModel

CPU = torch.device("cpu")


@pytest.fixture
def base(tiny_model_folder) -> BaseModel:
    return BaseModel(str(tiny_model_folder))


@pytest.fixture
def data(tmp_path):
    """A wide picture whose left half is transparent, and one of the size of a bucket, wholly opaque."""
    (tmp_path / "data").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    pixels[:, :48, 3], pixels[:, 48:, 3] = 0, 255
    Image.fromarray(pixels).save(tmp_path / "data" / "half.png")
    Image.fromarray(pixels[:, :64, :3]).save(tmp_path / "data" / "whole.png")
    return tmp_path / "data"


def filled(data, base, **options):
    settings = LoRASettings(output_dir=str(data.parent), data=str(data), max_aspect=1.0, **options)
    cache = Cache(data.parent / "cache", base)
    items, samples = plan_data(settings, base, CPU, cache)
    cache.fill(items, samples, [""], CPU)
    return settings, cache


def test_a_crop_lies_at_random_places_along_the_side_that_does_not_fit(data, base):
    settings, cache = filled(data, base, random_crop=True, flip=True)
    wide, square = cache.samples
    keys = [wide.latents, *wide.more_latents]
    assert len(keys) == settings.image_variations and not square.more_latents
    assert all("-crop" in key and key.endswith("x500") for key in keys) and "-crop" not in square.latents
    means = [cache.get(key, "mean") for key in (*keys, f"{keys[1]}-mirrored")]
    assert len({float(mean.sum()) for mean in means}) == 5
    batches = CachedBatches(cache, settings, 0, 1)
    assert len({float(batches[number]["latents"].mean()) for number in range(20)}) == 20
    again = Cache(data.parent / "cache", base)
    again.require_samples(cache.samples)
    assert plan_data(settings, base, CPU, again)[1] == cache.samples  # the same places


def test_what_is_transparent_has_no_loss(data, base):
    settings, cache = filled(data, base, alpha_mask=True, flip=True, batch_size=2)
    half, whole = cache.samples
    assert half.latents.endswith("-alpha") and cache.get(whole.latents, "area").eq(1).all()
    area = cache.get(half.latents, "area")  # cropped evenly: columns 16 to 80, of which 32 are transparent
    assert area.shape == (1, 1, 8, 8) and area[..., :4].eq(0).all() and area[..., 4:].eq(1).all()
    assert torch.equal(cache.get(half.mirrored, "area"), area.flip(-1))
    (held_out,) = fixed_batches(cache, settings, [0, 1])
    assert torch.equal(held_out["area"], torch.stack([area, torch.ones_like(area)]))
    batch = CachedBatches(cache, settings, 0, 1)[0]
    transformer = base.load_transformer(torch.float32, "none", CPU).eval()
    with torch.no_grad():
        errors = lora_errors(transformer, batch, torch.float32)
        left = lora_errors(transformer, batch | {"area": 1 - batch["area"]}, torch.float32)
        everything = lora_errors(transformer, {**batch, "area": None}, torch.float32)
    torch.testing.assert_close(errors + left, everything)
    assert (errors < 0.9 * everything).sum() == 1


def test_small_and_wholly_transparent_files_are_named(data, base, caplog):
    caplog.set_level("INFO")
    Image.new("RGBA", (80, 80)).save(data / "empty.png")
    filled(data, base, alpha_mask=True, skip_image_resolution=64)
    assert "whole.png: has 64 x 64 pixels (skip_image_resolution=64)" in caplog.text
    assert "empty.png: is wholly transparent (alpha_mask)" in caplog.text and "half.png" not in caplog.text
    with pytest.raises(ValueError, match="skip_image_resolution=-1 must be at least 0; nearest: 0"):
        LoRASettings(output_dir="x", skip_image_resolution=-1)
    with pytest.raises(ValueError, match="image_variations=0 must be at least 1; nearest: 1"):
        LoRASettings(output_dir="x", image_variations=0)


def test_the_transparency_of_clips_is_that_of_four_frames_together(tmp_path, base):
    frames = [Image.new("RGBA", (64, 64), (255, 0, 0, 255 if number else 0)) for number in range(5)]
    frames[0].putpixel((0, 0), (0, 0, 0, 255))
    (tmp_path / "data").mkdir()
    frames[0].save(tmp_path / "data" / "clip.png", save_all=True, append_images=frames[1:])
    _, cache = filled(tmp_path / "data", base, alpha_mask=True, num_frames=5)
    area = cache.get(cache.samples[0].latents, "area")
    assert area.shape == (1, 2, 8, 8) and area[0, 0, 0, 0] == pytest.approx(1 / 64) and area[0, 1].eq(1).all()
