"""What a batch holds: times, frames, crops and masks as the settings ask."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from ptdit_diffusers.training.own_data.batches import OwnBatches, stage_data
from ptdit_diffusers.training.own_data.changes import changed
from ptdit_diffusers.training.own_data.inspect import inspect
from ptdit_diffusers.training.own_data.model import make_base
from ptdit_diffusers.training.own_data.prepare import encode_part, merge_parts
from ptdit_diffusers.training.own_data.settings import DataSettings, OwnDataSettings, read_settings
from ptdit_diffusers.training.own_data.task import OwnDataTask
from ptdit_diffusers.training.times import Times

CPU = torch.device("cpu")
TEXTS = [SimpleNamespace(rows=lambda captions, numbers: {"captions": captions})]


def encoded(settings: OwnDataSettings) -> OwnBatches:
    """The batches of a run of one process; its data are encoded first."""
    base = make_base(settings)
    encode_part(settings, base, CPU)
    return OwnBatches(settings, base, stage_data(settings, [merge_parts(settings, base, 1)]), TEXTS, 0, 1)


@pytest.fixture
def colors(config, tmp_path):
    """Settings of a run on a red picture, and on a clip of twelve gray frames of 50 ms, of which frame i is 20 i."""
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (64, 64), "red").save(data / "red.png")
    frames = [Image.new("RGB", (64, 64), (20 * i, 20 * i, 20 * i)) for i in range(12)]
    frames[0].save(data / "clip.png", save_all=True, append_images=frames[1:], duration=50, loop=0)
    stages = [{"resolution": 64, "steps": 4, "batch": 8, "lr": 1e-3}]
    return read_settings(config(data={"source": str(data), "num_frames": 5, "validation": 0}, stages=stages))


def test_times_have_the_distribution_and_the_range_asked_for(colors):
    usual = encoded(colors)
    shift = usual.ratio((1, 64, 64)), usual.ratio((5, 64, 64))

    def times(**options) -> torch.Tensor:
        usual.settings = replace(colors, times=Times(**options))
        return torch.cat([usual[step]["time"] for step in range(4)])

    frames = torch.tensor([usual[step]["latents"].shape[2] for step in range(4)]).repeat_interleave(8)
    shift = torch.where(frames == 1, *(torch.tensor(each) for each in shift))
    first = times()
    assert torch.equal(times(min_timestep=200.0, max_timestep=600.0), 0.2 + (0.6 - 0.2) * first)
    share = torch.special.ndtr(torch.logit(first / (shift + first - shift * first)))
    expected = shift * share / (1 + (shift - 1) * share)
    torch.testing.assert_close(times(timestep_sampling="uniform"), expected, atol=1e-5, rtol=1e-4)
    eighths = share.reshape(4, 8).mul(8).floor().sort(-1).values
    assert torch.equal(eighths, torch.arange(8.0).expand(4, 8))  # one time from each


def test_frames_of_clips_are_taken_at_a_rate_and_other_rates_are_encoded_apart(colors, tmp_path, caplog):
    for fps, expected in ((0.0, [0, 1, 2, 3, 4]), (10.0, [0, 2, 4, 6, 8])):
        settings = replace(colors, data=replace(colors.data, fps=fps))
        batches = encoded(settings)
        data = batches.stages[0].encoded
        (clip,) = (n for n in range(2) if data.buckets[data.index["bucket"][n]][0] == 5)
        pixels = torch.tensor(expected).float().mul(20 / 127.5).sub(1).view(1, 1, 5, 1, 1).expand(1, 3, 5, 64, 64)
        vae = make_base(settings).load_vae(torch.float32, CPU)
        with torch.no_grad():
            wanted = vae.encode(pixels.contiguous()).latent_dist.mean[0]
        torch.testing.assert_close(data.latents(clip)[0], wanted, atol=2e-3, rtol=2e-3)  # half precision
    assert len(list((tmp_path / "encoded").rglob("5x64x64/*.safetensors"))) == 2
    assert len(list((tmp_path / "encoded").rglob("1x64x64/*.safetensors"))) == 1  # a picture has no rate
    encode_part(replace(colors, data=replace(colors.data, fps=25.0)), make_base(colors), CPU)
    assert "skipped clip.png: has fewer than 25 frames a second (fps)" in caplog.text
    with pytest.raises(ValueError, match="data.fps=8 is for clips, but data.num_frames=1; nearest: num_frames=17"):
        DataSettings(source="x", fps=8.0)


def test_all_pieces_of_clips_are_trained_on_and_held_out_together(colors, tmp_path):
    """Two pieces that are no near-duplicates, and a rest of two frames; what `head` encoded is not encoded again."""
    shown = [Image.new("L", (64, 64)) for _ in range(12)]
    for number, frame in enumerate(shown):
        frame.paste(255 - 4 * number, (0, 0, 32, 64) if number < 5 else (20, 8, 50, 30))
    shown[0].save(tmp_path / "data" / "clip.png", save_all=True, append_images=shown[1:], duration=50, loop=0)
    names = {}
    for way in ("head", "chunk"):
        settings = replace(colors, data=replace(colors.data, frame_extraction=way))
        data = encoded(settings).stages[0].encoded
        names[way] = [data.caption_lines(number)["name"] for number in range(len(data.index))]
    assert names["head"].count("clip.png") == 1 and names["chunk"].count("clip.png") == 2
    clips = [number for number, name in enumerate(names["chunk"]) if name == "clip.png"]
    assert len(set(data.index["group"][clips].tolist())) == 1
    one, two = (data.latents(number)[0] for number in clips[:2])
    assert (one - two).abs().max() > 0.1  # other frames
    assert len(list((tmp_path / "encoded").rglob("1x64x64/*.safetensors"))) == 1
    lines = list(inspect(settings))
    assert "bucket 64x64, 5 frames: 2" in lines and any("clip.png, clip.png" in line for line in lines)
    with pytest.raises(ValueError, match="data.frame_extraction='chunk' is for clips, but data.num_frames=1; nearest"):
        DataSettings(source="x", frame_extraction="chunk")
    with pytest.raises(ValueError, match="data.frame_extraction='chunks'.*nearest: 'chunk'"):
        DataSettings(source="x", frame_extraction="chunks")


def test_a_checkpoint_from_before_a_setting_had_its_default(colors):
    saved = asdict(colors)
    del saved["times"], saved["data"]["fps"]
    assert changed(saved, colors, 1) == []
    other = replace(colors, times=Times(time_mean=1.0), data=replace(colors.data, fps=10.0))
    assert sorted(changed(saved, other, 1)) == ["data.fps was 0.0, is 10.0", "times.time_mean was 0.0, is 1.0"]


@pytest.fixture
def half(config, tmp_path):
    """Settings of a run on a wide picture whose left half is transparent, and on one of the size of the bucket."""
    data = tmp_path / "data"
    data.mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 4), dtype=np.uint8)
    pixels[:, :48, 3], pixels[:, 48:, 3] = 0, 255
    Image.fromarray(pixels).save(data / "half.png")
    Image.fromarray(pixels[:, 32:, :3]).save(data / "whole.png")
    stages = [{"resolution": 64, "steps": 4, "batch": 8, "lr": 1e-3, "buckets": 1.0}]
    return read_settings(config(data={"source": str(data), "validation": 0, "flip": True}, stages=stages))


def test_crops_lie_at_random_places_along_the_side_that_does_not_fit(half, monkeypatch):
    settings = replace(half, data=replace(half.data, random_crop=True, image_variations=3))
    batches = encoded(settings)
    data = batches.stages[0].encoded
    wide, square = sorted(range(2), key=lambda number: data.caption_lines(number)["name"])
    found = [data.latents(wide, mirrored, crop)[0] for crop in range(3) for mirrored in (False, True)]
    assert len({float(mean.sum()) for mean in found}) == 6
    whole = [data.latents(square, mirrored, crop)[0] for crop in range(3) for mirrored in (False, True)]
    assert all(torch.equal(whole[number], whole[number + 2]) for number in range(4))
    asked = []
    read = data.latents
    monkeypatch.setattr(data, "latents", lambda number, *which: asked.append(which) or read(number, *which))
    assert batches[0].keys() == {"latents", "noise", "time", "weight", "quarters", "captions"}
    _ = batches[1], batches[2]
    assert {crop for _, crop in asked} == {0, 1, 2}


def test_what_is_transparent_has_no_loss(half):
    settings = replace(half, data=replace(half.data, alpha_mask=True))
    batches, base = encoded(settings), make_base(settings)
    data = batches.stages[0].encoded
    masked, whole = sorted(range(2), key=lambda number: data.caption_lines(number)["name"])
    area = data.area(masked)  # cropped evenly: columns 16 to 80, of which 32 are transparent
    assert area.shape == (1, 1, 8, 8) and area[..., :4].eq(0).all() and area[..., 4:].eq(1).all()
    assert torch.equal(data.area(masked, mirrored=True), area.flip(-1)) and data.area(whole).eq(1).all()
    model = base.load_transformer(torch.float32, "none", CPU).eval()
    text = torch.zeros(8, 3, model.config.caption_channels)
    task = SimpleNamespace(
        network=model, texts=[SimpleNamespace(embed=lambda batch: (text[: len(batch["time"])], None))]
    )
    batch = batches[0]
    with torch.no_grad():
        errors = OwnDataTask.errors(task, batch)
        left = OwnDataTask.errors(task, batch | {"area": 1 - batch["area"]})
        everything = OwnDataTask.errors(task, batch | {"area": torch.ones_like(batch["area"])})
    torch.testing.assert_close(errors + left, everything)
    assert (errors < 0.9 * everything).sum() == batch["area"].ne(1).flatten(1).any(1).sum() == 4
    measured = []
    stub = SimpleNamespace(stages=batches.stages, settings=settings, device=CPU, base=base, data=batches)
    stub.mine, stub.run_together, stub.texts = lambda: slice(None), True, [SimpleNamespace(rows=lambda *_: {})]
    stub.errors = lambda batch: measured.append(batch) or torch.zeros(1)
    OwnDataTask.measured_loss(stub, 0, [masked, whole])
    assert torch.equal(measured[0]["area"], torch.stack([area, torch.ones_like(area)]))


def test_what_is_wholly_transparent_is_named_and_the_masks_of_views_are_one_by_one(half, tmp_path, caplog):
    data = tmp_path / "other"
    (data / "mug.views").mkdir(parents=True)
    Image.new("RGBA", (64, 64)).save(data / "empty.png")
    for number in range(3):
        view = Image.new("RGBA", (64, 64), "red")
        view.paste((0, 0, 0, 0), (0, 0, 64, 16 * number))
        view.save(data / "mug.views" / f"{number}.png")
    settings = replace(half, data=replace(half.data, source=str(data), alpha_mask=True, num_views=3))
    views = encoded(settings).stages[0].encoded
    assert "skipped empty.png: is wholly transparent (alpha_mask)" in caplog.text and len(views.index) == 1
    assert views.area(0).mean((0, 2, 3)).tolist() == [1, 0.75, 0.5]
    assert views.area(0, mirrored=True).mean((0, 2, 3)).tolist() == [1, 0.5, 0.75]  # the other way round
    with pytest.raises(ValueError, match="data.image_variations=0 must be at least 1; nearest: 1"):
        DataSettings(source="x", image_variations=0)
