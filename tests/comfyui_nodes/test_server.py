"""Stock nodes over PT-DiT on a real ComfyUI: every graph of `stock_graphs`, and what is said about some of them."""

from collections.abc import Callable

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from .graph import EMBEDDED, Graph, Server, output
from .stock_graphs import GRAPHS, parts, sample, windows
from .test_layout import NODES

pytestmark = pytest.mark.comfy


def finite_latents(server: Server, result: dict) -> list[torch.Tensor]:
    """What SaveLatent wrote; each of them finite and no constant."""
    found = [load_file(path)["latent_tensor"] for path in server.files(result) if path.suffix == ".latent"]
    for latent in found:
        assert latent.isfinite().all() and latent.std() > 0.01
    return found


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_of_stock_nodes_runs(server, name):
    g = Graph()
    GRAPHS[name](g)
    known = server.get("/object_info")
    missing = sorted({node["class_type"] for node in g.nodes.values()} - set(known))
    if missing:
        pytest.skip(f"this ComfyUI has no {', '.join(missing)}")
    result = server.queue(g)
    assert result["ok"], result["message"]
    latents = finite_latents(server, result)
    saved = [node for node in g.nodes.values() if node["class_type"] == "SaveLatent"]
    assert len(latents) == len(saved)
    assert all(path.is_file() and path.stat().st_size > 100 for path in server.files(result))


def test_all_nodes_are_there_with_tooltips_on_every_input_and_output(server):
    known = server.get("/object_info")
    assert "Cannot import" not in server.text()
    for name in NODES:
        groups = [known[name]["input"].get(group, {}) for group in ("required", "optional")]  # others are not shown
        inputs = [value for group in groups for value in group.values()]
        assert all(len(value) > 1 and value[1].get("tooltip") for value in inputs), name
        assert all(known[name]["output_tooltips"]), name
        assert known[name]["description"] and known[name]["display_name"]


def one_step(server: Server, change: Callable[[Graph, tuple], tuple]) -> torch.Tensor:
    """Latents of the standard run with a changed model."""
    g = Graph()
    model, *rest = parts(g)
    sample(g, change(g, model), *rest)
    result = server.queue(g)
    assert result["ok"], result["message"]
    (latent,) = finite_latents(server, result)
    return latent


def test_all_three_kinds_of_lora_files_do_the_same_and_load_every_key(server):
    before = len(server.text())
    plain = one_step(server, lambda g, model: model)
    changed = [
        one_step(server, lambda g, model, name=name: g(
            "LoraLoaderModelOnly", model=model, lora_name=f"{name}.safetensors", strength_model=1.0))
        for name in ("diffusers", "comfy", "kohya")
    ]  # fmt: skip
    assert (changed[0] - plain).abs().max() > 1e-3
    for other in changed[1:]:
        torch.testing.assert_close(other, changed[0], atol=1e-5, rtol=1e-5)
    assert "lora key not loaded" not in server.text()[before:]
    assert "NOT LOADED" not in server.text()[before:]


def test_a_saved_model_loads_again_and_gives_the_same(server):
    g = Graph()
    g(
        "ModelSave",
        model=g("UNETLoader", unet_name="tiny.safetensors", weight_dtype="default"),
        filename_prefix="saved",
    )
    assert server.queue(g)["ok"]
    (file,) = server.base.glob("output/saved*.safetensors")
    file.rename(server.base / "models/diffusion_models/saved.safetensors")
    again = one_step(server, lambda g, model: g("UNETLoader", unet_name="saved.safetensors", weight_dtype="default"))
    torch.testing.assert_close(again, one_step(server, lambda g, model: model), atol=1e-5, rtol=1e-5)


def test_a_saved_checkpoint_loads_again_as_model_text_encoder_and_vae(server):
    g = Graph()
    loader = g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default")
    g("CheckpointSave", model=loader, clip=output(loader, 1), vae=output(loader, 2), filename_prefix="whole")
    assert server.queue(g)["ok"]
    (file,) = server.base.glob("output/whole*.safetensors")
    file.rename(server.base / "models/checkpoints/whole.safetensors")
    pictures = []
    for checkpoint in (False, True):
        g = Graph()
        saved = g("CheckpointLoaderSimple", ckpt_name="whole.safetensors")
        loader = saved if checkpoint else g("PTDiTFolderLoader", folder=EMBEDDED)
        positive, negative = (g("CLIPTextEncode", clip=output(loader, 1), text=text) for text in ("a red circle", ""))
        latent = g("PTDiTEmptyLatent", width=0, height=0, model=loader)
        latent = g("KSampler", model=loader, positive=positive, negative=negative, latent_image=latent, seed=0,
                   steps=3, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
        g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="whole")
        result = server.queue(g)
        assert result["ok"], result["message"]
        pictures += [Image.open(path).tobytes() for path in server.files(result)]
    assert len(pictures) == 2 and pictures[0] == pictures[1]


def test_views_are_decoded_one_by_one_and_lie_on_the_sheet_in_order(server):
    sizes, pixels = [], []
    for sheets in (False, True):
        g = Graph()
        model, positive, negative, _ = parts(g)
        latent = g("PTDiTEmptyLatent", width=64, height=48, aspect="custom", length=1, views=6, batch_size=2)
        views = g("PTDiTViewsToBatch", latent=sample(g, model, positive, negative, latent))
        vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="fp32", video=False)
        images = g("VAEDecode", samples=views, vae=vae)
        if sheets:
            images = g("PTDiTContactSheet", images=images, columns=0, per_sheet=output(views, 1))
        g("SaveImage", images=images, filename_prefix="views")
        result = server.queue(g)
        assert result["ok"], result["message"]
        opened = [Image.open(path) for path in server.files(result) if path.suffix == ".png"]
        sizes.append([image.size for image in opened])
        pixels.append(
            [torch.tensor(list(image.convert("RGB").tobytes())).view(*image.size[::-1], 3) for image in opened]
        )
    assert sizes == [[(64, 48)] * 12, [(192, 96)] * 2]
    pictures, sheets = pixels
    assert torch.equal(sheets[1][48:, 128:], pictures[11]) and torch.equal(sheets[0][:48, 64:128], pictures[1])
    assert not torch.equal(pictures[0], pictures[1])


def test_previews_and_progress_reach_the_page(server):
    g = Graph()
    sample(g, *parts(g), steps=4, seed=123)
    result = server.queue(g)
    assert result["previews"] >= 4 and result["steps"] == [(step, 4) for step in range(1, 5)]


def test_a_noise_mask_keeps_what_it_does_not_cover(server):
    g = Graph()
    *rest, _ = parts(g)
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="fp32", video=False)
    latent = g("VAEEncode", pixels=g("EmptyImage", width=64, height=48, batch_size=1, color=0x8040A0), vae=vae)
    g("SaveLatent", samples=latent, filename_prefix="before")
    nothing, everything = (g("SolidMask", value=value, width=64, height=48) for value in (0.0, 1.0))
    half = g("MaskComposite", destination=nothing, source=everything, x=32, y=0, operation="add")
    sample(g, *rest, g("SetLatentNoiseMask", samples=latent, mask=half))
    result = server.queue(g)
    assert result["ok"], result["message"]
    latents = sorted(finite_latents(server, result), key=lambda latent: latent.std())
    before, after = (latent.reshape(4, 6, 8) for latent in latents)  # the encoded picture has no axis of frames
    changed = (after - before).abs().amax((0, 1))  # by column
    assert changed[:4].max() < 1e-5 and changed[4:].min() > 1e-2


def test_settings_stay_on_their_clone(server):
    plain = one_step(server, lambda g, model: model)
    coarse = one_step(server, lambda g, model: windows(g, model, window_height=3, window_width=4))
    assert (coarse - plain).abs().max() > 1e-4
    assert torch.equal(one_step(server, lambda g, model: g("ModelSamplingSD3", model=model, shift=0.5)),
                       one_step(server, lambda g, model: windows(g, g("ModelSamplingSD3", model=model, shift=0.5),
                                                                 mode="match resolution (64 windows)")))  # fmt: skip
    repeated = one_step(server, lambda g, model: windows(g, model, mode="match resolution (64 windows)"))
    torch.testing.assert_close(repeated, plain)
