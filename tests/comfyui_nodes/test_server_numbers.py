"""The same numbers on a real ComfyUI as without it: against the diffusers pipeline, other formats, partial loading."""

import pytest
import torch
from safetensors.torch import load_file

from ptdit_diffusers import PTDiTPipeline
from ptdit_diffusers.conversion.quantize import store_in_fp8
from ptdit_diffusers.core.devices import computes_bf16
from ptdit_diffusers.core.embedded import embedded_model_path

from .graph import EMBEDDED, Graph, Server, output, wrong_in
from .stock_graphs import parts
from .test_server import finite_latents, one_step

pytestmark = pytest.mark.comfy
PROMPT, SEED = "a big blue square above a red circle, white background", 3
BF16_LIMIT = 0.03 if computes_bf16("cpu") else 0.06  # a processor that imitates bf16 rounds more often
LIMITS = {"bf16": BF16_LIMIT, "fp8": 0.1}  # relative error of the latent after 8 steps against fp32


def embedded(g: Graph, weights: str, prompt: str = PROMPT, folder: str = EMBEDDED, frames: int = 1) -> tuple:
    """Model, positive, negative and latent of an embedded model."""
    loader = g("PTDiTFolderLoader", folder=folder, weight_dtype=weights)
    clip = output(loader, 1)
    positive, negative = (
        g("PTDiTTextEncode", clip=clip, text=text, literal=True, cleaning=False) for text in (prompt, "")
    )
    latent = g("PTDiTEmptyLatent", width=128, height=128, aspect="1:1", length=frames, views=0, batch_size=1)
    return loader, positive, negative, latent


def sampled(
    server: Server, weights: str, steps: int = 8, cfg: float = 4.0, compute: str = "default", rounded: bool = False
) -> list[torch.Tensor]:
    """The embedded model's stored latent with the official noise levels, and the vectors of both prompts."""
    g = Graph()
    model, positive, negative, latent = embedded(g, weights)
    if compute != "default":  # the node takes "default" for the format of the weights
        model = g("ModelComputeDtype", model=model, dtype=compute)
    model = g("PTDiTModelSampling", model=model, latent=latent, shift=0.0, round_timestep=rounded)
    g("SaveLatent", filename_prefix="numbers", samples=g(
        "SamplerCustomAdvanced",
        noise=g("RandomNoise", noise_seed=SEED),
        guider=g("CFGGuider", model=model, positive=positive, negative=negative, cfg=cfg),
        sampler=g("KSamplerSelect", sampler_name="euler"),
        sigmas=g("PTDiTScheduler", model=model, latent=latent, steps=steps, shift=0.0, denoise=1.0),
        latent_image=latent,
    ))  # fmt: skip
    for prompt in (positive, negative):
        g("SaveLatent", samples=g("ProbeText", conditioning=prompt), filename_prefix="text")
    result = server.queue(g)
    assert result["ok"], result["message"]
    found = finite_latents(server, result)
    latent, *texts = sorted(found, key=lambda tensor: (-tensor.ndim, -tensor.numel()))
    return [latent.unsqueeze(2), *texts]  # diffusers' latents of pictures have an axis of frames


@pytest.fixture(scope="module")
def pipe():
    return PTDiTPipeline.from_pretrained("shapes-128", dtype=torch.float32)


@pytest.mark.parametrize("steps, cfg", [(1, 1.0), (8, 4.0)])
def test_fp32_gives_the_latent_of_the_diffusers_pipeline(server, pipe, steps, cfg, record_property):
    noise = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(SEED))
    settings = {"num_inference_steps": steps, "guidance_scale": cfg, "output_type": "latent", "latents": noise}
    stored, positive, negative = sampled(server, "fp32", steps, cfg)
    stored = stored * pipe.vae.config.scaling_factor  # ComfyUI keeps latents divided by the VAE's scale
    given = {"prompt_embeds": positive, "negative_prompt_embeds": negative}
    given |= {name.replace("embeds", "attention_mask"): text.new_ones(text.shape[:2]) for name, text in given.items()}
    largest = stored.abs().max().item()
    same_text = (stored - pipe(**given, **settings).images).abs().max().item()
    own_text = (stored - pipe(PROMPT, **settings).images).abs().max().item()
    text = (positive - pipe.encode_prompt(PROMPT)[0]).abs().max().item()
    words = f"{same_text:.2e} same text, {own_text:.2e} own text, largest {largest:.2f}; texts {text:.2e}"
    record_property(f"differences, {steps} steps, cfg {cfg}", words)
    assert same_text < 1e-5 * largest, words
    assert text < 5e-6 and own_text < 2e-5 * largest, words  # two implementations of T5 round differently


@pytest.mark.parametrize("model_name, prompt, frames", [
    ("shapes-128", PROMPT, 1),
    ("clips-128", "a red circle moves to the right, white background", 17),
])  # fmt: skip
def test_a_student_of_four_steps_gives_with_stock_nodes_the_latent_of_the_diffusers_pipeline(
    server, model_name, prompt, frames, record_property
):
    """LoraLoaderModelOnly, and KSampler with steps 4, cfg 1, sampler euler, scheduler simple."""
    student, g = f"{model_name}-4steps", Graph()  # it comes with the nodes, in the list of LoRAs
    model, positive, negative, latent = embedded(g, "fp32", prompt, EMBEDDED.replace("shapes-128", model_name), frames)
    model = g("LoraLoaderModelOnly", model=model, lora_name=f"{student}.safetensors", strength_model=1.0)
    given = {"model": g("PTDiTModelSampling", model=model, latent=latent, shift=0.0, round_timestep=False)}
    given |= {"positive": positive, "negative": negative, "latent_image": latent}
    few = {"steps": 4, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    g("SaveLatent", filename_prefix="student", samples=g("KSampler", seed=SEED, **given, **few))
    result = server.queue(g)
    assert result["ok"], result["message"]
    (stored,) = finite_latents(server, result)
    pipe = PTDiTPipeline.from_pretrained(model_name)
    stored = (stored if stored.ndim == 5 else stored.unsqueeze(2)) * pipe.vae.config.scaling_factor
    shape = (1, 4, (frames - 1) // 4 + 1, 16, 16)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(SEED))
    settings = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "latent", "latents": noise}

    def latents() -> torch.Tensor:
        made = pipe(prompt, num_frames=frames, **settings)
        return made.images if frames == 1 else made.frames

    teacher = latents()
    pipe.load_lora_weights(student)
    expected = latents()
    difference = (stored - expected).abs().max().item()
    record_property(f"differences of {student}", f"{difference:.2e}, largest {expected.abs().max():.2f}")
    assert difference < 1e-4
    assert (teacher - expected).abs().max() > 0.1  # the LoRA was in use


def test_a_lora_on_the_text_encoder_gives_with_the_stock_node_the_vectors_of_the_diffusers_pipeline(
    server, pipe, record_property
):
    """LoraLoader, for model and CLIP, with ComfyUI's names and with diffusers'; at half strength, too."""
    before, g = len(server.text()), Graph()
    for name, strength in (("text_comfyui", 1.0), ("text_diffusers", 1.0), ("text_comfyui", 0.5)):
        loader = g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="fp32")
        given = {"model": loader, "clip": output(loader, 1), "strength_model": 1.0, "strength_clip": strength}
        clip = output(g("LoraLoader", lora_name=f"{name}.safetensors", **given), 1)
        text = g("PTDiTTextEncode", clip=clip, text=PROMPT, literal=True, cleaning=False)
        g("SaveLatent", samples=g("ProbeText", conditioning=text), filename_prefix=f"{name}_{10 * strength:.0f}")
    result = server.queue(g)
    assert result["ok"], result["message"]
    files = {path.name: load_file(path)["latent_tensor"] for path in server.files(result)}
    assert len(files) == 3 and "lora key not loaded" not in server.text()[before:]
    plain = pipe.encode_prompt(PROMPT)[0]
    pipe.load_lora_weights(server.base / "models/loras", weight_name="text_diffusers.safetensors", adapter_name="text")
    try:
        for strength in (1.0, 0.5):
            pipe.set_adapters("text", strength)
            expected = pipe.encode_prompt(PROMPT)[0].detach()
            assert (expected - plain).abs().max() > 0.02  # the LoRA was in use
            for name in (name for name in files if f"_{10 * strength:.0f}" in name):
                difference = (files[name] - expected).abs().max().item()
                record_property(f"difference of {name}", f"{difference:.2e}")
                assert difference < 1e-5
    finally:
        pipe.unload_lora_weights()


@pytest.mark.parametrize("weights, limit", [("bf16", 0.02), ("fp8_e4m3fn", 0.2), ("fp8_e5m2", 0.4)])
def test_other_formats_stay_near_fp32(server, weights, limit, record_property):
    exact, other = sampled(server, "fp32")[0], sampled(server, weights)[0]
    error = ((other - exact).norm() / exact.norm()).item()
    record_property("relative error", f"{weights} {error:.4f}")
    assert 0 < error < limit, f"relative error {error:.4f}"


def in_format(form: str, rounded: bool) -> PTDiTPipeline:
    """The pipeline of diffusers: "bf16" weights and computing, or "fp8" weights (e4m3) and computing in fp32."""
    pipe = PTDiTPipeline.from_pretrained("shapes-128", dtype=torch.bfloat16 if form == "bf16" else torch.float32)
    if form == "fp8":
        store_in_fp8(pipe.transformer, torch.float32)
    pipe.transformer.register_to_config(round_timestep=rounded)
    return pipe


@pytest.mark.parametrize("form, rounded", [("bf16", False), ("bf16", True), ("fp8", False)])
def test_other_formats_are_no_further_from_fp32_than_in_diffusers(server, pipe, form, rounded, record_property):
    exact, positive, negative = sampled(server, "fp32")
    weights, compute = ("bf16", "bf16") if form == "bf16" else ("fp8_e4m3fn", "default")
    ours = sampled(server, weights, compute=compute, rounded=rounded)[0]
    noise = torch.randn(1, 4, 1, 16, 16, generator=torch.Generator().manual_seed(SEED))
    other = in_format(form, rounded)
    given = {"prompt_embeds": positive.to(other.dtype), "negative_prompt_embeds": negative.to(other.dtype)}
    given |= {name.replace("embeds", "attention_mask"): text.new_ones(text.shape[:2]) for name, text in given.items()}
    theirs = other(**given, num_inference_steps=8, guidance_scale=4.0, output_type="latent", latents=noise).images
    theirs = theirs.float() / pipe.vae.config.scaling_factor

    def error(latent: torch.Tensor, reference: torch.Tensor) -> float:
        return ((latent - reference).norm() / reference.norm()).item()

    in_comfyui, in_diffusers, between = error(ours, exact), error(theirs, exact), error(ours, theirs)
    words = f"ComfyUI {in_comfyui:.4f}, diffusers {in_diffusers:.4f}, between them {between:.4f}"
    record_property(f"relative errors, {form}, time {'rounded' if rounded else 'exact'}", words)
    assert 0 < in_comfyui < LIMITS[form] and in_comfyui < 2 * in_diffusers, words
    assert between < in_comfyui + in_diffusers, words


def text_of(server: Server, node: str, **inputs: object) -> str:
    """What a probe answers about the embedded model."""
    g = Graph()
    model, positive, _, latent = embedded(g, "fp32")
    shown = g("PreviewAny", source=g(node, model=model, positive=positive, latent=latent, **inputs))
    result = server.queue(g)
    assert result["ok"], result["message"]
    return result["outputs"][shown[0]]["text"][0]


@pytest.mark.parametrize("room", ["1", "half", "NO_VRAM", "LOW_VRAM"])
def test_weights_that_stay_outside_give_the_same(server, room, record_property):
    g = Graph()
    model, positive, _, latent = parts(g)
    model = g("LoraLoaderModelOnly", model=model, lora_name="diffusers.safetensors", strength_model=1.0)
    shown = g("PreviewAny", source=g("ProbePartialLoad", model=model, positive=positive, latent=latent, room=room))
    result = server.queue(g)
    assert result["ok"], result["message"]
    difference, left, total = map(float, result["outputs"][shown[0]]["text"][0].split())
    record_property(f"memory {room}", f"{left:.0f} of {total:.0f} layers left outside, difference {difference:.1e}")
    assert difference < 1e-5
    if room != "LOW_VRAM":  # there ComfyUI 0.3.64 always has room for 128 MiB, so for all of this model
        assert left == total or (room == "half" and 0 < left < total)


@pytest.mark.parametrize("loader", ["Load Diffusion Model", "PT-DiT Folder Loader"])
def test_conditionings_split_over_two_devices_give_the_same(server, loader, record_property):
    g = Graph()
    model, positive, negative, latent = parts(g) if loader == "Load Diffusion Model" else embedded(g, "fp32")
    given = {"model": model, "positive": positive, "negative": negative, "latent": latent}
    shown = g("PreviewAny", source=g("ProbeTwoDevices", **given))
    result = server.queue(g)
    assert result["ok"], result["message"]
    text = result["outputs"][shown[0]]["text"][0]
    if text == "this ComfyUI does not split":
        pytest.skip(text)
    difference, one, two = text.split()
    record_property(f"two devices, {loader}", f"difference {difference}")
    assert one in ("222", "111111") and two == "111+111"  # each device had one conditioning in each of three steps
    assert float(difference) < 1e-4


def test_a_replaced_block_gets_what_other_nodes_expect_and_can_call_the_original(server):
    itself, by_the_other_name, nothing, *received = text_of(server, "ProbeReplacedBlock").split()
    assert float(itself) == float(by_the_other_name) == 0 < float(nothing)
    assert received == ["img", "pe", "transformer_options", "txt", "vec"]


def test_the_way_through_comfyui_costs_little(server, record_property):
    through, bare = map(float, text_of(server, "ProbeTime").split())
    record_property("milliseconds", f"{through:.2f} through ComfyUI, {bare:.2f} bare")
    assert through < 2 * bare


def test_a_picture_comes_soon(server, record_property):
    server.get("/free", {"unload_models": True, "free_memory": True})
    seconds, cpu = [], []
    for seed in range(5):
        before = server.cpu_seconds()
        g = Graph()
        loader, positive, negative, latent = embedded(g, "default")
        latent = g("KSampler", model=loader, positive=positive, negative=negative, latent_image=latent, seed=seed,
                   steps=30, cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
        pixels = g("VAEDecode", samples=latent, vae=output(loader, 2))
        g("SaveImage", images=pixels, filename_prefix="soon")
        result = server.queue(g)
        assert result["ok"], result["message"]
        seconds.append(round(result["seconds"], 2))
        cpu.append(round(server.cpu_seconds() - before, 2))
    record_property("seconds", f"{seconds} from queue to picture, {cpu} of CPU time; the first with loading")
    assert min(seconds) < 60


def test_no_memory_in_decode_falls_back_to_tiles(server):
    pictures = []
    for probe in (False, True):
        g = Graph()
        vae = output(embedded(g, "fp32")[0], 2)
        *_, latent = parts(g)
        latent = g("PTDiTEmptyLatent", width=256, height=256, aspect="1:1", length=1, views=0, batch_size=1)
        before = len(server.text())
        vae = g("ProbeOutOfMemory", vae=vae) if probe else vae
        g("SaveImage", images=g("VAEDecode", samples=latent, vae=vae), filename_prefix=f"memory_{probe}")
        result = server.queue(g)
        assert result["ok"], result["message"]
        assert ("retrying with tiled" in server.text()[before:]) == probe
        pictures += server.files(result)
    assert len(pictures) == 2


def test_the_time_is_rounded_only_where_asked_and_only_below_fp32(server):
    def shifted(rounded: bool, file: str) -> torch.Tensor:
        return one_step(server, lambda g, model: g(
            "PTDiTModelSampling", model=g("UNETLoader", unet_name=file, weight_dtype="default"), shift=1.7,
            round_timestep=rounded))  # fmt: skip

    assert torch.equal(shifted(False, "tiny.safetensors"), shifted(True, "tiny.safetensors"))


def test_a_text_encoder_from_gguf_draws_what_was_asked(server, record_property):
    if "CLIPLoaderGGUF" not in server.get("/object_info"):
        pytest.skip("COMFYUI_GGUF names no checkout of ComfyUI-GGUF")
    g = Graph()
    loader, positive, negative, latent = embedded(g, "fp32")
    clip = g("ProbeSmallTextEncoderFromGGUF", clip=output(loader, 1), folder=str(embedded_model_path("shapes-128")),
             clip_name="small.gguf")  # fmt: skip
    other = g("PTDiTTextEncode", clip=clip, text=PROMPT, literal=True, cleaning=False)
    for prompt in (positive, other):
        g("SaveLatent", samples=g("ProbeText", conditioning=prompt), filename_prefix="text")
    latent = g("KSampler", model=loader, positive=other, negative=negative, latent_image=latent, seed=SEED, steps=20,
               cfg=4.0, sampler_name="euler", scheduler="simple", denoise=1.0)  # fmt: skip
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=output(loader, 2)), filename_prefix="gguf_text")
    result = server.queue(g)
    assert result["ok"], result["message"]
    full, small = finite_latents(server, result)
    error = ((small - full).norm() / full.norm()).item()
    record_property("relative error", f"T5 in GGUF q8_0 {error:.4f}")
    assert 0 < error < 0.05
    assert [wrong_in(path, PROMPT) for path in server.files(result) if path.suffix == ".png"] == [()]


@pytest.mark.parametrize("form, limit", [("q8_0", 0.02), ("q4_k", 0.2)])
def test_gguf_through_another_pack_is_near_the_full_weights(server, form, limit, record_property):
    if "UnetLoaderGGUF" not in server.get("/object_info"):
        pytest.skip("COMFYUI_GGUF names no checkout of ComfyUI-GGUF")
    full = one_step(server, lambda g, _: g("UNETLoader", unet_name="wide.safetensors", weight_dtype="default"))
    small = one_step(server, lambda g, _: g("UnetLoaderGGUF", unet_name=f"wide-{form}.gguf"))
    error = ((small - full).norm() / full.norm()).item()
    record_property("relative error", f"GGUF {form} {error:.4f}")
    assert 0 < error < limit
