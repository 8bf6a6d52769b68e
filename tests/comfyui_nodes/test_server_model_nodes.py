"""Every node of ComfyUI that changes a model, at its defaults on an embedded model, and judged by its picture."""

from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from .graph import EMBEDDED, Graph, Server, output, wrong_in

pytestmark = pytest.mark.comfy
SHARES = 8  # tests that the nodes are divided among: all in one would take too long for a busy machine
WIDGETS = {"INT", "FLOAT", "STRING", "BOOLEAN", "COMBO"}
PROMPT = "a big blue square above a red circle, white background"
FAIL = {"FreeU", "FreeU_V2", "SelfAttentionGuidance"}  # they need the layers of a U-Net, and stop with a message
SUMS = {"ModelMergeAdd", "ModelMergeSubtract"}  # of the model with itself: no model any more
WARNED = {  # the picture is wrong, and the log says why
    "EasyCache",
    "ModelSamplingAuraFlow",
    "ModelSamplingContinuousEDM",
    "ModelSamplingContinuousV",
    "ModelSamplingDiscrete",
    "ModelSamplingFlux",
    "ModelSamplingLTXV",
    "ModelSamplingStableCascade",
}
WITHOUT_EFFECT = {  # they cannot act on this network, and the log says so
    "FluxKVCache",
    "HyperTile",
    "LTXVModalityGuidance",
    "LTXVSpatioTemporalGuidance",
    "NAGuidance",
    "PatchModelAddDownscale",
    "PerturbedAttentionGuidance",
    "ScaleROPE",
    "SkipLayerGuidanceDiT",  # of the layers 7, 8, 9, and the model has 0 to 5
    "SkipLayerGuidanceDiTSimple",
    "SkipLayerGuidanceSD3",
    "TomePatchModel",
}


def defaults(inputs: dict) -> dict:
    """What the page would fill into a node's widgets; None where a list of files is empty."""
    values = {}
    for name, (kind, *more) in inputs.items():
        options = (kind if isinstance(kind, list) else more[0].get("options") if more else None) or [None]
        plain = {"INT": 1, "FLOAT": 1.0, "STRING": "", "BOOLEAN": False}.get(str(kind), options[0])
        values[name] = more[0].get("default", plain) if more else plain
    return values


def model_nodes(known: dict) -> dict[str, tuple[list[str], dict[str, Any]]]:
    """Name -> inputs for models and values of widgets, of the core nodes that make a MODEL of MODELs alone."""
    found = {}
    for name, node in known.items():
        inputs = node["input"].get("required", {})
        linked = [key for key, (kind, *_) in inputs.items() if not isinstance(kind, list) and kind not in WIDGETS]
        if "MODEL" not in node["output"] or name.startswith(("PTDiT", "Probe")) or name == "TorchCompileModel":
            continue
        values = defaults({key: value for key, value in inputs.items() if key not in linked})
        if linked and all(inputs[key][0] == "MODEL" for key in linked) and None not in values.values():
            found[name] = linked, values
    return found


def picture(server: Server, name: str | None = None) -> tuple[dict, Tensor | None, tuple[str, ...], str]:
    """Result, latents, what is wrong in the picture, and the log, with one node or none behind the loader."""
    g = Graph()
    known = server.get("/object_info")
    loader = model = g("PTDiTFolderLoader", folder=EMBEDDED)
    if name is not None:
        linked, values = model_nodes({name: known[name]})[name]
        others = [g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="fp32") for _ in linked[1:]]
        made = g(name, **dict(zip(linked, [loader, *others], strict=True)), **values)
        model = output(made, known[name]["output"].index("MODEL"))
    positive, negative = (g("CLIPTextEncode", clip=output(loader, 1), text=text) for text in (PROMPT, ""))
    latent = g("EmptyLatentImage", width=128, height=128, batch_size=1)
    latent = g("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=3, steps=20,
               cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
    g("SaveLatent", samples=latent, filename_prefix="node")
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="node")
    before = len(server.text())
    result = server.queue(g)
    if not result["ok"]:
        return result, None, (), server.text()[before:]
    files = {path.suffix: path for path in server.files(result)}
    try:
        wrong = wrong_in(files[".png"], PROMPT)
    except ValueError:  # noise in which the verifier sees no background
        wrong = ("no picture",)
    return result, load_file(files[".latent"])["latent_tensor"], wrong, server.text()[before:]


@pytest.fixture(scope="module")
def plain(server: Server) -> Tensor:
    """Latents of the model as it is, whose picture is right."""
    _, latent, wrong, _ = picture(server)
    assert wrong == ()
    return latent


@pytest.mark.parametrize("share", range(SHARES))
def test_every_node_makes_a_right_picture_or_the_log_says_why_not(server, plain, share, record_property):
    counts = {"right": [], "the same bits": [], "wrong": [], "stops": []}
    for name in sorted(model_nodes(server.get("/object_info")))[share::SHARES]:
        result, latent, wrong, log = picture(server, name)
        if name in FAIL:
            assert not result["ok"] or latent.equal(plain), name
            counts["stops"].append(name)
            continue
        assert result["ok"], f"{name}: {result['message']}"
        counts["wrong" if wrong else "the same bits" if latent.equal(plain) else "right"].append(name)
        assert not wrong or name in SUMS | WARNED, f"{name}: {wrong}"
        assert not wrong or name in SUMS or "PT-DiT: " in log, name
        if name in WITHOUT_EFFECT:
            assert latent.equal(plain) and "PT-DiT cannot use" in log, name
    for kind, names in counts.items():
        record_property(kind, f"{len(names)}: {', '.join(names)}")
    assert sum(map(len, counts.values())) > 5
