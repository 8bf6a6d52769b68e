"""Bad input on a real ComfyUI: a sentence on the node, and the server lives."""

import re

import pytest
import torch

from .graph import EMBEDDED, Graph, output
from .stock_graphs import parts, sample, windows
from .test_server import one_step

pytestmark = pytest.mark.comfy


def decode(g: Graph, vae_name: str, dtype: str = "auto") -> None:
    """Decode something with a file of models/vae."""
    vae = g("PTDiTVAELoader", vae_name=vae_name, dtype=dtype, video=False)
    pixels = g("VAEDecode", samples=g("EmptyLatentImage", width=64, height=64, batch_size=1), vae=vae)
    g("SaveImage", images=pixels, filename_prefix="x")


def run(g: Graph, model: str, **more: object) -> None:
    """The standard run with a file of models/diffusion_models."""
    sample(g, *parts(g, file=model), **more)


def run_windows(g: Graph, **settings: object) -> None:
    """The standard run with a Window & Proxy node."""
    model, *rest = parts(g)
    sample(g, windows(g, model, **settings), *rest)


def run_lora(g: Graph, name: str) -> None:
    """The standard run with a file of models/loras."""
    model, *rest = parts(g)
    sample(g, g("LoraLoaderModelOnly", model=model, lora_name=name, strength_model=1.0), *rest)


def run_folder(g: Graph, name: str, frames: int = 1, weight_dtype: str = "default") -> None:
    """The standard run with a model folder."""
    _, *rest = parts(g, frames=frames)
    sample(g, g("PTDiTFolderLoader", folder=name, weight_dtype=weight_dtype), *rest)


def clip(g: Graph, length: int = 24, aspect: str = "1:1") -> None:
    """A clip that cannot be."""
    latent = g("PTDiTEmptyLatent", width=64, height=64, aspect=aspect, length=length, views=0, batch_size=1)
    g("SaveLatent", samples=latent, filename_prefix="x")


def sheet(g: Graph) -> None:
    """A contact sheet that the pictures do not fill."""
    pictures = g("EmptyImage", width=16, height=16, batch_size=6, color=0)
    g("SaveImage", images=g("PTDiTContactSheet", images=pictures, columns=0, per_sheet=4), filename_prefix="x")


def views_of_a_picture(g: Graph) -> None:
    """A latent without frames taken apart."""
    latent = g("PTDiTViewsToBatch", latent=g("EmptyLatentImage", width=64, height=64, batch_size=1))
    g("SaveLatent", samples=latent, filename_prefix="x")


def map_of_block(g: Graph, blocks: str) -> None:
    """A proxy map of some blocks."""
    model, positive, _, latent = parts(g)
    drawn = g("PTDiTProxyMap", model=model, positive=positive, latent=latent, x=0.5, y=0.5, levels=1, blocks=blocks,
              frame=0, noise_seed=0)  # fmt: skip
    g("SaveImage", images=drawn, filename_prefix="x")


def wrong_text(g: Graph) -> None:
    """Text of another width: zeros of CLIP size through the released network's tiny stand-in."""
    _, positive, negative, latent = parts(g)
    sample(g, g("UNETLoader", unet_name="other_text.safetensors", weight_dtype="default"), positive, negative, latent)


def no_text_encoder(g: Graph) -> None:
    """A folder without text encoder."""
    clip = (g("PTDiTFolderLoader", folder="bare", weight_dtype="default")[0], 1)
    text = g("PTDiTTextEncode", clip=clip, text="a", literal=True, cleaning=False)
    model, _, negative, latent = parts(g)
    sample(g, model, text, negative, latent)


def save_outside(g: Graph) -> None:
    """A picture whose name leads out of the output folder."""
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="auto", video=False)
    pixels = g("VAEDecode", samples=g("EmptyLatentImage", width=64, height=64, batch_size=1), vae=vae)
    g("SaveImage", images=pixels, filename_prefix="../../outside")


def missing_t5(g: Graph) -> None:
    """The stock loader with a file that is not there."""
    model, _, negative, latent = parts(g)
    clip = g("CLIPLoader", clip_name="t5xxl_fp16.safetensors", type="pixart", device="default")
    sample(g, model, g("PTDiTTextEncode", clip=clip, text="a", literal=True, cleaning=False), negative, latent)


BAD = {
    "a transformer as VAE": (
        lambda g: decode(g, "no_vae.safetensors"),
        "not the causal VAE of Open-Sora-Plan; it seems to be a PT-DiT transformer",
    ),
    "a file that is no checkpoint": (lambda g: decode(g, "garbage.ckpt"), "garbage.ckpt cannot be read as weights"),
    "a width without configuration": (
        lambda g: run(g, "no_config.safetensors"),
        "width 32 is no known size.*288 .6 heads.*Folder Loader",
    ),
    "a LoRA as transformer": (lambda g: run(g, "lora.safetensors"), "Could not detect model type"),
    "a range without steps": (
        lambda g: run_windows(g, start_percent=0.5, end_percent=0.5),
        "start_percent=0.5 must be below",
    ),
    "a proxy that fits no window": (
        lambda g: run_windows(g, window_height=4, proxy_height=3),
        "proxy_height=3.*nearest: 2 or 4",
    ),
    "a proxy coarser than windows that is no multiple of them": (
        lambda g: run_windows(g, window_width=4, proxy_width=6),
        "proxy_width=6.*nearest: 4 or 8",
    ),
    "a proxy larger than any": (lambda g: run_windows(g, window_width=4, proxy_width=65), "bigger than max"),
    "a mode that is not there": (lambda g: run_windows(g, mode="finest"), "not in"),
    "a proxy mode that is not there": (lambda g: run_windows(g, proxy_mode="last"), "not in"),
    "an aspect that is not there": (lambda g: clip(g, length=1, aspect="5:5"), "not in"),
    "a format of the VAE that is not there": (lambda g: decode(g, "tiny.safetensors", dtype="fp64"), "not in"),
    "a format of weights that is not there": (lambda g: run_folder(g, EMBEDDED, weight_dtype="int3"), "not in"),
    "a negative window": (lambda g: run_windows(g, window_height=-1), "smaller than min"),
    "frames for a model of pictures": (
        lambda g: run_folder(g, EMBEDDED, frames=5),
        "single pictures .*the latent has 2",
    ),
    "frames that no clip has": (clip, "length=24 .*nearest: 21 or 25"),
    "a sheet that is not filled": (sheet, "per_sheet=4 does not divide the 6 pictures; nearest: 3"),
    "views of a picture": (views_of_a_picture, "views are frames: use PT-DiT Empty Latent with views"),
    "a missing LoRA": (lambda g: run_lora(g, "none.safetensors"), "not in"),
    "a path as folder": (lambda g: run_folder(g, "../../.."), "not in|there is no PT-DiT folder"),
    "a folder whose list of weights names a file outside": (
        lambda g: run_folder(g, "outside"),
        r"names '../../../vae/tiny.safetensors', which is not beside it",
    ),
    "a folder that lacks a weight": (
        lambda g: run_folder(g, "incomplete"),
        "does not hold exactly the weights of the PT-DiT of its config.json.*1 missing: proj_out.bias",
    ),
    "a folder whose VAE is of another model": (
        lambda g: run_folder(g, "of_two_models"),
        "vae and transformer do not fit each other: z_channels=8, but in_channels=4",
    ),
    "a folder whose weights have other shapes": (lambda g: run_folder(g, "other_layers"), "misshapen: caption_proj"),
    "a path as network": (lambda g: run(g, "../vae/tiny.safetensors"), "not in"),
    "a path as picture to save": (save_outside, "outside the output folder|Invalid filename|outside"),
    "a path as file": (lambda g: decode(g, "../../secret.ckpt"), "not in|not found"),
    "a block that is not there": (
        lambda g: map_of_block(g, "7"),
        "block 7 does not exist; the model has blocks 0 to 1",
    ),
    "no list of blocks": (lambda g: map_of_block(g, "all"), "no list of numbers"),
    "a missing T5": (missing_t5, "not in"),
    "text of another encoder": (wrong_text, "gives vectors of width 128, this PT-DiT reads 96"),
    "a folder without text encoder": (no_text_encoder, "no text encoder|clip input is invalid"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_gives_a_sentence_and_the_server_lives(server, name):
    build, message = BAD[name]
    g = Graph()
    build(g)
    result = server.queue(g)
    assert not result["ok"]
    assert re.search(message, result["message"], re.DOTALL), result["message"]
    assert server.process.poll() is None


def test_a_window_of_zero_is_that_of_the_checkpoint(server):
    zero = one_step(server, lambda g, model: windows(g, model))
    same = one_step(server, lambda g, model: windows(g, model, mode="checkpoint"))
    other = one_step(server, lambda g, model: windows(g, model, window_height=3))
    torch.testing.assert_close(zero, same)
    assert (other - zero).abs().max() > 1e-4


def test_a_prompt_that_is_too_long_is_cut_and_this_is_said(server):
    g = Graph()
    clip = output(g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default"), 1)
    words = " ".join(["red"] * 250) + " star"
    text = g("PTDiTTextEncode", clip=clip, text=words, literal=True, cleaning=False)
    shown = g("PreviewAny", source=output(text, 1))
    result = server.queue(g)
    assert result["ok"], result["message"]
    notes = result["outputs"][shown[0]]["text"][0]
    assert notes.startswith("200 of 200 tokens") and "this part is not used" in notes and "star" in notes
    assert "PT-DiT Text Encode: 200 of 200 tokens" in server.text()


def test_a_run_can_be_cancelled_and_the_next_one_works(server):
    g = Graph()
    *rest, _ = parts(g)
    sample(g, *rest, g("EmptyLatentImage", width=512, height=512, batch_size=4), steps=200, seed=99)
    assert server.queue(g, interrupt=True)["message"] == "interrupted"
    assert one_step(server, lambda g, model: g("ModelSamplingSD3", model=model, shift=1.1)).isfinite().all()
