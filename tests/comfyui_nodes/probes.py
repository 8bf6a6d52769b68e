"""Nodes of another pack, for tests: they do inside the server what cannot be asked of it from outside."""

import time

import comfy.model_management
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch


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


class ProbePartialLoad:
    """Weights left where they are, as with little GPU memory, against all of them loaded."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",)}}

    def run(self, model, positive, latent):
        results, lowvram = [], 0
        for memory in (0, 1):
            clone = model.clone()
            clone.unpatch_model(unpatch_weights=True)
            clone.patch_model(device_to=torch.device("cpu"), lowvram_model_memory=memory)
            layers = clone.model.diffusion_model.modules()
            lowvram = sum(bool(getattr(layer, "comfy_cast_weights", False)) for layer in layers)
            results.append(one_call(clone, positive, latent)().float())
            clone.unpatch_model(unpatch_weights=True)
        return (f"{(results[0] - results[1]).abs().max():.3e} {lowvram}",)


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


class ProbeTime:
    """CPU milliseconds of the fastest of 31 calls: through ComfyUI, and of the bare network in plain torch."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("STRING",), "run", "probes"

    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"model": ("MODEL",), "positive": ("CONDITIONING",), "latent": ("LATENT",)}}

    def run(self, model, positive, latent):
        from ptdit_diffusers.models.ptdit_backbone import PTDiTBackbone

        comfy.model_management.load_models_gpu([model])
        config = dict(model.model.model_config.unet_config)
        for name in ("image_model", "sample_frames", "round_timestep", "dtype", "disable_unet_model_creation"):
            config.pop(name, None)
        network = PTDiTBackbone()
        network.build(**config)
        network.load_state_dict({k: v.float() for k, v in model.model.diffusion_model.state_dict().items()})
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
        window, ratio = network.auto_windows(*samples.shape[-2:])
        text, level = positive[0][0].float(), torch.full((len(samples),), 600.0)

        def bare():
            return network.denoise(samples, level, text, window_size=window, proxy_ratio=ratio)

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


NODE_CLASS_MAPPINGS = {each.__name__: each for each in (ProbeText, ProbePartialLoad, ProbeOutOfMemory, ProbeTime)}
