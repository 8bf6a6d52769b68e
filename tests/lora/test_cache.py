"""The cache: contents, staleness, and other models."""

import shutil

import pytest
import torch
from PIL import Image

from lora.base import BaseModel
from lora.batches import CachedBatches, Plan
from lora.cache import Cache, Sample
from lora.config import LoRASettings
from lora.dataset import bucket_sizes, find_items
from lora.precompute import main

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_model_folder) -> BaseModel:
    return BaseModel(str(tiny_model_folder))


def test_latents_and_text_are_what_vae_and_pipeline_compute(cached, base, pictures):
    cache = Cache(cached, base)
    first = cache.samples()[0]
    pixels = torch.frombuffer(bytearray(Image.open(pictures / "0.png").tobytes()), dtype=torch.uint8)
    pixels = pixels.view(1, 1, 64, 64, 3).permute(0, 4, 1, 2, 3).float() / 127.5 - 1
    with torch.no_grad():
        posterior = base.load_vae(torch.float32, CPU).encode(pixels).latent_dist
        text = base.load_text_pipeline(torch.float32, CPU).encode_prompt(
            "a red star", do_classifier_free_guidance=False
        )
    torch.testing.assert_close(cache.get(first.latents, "mean"), posterior.mean[0])
    torch.testing.assert_close(cache.get(first.latents, "std"), posterior.std[0])
    torch.testing.assert_close(cache.text("a red star"), text[0][0])


def test_a_changed_picture_is_encoded_again_and_the_rest_is_not(base, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    data, folder = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(pictures, data)
    flags = ["--base", str(base.folder), "--data", str(data), "--cache-dir", str(folder)]
    assert main(flags) == 0
    assert "encoding 5 pictures" in caplog.text
    caplog.clear()
    assert main(flags) == 0
    assert "encoding" not in caplog.text
    Image.new("RGB", (64, 64), "red").save(data / "1.png")
    (data / "0.txt").write_text("a blue heart", encoding="utf-8")
    assert main(flags) == 0
    assert "the cache is stale for 1 of 5" in caplog.text
    assert "encoding 1 pictures" in caplog.text and "encoding 1 captions" in caplog.text


def test_a_cache_of_another_model_is_refused_or_replaced_when_asked(base, cached, tmp_path, pictures, capsys):
    other = tmp_path / "other"
    shutil.copytree(base.folder, other)
    weights = other / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    folder = tmp_path / "cache"
    shutil.copytree(cached, folder)
    flags = ["--base", str(other), "--data", str(pictures), "--cache-dir", str(folder)]
    assert main(flags) == 2
    assert "made by another vae" in capsys.readouterr().err
    assert main([*flags, "--rebuild-cache"]) == 0


def test_a_missing_base_model_is_named(capsys, tmp_path):
    assert main(["--base", str(tmp_path / "none"), "--data", "x", "--cache-dir", str(tmp_path / "c")]) == 2
    assert "none" in capsys.readouterr().err


def test_an_epoch_holds_every_sample_and_two_processes_share_a_batch(cached, base):
    samples = [Sample(str(i), "", "", (1, 64, 64 if i < 5 else 32), False) for i in range(8)]
    plan = Plan(samples, LoRASettings(output_dir="x", repeats=2), 4)
    taken = [index for number in range(plan.per_epoch) for index in plan.batch(number)]
    assert plan.per_epoch == 5 and set(taken) == set(range(8)) and len(taken) == 20
    assert plan.batch(7) == Plan(samples, LoRASettings(output_dir="x", repeats=2), 4).batch(7)

    cache = Cache(cached, base)
    whole = CachedBatches(cache, LoRASettings(output_dir="x", batch_size=2), 0, 1)
    halves = [CachedBatches(cache, LoRASettings(output_dir="x", batch_size=1), rank, 2) for rank in range(2)]
    for number in range(4):
        rows = [half[number]["latents"] for half in halves]
        assert torch.equal(whole[number]["latents"], torch.cat(rows))


def test_mirrored_copies_are_cached_and_sampled(base, pictures, tmp_path):
    items = find_items(str(pictures), "", "", 1, bucket_sizes(64, 32, 1.0)).items[:1]
    cache = Cache(tmp_path, base)
    cache.fill(items, [""], True, CPU)
    (sample,) = cache.samples()
    assert not torch.equal(cache.get(sample.latents, "mean"), cache.get(sample.mirrored, "mean"))
