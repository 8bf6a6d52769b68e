"""The class-conditional pipeline: official random numbers, guidance, names of classes, forms of loading, bad input."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    EulerDiscreteScheduler,
    FirstBlockCacheConfig,
    FlowMatchEulerDiscreteScheduler,
)
from safetensors.torch import load_file, save_file

import ptdit_diffusers
from ptdit_diffusers import ClassToImagePipeline, DiffiT2DModel, DiT2DModel, PTDiTPipeline, official_scheduler
from ptdit_diffusers.core.diffusion import respaced_betas, respaced_timesteps
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from tests.ptdit_diffusers import diffit_goldens, dit_goldens
from tests.ptdit_diffusers.class_models import NAMES, tiny_diffit_pipeline, tiny_folder, tiny_pipeline, tiny_vae
from tests.ptdit_diffusers.models.test_transformer_dit import folder_of_diffusers
from tests.ptdit_diffusers.offloading import GROUPS, remove_offloaded


def latents_of(pipe, labels=(2, 7), **options) -> torch.Tensor:
    return pipe([*labels], **{"num_inference_steps": 10, "output_type": "latent", **options}).images


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- the official sampler --------------------------------------------------------------------------------------------


@torch.no_grad()
def official_run(transformer, labels, steps: int, scale: float, generator) -> torch.Tensor:
    """The official script's loop, its random numbers in its order: latents, then one doubled draw at every step."""
    timesteps = respaced_timesteps(steps)
    betas = respaced_betas(timesteps)
    kept = torch.cumprod(1 - betas, 0)
    before = torch.cat([torch.ones(1).double(), kept[:-1]])
    variance = betas * (1 - before) / (1 - kept)
    copies, labels = 1, torch.tensor(labels)
    latents = torch.randn(len(labels), 4, 8, 8, generator=generator)
    if scale > 1:
        copies, latents, labels = 2, torch.cat([latents, latents]), torch.cat([labels, torch.full_like(labels, 10)])
    for index in range(steps)[::-1]:
        tied = torch.cat([latents[: len(latents) // copies]] * copies)
        noise, value = transformer(tied, torch.tensor(timesteps[::-1][index]), labels).sample.chunk(2, dim=1)
        if scale > 1:
            conditional, unconditional = noise[:, :3].chunk(2)
            guided = unconditional + scale * (conditional - unconditional)
            noise = torch.cat([torch.cat([guided, guided]), noise[:, 3:]], dim=1)
        clean = latents / kept[index].sqrt() - (1 / kept[index] - 1).sqrt() * noise
        mean = betas[index] * before[index].sqrt() / (1 - kept[index]) * clean
        mean = mean + (1 - before[index]) * (1 - betas[index]).sqrt() / (1 - kept[index]) * latents
        share = (value + 1) / 2
        spread = share * betas[index].log() + (1 - share) * variance[max(index, 1)].log()
        random = torch.randn(latents.shape, generator=generator)
        latents = mean + (index > 0) * torch.exp(0.5 * spread) * random
    return latents[: len(latents) // copies]


@pytest.mark.parametrize("scale", [1.0, 1.5])
def test_a_seed_gives_what_it_gives_in_the_official_script(scale):
    pipe, ours, theirs = tiny_pipeline(), seeded(3), seeded(3)
    for _ in range(2):  # the second batch goes on where the first one stopped, which a last unused draw decides
        latents = latents_of(pipe, guidance_scale=scale, generator=ours)
        assert (latents - official_run(pipe.transformer, (2, 7), 10, scale, theirs)).abs().max() < 2e-4


@pytest.mark.parametrize("system", ["dit", "diffit"])
def test_the_guided_golden_runs_through_the_pipeline(monkeypatch, system):
    goldens, pipeline, guidance = {
        "dit": (dit_goldens, tiny_pipeline, {"guidance_scale": 1.5}),
        "diffit": (diffit_goldens, tiny_diffit_pipeline, {}),  # 4.4, power-cosine: what the pipeline says
    }[system]
    golden = goldens.load(f"{system}_sampler")
    for name in ("ddpm", "ddim"):
        noise = [*golden["noise_10"]]
        for place in ("ptdit_diffusers.pipelines.class_sampling", "diffusers.schedulers.scheduling_ddpm"):
            monkeypatch.setattr(f"{place}.randn_tensor", lambda *_, noise=noise, **__: noise.pop(0))
        labels = golden["y"].tolist()
        trajectory = []
        latents_of(
            pipeline(official_scheduler(name)),
            labels,
            latents=golden["z"],
            callback_on_step_end=lambda *given, kept=trajectory: kept.append(given[3]["latents"]),
            **guidance,
        )
        expected = golden[f"{name}10_cfg.latents"][1:, :2]
        assert (torch.stack(trajectory) - expected).abs().max() < 2e-4


def test_defaults_are_250_ancestral_steps_guided_by_4_on_three_channels():
    pipe, seen = tiny_pipeline(), []

    def look(pipe, step, timestep, tensors):
        seen.append((int(timestep), pipe.guidance_scale, pipe.num_timesteps, tensors["latents"].shape))
        pipe._interrupt = step == 1
        return {}

    pipe(1, callback_on_step_end=look)
    assert seen == [(999, 4.0, 250, (1, 4, 8, 8)), (995, 4.0, 250, (1, 4, 8, 8))]  # one trajectory, not two
    assert pipe._guidance_channels == 3


def test_a_sample_with_its_own_generator_equals_its_single_run():
    pipe = tiny_pipeline()
    for scheduler in ("ddpm", "ddim"):
        pipe.scheduler = official_scheduler(scheduler)
        together = latents_of(pipe, generator=[seeded(5), seeded(6)], guidance_scale=1.5)
        for index, label in enumerate((2, 7)):
            alone = latents_of(pipe, (label,), generator=seeded(5 + index), guidance_scale=1.5)
            assert (together[index : index + 1] - alone).abs().max() < 1e-4


# --- guidance --------------------------------------------------------------------------------------------------------


def test_three_channels_or_all_are_guided():
    pipe = tiny_pipeline()
    three, every = (
        latents_of(pipe, generator=seeded(0), guidance_scale=1.5, guidance_channels=channels)
        for channels in (3, "all")
    )
    assert torch.equal(latents_of(pipe, generator=seeded(0), guidance_scale=1.5), three)
    assert (three - every).abs().max() > 1e-3
    for other in (tiny_pipeline(guidance_channels=None), tiny_pipeline(guidance_channels=4)):
        assert torch.equal(latents_of(other, generator=seeded(0), guidance_scale=1.5), every)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_diffit_pipeline])
def test_the_strength_of_guidance_depends_on_the_timestep_as_asked(pipeline):
    pipe, seen = pipeline(), []

    def look(pipe, step, timestep, tensors):
        seen.append(pipe.strength_at(timestep))

    options = {"num_inference_steps": 3, "generator": seeded(0), "callback_on_step_end": look}
    latents_of(pipe, guidance_scale=3.0, guidance_schedule="power_cosine", guidance_power=1.0, **options)
    latents_of(pipe, guidance_scale=3.0, guidance_schedule="constant", **options)
    assert seen == pytest.approx([1.0, 2.0, 3.0, 3.0, 3.0, 3.0], abs=0.01)


def test_a_pipeline_keeps_its_guidance(tmp_path):
    tiny_diffit_pipeline(guidance_power=3.0, vae=None).save_pretrained(tmp_path)
    pipe = ClassToImagePipeline.from_pretrained(tmp_path)
    assert type(pipe.transformer) is DiffiT2DModel
    kept = pipe.config.guidance_scale, pipe.config.guidance_schedule, pipe.config.guidance_power
    assert kept == (4.4, "power_cosine", 3.0)


def test_without_guidance_the_network_runs_once_per_sample():
    pipe, batches = tiny_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    latents_of(pipe, num_inference_steps=2, guidance_scale=1.0)
    latents_of(pipe, num_inference_steps=2, guidance_scale=1.01)
    assert batches == [2, 2, 4, 4]


def test_a_callback_may_change_latents_and_end_guidance():
    pipe, batches = tiny_pipeline(), []
    pipe.transformer.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))

    def change(pipe, step, timestep, tensors):
        pipe._guidance_scale = 1.0
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 2 else None

    assert latents_of(pipe, num_inference_steps=3, callback_on_step_end=change).abs().max() == 0
    assert batches == [4, 2, 2]


# --- schedulers, sizes, outputs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        EulerDiscreteScheduler(beta_schedule="linear", timestep_spacing="linspace"),
        FlowMatchEulerDiscreteScheduler(),
        DDPMScheduler(beta_schedule="linear", variance_type="fixed_large", clip_sample=False),
        DDIMScheduler(beta_schedule="linear", clip_sample=False),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_other_schedulers_run(scheduler):
    latents = latents_of(tiny_pipeline(scheduler), generator=seeded(0), guidance_scale=1.5)
    assert latents.dtype == torch.float32 and latents.isfinite().all()


def test_euler_on_the_official_timesteps_is_ddim_up_to_its_rounding():
    euler = EulerDiscreteScheduler(beta_schedule="linear", timestep_spacing="linspace")
    results = [
        latents_of(tiny_pipeline(scheduler), generator=seeded(0), guidance_scale=1.0, timesteps=respaced_timesteps(50))
        for scheduler in (euler, official_scheduler("ddim"))
    ]
    assert (results[0] - results[1]).abs().max() < 0.05  # Euler starts from sqrt(A) x + sqrt(1 - A) noise


def test_latents_stay_in_float32_when_the_network_does_not(recwarn):
    pipe = tiny_pipeline()
    pipe.transformer.bfloat16()
    assert latents_of(pipe, num_inference_steps=2, generator=seeded(0)).dtype == torch.float32
    with pytest.warns(UserWarning, match="`latents` are float16; sampling goes on in float32"):
        given = torch.zeros(2, 4, 8, 8, dtype=torch.float16)
        assert latents_of(pipe, num_inference_steps=2, latents=given).dtype == torch.float32


def test_sizes_counts_and_outputs():
    pipe = tiny_pipeline()
    for output_type, kind in (("pil", list), ("np", np.ndarray), ("pt", torch.Tensor)):
        images = pipe(["red star", 4], 64, 96, 2, num_images_per_prompt=2, output_type=output_type).images
        assert isinstance(images, kind) and len(images) == 4
    assert images.shape == (4, 3, 64, 96) and 0 <= images.min() <= images.max() <= 1
    (images,) = pipe(1, num_inference_steps=2, return_dict=False)
    assert images[0].size == (64, 64)
    images = pipe(torch.tensor([1, 2]), num_inference_steps=2, output_type="pt").images
    assert len(images) == 2


def test_a_video_vae_decodes_pictures_as_clips_of_one_frame():
    vae = AutoencoderKLOpenSoraPlan(
        hidden_size=8, hidden_size_mult=(1, 1, 1, 1), num_res_blocks=1, norm_num_groups=4
    ).eval()
    pipe = tiny_pipeline(vae=vae)
    latents = latents_of(pipe, num_inference_steps=2, generator=seeded(0))
    images = pipe([2, 7], num_inference_steps=2, generator=seeded(0), output_type="pt").images
    with torch.no_grad():
        pixels = vae.decode(latents[:, :, None] / vae.config.scaling_factor).sample[:, :, 0]
    assert torch.allclose(images, (pixels / 2 + 0.5).clamp(0, 1), atol=1e-5)


@GROUPS
def test_offloading_changes_nothing(groups, tmp_path):
    pipe = tiny_pipeline()

    def run() -> torch.Tensor:
        return pipe(1, num_inference_steps=2, generator=seeded(0), output_type="pt").images

    plain = run()
    pipe.enable_group_offload(torch.device("cpu"), offload_to_disk_path=str(tmp_path), **groups)
    for _ in range(2):
        remove_offloaded(pipe.transformer)
        remove_offloaded(pipe.vae)
        assert torch.equal(run(), plain)


@pytest.mark.parametrize("pipeline", [tiny_pipeline, tiny_diffit_pipeline])
def test_the_first_block_cache_skips_blocks_whose_input_hardly_changes(pipeline):
    plain = latents_of(pipeline(), generator=seeded(0), guidance_scale=1.5)
    for threshold in (0.0, 1e6):
        pipe, runs = pipeline(), []
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        pipe.transformer.blocks[1].mlp.register_forward_hook(lambda *_, runs=runs: runs.append(1))
        latents = latents_of(pipe, generator=seeded(0), guidance_scale=1.5)
        assert torch.equal(latents, plain) == (threshold == 0.0) == (len(runs) == 10)


# --- classes ---------------------------------------------------------------------------------------------------------


def test_names_stand_for_numbers():
    pipe = tiny_pipeline()
    assert pipe.get_label_ids(["Tench", "tinca tinca", "tench, Tinca tinca", "RED  star"]) == [0, 0, 0, 1]
    assert pipe.get_label_ids("golden retriever") == [4]
    assert len(latents_of(pipe, ["red star", 3, "7"], num_images_per_prompt=2, num_inference_steps=1)) == 6


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (10, "class label 10 must be 0 to 9; nearest: 9"),
        ([1, -1], "class label -1 must be 0 to 9; nearest: 0"),
        (["-1"], "class label -1 must be 0 to 9; nearest: 0"),
        ("golden retreiver", "there is no class 'golden retreiver'; nearest: golden retriever"),
        ("crane", "'crane' is a name of the classes 2, 3; pass the number"),
        (1.5, "class label 1.5 must be a number or a name"),
        ([], "class_labels is empty"),
    ],
)
def test_unknown_classes_are_refused_with_the_nearest(labels, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be a finite number of at least 0"),
        ({"guidance_scale": -1}, "guidance_scale=-1 must be .*nearest: 0"),
        ({"eta": float("inf")}, "eta=inf must be a number from 0 to 1; nearest: 1"),
        ({"generator": 42}, "manual_seed"),
        ({"guidance_channels": 5}, "guidance_channels=5 must be 1 to 4"),
    ],
)
def test_values_that_mean_nothing_are_refused_before_a_step(arguments, message):
    with pytest.raises(ValueError, match=message):
        latents_of(tiny_pipeline(), **arguments)


def test_integers_of_numpy_and_tuples_of_generators_are_taken():
    arguments = {"height": np.int64(64), "num_inference_steps": np.int64(2), "num_images_per_prompt": np.int8(1),
                 "guidance_channels": np.int64(3)}  # fmt: skip
    generators = seeded(0), seeded(1)
    found = latents_of(tiny_pipeline(), (np.int64(2), 7), generator=generators, **arguments)
    expected = latents_of(tiny_pipeline(), num_inference_steps=2, generator=[seeded(0), seeded(1)])
    assert torch.equal(found, expected)


def test_a_second_call_at_the_same_time_is_refused_with_a_remedy_that_works():
    pipe, failures = tiny_pipeline(), []
    arguments = {"num_inference_steps": 2, "guidance_scale": 2.0}

    def call_again(*_):
        with pytest.raises(RuntimeError, match="give each thread a pipeline of its own") as failure:
            pipe(1)
        failures.append(str(failure.value))
        return {}

    once = latents_of(pipe, callback_on_step_end=call_again, generator=seeded(0), **arguments)
    remedy = failures[0].partition("shares the weights: ")[2].rstrip(".")
    names = {"ClassToImagePipeline": ClassToImagePipeline, "pipe": pipe, "copy": copy}
    other = eval(remedy, names)  # noqa: S307 (our own message)
    other.set_progress_bar_config(disable=True)
    assert other.transformer is pipe.transformer and other.vae is pipe.vae and other.scheduler is not pipe.scheduler
    assert other.config.id2label == pipe.config.id2label
    assert torch.equal(latents_of(other, generator=seeded(0), **arguments), once)


def test_a_model_without_names_says_which_numbers_it_takes():
    with pytest.raises(ValueError, match="no class 'dog'; this model has no names, pass 0 to 9"):
        tiny_pipeline(id2label=None)("dog")


# --- loading ---------------------------------------------------------------------------------------------------------


def test_a_saved_pipeline_loads_as_one_of_diffusers(tmp_path):
    pipe = tiny_pipeline(guidance_channels=4)
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text(encoding="utf-8"))
    assert index["transformer"] == ["diffusers", "DiT2DModel"]
    for loader in (DiffusionPipeline, ClassToImagePipeline):
        again = loader.from_pretrained(tmp_path)
        again.set_progress_bar_config(disable=True)
        assert type(again) is ClassToImagePipeline and again.config.guidance_channels == 4
        assert again.get_label_ids("red star") == [1]
        same = (latents_of(each, num_inference_steps=2, generator=seeded(0)) for each in (pipe, again))
        assert torch.equal(*same)
    without = ClassToImagePipeline.from_pretrained(tmp_path, vae=None)
    without.set_progress_bar_config(disable=True)
    assert latents_of(without, num_inference_steps=2).shape == (2, 4, 8, 8)
    with pytest.raises(ValueError, match="output_type='pil' needs a VAE, but this pipeline has none"):
        without(1)


def test_a_folder_of_diffusers_gets_the_exact_network_and_the_official_sampler(tmp_path):
    folder_of_diffusers(tmp_path / "transformer", "dit_sampler")
    tiny_vae().save_pretrained(tmp_path / "vae", safe_serialization=False)
    DDIMScheduler(beta_schedule="linear", clip_sample=False).save_pretrained(tmp_path / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": "0.12.0.dev0",
        "id2label": {str(number): name for number, name in NAMES.items()},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (tmp_path / "model_index.json").write_text(json.dumps(index), encoding="utf-8")
    pipe = ClassToImagePipeline.from_pretrained(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe.transformer) is DiT2DModel and pipe.scheduler.config.variance_type == "learned_range"
    assert pipe.get_label_ids("tench") == [0] and pipe.config.guidance_channels == 3
    latents = latents_of(pipe, generator=seeded(3), guidance_scale=1.5)
    assert torch.equal(latents, latents_of(tiny_pipeline(), generator=seeded(3), guidance_scale=1.5))
    kept = ClassToImagePipeline.from_pretrained(tmp_path, scheduler=official_scheduler("ddim"), dtype=torch.bfloat16)
    assert kept.scheduler.config.solver_order == 1 and kept.transformer.dtype == torch.bfloat16


def test_pipelines_of_prompts_are_refused():
    with pytest.raises(ValueError, match="holds a PTDiTPipeline, not a class-conditional pipeline"):
        ClassToImagePipeline.from_pretrained("shapes-128")


def test_a_pipeline_of_prompts_names_the_class_that_loads_a_model_of_classes(tmp_path):
    with pytest.raises(ValueError, match="a ClassToImagePipeline, without the text_encoder and tokenizer of a PTDiTP"):
        PTDiTPipeline.from_pretrained(tiny_folder(tmp_path))


def test_a_missing_weight_of_the_transformer_is_named_before_anything_is_loaded(tmp_path):
    (path,) = (tiny_folder(tmp_path) / "transformer").glob("*.safetensors")
    weights = load_file(path)
    del weights["blocks.0.attn.qkv.weight"]
    save_file(weights, path)
    with pytest.raises(ValueError, match="1 missing: blocks.0.attn.qkv.weight"):
        ClassToImagePipeline.from_pretrained(tmp_path)


def test_the_package_offers_the_parts():
    for name in ("ClassToImagePipeline", "DiT2DModel", "official_scheduler", "respaced_timesteps"):
        assert name in ptdit_diffusers.__all__ and getattr(ptdit_diffusers, name)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": 70}, r"height=70 is not a multiple of 16 \(VAE 8 x patch 2\); nearest: 64 or 80"),
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be an integer of at least 1"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt=0 must be an integer of at least 1"),
        ({"guidance_channels": 5}, 'guidance_channels=5 must be 1 to 4 or "all"; nearest: 4'),
        (
            {"guidance_schedule": "cosine"},
            "guidance_schedule='cosine' is unknown; choose one of constant, power_co",
        ),
        ({"guidance_power": 0}, "guidance_power=0 must be a number above 0; the official one is 4"),
        ({"generator": [seeded(0)] * 2}, "`generator` has 2 members for a batch of 1"),
        ({"latents": torch.zeros(1, 4, 8, 10)}, r"`latents` must have shape \(1, 4, 8, 8\) for this call"),
        ({"output_type": "jpg"}, "output_type='jpg' is unknown"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "are unknown; choose from"),
    ],
)
def test_illegal_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny_pipeline()(1, **arguments)


def test_a_model_of_one_size_refuses_others():
    with pytest.raises(ValueError, match="width=80: this model makes 64 x 64 only; nearest: 64"):
        tiny_diffit_pipeline()(1, width=80)


def test_a_variance_that_the_model_does_not_predict_is_named():
    pipe = ClassToImagePipeline(dit_goldens.model("dit_p4"), None, official_scheduler())
    with pytest.raises(ValueError, match="uses a learned variance, but the model predicts none .4 channels for 4."):
        pipe(1, output_type="latent")


def test_a_model_without_a_null_class_is_not_guided():
    sizes = dit_goldens.config("dit_sampler") | {"class_dropout_prob": 0.0}
    pipe = ClassToImagePipeline(DiT2DModel(**sizes), None, official_scheduler())
    with pytest.raises(
        ValueError, match="trained without a null class, so it cannot be guided; pass guidance_scale=1"
    ):
        pipe(1, output_type="latent")


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lora_weights(rank: int = 2, name: str = "transformer.blocks.1.attn.qkv") -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    down, up = (torch.randn(*shape, generator=generator) for shape in ((rank, 48), (3 * 48, rank)))
    return {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}


def test_a_lora_adds_the_product_of_its_matrices_and_can_be_taken_off(tmp_path):
    pipe, weights = tiny_pipeline(), lora_weights()
    plain = latents_of(pipe, generator=seeded(0), guidance_scale=1.5)
    save_file(weights, tmp_path / "pytorch_lora_weights.safetensors")
    pipe.load_lora_weights(tmp_path, adapter_name="one")
    pipe.set_adapters("one", 0.5)
    changed = latents_of(pipe, generator=seeded(0), guidance_scale=1.5)
    assert not torch.equal(changed, plain)

    merged = tiny_pipeline()
    down, up = weights.values()
    with torch.no_grad():
        merged.transformer.blocks[1].attn.qkv.weight += 0.5 * up @ down
    expected = latents_of(merged, generator=seeded(0), guidance_scale=1.5)
    assert (changed - expected).abs().max() < 1e-3
    pipe.unload_lora_weights()
    assert torch.equal(latents_of(pipe, generator=seeded(0), guidance_scale=1.5), plain)


@pytest.mark.parametrize("name", ["diffusion_model.blocks.1.attn.qkv", "lora_unet_blocks_1_attn_qkv"])
def test_a_lora_with_the_names_of_comfyui_or_kohya_is_the_same(name):
    weights = dict(zip(lora_weights(name=name), lora_weights().values(), strict=True))
    kohya = {key.replace("lora_A", "lora_down").replace("lora_B", "lora_up"): each for key, each in weights.items()}
    for given in (weights, kohya):
        pipe, expected = tiny_pipeline(), tiny_pipeline()
        pipe.load_lora_weights(given)
        expected.load_lora_weights(lora_weights())
        assert torch.equal(latents_of(pipe, generator=seeded(0)), latents_of(expected, generator=seeded(0)))


def test_a_lora_of_another_model_is_refused_with_the_first_keys():
    with pytest.raises(ValueError, match="transformer_blocks.0.attn1.to_q.lora_A.weight .no such layer."):
        tiny_pipeline().load_lora_weights(lora_weights(name="transformer.transformer_blocks.0.attn1.to_q"))
