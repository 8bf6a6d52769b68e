"""Graphs of stock nodes over PT-DiT: loaders, samplers, LoRA, merging, tiling, masks. `test_server` runs them all."""

from collections.abc import Callable

from .graph import EMBEDDED, Graph, output

PROMPT = "a small red circle"
GRAPHS: dict[str, Callable[[Graph], None]] = {}


def graph(function: Callable[[Graph], None]) -> Callable[[Graph], None]:
    """Adds a graph to the suite under its function's name."""
    GRAPHS[function.__name__] = function
    return function


def parts(g: Graph, file: str = "tiny.safetensors", dtype: str = "default", frames: int = 1, batch: int = 1) -> tuple:
    """Model, positive, negative and latent of most graphs; text comes from the embedded model's encoder."""
    model = g("UNETLoader", unet_name=file, weight_dtype=dtype)
    clip = output(g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default"), 1)
    positive = g("CLIPTextEncode", clip=clip, text=PROMPT)
    negative = g("CLIPTextEncode", clip=clip, text="")
    latent = g("PTDiTEmptyLatent", width=64, height=48, aspect="custom", length=frames, views=0, batch_size=batch)
    return model, positive, negative, latent


def sample(g: Graph, model: tuple, positive: tuple, negative: tuple, latent: tuple, **more: object) -> tuple:
    """KSampler, and its result saved."""
    settings = {"seed": 7, "steps": 3, "cfg": 3.0, "sampler_name": "euler", "scheduler": "simple", "denoise": 1.0}
    result = g("KSampler", model=model, positive=positive, negative=negative, latent_image=latent, **settings | more)
    g("SaveLatent", samples=result, filename_prefix="suite")
    return result


# --- loaders and latents ---------------------------------------------------------------------------------------------


@graph
def load_diffusion_model(g):
    sample(g, *parts(g))


@graph
def load_pt_file(g):
    sample(g, *parts(g, file="tiny.pt"))


@graph
def load_checkpoint(g):
    _, *rest = parts(g)
    sample(g, g("CheckpointLoaderSimple", ckpt_name="tiny.safetensors"), *rest)


@graph
def folder_loader(g):
    _, positive, negative, latent = parts(g)
    sample(g, g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="bf16"), positive, negative, latent)


@graph
def empty_latent_image(g):
    *rest, _ = parts(g)
    sample(g, *rest, g("EmptyLatentImage", width=64, height=48, batch_size=2))


@graph
def empty_hunyuan_video(g):
    *rest, _ = parts(g)
    sample(g, *rest, g("EmptyHunyuanLatentVideo", width=64, height=48, length=9, batch_size=1))


@graph
def odd_sizes_and_batch(g):
    *rest, _ = parts(g)
    sample(g, *rest, g("EmptyLatentImage", width=72, height=40, batch_size=3))


# --- sampling --------------------------------------------------------------------------------------------------------


@graph
def shift_of_sd3(g):
    model, *rest = parts(g)
    sample(g, g("ModelSamplingSD3", model=model, shift=3.0), *rest)


@graph
def resolution_shift(g):
    model, positive, negative, latent = parts(g)
    sample(g, g("PTDiTModelSampling", model=model, shift=0.0, latent=latent), positive, negative, latent)


@graph
def custom_advanced(g):
    model, positive, negative, latent = parts(g)
    g("SaveLatent", filename_prefix="suite", samples=g(
        "SamplerCustomAdvanced",
        noise=g("RandomNoise", noise_seed=7),
        guider=g("CFGGuider", model=model, positive=positive, negative=negative, cfg=3.0),
        sampler=g("KSamplerSelect", sampler_name="euler"),
        sigmas=g("PTDiTScheduler", model=model, latent=latent, steps=3, shift=0.0, denoise=1.0),
        latent_image=latent,
    ))  # fmt: skip


@graph
def basic_scheduler(g):
    model, positive, negative, latent = parts(g)
    g("SaveLatent", filename_prefix="suite", samples=g(
        "SamplerCustomAdvanced",
        noise=g("RandomNoise", noise_seed=7),
        guider=g("BasicGuider", model=model, conditioning=positive),
        sampler=g("KSamplerSelect", sampler_name="dpmpp_2m"),
        sigmas=g("BasicScheduler", model=model, scheduler="simple", steps=3, denoise=1.0),
        latent_image=latent,
    ))  # fmt: skip


@graph
def two_halves_with_ksampler_advanced(g):
    model, positive, negative, latent = parts(g)
    settings = {"model": model, "positive": positive, "negative": negative, "noise_seed": 7, "steps": 4, "cfg": 3.0,
                "sampler_name": "euler", "scheduler": "simple"}  # fmt: skip
    first = g("KSamplerAdvanced", add_noise="enable", latent_image=latent, start_at_step=0, end_at_step=2,
              return_with_leftover_noise="enable", **settings)  # fmt: skip
    second = g("KSamplerAdvanced", add_noise="disable", latent_image=first, start_at_step=2, end_at_step=10000,
               return_with_leftover_noise="disable", **settings)  # fmt: skip
    g("SaveLatent", samples=second, filename_prefix="suite")


@graph
def seven_samplers_and_schedulers(g):
    everything = parts(g)
    for sampler, scheduler in (
        ("dpmpp_2m", "sgm_uniform"),
        ("uni_pc", "normal"),
        ("euler_ancestral", "beta"),
        ("res_multistep", "kl_optimal"),
        ("lcm", "linear_quadratic"),
        ("dpmpp_2m_sde", "karras"),
        ("heun", "ddim_uniform"),
    ):
        sample(g, *everything, sampler_name=sampler, scheduler=scheduler, steps=4)


@graph
def guidance_off(g):
    sample(g, *parts(g), cfg=1.0)


# --- windows and proxies ---------------------------------------------------------------------------------------------


def windows(g: Graph, model: tuple, **more: object) -> tuple:
    """The Window & Proxy node."""
    settings = {f"{kind}_{axis}": 0 for kind in ("window", "proxy") for axis in ("frames", "height", "width")}
    settings |= {"mode": "custom", "proxy_mode": "checkpoint", "start_percent": 0.0, "end_percent": 1.0}
    return g("PTDiTWindowProxy", model=model, meaning_width=64, meaning_height=48, **settings | more)


@graph
def window_and_proxy(g):
    model, *rest = parts(g, frames=5)
    model = windows(g, model, window_frames=2, window_height=3, proxy_width=1, proxy_mode="random")
    g("PreviewAny", source=output(model, 1))
    sample(g, windows(g, model, mode="fast", end_percent=0.4), *rest)


@graph
def random_proxies_by_first_and_fine(g):
    model, *rest = parts(g)
    sample(
        g, windows(g, windows(g, model, mode="fine", proxy_mode="first"), mode="checkpoint", start_percent=0.5), *rest
    )


@graph
def proxy_map(g):
    model, positive, negative, latent = parts(g)
    result = sample(g, windows(g, model, mode="fine"), positive, negative, latent)
    g("SaveImage", filename_prefix="map", images=g(
        "PTDiTProxyMap", model=windows(g, model, mode="fine"), positive=positive, latent=result, x=0.2, y=0.9,
        levels=2, blocks="1", frame=0, noise_seed=0,
    ))  # fmt: skip


# --- weights: LoRA, merge, save, fp8 ---------------------------------------------------------------------------------


@graph
def lora_for_model_and_clip(g):
    model, _, negative, latent = parts(g)
    clip = output(g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default"), 1)
    lora = g(
        "LoraLoader", model=model, clip=clip, lora_name="diffusers.safetensors", strength_model=1.0, strength_clip=1.0
    )
    sample(g, lora, g("CLIPTextEncode", clip=output(lora, 1), text=PROMPT), negative, latent)


@graph
def merge(g):
    model, *rest = parts(g)
    other = g("UNETLoader", unet_name="other.safetensors", weight_dtype="default")
    sample(g, g("ModelMergeSimple", model1=model, model2=other, ratio=0.5), *rest)


@graph
def merge_by_blocks_and_subtract(g):
    model, *rest = parts(g)
    other = g("UNETLoader", unet_name="other.safetensors", weight_dtype="default")
    difference = g("ModelMergeSubtract", model1=model, model2=other, multiplier=0.5)
    sample(g, g("ModelMergeAdd", model1=model, model2=difference), *rest)


@graph
def fp8_weights(g):
    sample(g, *parts(g, dtype="fp8_e4m3fn"))


@graph
def fp8_weights_with_lora(g):
    model, *rest = parts(g, dtype="fp8_e4m3fn")
    lora = g("LoraLoaderModelOnly", model=model, lora_name="diffusers.safetensors", strength_model=1.0)
    sample(g, lora, *rest)


# --- other people's model nodes --------------------------------------------------------------------------------------


@graph
def skip_layer_guidance(g):
    model, *rest = parts(g)
    sample(g, g("SkipLayerGuidanceDiT", model=model, double_layers="0", single_layers="", scale=3.0, start_percent=0.0,
                end_percent=1.0, rescaling_scale=0.0), *rest)  # fmt: skip


@graph
def easy_cache(g):
    model, *rest = parts(g)
    cached = g("EasyCache", model=model, reuse_threshold=0.5, start_percent=0.1, end_percent=0.95, verbose=True)
    sample(g, cached, *rest, steps=8)


@graph
def context_windows(g):
    model, *rest = parts(g, frames=33)
    sample(g, g("ContextWindowsManual", model=model, context_length=4, context_overlap=2,
                context_schedule="standard_static", context_stride=1, closed_loop=False, fuse_method="pyramid", dim=2,
                freenoise=False, cond_retain_index_list="", split_conds_to_windows=False, latent_retain_index_list="",
                causal_window_fix=True), *rest)  # fmt: skip


@graph
def core_nodes_that_change_guidance_or_sampling(g):
    """In one row; U-Net nodes (FreeU) cannot work on a transformer."""
    model, *rest = parts(g)
    model = g("RescaleCFG", model=model, multiplier=0.7)
    model = g("APG", model=model, eta=1.0, norm_threshold=5.0, momentum=0.0)
    model = g("CFGZeroStar", model=model)
    model = g("CFGNorm", model=model, strength=1.0)
    model = g("Mahiro", model=model)
    model = g("FreSca", model=model, scale_low=1.0, scale_high=1.25, freq_cutoff=20)
    model = g("DifferentialDiffusion", model=model)
    model = g("Epsilon Scaling", model=model, scaling_factor=1.005)
    sample(g, g("ModelSamplingAuraFlow", model=model, shift=1.73), *rest)


@graph
def fp8_and_bf16_weights_with_other_formats_of_computing(g):
    for weights, computing in (("fp8_e4m3fn", "bf16"), ("fp8_e5m2", "fp32"), ("default", "bf16")):
        model, *rest = parts(g, dtype=weights)
        sample(g, g("ModelComputeDtype", model=model, dtype=computing), *rest)


@graph
def latent_nodes(g):
    model, positive, negative, latent = parts(g)
    latent = g("RepeatLatentBatch", samples=latent, amount=2)
    first = sample(g, model, positive, negative, latent)
    larger = g("LatentUpscaleBy", samples=first, upscale_method="bilinear", scale_by=1.5)
    second = sample(g, model, positive, negative, larger, denoise=0.6)
    sample(g, model, positive, negative, g("LatentFromBatch", samples=second, batch_index=1, length=1), denoise=0.5)


@graph
def compiled(g):
    model, *rest = parts(g)
    sample(g, windows(g, g("TorchCompileModel", model=model, backend="inductor"), mode="fine"), *rest)


# --- VAE -------------------------------------------------------------------------------------------------------------


@graph
def decode_video(g):
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="auto", video=True)
    frames = g("VAEDecode", samples=sample(g, *parts(g, frames=9)), vae=vae)
    g("SaveVideo", video=g("CreateVideo", images=frames, fps=8.0), filename_prefix="v", format="mp4", codec="h264")


@graph
def views_of_two_objects(g):
    model, positive, negative, _ = parts(g)
    latent = g("PTDiTEmptyLatent", width=64, height=48, aspect="custom", length=1, views=6, batch_size=2)
    views = g("PTDiTViewsToBatch", latent=sample(g, model, positive, negative, latent))
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="auto", video=False)
    pictures = g("VAEDecode", samples=views, vae=vae)
    g("SaveImage", filename_prefix="sheet", images=g(
        "PTDiTContactSheet", images=pictures, columns=0, per_sheet=output(views, 1)))  # fmt: skip
    g("SaveVideo", video=g("CreateVideo", images=pictures, fps=8.0), filename_prefix="v", format="mp4", codec="h264")


@graph
def decode_tiled(g):
    vae = g("PTDiTVAELoader", vae_name="official.ckpt", dtype="auto", video=False)
    pixels = g("VAEDecodeTiled", samples=sample(g, *parts(g, frames=9)), vae=vae, tile_size=64, overlap=16,
               temporal_size=8, temporal_overlap=4)  # fmt: skip
    g("SaveImage", images=pixels, filename_prefix="tiled")


@graph
def decode_latents_of_no_sampler(g):
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="auto", video=False)
    latent = g("EmptyLatentImage", width=64, height=48, batch_size=2)
    g("SaveImage", images=g("VAEDecode", samples=latent, vae=vae), filename_prefix="empty")
    tiled = g("VAEDecodeTiled", samples=latent, vae=vae, tile_size=64, overlap=16, temporal_size=8, temporal_overlap=4)
    g("SaveImage", images=tiled, filename_prefix="empty_tiled")


@graph
def encode_tiled_and_image_to_image(g):
    *rest, _ = parts(g)
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="fp32", video=False)
    pictures = g("EmptyImage", width=64, height=48, batch_size=2, color=0x8040A0)
    g(
        "SaveLatent",
        filename_prefix="suite",
        samples=g(
            "VAEEncodeTiled", pixels=pictures, vae=vae, tile_size=64, overlap=16, temporal_size=64, temporal_overlap=8
        ),
    )
    sample(g, *rest, g("VAEEncode", pixels=pictures, vae=vae), denoise=0.5)  # fmt: skip


@graph
def video_to_video(g):
    *rest, _ = parts(g)
    vae = g("PTDiTVAELoader", vae_name="tiny.safetensors", dtype="auto", video=True)
    frames = g("EmptyImage", width=64, height=48, batch_size=9, color=0x8040A0)
    sample(g, *rest, g("VAEEncode", pixels=frames, vae=vae), denoise=0.5)


# --- conditions and masks --------------------------------------------------------------------------------------------


@graph
def inpaint_mask(g):
    *rest, latent = parts(g)
    mask = g("SolidMask", value=1.0, width=64, height=48)
    sample(g, *rest, g("SetLatentNoiseMask", samples=latent, mask=mask))


@graph
def combined_and_timed_prompts(g):
    model, positive, negative, latent = parts(g)
    clip = output(g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default"), 1)
    longer = g("CLIPTextEncode", clip=clip, text="two big blue stars left of a small green ring on a white background")
    early = g("ConditioningSetTimestepRange", conditioning=positive, start=0.0, end=0.5)
    both = g("ConditioningCombine", conditioning_1=early, conditioning_2=longer)
    sample(g, model, both, g("ConditioningZeroOut", conditioning=negative), latent)


@graph
def weighted_and_literal_prompts(g):
    model, _, negative, latent = parts(g)
    clip = output(g("PTDiTFolderLoader", folder=EMBEDDED, weight_dtype="default"), 1)
    for literal in (True, False):
        text = g("PTDiTTextEncode", clip=clip, text="a (red:1.4) circle, zebra", literal=literal, cleaning=True)
        g("PreviewAny", source=output(text, 1))
        sample(g, model, text, negative, latent)


@graph
def two_models_of_different_size(g):
    model, positive, negative, latent = parts(g)
    other = g("UNETLoader", unet_name="larger.safetensors", weight_dtype="default")
    sample(g, model, positive, negative, sample(g, other, positive, negative, latent), denoise=0.6)
