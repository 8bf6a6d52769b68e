"""What is trained on: several data sets, pictures to keep, pictures that are held out; all chosen before training."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from lora.batches import CachedBatches, Plan
from lora.cache import Cache
from lora.command_line import make_parser, read_settings
from lora.config import LoRASettings
from lora.precompute import hold_out, plan_data
from lora.samples import Sample, from_json, read_samples, to_json
from ptdit_diffusers.training.base_model import BaseModel
from ptdit_diffusers.training.data.find import Item


def log_of(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def test_held_out_pictures_are_not_trained_on_and_their_loss_is_in_the_log(train, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    flags = ["--data", pictures, "--validation-split", "2", "--max-steps", "2", "--cache-dir", tmp_path / "cache"]
    assert train("out", *flags) == 0
    samples, _ = read_samples(tmp_path / "out" / "samples.json")
    hidden = [number for number, sample in enumerate(samples) if sample.held_out]
    assert len(hidden) == 2 and "; 2 held out" in caplog.text
    plan = Plan(samples, LoRASettings(output_dir="x"), 2)
    assert not set(hidden) & {index for number in range(plan.per_epoch) for index in plan.batch(number)}
    measured = {line["step"]: line for line in log_of(tmp_path / "out") if "held_out_loss" in line}
    assert list(measured) == [0, 1, 2]
    assert measured[0]["held_out_loss"] != measured[0]["seen_loss"] != measured[2]["seen_loss"]


def test_a_copy_of_a_held_out_picture_is_held_out_too(pictures, tiny_model_folder, tmp_path):
    for name in "ab":
        shutil.copytree(pictures, tmp_path / "data" / name)
    settings = LoRASettings(output_dir=str(tmp_path), data=str(tmp_path / "data"), validation_split=0.4)
    base = BaseModel(str(tiny_model_folder))
    _, samples = plan_data(settings, base, "cpu", Cache(tmp_path / "cache", base))
    hidden = [sample.name for sample in samples if sample.held_out]
    assert len(hidden) == 4 and {name[2:] for name in hidden if name < "b"} == {name[2:] for name in hidden[2:]}


def test_a_split_that_leaves_nothing_to_train_on_is_refused(train, pictures, capsys):
    assert train("out", "--data", pictures, "--validation-split", "5") == 2
    message = "validation_split=5 leaves none of 5 pictures in 5 groups of near-duplicates to train on; nearest: 4."
    assert message in capsys.readouterr().err


def number_held_out(split: float, kinds: int) -> int:
    """How many of four pictures are held out, of which so many differ."""
    items = [Item(Path(f"{i}.png"), "", hashes=(255 << 8 * (i % kinds), 0, 0)) for i in range(4)]
    samples = [Sample(item.path.name, "", "", "", (1, 64, 64), False) for item in items]
    settings = LoRASettings(output_dir="x", validation_split=split)
    return sum(sample.held_out for sample in hold_out(settings, items, samples))


@pytest.mark.parametrize("split", [4, 9, 0.99])
def test_the_nearest_split_that_is_named_is_legal(split):
    for kinds, nearest in ((4, "3"), (2, "3"), (1, "0, which holds out none")):
        with pytest.raises(ValueError, match=f"to train on; nearest: {nearest}\\.$"):
            number_held_out(split, kinds)
    assert number_held_out(3, 4) == 3 and number_held_out(3, 2) == 2  # of two pairs of copies one


def test_data_sets_have_repeats_resolution_and_captions_of_their_own(train, pictures, tmp_path, caplog):
    caplog.set_level("INFO")
    sets = [
        f"{{data: {pictures}, repeats: 2}}",
        f"{{data: {pictures}, resolution: 32, bucket_step: 32, trigger: two}}",
    ]
    sets += [f"{{data: {pictures}, is_reg: true, prior_weight: 0.25}}"]
    assert train("out", "--cache-dir", tmp_path / "cache", "--datasets", *sets) == 0
    samples, data = read_samples(tmp_path / "out" / "samples.json")
    assert [sample.data_set for sample in samples] == [0] * 5 + [1] * 5 + [2] * 5 and len(data["sets"]) == 3
    assert {sample.bucket[1:] for sample in samples[5:10]} == {(32, 32)}
    assert samples[0].text != samples[5].text and "data set 3: " in caplog.text and "(pictures to keep)" in caplog.text
    settings = read_settings(make_parser("test").parse_args(["--output-dir", "x", "--datasets", *sets[:1]]))
    plan = Plan(samples, settings_of(pictures), 1)
    assert sum(map(len, plan.buckets.values())) == 2 * 5 + 5 + 5 and settings.data_sets()[0].repeats == 2
    assert "Trigger word: `two`." in (tmp_path / "out" / "lora" / "README.md").read_text()
    assert "{'data': 'pictures" in (tmp_path / "out" / "lora" / "README.md").read_text()  # no folder of this machine


def settings_of(pictures):
    sets = ({"data": str(pictures), "repeats": 2}, {"data": str(pictures)}, {"data": str(pictures), "is_reg": True})
    return LoRASettings(output_dir="x", datasets=sets, prior_weight=0.25)


def test_pictures_to_keep_have_their_weight(cache, pictures):
    cache.samples = [Sample(**{**vars(cache.samples[0]), "data_set": number}) for number in (0, 2)]
    batches = CachedBatches(cache, settings_of(pictures), 0, 1)
    assert {float(batches[number]["weight"]) for number in range(3)} == {1.0, 0.25}


def test_pictures_of_the_base_model_have_the_settings_outside_of_the_data_sets(
    cache, pictures, tiny_model_folder, tmp_path, monkeypatch
):
    options = {"flip": True, "caption_dropout": 1.0, "prior_weight": 5.0}
    sets = ({"data": str(pictures), **options}, {"data": str(pictures), "is_reg": True})
    settings = LoRASettings(output_dir=str(tmp_path), datasets=sets, caption_dropout=0.0, prior_weight=0.25)
    prior = Item(pictures / "0.png", "a star", 1, 64, 64, prior=True, name="prior picture 0")
    monkeypatch.setattr("lora.precompute.prior_items", lambda *_: [prior])
    base = BaseModel(str(tiny_model_folder))
    _, samples = plan_data(settings, base, "cpu", Cache(tmp_path / "cache", base))
    assert [bool(sample.mirrored) for sample in samples] == [True] * 5 + [False] * 6 and samples[5].prior
    cache.samples = [Sample(**{**vars(cache.samples[0]), "prior": True})]
    batch = CachedBatches(cache, settings, 0, 1)[0]
    assert batch["weight"] == 0.25 and torch.equal(batch["text"][0], cache.get(cache.samples[0].text, "embeds"))


def test_a_caption_is_read_in_several_forms_and_each_sample_takes_one(pictures, tiny_model_folder, tmp_path, caplog):
    shutil.copytree(pictures, tmp_path / "data")
    (tmp_path / "data" / "0.txt").write_text("a star, red, large, {blue|green}")
    options = {"shuffle_caption": True, "keep_tokens": 1, "enable_wildcard": True, "caption_dropout": 0.0}
    settings = LoRASettings(output_dir=str(tmp_path), data=str(tmp_path / "data"), trigger="two", **options)
    base = BaseModel(str(tiny_model_folder))
    cache = Cache(tmp_path / "cache", base)
    caplog.set_level("INFO")
    items, samples = plan_data(settings, base, "cpu", cache)
    assert "\n1 captions are read in several forms, up to 8" in "\n".join(caplog.messages)
    assert all(form.startswith("two, a star, ") for form in items[0].variations) and len(set(items[0].variations)) > 3
    assert set(items[1].variations) == {items[1].caption} and len(samples[0].more_texts) == len(items[0].variations)
    cache.add_captions({text: "" for item in items for text in (item.caption, *item.variations)}, torch.device("cpu"))
    cache.write("latents", ((s.latents, {"mean": torch.zeros(1), "std": torch.zeros(1)}) for s in samples))
    cache.samples = samples[:1]
    batches = CachedBatches(cache, settings, 0, 1)
    forms = {tuple(batches[number]["text"].sum((0, 1)).tolist()) for number in range(30)}
    assert len(forms) > 3
    again = from_json(json.loads(json.dumps(to_json(samples))))
    assert again == samples


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"repeats": 2}, r"datasets\[0\].data is missing: the folder or table of this data set"),
        ({"data": "a", "repeets": 2}, r"datasets\[0\].repeets is not a setting; nearest: repeats"),
        ({"data": "a", "num_repeats": 2}, r"datasets\[0\].num_repeats is not a setting; nearest: repeats"),
        ({"data": "a", "rank": 2}, r"datasets\[0\].rank is the same for all data sets; set rank outside"),
        ({"data": "a", "repeats": 0}, r"datasets\[0\]: repeats=0 must be at least 1; nearest: 1"),
        ({"data": "a", "fps": 8}, r"datasets\[0\]: fps=8.0 is for clips, but num_frames=1"),
        ({"data": "a", "flip": "often"}, r"datasets\[0\].flip='often' must be of type bool"),
    ],
)
def test_a_wrong_entry_of_a_data_set_is_named(entry, message):
    with pytest.raises(ValueError, match=message):
        LoRASettings(output_dir="x", datasets=(entry,))
    with pytest.raises(ValueError, match="data='b' and datasets exclude each other; nearest: datasets alone"):
        LoRASettings(output_dir="x", data="b", datasets=({"data": "a"},))


def test_the_fps_outside_of_the_data_sets_are_those_of_the_sets_of_clips():
    sets = ({"data": "a", "num_frames": 1}, {"data": "b", "num_frames": 17})
    for frames in (1, 5):
        found = LoRASettings(output_dir="x", fps=8, num_frames=frames, datasets=sets).data_sets()
        assert [each.fps for each in found] == [0, 8]
