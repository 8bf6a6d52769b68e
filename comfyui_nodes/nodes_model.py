"""Nodes that take a MODEL: windows and proxies, resolution shift, the proxy map."""

from __future__ import annotations

from typing import Any

import comfy.model_management
import comfy.model_sampling
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy_api.latest import io
from torch import Tensor

from ptdit_diffusers.core.backbones.proxies import PROXY_MODES, ProxyPlan

from .labels import labeled
from .native import IMAGE_MODEL, ROUNDING, SETTINGS
from .nodes_sample import automatic_shift, own_size
from .proxy_map import GAP, Recorder, draw_map
from .schema import check_choice, choice, fit, integer, number, schema, show, switch
from .windows import CUSTOM, MODES, WindowRule, check_custom, explain, rule_for, window_and_ratio

AXES = ("frames", "height", "width")
PROXY_CHOICES = ("checkpoint", *PROXY_MODES)


def network_of(model: Any) -> Any:
    """Return the PT-DiT network of a MODEL.

    Raises:
        ValueError: it is another model.
    """
    image_model = model.model.model_config.unet_config.get("image_model")
    if image_model != IMAGE_MODEL:
        raise ValueError(f"this node changes a PT-DiT; the model given is {image_model or 'of another kind'}.")
    return model.get_model_object("diffusion_model")


class PTDiTWindowProxy(io.ComfyNode):
    """Set windows and proxies, on a clone of the model."""

    @classmethod
    def define_schema(cls) -> Any:
        windows = [
            integer(f"window_{axis}", 0, 0, 64, f"custom: tokens per window, {axis} (a token is 16 pixels, or one "
                    "latent frame). 0 = as in the checkpoint. Larger windows let a token attend to more tokens and "
                    "cost more.", optional=True)
            for axis in AXES
        ]  # fmt: skip
        proxies = [
            integer(f"proxy_{axis}", 0, 0, 64, f"custom: tokens per proxy token, {axis}. 0 = one proxy token per "
                    "window. Smaller numbers give more proxy tokens, a finer global view and more work. Must "
                    "divide the window or be a multiple of it.", optional=True)
            for axis in AXES
        ]  # fmt: skip
        return schema(
            "PTDiTWindowProxy",
            "PT-DiT Window & Proxy",
            "model",
            "Sets the windows and proxy tokens for a range of sampling steps. The weights do not depend on them. "
            "With several of these nodes in a row, the last one whose range contains the step applies. `meaning` "
            "describes the setting in words.",
            [
                fit(io.Model.Input, "model", tooltip="A PT-DiT model, also with LoRA or compiled."),
                choice("mode", list(MODES), "match resolution: as many windows as in training, at any size (the "
                       "default without this node). checkpoint: the window size of training, in tokens. fast: a "
                       "quarter of the proxy tokens. fine: four times as many. custom: the numbers below."),
                *windows,
                *proxies,
                choice("proxy_mode", list(PROXY_CHOICES), "How a proxy token is made from its tokens: their mean (as "
                       "in the released weights), one at random (chosen again in each step and block), or the "
                       "first.", optional=True),
                number("start_percent", 0.0, 0.0, 1.0, "Position in the sampling schedule (0 to 1) at which this "
                       "setting begins.", optional=True, advanced=True),
                number("end_percent", 1.0, 0.0, 1.0, "Position in the sampling schedule (0 to 1) at which this "
                       "setting ends.", optional=True, advanced=True),
                integer("meaning_width", 0, 0, 8192, "Width in pixels for which `meaning` is computed. 0 = the "
                        "model's own size.", step=16, optional=True, advanced=True),
                integer("meaning_height", 0, 0, 8192, "Height in pixels for which `meaning` is computed. 0 = the "
                        "model's own size.", step=16, optional=True, advanced=True),
            ],
            [
                fit(io.Model.Output, display_name="model", tooltip="A copy of the model with this setting."),
                fit(io.String.Output, display_name="meaning", tooltip="Number of windows and proxy tokens, and the "
                    "attention cost relative to full attention."),
            ],
            search_aliases=["window", "proxy ratio", "sparse attention"],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, mode: str, window_frames: int = 0, window_height: int = 0, window_width: int = 0,
                proxy_frames: int = 0, proxy_height: int = 0, proxy_width: int = 0, proxy_mode: str = "checkpoint",
                start_percent: float = 0.0, end_percent: float = 1.0, meaning_width: int = 0,
                meaning_height: int = 0) -> Any:  # fmt: skip
        """Add one rule to a clone of the model."""
        network = network_of(model)
        check_choice("mode", mode, MODES)
        check_choice("proxy_mode", proxy_mode, PROXY_CHOICES)
        window = (window_frames, window_height, window_width)
        proxy = (proxy_frames, proxy_height, proxy_width)
        if start_percent >= end_percent:
            raise ValueError(
                f"start_percent={start_percent} must be below end_percent={end_percent}; nearest: 0 and {end_percent}."
            )
        if mode == CUSTOM:
            check_custom(tuple(a or b for a, b in zip(window, network.trained_windows[0], strict=True)), proxy)
        rule = WindowRule(mode, window, proxy, proxy_mode, start_percent, end_percent)
        clone = model.clone()
        options = clone.model_options.setdefault("transformer_options", {})
        options[SETTINGS] = (*options.get(SETTINGS, ()), tuple(rule))
        side = own_size(model)
        meaning = explain(network, rule, meaning_height or side, meaning_width or side, network.sample_frames)
        show(cls, meaning)
        return io.NodeOutput(clone, meaning)


class PTDiTModelSampling(io.ComfyNode):
    """Set the official time shift for a picture size, on a clone of the model."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "PTDiTModelSampling",
            "PT-DiT Resolution Shift",
            "sampling",
            "Sets how far the noise levels are shifted for a picture size, so that KSampler works well at this size. "
            "Without this node the shift of the model's own size is used. The schedulers simple and sgm_uniform are "
            "closest to the official spacing.",
            [
                fit(io.Model.Input, "model", tooltip="A PT-DiT model."),
                number("shift", 0.0, 0.0, 100.0, "0 = official: sqrt(width * height / 512^2 * frame factor) of the "
                       "latent. A higher value spends more steps at high noise: better layout, less detail."),
                fit(io.Latent.Input, "latent", optional=True, tooltip="Its size determines the automatic shift."),
                switch("round_timestep", False, "Round the time to the compute format, as the official code does: in "
                       "bf16 to multiples of 4 above 512. For weights that may have been trained in this way. No "
                       "effect in fp32.", optional=True, advanced=True),
            ],
            [
                fit(io.Model.Output, display_name="model", tooltip="A copy of the model with this shift."),
                fit(io.Float.Output, display_name="shift_used", tooltip="The shift that was set."),
            ],
            search_aliases=["model sampling", "sd3 shift", "time shift"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, shift: float = 0.0, latent: dict | None = None, round_timestep: bool = False) -> Any:
        """Patch `model_sampling` on a clone of the model."""
        network_of(model)
        if not shift and latent is None:
            raise ValueError("shift=0 means automatic, which needs a latent; connect one, or set a shift above 0.")
        used = shift or automatic_shift(model, latent)

        class Sampling(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
            pass

        sampling = Sampling(model.model.model_config)
        sampling.set_parameters(shift=used, multiplier=1000)
        clone = model.clone()
        clone.add_object_patch("model_sampling", sampling)
        clone.model_options.setdefault("transformer_options", {})[ROUNDING] = round_timestep
        return io.NodeOutput(clone, used)


class PTDiTProxyMap(io.ComfyNode):
    """Show the attention of proxies as pictures."""

    @classmethod
    def define_schema(cls) -> Any:
        return schema(
            "PTDiTProxyMap",
            "PT-DiT Proxy Map",
            "model",
            "Shows the attention of the proxy tokens for a finished latent: one picture per noise level, one row per "
            "block. Columns: the windows; how much attention each proxy token gets; the proxy tokens that the marked "
            "token's own proxy token attends to; the proxy tokens that the marked token attends to. Costs one "
            "sampling step per noise level.",
            [
                fit(io.Model.Input, "model", tooltip="A PT-DiT model, also with Window & Proxy settings."),
                fit(io.Conditioning.Input, "positive", tooltip="The encoded prompt."),
                fit(io.Latent.Input, "latent", tooltip="A finished latent, from a sampler or VAE Encode."),
                number("x", 0.5, 0.0, 1.0, "Position of the marked token, from left (0) to right (1).", optional=True),
                number("y", 0.5, 0.0, 1.0, "Position of the marked token, from top (0) to bottom (1).", optional=True),
                integer("levels", 3, 1, 20, "Number of noise levels, from early to late; one picture each.",
                        optional=True),
                fit(io.String.Input, "blocks", default="", optional=True, tooltip="Blocks to show, for example 0,3,5; "
                    "empty = all."),
                integer("frame", 0, 0, 1024, "Number of the latent frame to show.", optional=True, advanced=True),
                integer("noise_seed", 0, 0, 2**63 - 1, "Seed of the noise that is added to the latent.", optional=True,
                        advanced=True, control_after_generate=True),
                fit(io.Image.Input, "image", optional=True, tooltip="The decoded picture, on which the windows are "
                    "drawn."),
            ],
            [fit(io.Image.Output, display_name="map", tooltip="One picture per noise level.")],
            search_aliases=["attention map", "visualize", "heat map"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, positive: list, latent: dict, x: float = 0.5, y: float = 0.5, levels: int = 3,
                blocks: str = "", frame: int = 0, noise_seed: int = 0,
                image: Tensor | None = None) -> Any:  # fmt: skip
        """Record one forward per noise level and draw it."""
        network = network_of(model)
        chosen = chosen_blocks(blocks, len(network.transformer_blocks))
        samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])[:1]
        if samples.ndim == 4:
            samples = samples.unsqueeze(2)
        frame = min(frame, samples.shape[2] - 1)
        noise = torch.randn(samples.shape, generator=torch.Generator().manual_seed(noise_seed))
        picture = image[:1] if image is not None else torch.full((1, 64, 64, 3), 0.5)
        sheets = []
        for level in range(levels):
            progress = (level + 0.5) / levels
            recorder = Recorder(chosen)
            record_step(model, positive, samples, noise, noise_seed, progress, recorder)
            plan = plan_of(network, model, samples, progress)
            row, column = (int(min(share * size, size - 1)) for share, size in zip((y, x), plan.grid[1:], strict=True))
            sheet = draw_map(recorder, plan, picture[0, ..., :3].cpu(), frame, row, column)
            sheets.append(labeled(sheet, sorted(chosen), level_at(model, progress), GAP))
        return io.NodeOutput(torch.stack(sheets))


def chosen_blocks(text: str, count: int) -> set[int]:
    """Return the numbers in a text such as "0,3,5"; an empty text means all.

    Raises:
        ValueError: it is no list of numbers, or there is no such block.
    """
    try:
        numbers = {int(part) for part in text.replace(" ", "").split(",") if part}
    except ValueError:
        raise ValueError(f"blocks={text!r} is no list of numbers such as 0,3,5; empty means all.") from None
    wrong = sorted(number for number in numbers if not 0 <= number < count)
    if wrong:
        raise ValueError(f"block {wrong[0]} does not exist; the model has blocks 0 to {count - 1}.")
    return numbers or set(range(count))


def plan_of(network: Any, model: Any, samples: Tensor, progress: float) -> ProxyPlan:
    """Return the token grid, windows and proxy ratio at `progress` (0 to 1) of the sampling."""
    patch = network.patch_size
    frames, rows, columns = samples.shape[2], -(-samples.shape[3] // patch), -(-samples.shape[4] // patch)
    rules = model.model_options.get("transformer_options", {}).get(SETTINGS, ())
    rule = rule_for(rules, progress)
    return ProxyPlan((frames, rows, columns), *window_and_ratio(network, rule, rows * patch, columns * patch))


def level_at(model: Any, progress: float) -> float:
    """Return the noise level, 0 to 1, after that share of the sampling time."""
    return float(model.get_model_object("model_sampling").percent_to_sigma(progress))


def record_step(model: Any, positive: list, samples: Tensor, noise: Tensor, seed: int, progress: float,
                recorder: Recorder) -> None:  # fmt: skip
    """Sample one step, from a noised latent to noise level 0, with attention recorded."""
    clone = model.clone()
    clone.model_options.setdefault("transformer_options", {})["optimized_attention_override"] = recorder
    sigmas = torch.tensor([level_at(clone, progress), 0.0])
    guider = comfy.samplers.CFGGuider(clone)
    guider.set_conds(positive, positive)
    guider.set_cfg(1.0)
    guider.sample(noise, samples, comfy.samplers.sampler_object("euler"), sigmas, seed=seed, disable_pbar=True)
