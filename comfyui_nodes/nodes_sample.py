"""Nodes around sampling: text, empty latents, noise levels."""

from __future__ import annotations

import logging
from typing import Any

import comfy.model_management
import torch
from comfy_api.latest import io

from .dit import CLASS_MODEL
from .native import IMAGE_MODEL
from .sampling import ASPECTS, latent_shape, official_sigmas, shift_for, size_for
from .schema import check_choice, choice, fit, integer, number, schema, show, switch
from .text import MAX_TOKENS, NOT_USED, encode_prompt


class PTDiTTextEncode(io.ComfyNode):
    """Prompts as the official pipeline reads them."""

    @classmethod
    def define_schema(cls) -> Any:
        """Inputs and outputs."""
        return schema(
            "PTDiTTextEncode",
            "PT-DiT Text Encode",
            "conditioning",
            "Encodes a prompt as the official pipeline does: in lower case, with brackets as plain text, and at most "
            "200 tokens. `notes` reports what was cut and which words a small model does not know.",
            [
                fit(io.Clip.Input, "clip", tooltip="The T5 text encoder, from CLIPLoader with type pixart or from "
                    "PT-DiT Folder Loader."),
                fit(
                    io.String.Input,
                    "text",
                    multiline=True,
                    default="",
                    dynamic_prompts=True,
                    tooltip=f"The prompt. The model reads its first {MAX_TOKENS} tokens (about 150 words).",
                ),
                switch(
                    "literal",
                    True,
                    "On: brackets are plain text, as in the official pipeline. Off: (word:1.2) gives a word more "
                    "weight.",
                    optional=True,
                ),
                switch(
                    "cleaning",
                    False,
                    "On: clean the prompt like the training captions, as the official pipeline does for positive "
                    "prompts. This deletes Chinese text, web addresses, brackets and long numbers.",
                    optional=True,
                ),
            ],
            [
                fit(io.Conditioning.Output, display_name="conditioning", tooltip="For a sampler."),
                fit(io.String.Output, display_name="notes", tooltip="Number of tokens, what was cut, unknown words."),
            ],
            search_aliases=["prompt", "clip text encode", "t5"],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip: Any, text: str, literal: bool = True, cleaning: bool = False) -> Any:
        """Encode; notes beyond the token count also go to the log."""
        if clip is None:
            raise ValueError(
                "there is no text encoder: load T5-XXL with CLIPLoader (type pixart), or a folder that has one."
            )
        conditioning, notes = encode_prompt(clip, text, literal, cleaning)
        show(cls, notes)
        if NOT_USED in notes:  # other notes are logged by the tokenizer, for stock nodes, too
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
            "Creates empty latents of a legal size for pictures, videos of 4n + 1 frames, or views of one object. "
            "Connect latent_image of a sampler. For views, put PT-DiT Views to Batch after the sampler.",
            [
                integer("width", 0, 0, 8192, "Width in pixels, rounded to a multiple of 16. 0 = the model's own size.",
                        step=16),
                integer("height", 0, 0, 8192, "Height in pixels, rounded to a multiple of 16. 0 = the model's own "
                        "size.", step=16),
                choice("aspect", list(ASPECTS), "A preset sets the ratio width:height and keeps the number of pixels "
                       "of width x height. custom uses width and height as they are.", optional=True),
                integer("length", 1, 1, 1025, "Number of frames: 1 = picture, 4n + 1 = video. Needs a model trained "
                        "on video.", step=4, optional=True),
                integer("views", 0, 0, 256, "Number of views of one object from all around; each view is a latent "
                        "frame. 0 = use length. Needs a model trained on views.", advanced=True, optional=True),
                integer("batch_size", 1, 1, 4096, "Number of pictures or videos made at once.", optional=True),
                fit(io.Model.Input, "model", optional=True, tooltip="A PT-DiT or DiT, for a width or height of 0."),
            ],
            [
                fit(io.Latent.Output, display_name="latent", tooltip="Pictures (batch, 4, height / 8, width / 8); "
                    "videos and views have their frames after the 4."),
                fit(io.Int.Output, display_name="width_px", tooltip="Width in pixels after rounding."),
                fit(io.Int.Output, display_name="height_px", tooltip="Height in pixels after rounding."),
            ],
            search_aliases=["empty latent image", "empty latent video", "resolution", "aspect ratio", "image size"],
        )  # fmt: skip

    @classmethod
    def execute(
        cls,
        width: int,
        height: int,
        aspect: str = "custom",
        length: int = 1,
        views: int = 0,
        batch_size: int = 1,
        model: Any = None,
    ) -> Any:
        """Return zeros of that size."""
        check_choice("aspect", aspect, ASPECTS)
        if not (width and height):
            side = own_size(model)
            width, height = width or side, height or side
        width, height = size_for(aspect, width, height)
        shape = latent_shape(width, height, length, views, batch_size)
        samples = torch.zeros(shape, device=comfy.model_management.intermediate_device())
        latent = {"samples": samples, "downscale_ratio_spacial": 8}
        if samples.ndim == 5:
            latent["downscale_ratio_temporal"] = 4
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
            "The noise levels (sigmas) of the official sampler, for SamplerCustomAdvanced. Large pictures and videos "
            "spend more steps at high noise.",
            [
                fit(io.Model.Input, "model", tooltip="A PT-DiT model; it sets the size at which the shift is 1."),
                fit(io.Latent.Input, "latent", tooltip="Its size determines the shift."),
                integer("steps", 30, 1, 1000, "Number of sampling steps."),
                number("shift", 0.0, 0.0, 100.0, "0 = official: sqrt(width * height / 512^2 * frame factor). A higher "
                       "value spends more steps at high noise.", optional=True),
                number("denoise", 1.0, 0.0, 1.0, "1 = start from pure noise. A lower value keeps more of the latent "
                       "(image to image).", optional=True),
            ],
            [
                fit(io.Sigmas.Output, display_name="sigmas", tooltip="steps + 1 noise levels from 1 to 0."),
                fit(io.Float.Output, display_name="shift_used", tooltip="The shift that was used. ModelSamplingSD3 "
                    "takes the same value."),
            ],
            search_aliases=["sigmas", "scheduler", "shift"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, latent: dict, steps: int, shift: float = 0.0, denoise: float = 1.0) -> Any:
        """Noise levels for the latent's size."""
        used = shift or automatic_shift(model, latent)
        return io.NodeOutput(official_sigmas(steps, used, denoise), used)


def own_size(model: Any) -> int:
    """Return the side in pixels of the pictures that a model was trained for.

    Raises:
        ValueError: There is no model, or it is not one of ours.
    """
    config = model.model.model_config.unet_config if model is not None else {}
    if config.get("image_model") not in (IMAGE_MODEL, CLASS_MODEL):
        raise ValueError(
            "a width or height of 0 means the model's own size: connect a PT-DiT or DiT to the input model, or set "
            "both."
        )
    return 8 * config["sample_size"]


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
