"""DiT and DiffiT on a real ComfyUI: the numbers of the diffusers pipeline, every form of file, classes, guidance."""

import re

import pytest
import torch
from PIL import Image

from ptdit_diffusers import ClassToImagePipeline

from .graph import EMBEDDED, Graph, Server, output
from .test_server import finite_latents

pytestmark = pytest.mark.comfy
SEED, GUIDANCE, STEPS = 5, 3.0, 10  # with 10 steps "normal" takes timesteps 999, 888, ..., 0, as the official code
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(SEED))


def file(g: Graph, name: str) -> tuple:
    """A network from models/diffusion_models."""
    return g("UNETLoader", unet_name=name, weight_dtype="default")


def folder(g: Graph, name: str) -> tuple:
    """Network and VAE of a folder."""
    return g("PTDiTFolderLoader", folder=name)


def sample(g: Graph, model: tuple, positive: tuple, negative: tuple, cfg: float = GUIDANCE, **more: object) -> tuple:
    """KSampler on two pictures of 64 x 64, and its result saved."""
    latent = more.pop("latent", None) or g("PTDiTEmptyLatent", width=64, height=64, batch_size=2)
    settings = {"seed": SEED, "steps": STEPS, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0} | more
    result = g("KSampler", model=model, positive=positive, negative=negative, cfg=cfg, latent_image=latent, **settings)
    g("SaveLatent", samples=result, filename_prefix="classes")
    return result


def latents_of(server: Server, g: Graph) -> torch.Tensor:
    """What the only SaveLatent of a graph that must succeed wrote."""
    result = server.queue(g)
    assert result["ok"], result["message"]
    (latent,) = finite_latents(server, result)
    return latent


def sampled(server: Server, load=file, name: str = "dit.safetensors", classes: str = "2\n7", change=None, **more):
    """Latents of two classes; `change` may put something between model and sampler."""
    g = Graph()
    model = load(g, name)
    chosen = g("PTDiTClass", model=model, classes=classes)
    sample(g, change(g, model) if change else model, chosen, output(chosen, 1), **more)
    return latents_of(server, g)


def pipeline(server: Server, name: str, **options: object) -> torch.Tensor:
    """Latents of the diffusers pipeline of a folder from the same noise."""
    pipe = ClassToImagePipeline.from_pretrained(server.base / "models/diffusers" / name)
    pipe.set_progress_bar_config(disable=True)
    options = {"guidance_scale": GUIDANCE, "latents": NOISE, "num_inference_steps": STEPS} | options
    return pipe([2, 7], output_type="latent", **options).images / pipe.vae.config.scaling_factor


def guided(**inputs: object):
    """A change of the model: guidance as in the official code."""
    return lambda g, model: g("PTDiTClassGuidance", model=model, **inputs)


@pytest.mark.parametrize("cfg", [1.0, GUIDANCE])
def test_a_run_gives_the_latents_of_the_diffusers_pipeline(server, cfg, record_property):
    ours = sampled(server, folder, "dit", cfg=cfg)
    theirs = pipeline(server, "dit", guidance_scale=cfg, guidance_channels="all")
    difference = (ours - theirs).abs().max().item()
    record_property(f"DiT, cfg {cfg}", f"{difference:.1e} of latents up to {theirs.abs().max():.1f}")
    assert difference < 1e-4


def test_one_step_shows_that_the_networks_agree(server):
    theirs = pipeline(server, "dit", guidance_scale=1.0, num_inference_steps=1, timesteps=[999])
    one = sampled(server, folder, "dit", cfg=1.0, steps=1, scheduler="simple")
    assert (one - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_three_channels_are_guided_as_in_the_official_code(server):
    ours = sampled(server, folder, "dit", change=guided())
    assert (ours - pipeline(server, "dit")).abs().max() < 1e-4
    every = sampled(server, folder, "dit", change=guided(channels=0))
    torch.testing.assert_close(every, sampled(server, folder, "dit"), atol=1e-4, rtol=0)
    assert (every - ours).abs().max() > 1e-2


def test_diffit_and_its_growing_guidance_give_the_latents_of_the_pipeline(server):
    change = guided(channels=3, schedule="power_cosine")
    ours = sampled(server, folder, "diffit", change=change, cfg=4.4)
    assert (ours - pipeline(server, "diffit", guidance_scale=4.4)).abs().max() < 1e-4


def test_a_model_of_rectified_flow_is_sampled_as_a_flow(server):
    g = Graph()
    model = folder(g, "dit_flow")
    chosen = g("PTDiTClass", model=model, classes="2\n7")
    sample(g, model, chosen, output(chosen, 1), scheduler="simple")
    difference = latents_of(server, g) - pipeline(server, "dit_flow", guidance_channels="all")
    assert difference.abs().max() < 0.02  # the schedules differ: 1, 0.9, ... and 1, 0.889, ..., 0.001


@pytest.mark.parametrize("name", ["dit.safetensors", "dit_official.pt", "diffit.safetensors"])
def test_files_load_with_the_stock_node_and_the_log_says_how_they_are_sampled(server, name):
    server.get("/free", {"unload_models": True, "free_memory": True})
    before = len(server.text())
    latent = sampled(server, file, name, seed=SEED + len(name))  # a new seed, so that nothing is taken from the cache
    assert latent.shape == (2, 4, 8, 8)
    log = server.text()[before:]
    system = "DiffiT" if "diffit" in name else "DiT"
    assert f"PT-DiT: {system} of 10 classes; predicts the noise of 1000 steps with linear betas" in log
    assert f"do not use the learned variance of {system}" in log


def test_a_file_and_its_folder_differ_only_by_the_scale_of_their_vae(server):
    scaled = sampled(server, file, "dit.safetensors") * 0.18215
    torch.testing.assert_close(scaled, sampled(server, folder, "dit") * 0.43043, atol=1e-5, rtol=1e-5)


def test_classes_go_by_name_and_several_are_those_of_a_batch(server):
    by_name = sampled(server, folder, "dit", classes="red star\ngolden retriever")
    torch.testing.assert_close(by_name, sampled(server, folder, "dit", classes="1\n4"))
    one = sampled(server, folder, "dit", classes="1")
    assert torch.equal(one[0], by_name[0]) and not torch.allclose(one[1], by_name[1], atol=1e-2)


def test_stock_nodes_make_the_null_class_and_mixtures(server):
    def with_negative(make) -> torch.Tensor:
        g = Graph()
        model = folder(g, "dit")
        chosen = g("PTDiTClass", model=model, classes="2\n7")
        sample(g, model, *make(g, model, chosen))
        return latents_of(server, g)

    def zeroed(g, model, chosen):
        return chosen, g("ConditioningZeroOut", conditioning=chosen)

    def mixed(share: float):
        def make(g, model, chosen):
            other = g("PTDiTClass", model=model, classes="4\n4")
            return g("ConditioningAverage", conditioning_to=chosen, conditioning_from=other,
                     conditioning_to_strength=share), output(chosen, 1)  # fmt: skip

        return make

    plain = sampled(server, folder, "dit")
    torch.testing.assert_close(with_negative(zeroed), plain, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(with_negative(mixed(1.0)), plain, atol=1e-5, rtol=1e-5)
    half = with_negative(mixed(0.5))
    assert (half - plain).abs().max() > 1e-2 and half.isfinite().all()


def test_a_lora_and_a_saved_model_work_as_for_other_models(server):
    before = len(server.text())
    plain = sampled(server)
    changed = sampled(server, change=lambda g, model: g(
        "LoraLoaderModelOnly", model=model, lora_name="dit.safetensors", strength_model=1.0))  # fmt: skip
    assert (changed - plain).abs().max() > 1e-3 and "lora key not loaded" not in server.text()[before:]
    g = Graph()
    g("ModelSave", model=file(g, "dit.safetensors"), filename_prefix="class_model")
    assert server.queue(g)["ok"]
    (saved,) = server.base.glob("output/class_model*.safetensors")
    saved.rename(server.base / "models/diffusion_models/class_model.safetensors")
    torch.testing.assert_close(sampled(server, name="class_model.safetensors"), plain, atol=1e-5, rtol=1e-5)


def test_pictures_come_out_of_the_stock_vae_node_in_the_models_own_size(server):
    g = Graph()
    model = folder(g, "dit")
    chosen = g("PTDiTClass", model=model, classes="red star")
    latent = g("PTDiTEmptyLatent", width=0, height=0, model=model)
    latent = sample(g, model, chosen, output(chosen, 1), latent=latent)
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(model, 2)), filename_prefix="class")
    shown = g("PreviewAny", source=output(chosen, 2))
    result = server.queue(g)
    assert result["ok"], result["message"]
    (picture,) = (path for path in server.files(result) if path.suffix == ".png")
    assert Image.open(picture).size == (64, 64)
    assert result["outputs"][shown[0]]["text"] == ["1: red star"]


# --- bad input -------------------------------------------------------------------------------------------------------


def run_classes(g: Graph, classes: str = "2", load=folder, name: str = "dit", **latent: int) -> None:
    """A run with classes that are not there, or a latent that does not fit."""
    model = load(g, name)
    chosen = g("PTDiTClass", model=model, classes=classes)
    size = g("PTDiTEmptyLatent", **{"width": 64, "height": 64} | latent)
    sample(g, model, chosen, output(chosen, 1), latent=size)


def run_text(g: Graph) -> None:
    """Text in place of a class."""
    text = g("CLIPTextEncode", clip=output(folder(g, EMBEDDED), 1), text="red star")
    sample(g, folder(g, "dit"), text, text)


def run_class_of_a_text_model(g: Graph) -> None:
    """A class of PT-DiT."""
    chosen = g("PTDiTClass", model=folder(g, EMBEDDED), classes="1")
    sample(g, folder(g, "dit"), chosen, output(chosen, 1))


def run_resolution_shift(g: Graph) -> None:
    """A node for PT-DiT on a DiT."""
    model = folder(g, "dit")
    latent = g("PTDiTEmptyLatent", width=64, height=64)
    chosen = g("PTDiTClass", model=model, classes="1")
    sample(g, g("PTDiTModelSampling", model=model, shift=0.0, latent=latent), chosen, output(chosen, 1))


BAD = {
    "a class that is not there": (lambda g: run_classes(g, "10"), "class label 10 must be 0 to 9; nearest: 9"),
    "an unknown name": (lambda g: run_classes(g, "red stars"), "no class 'red stars'; nearest: red star"),
    "a name of two classes": (lambda g: run_classes(g, "crane"), "name of the classes 2, 3; pass the number"),
    "no class": (lambda g: run_classes(g, " \n"), "classes is empty"),
    "frames": (lambda g: run_classes(g, length=5), "single pictures; the latent has 5 axes"),
    "text": (run_text, "knows 10 classes and no text; the conditioning holds vectors of width 128. Connect DiT Class"),
    "a class of a model of text": (run_class_of_a_text_model, "the model knows no classes: connect a DiT or DiffiT"),
    "a node for PT-DiT": (run_resolution_shift, "PT-DiT"),
    "another size for DiffiT": (lambda g: run_classes(g, name="diffit", width=80), "must be 8 x 8.*nearest: 8 x 8"),
    "a file without heads": (
        lambda g: run_classes(g, load=file, name="dit_without_heads.safetensors"),
        "do not show the number of heads.*Folder Loader",
    ),
    "a file that lacks a weight": (
        lambda g: run_classes(g, load=file, name="dit_incomplete.safetensors"),
        "lacks 1 weights of the DiT: blocks.1.mlp.fc2.bias",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_sentence(server, name):
    build, message = BAD[name]
    g = Graph()
    build(g)
    result = server.queue(g)
    assert not result["ok"]
    assert re.search(message, result["message"], re.DOTALL), result["message"]
