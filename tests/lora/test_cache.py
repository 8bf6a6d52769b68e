"""The cache: contents, keys of everything an entry depends on, runs that share it, and damage."""

import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open

from lora import cache as cache_module
from lora.batches import CachedBatches, Plan
from lora.cache import Cache
from lora.config import LoRASettings
from lora.precompute import data_settings, main
from lora.samples import Sample, recorded_samples
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.buckets import bucket_sizes
from ptdit_diffusers.training.data.find import find_items

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def base(tiny_model_folder) -> BaseModel:
    return BaseModel(str(tiny_model_folder))


def other_model(base, place, part="vae"):
    """A copy of the base model with one other weight."""
    shutil.copytree(base.folder, place)
    (weights,) = (place / part).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\x00\x3f")
    return BaseModel(str(place))


def precompute(base, data, folder, *flags):
    return main(["--base", str(base.folder), "--data", str(data), "--cache-dir", str(folder), *flags])


def test_latents_and_text_are_what_vae_and_pipeline_compute(cache, base, pictures):
    first = cache.samples[0]
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
    assert precompute(base, data, folder) == 0
    assert "encoding 5 pictures" in caplog.text
    caplog.clear()
    assert precompute(base, data, folder) == 0
    assert "encoding" not in caplog.text
    Image.new("RGB", (64, 64), "red").save(data / "1.png")
    (data / "0.txt").write_text("a blue heart", encoding="utf-8")
    assert precompute(base, data, folder) == 0
    assert "the cache lacks 1 of 5 pictures" in caplog.text
    assert "encoding 1 pictures" in caplog.text and "encoding 1 captions" in caplog.text


@pytest.mark.parametrize("part, encoded", [("vae", "5 pictures"), ("text_encoder", "2 captions")])
def test_models_share_a_cache_and_never_read_each_others_entries(
    base, cached, tmp_path, pictures, caplog, part, encoded
):
    caplog.set_level("INFO")
    folder = tmp_path / "cache"
    shutil.copytree(cached, folder)
    other = other_model(base, tmp_path / "other", part)
    assert precompute(other, pictures, folder) == 0
    assert f"encoding {encoded}" in caplog.text and caplog.text.count("encoding") == 1
    caplog.clear()
    assert precompute(base, pictures, folder) == 0 and "encoding" not in caplog.text
    samples = recorded_samples(cached, data_settings(LoRASettings(output_dir="x"), base))
    with pytest.raises(ValueError, match="encoded by another VAE or text encoder than those of base '.*other'; give"):
        Cache(folder, other).require_samples(samples)
    with pytest.raises(
        ValueError, match="was made with other settings, for '.*': maker of .* was '.*', is '.*'; give"
    ):
        recorded_samples(cached, data_settings(LoRASettings(output_dir="x"), other))


def test_two_runs_that_fill_a_cache_at_once_get_their_own_samples(base, pictures, tmp_path, monkeypatch):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder, color in ((first, "red"), (second, "blue")):
        folder.mkdir()
        Image.new("RGB", (64, 64), color).save(folder / "a.png")
    settings = [
        LoRASettings(output_dir="x", data=str(folder), cache_dir=str(tmp_path / "cache")) for folder in (first, second)
    ]
    encode, made = cache_module.encode_pictures, []

    def other_run_first(*arguments):
        monkeypatch.setattr(cache_module, "encode_pictures", encode)
        made.append(filled(settings[1], base))
        yield from encode(*arguments)

    monkeypatch.setattr(cache_module, "encode_pictures", other_run_first)
    made.append(filled(settings[0], base))
    blue, red = (cache.get(cache.samples[0].latents, "mean") for cache in made)
    alone = filled(LoRASettings(output_dir="x", data=str(first), cache_dir=str(tmp_path / "alone")), base)
    assert torch.equal(red, alone.get(alone.samples[0].latents, "mean")) and not torch.equal(red, blue)
    again = Cache(tmp_path / "cache", base)  # both runs' entries are there
    assert {sample.latents for cache in made for sample in cache.samples} <= again.entries.keys()


def filled(settings, base):
    from accelerate import Accelerator

    from lora.precompute import fill_cache

    return fill_cache(settings, base, Accelerator(cpu=True))


def test_a_file_that_changes_while_it_is_encoded_is_refused(base, pictures, tmp_path, monkeypatch, capsys):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    load = BaseModel.load_vae

    def change_and_load(*arguments):
        Image.new("RGB", (64, 64), "red").save(data / "0.png")
        return load(*arguments)

    monkeypatch.setattr(BaseModel, "load_vae", change_and_load)
    assert precompute(base, data, tmp_path / "cache") == 2
    assert "0.png changed while it was encoded" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [[], ["--rebuild-cache"]], ids=["by itself", "rebuilt"])
def test_a_damaged_file_of_the_cache_is_made_again(base, cached, pictures, tmp_path, caplog, flags):
    folder = tmp_path / "cache"
    shutil.copytree(cached, folder)
    (folder / "notes.safetensors").write_bytes(b"of the user")
    shard = next(folder.glob("latents-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:200])
    caplog.set_level("INFO")
    assert precompute(base, pictures, folder, *flags) == 0
    assert "encoding 5 pictures" in caplog.text and (f"{shard.name} is damaged" in caplog.text) == (not flags)
    assert ("captions" in caplog.text) == bool(flags)
    assert not shard.exists() and (folder / "notes.safetensors").exists()
    assert len(list(folder.glob("latents-*"))) == 1
    with safe_open(next(folder.glob("latents-*")), "pt") as file:
        assert len(list(file.keys())) == 10


def test_a_cache_of_other_settings_is_not_trained_on_without_data(base, cached, pictures, tmp_path):
    def wanted(**more):
        return data_settings(LoRASettings(output_dir="x", **more), base)

    assert len(recorded_samples(cached, wanted(resolution=64))) == 5  # 64 is what 0 means here
    with pytest.raises(ValueError, match="made with other settings, for '.*': trigger was '', is 'zork'; give `data`"):
        recorded_samples(cached, wanted(trigger="zork"))
    folder, data = tmp_path / "cache", tmp_path / "data"
    shutil.copytree(cached, folder)
    shutil.copytree(pictures, data)
    assert precompute(base, data, folder) == 0
    with pytest.raises(ValueError, match=r"holds 2 data sets \(.*\); give `data`"):
        recorded_samples(folder, wanted())
    with pytest.raises(ValueError, match="holds no samples; give `data` to fill it"):
        recorded_samples(tmp_path, wanted())


def test_what_the_text_encoder_does_not_know_or_cuts_is_said_in_one_line(base, pictures, tmp_path, caplog):
    data = tmp_path / "data"
    shutil.copytree(pictures, data)
    (data / "0.txt").write_text("a zork star", encoding="utf-8")
    (data / "1.txt").write_text("zork and blarg " + "star " * 200, encoding="utf-8")
    assert precompute(base, data, tmp_path / "cache") == 0
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert lines == [
        "the text encoder does not know 2 words, and reads them all alike: 'zork' (2: 0.png, 1.png), 'blarg' (1: "
        "1.png)",
        "1 captions are longer than 200 tokens and are cut: 1.png",
    ]


def test_a_fingerprint_sees_each_matrix_and_no_stray_files(base, tmp_path):
    folder = shutil.copytree(base.folder, tmp_path / "copy")

    def fingerprint():
        return BaseModel(str(folder)).fingerprint("vae")

    (folder / "vae" / ".DS_Store").write_bytes(b"x")
    (folder / "vae" / ".cache").mkdir()
    assert fingerprint() == base.fingerprint("vae")
    large, content = folder / "vae" / "more.safetensors", bytearray(5 * 2**20)
    large.write_bytes(content)
    first = fingerprint()
    content[2**20 + 7 : 2**21 + 7] = b"\x01" * 2**20
    large.write_bytes(content)
    assert fingerprint() != first


def test_a_missing_base_model_is_named(capsys, tmp_path):
    assert main(["--base", str(tmp_path / "none"), "--data", "x", "--cache-dir", str(tmp_path / "c")]) == 2
    assert "none" in capsys.readouterr().err


def test_an_epoch_holds_every_sample_and_two_processes_share_a_batch(cache):
    samples = [Sample(str(i), str(i), "", "", (1, 64, 64 if i < 5 else 32), False) for i in range(8)]
    plan = Plan(samples, LoRASettings(output_dir="x", repeats=2), 4)
    taken = [index for number in range(plan.per_epoch) for index in plan.batch(number)]
    assert plan.per_epoch == 5 and set(taken) == set(range(8)) and len(taken) == 20
    assert plan.batch(7) == Plan(samples, LoRASettings(output_dir="x", repeats=2), 4).batch(7)

    whole = CachedBatches(cache, LoRASettings(output_dir="x", batch_size=2), 0, 1)
    halves = [CachedBatches(cache, LoRASettings(output_dir="x", batch_size=1), rank, 2) for rank in range(2)]
    for number in range(4):
        rows = [half[number]["latents"] for half in halves]
        assert torch.equal(whole[number]["latents"], torch.cat(rows))


def test_any_number_of_processes_goes_on_with_the_batches_of_a_run(cache):
    settings = LoRASettings(output_dir="x", batch_size=3, prior_weight=0.5)
    whole = CachedBatches(cache, settings, 0, 1)
    for processes in (1, 2, 3):
        parts = [CachedBatches(cache, settings, rank, processes, global_batch=3) for rank in range(processes)]
        for number in range(3):
            batch, shared = whole[number], [part[number] for part in parts]
            assert torch.equal(batch["latents"], torch.cat([part["latents"] for part in shared]))
            assert batch["seeds"] == [seed for part in shared for seed in part["seeds"]]
            means = [(part["weight"] * part["time"]).mean() for part in shared]  # as the loss is summed up
            torch.testing.assert_close(sum(means) / processes, (batch["weight"] * batch["time"]).mean())


def test_mirrored_copies_are_cached_and_sampled(base, pictures, tmp_path):
    items = find_items(str(pictures), "", "", 1, bucket_sizes(64, 32, 1.0)).items[:1]
    cache = Cache(tmp_path, base)
    cache.fill(items, cache.plan(items, flip=True), [""], CPU)
    (sample,) = cache.samples
    assert not torch.equal(cache.get(sample.latents, "mean"), cache.get(sample.mirrored, "mean"))
