"""Nodes around sampling: text, empty latents, noise levels."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from .sampling import ASPECTS, latent_frames, official_sigmas, shift_for, size_for
from .schema import check_choice, choice, fit, integer, number, schema, switch
from .text import MAX_TOKENS, encode_prompt


class PTDiTTextEncode(io.ComfyNode):
    """Prompts as the official pipeline reads them."""

    @classmethod
    def define_schema(cls) -> Any:
        """Inputs and outputs."""
        return schema(
            "PTDiTTextEncode",
            "PT-DiT Text Encode",
            "conditioning",
            "Encodes a prompt as the official pipeline does: lower case, brackets are plain text, at most 200 tokens. "
            "What is cut, and words that a small model does not know, are said in `notes`.",
            [
                fit(io.Clip.Input, "clip", tooltip="T5: CLIPLoader of type pixart, or PT-DiT Folder Loader."),
                fit(
                    io.String.Input,
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip=f"The prompt; the model reads its first {MAX_TOKENS} tokens (about 150 words).",
                ),
                switch(
                    "literal",
                    True,
                    "On: brackets are text, as in the official pipeline. Off: (word:1.2) makes a word count more.",
                ),
                switch(
                    "cleaning",
                    False,
                    "On: clean like the training captions, as the official pipeline does for positive prompts. It "
                    "deletes Chinese text, web addresses, brackets and long numbers.",
                ),
            ],
            [
                fit(io.Conditioning.Output, display_name="conditioning", tooltip="For a sampler."),
                fit(io.String.Output, display_name="notes", tooltip="Tokens used, what was cut, unknown words."),
            ],
            search_aliases=["prompt", "clip text encode", "t5"],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip: Any, text: str, literal: bool = True, cleaning: bool = False) -> Any:
        """Encode; notes beyond the token count also go to the log."""
        if clip is None:
            raise ValueError(
                "there is no text encoder: load T5-XXL with CLIPLoader (type pixart), or a folder that has one."
            )
        conditioning, notes = encode_prompt(clip, text, literal, cleaning)
        if ";" in notes:
            logging.warning("PT-DiT Text Encode: %s", notes)
        return io.NodeOutput(conditioning, notes)


class PTDiTEmptyLatent(io.ComfyNode):
    """Noise to start from, in legal sizes."""

    @classmethod
    def define_schema(cls) -> Any:
        """Inputs and outputs."""
        return schema(
            "PTDiTEmptyLatent",
            "PT-DiT Empty Latent",
            "latent",
            "Empty latents of a legal size: pictures, videos of 4n + 1 frames, or views of one object. Goes to a "
            "sampler's latent_image; views then go to PT-DiT Views to Batch.",
            [
                integer("width", 1024, 16, 8192, "Width in pixels, rounded to 16.", step=16),
                integer("height", 1024, 16, 8192, "Height in pixels, rounded to 16.", step=16),
                choice("aspect", list(ASPECTS), "A preset keeps the number of pixels of width x height and sets their "
                       "ratio (width:height); custom leaves both."),
                integer("length", 1, 1, 1025, "Frames: 1 = picture, 4n + 1 = video. Needs a model made for video.",
                        step=4),
                integer("views", 0, 0, 256, "Views of one object all around it, each a latent frame; 0 = use length. "
                        "Needs a model made for views.", advanced=True),
                integer("batch_size", 1, 1, 4096, "Pictures or videos made at once."),
            ],
            [
                fit(io.Latent.Output, display_name="latent", tooltip="(batch, 4, frames, height / 8, width / 8)"),
                fit(io.Int.Output, display_name="width_px", tooltip="Width in pixels after rounding."),
                fit(io.Int.Output, display_name="height_px", tooltip="Height in pixels after rounding."),
            ],
            search_aliases=["empty latent image", "resolution", "aspect ratio"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, width: int, height: int, aspect: str, length: int = 1, views: int = 0, batch_size: int = 1
    ) -> Any:
        """Zeros of that size."""
        check_choice("aspect", aspect, ASPECTS)
        width, height = size_for(aspect, width, height)
        frames = views or latent_frames(length)
        device = comfy.model_management.intermediate_device()
        samples = torch.zeros(batch_size, 4, frames, height // 8, width // 8, device=device)
        latent = {"samples": samples, "downscale_ratio_spacial": 8, "downscale_ratio_temporal": 4}
        return io.NodeOutput(latent, width, height)


class PTDiTScheduler(io.ComfyNode):
    """The official spacing of noise levels."""

    @classmethod
    def define_schema(cls) -> Any:
        """Inputs and outputs."""
        return schema(
            "PTDiTScheduler",
            "PT-DiT Sigmas",
            "sampling",
            "Noise levels exactly as the official sampler spaces them, for SamplerCustomAdvanced. Large pictures and "
            "videos spend more steps at high noise.",
            [
                fit(io.Model.Input, "model", tooltip="A PT-DiT; says at which size the shift is 1."),
                fit(io.Latent.Input, "latent", tooltip="Its size decides the shift."),
                integer("steps", 30, 1, 1000, "Number of sampling steps."),
                number("shift", 0.0, 0.0, 100.0, "0 = official: sqrt(width * height / 512^2 * frame factor). Higher "
                       "spends more steps at high noise."),
                number("denoise", 1.0, 0.0, 1.0, "1 = from pure noise. Lower keeps more of the latent (img2img)."),
            ],
            [
                fit(io.Sigmas.Output, display_name="sigmas", tooltip="steps + 1 noise levels from 1 to 0."),
                fit(io.Float.Output, display_name="shift_used", tooltip="The shift; fits ModelSamplingSD3."),
            ],
            search_aliases=["sigmas", "scheduler", "shift"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, latent: dict, steps: int, shift: float = 0.0, denoise: float = 1.0) -> Any:
        """Noise levels for the latent's size."""
        used = shift or automatic_shift(model, latent)
        return io.NodeOutput(official_sigmas(steps, used, denoise), used)


def automatic_shift(model: Any, latent: dict) -> float:
    """The official shift for a latent.

    Raises:
        ValueError: The model is no PT-DiT.
    """
    config = getattr(model.model.model_config, "extras", None) if model is not None else None
    if not config or "base_tokens" not in config:
        raise ValueError(
            "the model is not a PT-DiT, whose official shift is asked for; set shift to a number above 0."
        )
    samples = latent["samples"]
    frames = samples.shape[2] if samples.ndim == 5 else 1
    return shift_for(*samples.shape[-2:], frames, config["base_tokens"])
