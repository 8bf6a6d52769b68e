"""Models of pictures under the stock nodes for latents and conditioning, and models of clips beside them."""

import re

import numpy as np
import pytest
from PIL import Image

from .graph import EMBEDDED, Graph, Server, output, wrong_in
from .test_server import finite_latents

pytestmark = pytest.mark.comfy
CLIPS = "clips-128 (comes with the nodes)"
PROMPT = "a big blue square above a red circle, white background"


def drawn(g: Graph, loader, positive=None, latent=None, model=None, steps: int = 2, **more: object):
    """A sampled latent of 160 x 128 pixels."""
    text, nothing = (g("CLIPTextEncode", clip=output(loader, 1), text=text) for text in (PROMPT, ""))
    return g(
        "KSampler",
        model=model or loader,
        positive=positive or text,
        negative=nothing,
        latent_image=latent or g("PTDiTEmptyLatent", width=160, height=128),
        **{"seed": 7, "steps": steps, "cfg": 4.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0},
        **more,
    )


def half_mask(g: Graph):
    """A mask of the left half."""
    whole, half = (g("SolidMask", value=value, width=width, height=128) for value, width in ((0.0, 160), (1.0, 80)))
    return g("MaskComposite", destination=whole, source=half, x=0, y=0, operation="add")


def conditioned(node: str, **inputs: object):
    """A graph that changes the conditioning with one node."""

    def build(g: Graph, loader):
        text = g("CLIPTextEncode", clip=output(loader, 1), text=PROMPT)
        mask = {"mask": half_mask(g)} if node == "ConditioningSetMask" else {}
        part = g(node, conditioning=text, strength=1.0, **inputs, **mask)
        return drawn(g, loader, g("ConditioningCombine", conditioning_1=text, conditioning_2=part))

    return build


def operated(node: str, **inputs: object):
    """A graph that samples with an operation on latents."""

    def build(g: Graph, loader):
        return drawn(g, loader, model=g("LatentApplyOperationCFG", model=loader, operation=g(node, **inputs)))

    return build


def changed(node: str, **inputs: object):
    """A graph that changes a sampled latent with one node."""
    return lambda g, loader: g(node, samples=drawn(g, loader), **inputs)


# what a graph makes, and the rows and columns of the latent
GRAPHS = {
    "area in percent": (
        conditioned("ConditioningSetAreaPercentage", width=0.5, height=1.0, x=0.0, y=0.0), (1, 4, 16, 20)
    ),
    "area": (conditioned("ConditioningSetArea", width=64, height=64, x=16, y=16), (1, 4, 16, 20)),
    "mask": (conditioned("ConditioningSetMask", set_cond_area="default"), (1, 4, 16, 20)),
    "bounds of a mask": (conditioned("ConditioningSetMask", set_cond_area="mask bounds"), (1, 4, 16, 20)),
    "crop": (changed("LatentCrop", width=72, height=64, x=32, y=32), (1, 4, 8, 9)),
    "rotate": (changed("LatentRotate", rotation="90 degrees"), (1, 4, 20, 16)),
    "upscale": (
        changed("LatentUpscale", upscale_method="nearest-exact", width=256, height=192, crop="disabled"),
        (1, 4, 24, 32),
    ),
    "sharpen": (operated("LatentOperationSharpen", sharpen_radius=9, sigma=1.0, alpha=0.1), (1, 4, 16, 20)),
    "tonemap": (operated("LatentOperationTonemapReinhard", multiplier=1.0), (1, 4, 16, 20)),
    "batch of two kinds of empty latents": (
        lambda g, loader: drawn(g, loader, latent=g(
            "LatentBatch", samples1=g("PTDiTEmptyLatent", width=128, height=128, batch_size=2),
            samples2=g("EmptyLatentImage", width=128, height=128, batch_size=1))),
        (3, 4, 16, 16),
    ),
    "composite": (
        lambda g, loader: g("LatentComposite", samples_to=drawn(g, loader), samples_from=g(
            "PTDiTEmptyLatent", width=64, height=64), x=16, y=16, feather=0),
        (1, 4, 16, 20),
    ),
    "encode": (
        lambda g, loader: g("VAEEncode", pixels=g("EmptyImage", width=64, height=48, batch_size=3, color=0xFF),
                            vae=output(loader, 2)),
        (3, 4, 6, 8),
    ),
    "a latent with an axis of frames, as before": (
        lambda g, loader: drawn(g, loader, latent=g("EmptyHunyuanLatentVideo", width=64, height=48, length=1,
                                                    batch_size=1)),
        (1, 4, 1, 6, 8),
    ),
}  # fmt: skip


def run(server: Server, g: Graph) -> dict:
    """Run a graph that must succeed."""
    result = server.queue(g)
    assert result["ok"], result["message"]
    return result


@pytest.mark.parametrize("name", GRAPHS)
def test_stock_nodes_take_latents_of_pictures(server, name):
    build, shape = GRAPHS[name]
    g = Graph()
    g("SaveLatent", samples=build(g, g("PTDiTFolderLoader", folder=EMBEDDED)), filename_prefix="pictures")
    (latent,) = finite_latents(server, run(server, g))
    assert latent.shape == shape


def test_a_flipped_latent_is_a_flipped_picture(server):
    g = Graph()
    loader = g("PTDiTFolderLoader", folder=EMBEDDED)
    latent = drawn(g, loader, steps=8)
    for name, each in (("a", latent), ("b", g("LatentFlip", samples=latent, flip_method="x-axis: vertically"))):
        g("SaveImage", images=g("VAEDecode", samples=each, vae=output(loader, 2)), filename_prefix=f"flip_{name}")
    files = sorted(server.files(run(server, g)), key=lambda path: path.name)
    before, after = (np.asarray(Image.open(path)).astype(int) for path in files)
    assert abs(after - before[::-1]).mean() < 0.5 * abs(after - before).mean()


@pytest.mark.parametrize(
    "folder, encode_as, shape",
    [
        (CLIPS, "auto", (1, 4, 5, 16, 16)),
        (CLIPS, "pictures", (17, 4, 16, 16)),
        (CLIPS.replace("clips-128", "views-96"), "auto", (17, 4, 16, 16)),
    ],
)
def test_the_frames_of_a_clip_are_encoded_as_one_video_and_views_one_by_one(server, folder, encode_as, shape):
    g = Graph()
    vae = output(g("PTDiTFolderLoader", folder=folder, encode_as=encode_as), 2)
    frames = g("EmptyImage", width=128, height=128, batch_size=17, color=0xFF)
    g("SaveLatent", samples=g("VAEEncode", pixels=frames, vae=vae), filename_prefix="clip")
    (latent,) = finite_latents(server, run(server, g))
    assert latent.shape == shape


def test_nodes_at_their_defaults_make_a_right_picture(server):
    known = server.get("/object_info")
    folder = known["PTDiTFolderLoader"]["input"]["required"]["folder"][1]["default"]
    assert folder == EMBEDDED
    widths = [known["PTDiTEmptyLatent"]["input"]["required"][side][1]["default"] for side in ("width", "height")]
    g = Graph()
    loader = g("PTDiTFolderLoader", folder=folder)
    positive, negative = (g("PTDiTTextEncode", clip=output(loader, 1), text=text) for text in (PROMPT, ""))
    latent = g("PTDiTEmptyLatent", width=widths[0], height=widths[1], model=loader)
    latent = g("KSampler", model=loader, positive=positive, negative=negative, latent_image=latent, seed=0, steps=20,
               cfg=8.0, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="defaults")
    (picture,) = server.files(run(server, g))
    assert Image.open(picture).size == (128, 128) and wrong_in(picture, PROMPT) == ()


def test_a_size_of_zero_without_a_model_says_what_to_connect(server):
    g = Graph()
    g("SaveLatent", samples=g("PTDiTEmptyLatent", width=0, height=128), filename_prefix="x")
    assert "connect a PT-DiT or DiT to the input model, or set both" in server.queue(g)["message"]


def test_the_log_names_patches_that_cannot_act_once_in_a_run_also_those_of_a_second_forward(server):
    g = Graph()
    loader = g("PTDiTFolderLoader", folder=EMBEDDED)
    patched = g("HyperTile", model=loader, tile_size=256, swap_size=2, max_depth=0, scale_depth=False)
    patched = g("PerturbedAttentionGuidance", model=patched, scale=1.0)
    patched = g("TomePatchModel", model=patched, ratio=0.3)
    g("SaveLatent", samples=drawn(g, loader, model=patched), filename_prefix="patched")
    before = len(server.text())
    run(server, g)
    lines = re.findall(r"cannot use patches for layers that it does not have \((.+)\)", server.text()[before:])
    assert lines == ["attn1_output_patch, attn1_patch", "attn1 middle 0, attn1_output_patch, attn1_patch"]


@pytest.mark.parametrize("threshold, warns", [(0.05, False), (0.2, True)])
def test_easycache_makes_a_right_picture_or_the_log_warns(server, threshold, warns):
    g = Graph()
    loader = g("PTDiTFolderLoader", folder=EMBEDDED)
    cached = g(
        "EasyCache", model=loader, reuse_threshold=threshold, start_percent=0.15, end_percent=0.95, verbose=False
    )
    size = g("PTDiTEmptyLatent", width=128, height=128)
    latent = drawn(g, loader, model=cached, latent=size, steps=30)
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="cached")
    before = len(server.text())
    (picture,) = server.files(run(server, g))
    assert ("may leave out so many steps" in server.text()[before:]) == warns
    assert warns or wrong_in(picture, PROMPT) == ()


def test_weights_of_words_are_no_unknown_words_and_stay_when_the_prompt_is_cleaned(server):
    g = Graph()
    clip, shown = output(g("PTDiTFolderLoader", folder=EMBEDDED), 1), {}
    for cleaning in (False, True):
        text = g("PTDiTTextEncode", clip=clip, text="a (blue:1.5) square", literal=False, cleaning=cleaning)
        shown[cleaning] = g("PreviewAny", source=output(text, 1))[0]
    result = run(server, g)
    for node in shown.values():
        (notes,) = result["outputs"][node]["text"]
        assert "a (blue:1.5) square" in notes and "does not know" not in notes


def test_words_that_the_model_was_never_taught_are_said_for_the_stock_text_node_and_ours(server):
    g = Graph()
    clip = output(g("PTDiTFolderLoader", folder=EMBEDDED), 1)
    stock = g("CLIPTextEncode", clip=clip, text="six red dragons")
    ours = g("PTDiTTextEncode", clip=clip, text="six blue circles")
    shown = g("PreviewAny", source=output(ours, 1))
    g("SaveLatent", samples=g("ProbeText", conditioning=stock), filename_prefix="text")
    before = len(server.text())
    (notes,) = run(server, g)["outputs"][shown[0]]["text"]
    log = server.text()[before:]
    assert "was not taught 'six'" in notes and log.count("was not taught 'six'") == 2
    assert "does not know 'dragons'" in log


def test_the_meaning_of_a_setting_counts_the_frames_of_the_model(server):
    g = Graph()
    setting = g("PTDiTWindowProxy", model=g("PTDiTFolderLoader", folder=CLIPS), mode="checkpoint")
    shown = g("PreviewAny", source=output(setting, 1))
    (meaning,) = run(server, g)["outputs"][shown[0]]["text"]
    assert meaning.startswith("128 x 128 px, 5 latent frames: 8 x 8 tokens (320 in all)")
