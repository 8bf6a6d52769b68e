"""The stages vae, decoder and transformer: they run through the real script, freeze what they should, and export."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel
from ptdit_diffusers.pipelines.pipeline_ptdit import PTDiTPipeline
from ptdit_diffusers.training.checkpoint import checkpoints, load_checkpoint
from ptdit_diffusers.training.latents import to_pixels
from ptdit_diffusers.training.vae_start import start_as_identity
from scripts import train
from scripts.datasets.layouts import FORMS, scene_layout, views_layout
from scripts.datasets.registry import clip_chance, find_data_set, pick_data_set
from scripts.datasets.shapes import BACKGROUNDS, SHAPES, Group, Placement, Scene, is_held_out, render, sample_scene
from scripts.datasets.shapes.motion import is_held_out_clip, render_clip, sample_clip
from scripts.datasets.solids import Part, SolidObject, render_views
from scripts.embedded_models import latents as encoded
from scripts.embedded_models import text_stage
from scripts.embedded_models.denoisers import DenoiserSettings
from scripts.embedded_models.latents import PartSettings
from scripts.embedded_models.transformer_stage import (
    TransformerDataSettings,
    TransformerStage,
    TransformerStageSettings,
    layout_of,
)
from scripts.embedded_models.vae_stage import encode_frames, see_single_frames
from scripts.verifiers.clips.prompt import read_clip_prompt

pytestmark = pytest.mark.slow  # most go on from stages that were trained for two steps
LOOP = {"steps": 2, "batch_size": 2, "warmup": 1, "log_every": 1, "sheet_every": 0, "checkpoint_every": 0}
TEXT = {"d_model": 16, "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 1}
VAE = {"hidden_size": 4, "hidden_size_mult": [1, 1, 1, 1]}
PARTS = (PartSettings(samples=6),)
TRANSFORMER = {"num_attention_heads": 1, "attention_head_dim": 16, "num_layers": 1}


def run_stages(sections: dict[str, dict], folder: Path) -> Path:
    """Train every section in `folder`, in order, through the real script; components go to `export` by default."""
    folder.mkdir(exist_ok=True)
    for stage, section in sections.items():
        section.update(
            {"output_dir": str(folder / stage), "export_dir": section.get("export_dir", str(folder / "export"))}
        )
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(sections), encoding="utf-8")
    for stage in sections:
        assert train.main(["--config", str(config), "--stage", stage]) == 0
    return folder


def stage_in(folder: Path, model: DenoiserSettings | None = None, **data) -> TransformerStage:
    """The transformer stage with the components in a folder."""
    data = TransformerDataSettings(components=str(folder / "export"), **{"parts": PARTS, **data})
    loop = {"output_dir": str(folder / "transformer"), "steps": 2, "batch_size": 4, "warmup": 0}
    settings = TransformerStageSettings(**loop, model=model or DenoiserSettings(), data=data)
    return TransformerStage(settings, torch.device("cpu"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every stage ran two tiny steps; components are in `export`."""
    folder = tmp_path_factory.mktemp("training")
    export = str(folder / "export")
    sections = {
        "text": {**LOOP, "model": TEXT, "data": {"scenes": 20, "held_out_captions": 2}},
        "vae": {**LOOP, "model": VAE},
        "transformer": {
            **LOOP,
            "model": TRANSFORMER,
            "data": {"components": export, "parts": [{"samples": 6}], "steps": 2},
        },
        "decoder": {**LOOP, "data": {"start": str(folder / "export" / "vae")}, "export_dir": str(folder / "decoder")},
    }
    return run_stages(sections, folder)


def test_the_last_stage_leaves_a_folder_that_the_pipeline_loads(trained):
    pipe = PTDiTPipeline.from_pretrained(str(trained / "export"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.default_size() == (128, 128)
    picture = pipe("a red circle", num_inference_steps=2, generator=torch.manual_seed(0)).images[0]
    assert picture.size == (128, 128)


def test_sheets_logs_and_curves_are_written(trained):
    for stage in ("vae", "transformer", "decoder"):
        assert (trained / stage / "loss.png").exists()
        assert len(list((trained / stage / "sheets").glob("*.png"))) == 1
        assert len((trained / stage / "log.jsonl").read_text(encoding="utf-8").splitlines()) >= 2


def test_the_decoder_stage_changes_the_decoder_only(trained):
    before = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "export" / "vae")
    after = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "decoder" / "vae")
    assert after.config.scaling_factor == before.config.scaling_factor
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, before.state_dict()[name])}
    assert changed and all(name.startswith(("decoder.", "post_quant_conv.")) for name in changed)


def test_the_scaling_factor_gives_latents_of_unit_deviation(trained):
    vae = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "export" / "vae")
    generator = np.random.default_rng(5)
    pixels = to_pixels(np.stack([render(sample_scene(generator)) for _ in range(32)])[:, None])
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert 0.8 < latents.std() < 1.25


def test_an_untrained_vae_already_passes_brightness_and_hue():
    torch.manual_seed(0)
    vae = AutoencoderKLOpenSoraPlan(hidden_size=16, num_res_blocks=1, norm_num_groups=1)
    start_as_identity(vae)
    pixels = to_pixels(render(sample_scene(np.random.default_rng(1)))[None, None])
    with torch.no_grad():
        output = vae(pixels).sample
    together = torch.stack([output.flatten(), pixels.flatten()])
    assert torch.corrcoef(together)[0, 1] > 0.5


def test_training_scenes_are_never_held_out_and_batches_are_repeatable(trained):
    stage = stage_in(trained)
    assert not any(is_held_out(stage.parts[0].sample(index)) for index in range(200))
    first, again, other = stage.batch(3, 0, 4), stage.batch(3, 0, 4), stage.batch(3, 1, 4)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["noise"], other["noise"])


def test_times_are_nearer_to_noise_where_the_shift_asks_for_it(trained):
    def mean_time(base_tokens):
        return stage_in(trained, base_tokens=base_tokens).batch(0, 0, 400)["time"].mean()

    assert abs(mean_time(64) - 0.5) < 0.05
    assert mean_time(16) > 0.58


def test_layout_targets_name_the_figure_at_each_token_and_where_it_is():
    outer = Group("circle", "red", "large", (Placement(0.5, 0.5, 0.38, 0.0),))
    inner = Group("star", "white", "", (Placement(0.5625, 0.4375, 0.1, 18.0),))
    targets = scene_layout(Scene((inner, outer), ((0, "inside", 1),), "gray", "plain"), 8).reshape(8, 8, 7)
    assert targets[0, 0].tolist() == [0, BACKGROUNDS.index("gray"), 0, 0, 0, 0, 0]  # a corner is background
    star = targets[3, 4]  # the token that the star is centred on; it hides the circle
    assert star[0] == 1 + SHAPES.index("star") and star[1] == BACKGROUNDS.index("white")
    assert np.allclose(star[2:], [0, 0, 0.8, 0, 1], atol=1e-6)  # a quarter of the way to its next equal look
    circle = targets[4, 1]
    assert circle[0] == 1 + SHAPES.index("circle")
    assert np.allclose(circle[2:], [2.5, -0.5, 3.04, 1, 0], atol=1e-6)  # right, up, radius in tokens, no angle


@pytest.mark.parametrize("shape", SHAPES)
def test_figures_that_look_the_same_have_the_same_layout_and_others_do_not(shape):
    def look(angle):
        scene = Scene((Group(shape, "red", "", (Placement(0.5, 0.5, 0.3, angle),)),), (), "gray", "plain")
        return render(scene, 64).astype(int), scene_layout(scene, 4)

    for angle in range(0, 360, 6):
        (first, targets), (other, turned) = look(3.0), look(3.0 + angle)
        same = np.abs(first - other).mean() < 0.25
        assert same == np.allclose(targets, turned, atol=1e-4), f"{shape} turned by {angle} degrees"


def test_going_on_from_a_transformer_keeps_its_weights_and_the_layout_head_is_not_exported(trained):
    folder = trained / "export" / "transformer"
    stage = stage_in(trained, DenoiserSettings(**TRANSFORMER, start=str(folder)), layout_weight=0.25)
    saved = PTDiTTransformer3DModel.from_pretrained(folder).state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in stage.transformer.state_dict().items())
    loss, numbers = stage.loss(stage.batch(0, 0, 4))
    assert loss > numbers["loss_flow"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in stage.layout.parameters())


def test_going_on_with_other_sizes_is_refused(trained):
    model = DenoiserSettings(start=str(trained / "export" / "transformer"))
    with pytest.raises(ValueError, match="model.num_attention_heads=3 but .* has num_attention_heads=1"):
        stage_in(trained, model)
    with pytest.raises(ValueError, match="model.backbone='unet' is unknown; one of: ptdit"):
        stage_in(trained, DenoiserSettings(backbone="unet"))


def test_an_export_leaves_a_vae_alone_that_is_already_there(trained, tmp_path):
    (tmp_path / "vae").mkdir()
    stage_in(trained, DenoiserSettings(**TRANSFORMER)).export(tmp_path)
    assert list((tmp_path / "vae").iterdir()) == []
    assert (tmp_path / "transformer").is_dir() and (tmp_path / "model_index.json").is_file()


def test_going_on_from_the_middle_equals_going_through(trained, tmp_path):
    section = {**LOOP, "checkpoint_every": 1, "output_dir": str(tmp_path / "run"), "export_dir": str(tmp_path)}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"vae": {**section, "model": VAE}}), encoding="utf-8")
    run = ["--config", str(config), "--stage", "vae"]
    assert train.main(run) == 0
    through = load_checkpoint(tmp_path / "run")["model"]
    middle, end = checkpoints(tmp_path / "run")
    assert middle.name == "checkpoint-00000001"
    shutil.rmtree(end)
    assert train.main(run) == 0
    resumed = load_checkpoint(tmp_path / "run")["model"]
    assert all(torch.equal(value, resumed[name]) for name, value in through.items())


# --- clips, from weights of pictures ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_clips(trained: Path) -> Path:
    """A folder in which the stages went on from `trained` with clips; components are in `export`."""
    folder = trained / "clips"
    export = str(folder / "export")
    parts = [{"samples": 4}, {"world": "clips", "size": 32, "samples": 4, "batch_size": 3, "share": 4.0}]
    sections = {
        "text": {
            **LOOP,
            "model": TEXT,
            "data": {
                "scenes": 20,
                "held_out_captions": 2,
                "start": str(trained / "export"),
                "worlds": {"clips": 0.5, "pictures": 0.5},
            },
        },
        "decoder": {
            **LOOP,
            "data": {
                "start": str(trained / "export" / "vae"),
                "worlds": {"clips": 1.0},
                "clip_batch_size": 1,
                "size": 64,
            },
        },
        "transformer": {
            **LOOP,
            "model": {**TRANSFORMER, "start": str(trained / "export" / "transformer"), "window_size": [4, 2, 2]},
            "data": {"components": export, "parts": parts, "steps": 2},
        },
    }
    return run_stages(sections, folder)


def test_pictures_and_clips_come_out_of_one_folder(with_clips):
    pipe = PTDiTPipeline.from_pretrained(str(with_clips / "export"))
    pipe.set_progress_bar_config(disable=True)
    assert pipe.transformer.config.sample_frames == 5 and tuple(pipe.transformer.config.window_size) == (4, 2, 2)
    assert pipe("a red circle", num_inference_steps=1).images[0].size == (128, 128)
    clip = pipe("a red circle moves left", height=32, width=32, num_frames=17, num_inference_steps=1).frames[0]
    assert len(clip) == 17 and clip[0].size == (32, 32)
    names = {path.name for path in (with_clips / "transformer" / "sheets").glob("*.png")}
    assert names == {"step-00000002-pictures-128.png", "step-00000002-clips-32.png"}
    log = (with_clips / "transformer" / "log.jsonl").read_text(encoding="utf-8")
    logged = [line for line in map(json.loads, log.splitlines()) if "held_out_loss_clips-32" in line]
    assert (
        len(logged) == 1 and 0.1 < logged[0]["held_out_loss_clips-32"] < 10 > logged[0]["held_out_loss_pictures-128"]
    )


def test_the_held_out_loss_is_of_held_out_samples_and_grows_with_the_error(with_clips):
    stage = stage_of_clips(with_clips)
    part, described = stage.parts[0], []
    part.data_set = replace(part.data_set, describe=lambda clip, rng: described.append(clip) or ("", ""))
    with torch.no_grad():
        losses = [stage.held_out_loss(part), stage.held_out_loss(part)]
        stage.transformer.proj_out.bias += 3
        losses.append(stage.held_out_loss(part))
    assert losses[0] == losses[1] and losses[2] > losses[0] + 3
    assert len(described) == encoded.HELD_OUT and all(map(is_held_out_clip, described))


def test_moving_kernels_to_the_newest_frame_keeps_pictures_and_reads_clips_frame_by_frame(trained):
    vae = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "export" / "vae").double()
    clip = render_clip(sample_clip(np.random.default_rng(2)), 32)
    pixels = to_pixels(clip[None]).double()
    with torch.no_grad():
        before = vae(pixels[:, :, :1]).sample
        see_single_frames(vae)
        assert torch.allclose(vae(pixels[:, :, :1]).sample, before, atol=1e-12)
        changed = pixels.clone()
        changed[:, :, [1, 2, 3, 5, 6, 7, 9, 10, 11, 13, 14, 15]] = 0.25  # frames between the ones that are read
        for block in (module for module in vae.encoder.modules() if isinstance(module, torch.nn.GroupNorm)):
            block.forward = lambda hidden_states: hidden_states  # norms see all frames together
        assert torch.equal(vae.encode(changed).latent_dist.mode(), vae.encode(pixels).latent_dist.mode())


def test_the_text_encoder_starts_where_the_one_of_pictures_stopped(trained):
    where = {"output_dir": str(trained / "unused"), "warmup": 0}
    data = text_stage.TextDataSettings(
        scenes=20, start=str(trained / "export"), worlds={"clips": 0.5, "pictures": 0.5}, perturbed=0.0
    )
    settings = text_stage.TextStageSettings(
        steps=1, batch_size=16, model=text_stage.TextModelSettings(**TEXT), data=data, **where
    )
    stage = text_stage.TextStage(settings, torch.device("cpu"))
    batch = stage.batch(0, 0, 16)
    assert 0 < batch["pictures"].sum() < 16
    assert float(stage.loss(batch)[1]["moved"]) < 1e-10
    with torch.no_grad():
        stage.model.shared.weight.add_(0.1)
    assert float(stage.loss(batch)[1]["moved"]) > 1e-3


def stage_of_clips(folder):
    return stage_in(folder, parts=(PartSettings(world="clips", size=32, samples=4),))


def part_of_clips(folder):
    return stage_of_clips(folder).parts[0]


def test_half_of_the_clips_are_taken_backwards_but_none_that_is_held_out(with_clips):
    part = part_of_clips(with_clips)
    described = []
    part.data_set = replace(
        part.data_set, describe=lambda clip, rng: described.append(clip) or ("", part.data_set.rare_phrase)
    )
    latents, _, layouts = part.random_batch(np.random.default_rng(0), 200, 0.0)
    assert layouts.shape == (200, 5 * 2 * 2, 7)
    forward = [part.sample(index) for index in range(4)]
    backwards = 0
    for row, clip in enumerate(described):
        index = next(i for i, sample in enumerate(forward) if clip in (sample, sample.reversed()))
        turned = clip != forward[index]
        backwards += turned
        expected = part.latents[index].float()
        assert torch.equal(latents[row], expected.flip(1) if turned else expected)
        assert not is_held_out_clip(clip)
    assert 40 < backwards < 140


def test_captions_of_training_name_crossing_more_often_than_by_chance():
    data_set, rng = find_data_set("clips"), np.random.default_rng(0)
    clips = [clip for clip in (data_set.sample(rng) for _ in range(2000)) if clip.crossing]
    clips = [clip for clip in clips if clip.actors[0].motion in ("left", "right")]
    captions = {"by chance": [data_set.describe(clip, rng)[0] for clip in clips]}
    captions["in training"] = [data_set.caption_for_training(clip, rng) for clip in clips]
    crossing = {
        name: sum(read_clip_prompt(text).figures[0].motion == "cross" for text in texts) / len(clips)
        for name, texts in captions.items()
    }
    assert 0.4 < crossing["by chance"] < 0.6 and 0.65 < crossing["in training"] < 0.85


def test_what_is_easy_is_taken_seldom(with_clips):
    part = part_of_clips(with_clips)
    assert all(clip_chance(part.sample(index)) > 0 for index in range(50))
    crossing = [part.sample(index).crossing for index in range(400)]
    part.data_set = replace(part.data_set, training_chance=lambda clip: 0.25 if clip.crossing else 1.0)
    seldom = [part.sample(index).crossing for index in range(400)]
    part.data_set = replace(part.data_set, training_chance=None)
    all_equal = [part.sample(index).crossing for index in range(400)]
    assert sum(crossing) > 1.3 * sum(all_equal) > 2.6 * sum(seldom) > 0


def test_clips_are_encoded_from_the_frames_that_the_encoder_reads(with_clips):
    part = part_of_clips(with_clips)
    whole = to_pixels(part.data_set.render(part.sample(1), 32, part.length)[None])
    with torch.no_grad():
        read = encode_frames(part.vae, whole, part.data_set.frame_stride).mode() * part.vae.config.scaling_factor
    assert torch.allclose(part.latents[1].float(), read[0], atol=5e-3)


def test_latents_are_encoded_once_and_more_samples_add_files(trained, monkeypatch):
    def part(samples):
        vae = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "export" / "vae")
        settings = PartSettings(size=16, samples=samples)
        return encoded.EncodedPart(settings, 0, vae, trained / "chunks", base_tokens=28)

    monkeypatch.setattr(encoded, "CHUNK", 4)
    first = part(8).latents
    files = sorted((trained / "chunks").rglob("*.safetensors"))
    written = [file.stat().st_mtime_ns for file in files]
    more = part(10).latents
    assert torch.equal(more[:8], first) and more.shape == (10, 4, 1, 2, 2)
    assert len(files) == 2 and [file.stat().st_mtime_ns for file in files] == written
    assert len(list((trained / "chunks").rglob("*.safetensors"))) == 3
    assert not list((trained / "chunks").rglob("*.tmp"))
    files[0].write_bytes(files[0].read_bytes()[:-1])
    assert torch.equal(part(10).latents, more)  # what is damaged is made again


def test_frames_of_a_clip_are_read_as_pictures(trained):
    vae = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "export" / "vae")
    pixels = to_pixels(np.stack([render_clip(sample_clip(np.random.default_rng(i)), 32) for i in range(2)]))
    with torch.no_grad():
        latents = encode_frames(vae, pixels, 4).mode()
        assert latents.shape == (2, 4, 5, 4, 4)
        third = vae.encode(pixels[:, :, [8]]).latent_dist.mode()
    assert torch.allclose(latents[:, :, [2]], third, atol=1e-5)


# --- views, from weights of clips ------------------------------------------------------------------------------------


def test_views_go_on_from_clips_and_are_generated_by_the_pipeline(with_clips):
    folder, before = with_clips / "views", with_clips / "export"
    export = str(folder / "export")
    parts = [
        {"world": "views", "size": 48, "length": 4, "samples": 4, "share": 4.0},
        {"world": "views", "size": 48, "length": 6, "samples": 2, "batch_size": 1},
    ]
    sections = {
        "text": {
            **LOOP,
            "model": TEXT,
            "data": {
                "scenes": 20,
                "held_out_captions": 2,
                "start": str(before),
                "worlds": {"views": 0.8, "pictures": 0.2},
            },
        },
        "decoder": {**LOOP, "data": {"start": str(before / "vae"), "worlds": {"views": 1.0}, "size": 64}},
        "transformer": {
            **LOOP,
            "model": {**TRANSFORMER, "start": str(before / "transformer"), "window_size": [4, 1, 1]},
            "data": {"components": export, "parts": parts, "steps": 2, "layout_weight": 0.2},
        },
    }
    run_stages(sections, folder)
    pipe = PTDiTPipeline.from_pretrained(export)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.default_size() == (48, 48) and pipe.transformer.config.sample_frames == 6
    assert pipe.transformer.config.num_windows == 9
    assert {"turntable", "torus"} <= pipe.tokenizer.get_vocab().keys()
    views = pipe("a red ball with a white dot", num_views=4, num_inference_steps=1).views[0]
    assert len(views) == 4 and views[0].size == (48, 48)
    names = {path.name for path in (folder / "transformer" / "sheets").glob("*.png")}
    assert names == {"step-00000002-views-48-4.png", "step-00000002-views-48-6.png"}


def test_views_are_encoded_one_by_one_and_never_turned_round(trained):
    vae = AutoencoderKLOpenSoraPlan.from_pretrained(trained / "export" / "vae")
    settings = PartSettings(world="views", size=48, length=4, samples=2)
    part = encoded.EncodedPart(settings, 0, vae, trained / "views", base_tokens=9)
    assert part.pipeline_arguments == {"num_views": 4} and part.log_shift == pytest.approx(np.log(2))
    pixels = to_pixels(render_views(part.sample(1), 4, 48)[:, None])  # four pictures
    with torch.no_grad():
        alone = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    assert torch.allclose(part.latents[1].float(), alone.squeeze(2).transpose(0, 1), atol=5e-3)
    latents, _, layouts = part.random_batch(np.random.default_rng(0), 20, 0.0)
    assert all(any(torch.equal(row, stored.float()) for stored in part.latents) for row in latents)
    assert layouts.shape == (20, 4 * 3 * 3, 5)


def test_the_layout_of_views_names_solids_and_turns():
    part = Part("ball", "red", "stripe", "white")
    targets = views_layout(SolidObject((part,), "", "", 15.0, "gray"), 12, 4).reshape(4, 12, 12, 5)
    assert targets[0, 0, 0, :2].tolist() == [0, BACKGROUNDS.index("gray")]  # a corner is background
    assert (targets[:, 6, 5:7, 0] == 1 + FORMS.index("ball")).all()
    colors = [set(view[view[..., 0] > 0][:, 1].astype(int)) for view in targets]
    assert colors[2] == {BACKGROUNDS.index("red")} and BACKGROUNDS.index("white") in colors[0]  # no stripe behind
    cosines, sines = targets[:, 6, 6, 2], targets[:, 6, 6, 3]
    assert np.allclose(cosines, [1, 0, -1, 0], atol=1e-6) and np.allclose(sines, [0, 1, 0, -1], atol=1e-6)
    assert np.allclose(targets[..., 4], 0.5)


def test_data_sets_are_picked_by_their_shares():
    shares = {"views": 0.25, "clips": 0.5, "pictures": 0.25}
    picked = [pick_data_set(shares, roll) for roll in (0.0, 0.24, 0.26, 0.74, 0.76, 0.999)]
    assert picked == ["views", "views", "clips", "clips", "pictures", "pictures"]
    with pytest.raises(ValueError, match="add up to 0.75"):
        pick_data_set({"views": 0.75}, 0.5)
    with pytest.raises(ValueError, match="'films' is not known; one of: pictures, figures, clips, views"):
        pick_data_set({"films": 1.0}, 0.5)


def test_parts_that_show_different_things_are_refused():
    with pytest.raises(ValueError, match="clips, views, which show different things"):
        layout_of((PartSettings(world="views"), PartSettings(world="clips")))
