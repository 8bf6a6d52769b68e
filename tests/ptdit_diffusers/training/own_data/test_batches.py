"""What a batch holds: times and frames as the settings ask."""

from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from ptdit_diffusers.training.own_data.batches import OwnBatches, stage_data
from ptdit_diffusers.training.own_data.model import make_base
from ptdit_diffusers.training.own_data.prepare import encode_part, merge_parts
from ptdit_diffusers.training.own_data.settings import DataSettings, OwnDataSettings, changed, read_settings
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


def test_a_checkpoint_from_before_a_setting_had_its_default(colors):
    saved = asdict(colors)
    del saved["times"], saved["data"]["fps"]
    assert changed(saved, colors) == []
    other = replace(colors, times=Times(time_mean=1.0), data=replace(colors.data, fps=10.0))
    assert sorted(changed(saved, other)) == ["data.fps was 0.0, is 10.0", "times.time_mean was 0.0, is 1.0"]
