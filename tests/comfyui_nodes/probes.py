"""Nodes of another pack, for tests: they do inside the server what cannot be asked of it from outside."""

import dataclasses
import json
import sys
import time
from pathlib import Path

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.supported_models_base
import comfy.text_encoders.pixart_t5
import comfy.utils
import folder_paths
import torch
from safetensors.torch import save_file


def one_call(model, positive, latent, sigma=0.6):
    """A forward through ComfyUI's model class with the weights as they lie, and the function that makes it again."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(1))
    conditions = comfy.sampler_helpers.convert_cond(positive)
    conditions = comfy.samplers.encode_model_conds(model.model.extra_conds, conditions, noise, "cpu", "positive")
    given = {
        name: value.process_cond(batch_size=len(noise), device="cpu").cond
        for name, value in conditions[0]["model_conds"].items()
    }
    options = model.model_options["transformer_options"]
    level = torch.full((len(noise),), sigma)
    return lambda: model.model.apply_model(noise, level, transformer_options=options, **given)


def load_with(model, room):
    """Load weights as with little GPU memory: `room` is bytes for them (0: no limit) or a state of ComfyUI's memory.

    For a state ComfyUI's own loader decides, while it takes the CPU for a card without free memory.
    """
    management = comfy.model_management
    if room.isdigit():
        model.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=int(room))
        return
    saved = {name: getattr(management, name) for name in ("vram_state", "is_device_cpu", "get_free_memory")}
    management.vram_state = management.VRAMState[room]
    management.is_device_cpu = lambda device: False
    management.get_free_memory = lambda *args, **kwargs: 0
    try:
        management.load_models_gpu([model])
    finally:
        for name, value in saved.items():
            setattr(management, name, value)


class ProbePartialLoad:
    """Weights left where they are against all of them loaded: largest difference, layers that were left, layers."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        inputs = {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",), "room": ("STRING",)}
        return {"required": inputs}

    def run(self, model, positive, latent, room):
        room = str(model.model_size() // 2) if room == "half" else room
        results, left, total = [], 0, 0
        for each in ("0", room):
            comfy.model_management.unload_all_models()
            clone = model.clone()
            clone.unpatch_model(unpatch_weights=True)
            load_with(clone, each)
            layers = [layer for layer in clone.model.diffusion_model.modules() if hasattr(layer, "comfy_cast_weights")]
            left, total = sum(bool(layer.comfy_cast_weights) for layer in layers), len(layers)
            results.append(one_call(clone, positive, latent)().float())
            comfy.model_management.unload_all_models()
            clone.unpatch_model(unpatch_weights=True)
        return (f"{(results[0] - results[1]).abs().max():.3e} {left} {total}",)


class ProbeTwoDevices:
    """Sampling whose conditionings ComfyUI splits over two devices: largest difference from one device, conditionings
    that each of them had in each forward. Both devices are the CPU, under two names.
    """

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        kinds = {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent": "LATENT"}
        return {"required": {name: (kind,) for name, kind in kinds.items()}}

    def run(self, model, positive, negative, latent):
        if not hasattr(model, "deepclone_multigpu"):
            return ("this ComfyUI does not split",)
        import comfy.multigpu

        management = comfy.model_management
        saved = management.get_all_torch_devices
        management.get_all_torch_devices = lambda exclude_current=False: [model.load_device, torch.device("cpu", 0)]
        try:
            split = comfy.multigpu.create_multigpu_deepclones(model, 2)
        finally:
            management.get_all_torch_devices = saved
        noise = torch.randn(latent["samples"].shape, generator=torch.Generator().manual_seed(1))
        results, batches = [], []
        for patcher in (model, split):
            networks = [each.model for each in (patcher, *patcher.get_additional_models_with_key("multigpu"))]
            counts = [[] for _ in networks]
            hooks = [
                network.diffusion_model.register_forward_pre_hook(
                    lambda module, given, count=count: count.append(len(given[0]))
                )
                for network, count in zip(networks, counts, strict=True)
            ]
            sampled = comfy.sample.sample(
                patcher, noise, 3, 4.0, "euler", "normal", positive, negative, latent["samples"], seed=1
            )
            results.append(sampled)
            for hook in hooks:
                hook.remove()
            batches.append("+".join("".join(map(str, count)) for count in counts))
        return (f"{(results[0] - results[1]).abs().max():.3e} {' '.join(batches)}",)


class ProbeOutOfMemory:
    """A VAE whose first decode finds no memory."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("VAE",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"vae": ("VAE",)}}

    def run(self, vae):
        network = vae.first_stage_model
        decode = type(network).decode

        def fail_once(latents):
            network.decode = decode.__get__(network)
            raise comfy.model_management.OOM_EXCEPTION("no memory, says the probe")

        network.decode = fail_once
        return (vae,)


class ProbeReplacedBlock:
    """Largest difference from the plain forward: the first block replaced by itself, and by nothing; what it gets."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",)}}

    def run(self, model, positive, latent):
        received = set()

        def itself(given, extra):
            received.update(given)
            return extra["original_block"](given)

        def nothing(given, extra):
            return {"img": given["img"]}

        comfy.model_management.load_models_gpu([model])
        plain, differences = one_call(model, positive, latent)(), []
        for kind, patch in (("double_block", itself), ("single_block", itself), ("double_block", nothing)):
            clone = model.clone()
            clone.set_model_patch_replace(patch, "dit", kind, 0)
            differences.append((one_call(clone, positive, latent)() - plain).abs().max().item())
        return (" ".join([*map(str, differences), *sorted(received)]),)


class ProbeTime:
    """CPU milliseconds of the fastest of 31 calls: through ComfyUI, and of the bare network in plain torch."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",)}}

    def run(self, model, positive, latent):
        from ptdit_diffusers.core.backbones.parameters import PTDiTParameters
        from ptdit_diffusers.core.backbones.ptdit import PTDiTBackbone

        comfy.model_management.load_models_gpu([model])
        network = PTDiTBackbone()
        network.build(PTDiTParameters.from_config(model.model.model_config.unet_config))
        network.load_state_dict({k: v.float() for k, v in model.model.diffusion_model.state_dict().items()})
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        window, ratio = network.auto_windows(*samples.shape[-2:])
        text, level = positive[0][0].float(), torch.full((len(samples),), 600.0)

        def bare():
            return network.predict(samples[:, :, None], level, text, window_size=window, proxy_ratio=ratio)

        calls = {"comfyui": one_call(model, positive, latent), "bare": bare}
        times = {name: [] for name in calls}
        for _ in range(31):
            for name, call in calls.items():
                begin = time.thread_time()
                call()
                times[name].append(1000 * (time.thread_time() - begin))
        return (" ".join(f"{min(values):.3f}" for values in times.values()),)


class ProbeText:
    """The vectors of a prompt, in a form that SaveLatent writes."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("LATENT",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"conditioning": ("CONDITIONING",)}}

    def run(self, conditioning):
        return ({"samples": conditioning[0][0]},)


def module_with(name):
    """The module of another pack that has this name in it; packs have no names to import them by."""
    return next(module for module in list(sys.modules.values()) if name in getattr(module, "__dict__", {}))


class ProbeSmallTextEncoderFromGGUF:
    """A folder's T5 from a GGUF file, by ComfyUI-GGUF's reader and layers.

    Its own node takes every T5 to be T5-XXL; size and tokeniser are told here, everything else is as there.
    """

    RETURN_TYPES, FUNCTION, CATEGORY = ("CLIP",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"clip": ("CLIP",), "folder": ("STRING",), "clip_name": ("STRING",)}}

    def run(self, clip, folder, clip_name):
        other, ours = module_with("CLIPLoaderGGUF"), module_with("folder_clip")
        config = ours.t5_config(Path(folder) / "text_encoder/config.json")
        options = {"t5xxl_model_config": config, "custom_operations": other.GGMLOps}
        target = comfy.supported_models_base.ClipTarget(
            type(clip.tokenizer), comfy.text_encoders.pixart_t5.PixArtT5XXL
        )
        loaded = comfy.sd.CLIP(target, model_options=options)
        weights = other.gguf_clip_loader(folder_paths.get_full_path("text_encoders", clip_name))
        missing, _ = loaded.load_sd(weights)
        if missing:
            raise ValueError(f"{clip_name} lacks {', '.join(missing)}")
        loaded.patcher = other.GGUFModelPatcher.clone(loaded.patcher)
        return (loaded,)


class ProbeFiles:
    """What ComfyUI's loader, or ours for VAEs, makes of every file in a folder.

    Beside each it writes what the network computes, with the configuration or the error in the header.
    """

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"folder": ("STRING",), "inputs": ("STRING",), "vae": ("BOOLEAN",)}}

    def run(self, folder, inputs, vae):
        inputs = comfy.utils.load_torch_file(inputs)
        for file in sorted(Path(folder).iterdir()):
            try:
                computed, config = (self.encode if vae else self.predict)(str(file), inputs)
                result = {"config": json.dumps(config)}
            except Exception as error:
                computed, result = torch.zeros(1), {"error": str(error)}
            save_file({"computed": computed.float().contiguous()}, file.with_name(f"{file.name}.computed"), result)
        return (folder,)

    def predict(self, file, inputs):
        model = comfy.sd.load_diffusion_model(file)
        comfy.model_management.load_models_gpu([model])
        network, dtype = model.model.diffusion_model, model.model.get_dtype_inference()
        latents, text = inputs["latents"].to(dtype), inputs["encoder_hidden_states"].to(dtype)
        config = model.model.model_config.unet_config | model.model.model_config.extras
        config = {name: value for name, value in config.items() if name not in ("image_model", "dtype")}
        with torch.no_grad():
            return network(latents, inputs["timestep"], text), config

    def encode(self, file, inputs):
        vae = module_with("load_vae").load_vae(file, pictures=False, dtype_name="fp32")
        return vae.encode(inputs["pixels"]), dataclasses.asdict(vae.parameters)


PROBES = (
    ProbeFiles,
    ProbeText,
    ProbePartialLoad,
    ProbeOutOfMemory,
    ProbeReplacedBlock,
    ProbeTime,
    ProbeTwoDevices,
    ProbeSmallTextEncoderFromGGUF,
)
NODE_CLASS_MAPPINGS = {each.__name__: each for each in PROBES}
