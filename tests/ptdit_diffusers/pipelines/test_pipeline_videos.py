"""Videos and views: what a call takes and returns, how they are decoded, and what the network sees of them."""

import math

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_gif
from PIL import Image

from ptdit_diffusers import PTDiTModularPipeline, PTDiTPipeline, contact_sheet
from ptdit_diffusers.core.views import azimuths
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

SMALL = {"height": 32, "width": 48, "num_inference_steps": 1}


@pytest.fixture(scope="module")
def pipe(tiny_model_folder) -> PTDiTPipeline:
    """The tiny pipeline with a network for videos, windows of two latent frames, that does something."""
    pipe = PTDiTPipeline.from_pretrained(tiny_model_folder)
    config = {**pipe.transformer.config, "window_size": (2, 2, 2), "proxy_ratio": (2, 2, 2), "sample_frames": 5}
    torch.manual_seed(0)
    pipe.transformer = PTDiTTransformer3DModel.from_config(config).eval()
    for parameter in pipe.transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(pipe: PTDiTPipeline, prompt: str | list[str] = "a red star", **arguments):
    return pipe(prompt, **{**SMALL, "generator": torch.Generator().manual_seed(0), **arguments})


class TestVideos:
    @pytest.mark.parametrize("num_frames", [5, 9, 13, 17, 29])
    def test_any_length_of_4n_plus_1_frames_is_made_whatever_the_windows(self, pipe, num_frames):
        made = run(pipe, num_frames=num_frames, output_type="pt")
        assert made.images is None and made.views is None
        assert made.frames.shape == (1, num_frames, 3, 32, 48)

    def test_frames_come_in_every_form_of_diffusers_video_pipelines(self, pipe, tmp_path):
        clips = run(pipe, ["a red star", "a blue ring"], num_frames=5).frames
        assert [len(clip) for clip in clips] == [5, 5] and clips[0][0].size == (48, 32)
        array, latents = (run(pipe, num_frames=5, output_type=kind).frames for kind in ("np", "latent"))
        assert array.shape == (1, 5, 32, 48, 3) and latents.shape == (1, 4, 2, 4, 6)
        assert np.abs(array[0, 3] * 255 - np.asarray(run(pipe, num_frames=5).frames[0][3])).max() <= 0.5
        export_to_gif(clips[0], str(tmp_path / "a.gif"), fps=8)
        with Image.open(tmp_path / "a.gif") as gif:
            assert gif.n_frames == 5

    def test_export_to_video_takes_what_the_pipeline_returns(self, pipe, tmp_path):
        imageio = pytest.importorskip("imageio")
        pytest.importorskip("imageio_ffmpeg")
        from diffusers.utils import export_to_video

        for kind in ("pil", "np"):
            export_to_video(run(pipe, num_frames=5, output_type=kind).frames[0], str(tmp_path / "a.mp4"), fps=8)
            assert imageio.get_reader(tmp_path / "a.mp4").count_frames() == 5

    def test_a_clip_decoded_in_tiles_has_the_same_form(self, pipe):
        pipe.vae.enable_tiling(tile_sample_min_size=64, tile_sample_min_num_frames=5)
        try:
            assert run(pipe, num_frames=13, output_type="pt").frames.shape == (1, 13, 3, 32, 48)
        finally:
            pipe.vae.disable_tiling()

    @pytest.mark.parametrize("given, nearest", [(2, "1 or 5"), (16, "13 or 17"), (96, "93 or 97"), (-3, "1 or 5")])
    def test_other_counts_name_the_nearest_two(self, pipe, given, nearest):
        with pytest.raises(ValueError, match=f"num_frames={given} is not of the form 4n . 1 .*nearest: {nearest}"):
            run(pipe, num_frames=given)

    def test_a_model_of_single_pictures_says_so_and_a_video_model_does_not(self, pipe, tiny_model_folder, recwarn):
        run(pipe, num_frames=5)
        assert not [warning for warning in recwarn if "single images" in str(warning.message)]
        pictures = PTDiTPipeline.from_pretrained(tiny_model_folder)
        pictures.set_progress_bar_config(disable=True)
        with pytest.warns(
            UserWarning, match="2 latent frames were asked for, but this model was trained on single images"
        ):
            run(pictures, num_frames=5)


class TestViews:
    def test_views_are_decoded_one_by_one_as_pictures(self, pipe):
        latents = run(pipe, num_views=3, output_type="latent").views
        assert latents.shape == (1, 4, 3, 4, 6)
        views = run(pipe, num_views=3, output_type="pt").views
        alone = [pipe.decode_latents(latents[:, :, index : index + 1], "pt") for index in range(3)]
        torch.testing.assert_close(views, torch.stack(alone, dim=1), atol=1e-5, rtol=0)
        as_video = pipe.decode_latents(latents, "pt")
        assert as_video.shape[1] == 9  # the same latents as a video would be nine frames

    def test_views_come_as_lists_of_pictures_and_nothing_else(self, pipe):
        made = run(pipe, ["a red star", "a blue ring"], num_views=4)
        assert made.images is None and made.frames is None
        assert [len(views) for views in made.views] == [4, 4] and made.views[1][3].size == (48, 32)
        assert run(pipe, num_views=4, output_type="np").views.shape == (1, 4, 32, 48, 3)
        assert len(run(pipe, num_views=2, return_dict=False)[0][0]) == 2

    @pytest.mark.parametrize("num_views", [2, 5, 8])
    def test_the_network_sees_views_as_latent_frames_with_the_time_shift_of_as_many(self, pipe, num_views):
        calls = []
        hook = pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: calls.append((kwargs["hidden_states"].shape, kwargs["timestep"][0].item())),
            with_kwargs=True,
        )
        steps = {"num_inference_steps": 2, "output_type": "latent"}
        views = run(pipe, num_views=num_views, **steps).views
        frames = run(pipe, num_frames=4 * (num_views - 1) + 1, **steps).frames
        hook.remove()
        assert torch.equal(views, frames) and calls[:2] == calls[2:]
        assert calls[0][0] == (2, 4, num_views, 4, 6)

    def test_given_latents_have_one_frame_per_view(self, pipe):
        latents = torch.randn(1, 4, 3, 4, 6)
        assert run(pipe, num_views=3, latents=latents, output_type="latent").views.shape == latents.shape
        with pytest.raises(ValueError, match="must have shape .1, 4, 4, 4, 6. for this call, got .1, 4, 3, 4, 6."):
            run(pipe, num_views=4, latents=latents)

    @pytest.mark.parametrize(
        "arguments, message",
        [
            ({"num_views": 8, "num_frames": 17}, "num_views=8 and num_frames=17 were both given"),
            ({"num_views": 1}, "num_views=1 must be an integer of at least 2 .*; nearest: 2"),
            ({"num_views": 0}, "num_views=0 must be .*nearest: 2"),
            ({"num_views": 7.6}, "num_views=7.6 must be .*nearest: 8"),
            ({"num_views": True}, "num_views=True must be"),
            ({"num_views": "8"}, "num_views='8' must be"),
        ],
    )
    def test_what_is_not_legal_is_refused(self, pipe, arguments, message):
        with pytest.raises(ValueError, match=message):
            run(pipe, **arguments)

    def test_blocks_give_the_views_of_the_pipeline(self, pipe):
        modular = PTDiTModularPipeline.from_pretrained(str(pipe.config._name_or_path))
        modular.update_components(**pipe.components)
        modular.set_progress_bar_config(disable=True)
        settings = {"num_views": 3, "output_type": "pt", **SMALL}
        state = modular(prompt="a red star", generator=torch.Generator().manual_seed(0), **settings)
        assert state.get("images") is None and state.get("videos") is None
        torch.testing.assert_close(state.get("views"), run(pipe, **settings).views, atol=2e-5, rtol=0)
        with pytest.raises(ValueError, match="were both given"):
            modular(prompt="a red star", num_frames=5, **settings)


class TestProgress:
    @pytest.mark.parametrize(
        "arguments, runs", [({"num_views": 3}, 3), ({"num_frames": 5}, 1), ({"num_frames": 13}, 3), ({}, None)]
    )
    def test_decoding_clips_and_views_has_a_progress_bar_and_decoding_a_picture_none(
        self, pipe, arguments, runs, capsys
    ):
        pipe.set_progress_bar_config(disable=False, mininterval=0)
        pipe.vae.enable_tiling(tile_sample_min_size=64, tile_sample_min_num_frames=5)
        try:
            run(pipe, **arguments)
        finally:
            pipe.set_progress_bar_config(disable=True)
            pipe.vae.disable_tiling()
        shown = capsys.readouterr().err
        assert ("decoding" in shown) == (runs is not None)
        assert runs is None or f"{runs}/{runs}" in shown
        assert not pipe.vae.decoder._forward_hooks


class TestContactSheet:
    def test_view_i_is_seen_from_i_times_360_over_n(self):
        assert azimuths(8) == [0, 45, 90, 135, 180, 225, 270, 315]
        assert math.isclose(azimuths(24)[1], 15)

    @pytest.mark.parametrize(
        "count, columns, size",
        [(8, None, (48, 8)), (8, 3, (36, 12)), (5, None, (36, 8)), (5, 2, (24, 12)), (1, None, (12, 4))],
    )
    def test_views_stand_row_by_row_and_empty_cells_are_white(self, count, columns, size):
        views = [Image.new("RGB", (12, 4), (index, 0, 0)) for index in range(count)]
        sheet = contact_sheet(views, columns)
        assert sheet.size == size
        columns = columns or size[0] // 12
        for index in range(size[0] * size[1] // 48):
            corner = sheet.getpixel((index % columns * 12, index // columns * 4))
            assert corner == ((index, 0, 0) if index < count else (255, 255, 255))

    def test_pictures_that_make_no_sheet_are_refused(self):
        one, other = Image.new("RGB", (4, 4)), Image.new("RGB", (8, 4))
        for views, columns, message in (
            ([], None, "got none"),
            ([one, other], None, "of one size"),
            ([one], 0, "nea"),
        ):
            with pytest.raises(ValueError, match=message):
                contact_sheet(views, columns)
