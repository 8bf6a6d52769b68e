"""Nodes of class-conditional models: a class as conditioning, and guidance as in the official code."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_api.latest import io
from torch import Tensor

from ptdit_diffusers.core.class_labels import class_ids
from ptdit_diffusers.core.diffusion import GUIDANCE_SCHEDULES, guide_channels, power_cosine

from .dit import CLASS_MODEL
from .schema import check_choice, choice, fit, integer, number, schema, show


class PTDiTClass(io.ComfyNode):
    """Classes by name or number, and the null class beside them."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the schema of inputs and outputs."""
        return schema(
            "PTDiTClass",
            "DiT Class",
            "conditioning",
            "Chooses a class of a DiT or DiffiT by name or number. They know no text: connect class to positive and "
            "no_class to negative of a sampler. Several lines are the classes of the pictures of one batch.",
            [
                fit(
                    io.Model.Input,
                    "model",
                    tooltip="A DiT or DiffiT; it sets how many classes there are, and their names.",
                ),
                fit(
                    io.String.Input,
                    "classes",
                    default="0",
                    multiline=True,
                    tooltip="A number, or a name where the model has names, for example red star. One class in each "
                    "line; with several, picture i of the batch gets line i.",
                ),
            ],
            [
                fit(io.Conditioning.Output, display_name="class", tooltip="The class, for positive of a sampler."),
                fit(
                    io.Conditioning.Output,
                    display_name="no_class",
                    tooltip="The null class, for negative of a sampler: what guidance leads away from.",
                ),
                fit(io.String.Output, display_name="names", tooltip="Numbers and names of the chosen classes."),
            ],
            search_aliases=["class label", "imagenet", "class conditional", "dit"],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, model: Any, classes: str = "0") -> Any:
        """Return conditionings (classes, 1, rows of the class table), and one of zeros, which is the null class."""
        config = class_config(model)
        names = config.extras["id2label"]
        lines = [line for line in classes.splitlines() if line.strip()]
        if not lines:
            raise ValueError("classes is empty; write a class number or name, for example 0.")
        numbers = class_ids(lines, names, config.unet_config["num_classes"])
        rows = config.unet_config["num_classes"] + (config.unet_config["class_dropout_prob"] > 0)
        chosen = torch.nn.functional.one_hot(torch.tensor(numbers), rows).float()[:, None]
        text = "\n".join(f"{number}: {(names or {}).get(str(number), 'class without a name')}" for number in numbers)
        show(cls, text)
        return io.NodeOutput([[chosen, {}]], [[torch.zeros(1, 1, rows), {}]], text)


class PTDiTClassGuidance(io.ComfyNode):
    """Guidance of some channels, and of a strength that grows during the sampling."""

    @classmethod
    def define_schema(cls) -> Any:
        """Return the schema of inputs and outputs."""
        return schema(
            "PTDiTClassGuidance",
            "DiT Guidance",
            "model",
            "Guides as the official code of DiT and DiffiT does: cfg of the sampler acts on the first three of the "
            "four latent channels, and its strength can grow during the sampling. Without this node cfg acts on all "
            "channels in the same way. It works with other models, too.",
            [
                fit(io.Model.Input, "model", tooltip="A DiT or DiffiT, or another model of noise or rectified flow."),
                integer("channels", 3, 0, 64, "How many of the first latent channels are guided. 3 = official, 0 = "
                        "all.", optional=True),
                choice("schedule", list(GUIDANCE_SCHEDULES), "constant: cfg in all steps. power_cosine: from 1 at "
                       "noise to cfg at the picture, as the official DiffiT does at 256 px.", optional=True),
                number("power", 4.0, 0.01, 100.0, "Exponent of power_cosine: the larger, the later guidance sets in.",
                       optional=True, advanced=True),
            ],
            [fit(io.Model.Output, display_name="model", tooltip="A copy of the model with this guidance.")],
            search_aliases=["cfg", "classifier-free guidance", "three channels", "power cosine", "dit"],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, channels: int = 3, schedule: str = "constant", power: float = 4.0) -> Any:
        """Return a clone of the model that guides in this way."""
        check_choice("schedule", schedule, GUIDANCE_SCHEDULES)
        clone = model.clone()
        sampling = clone.get_model_object("model_sampling")

        def guide(given: dict[str, Any]) -> Tensor:  # of x - x0, which is the prediction times a number
            strength = given["cond_scale"]
            if math.isclose(strength, 1.0):  # ComfyUI leaves out the null class
                return given["cond"]
            if schedule != "constant":
                thousandths = 1000 / getattr(sampling, "multiplier", 1000)  # flow models count time in other units
                strength = power_cosine(sampling.timestep(given["timestep"]) * thousandths, strength, power)
                strength = strength.to(given["cond"]).view(-1, *(1 for _ in given["cond"].shape[1:]))
            return guide_channels(given["cond"], given["uncond"], strength, channels or None)

        clone.set_model_sampler_cfg_function(guide)
        return io.NodeOutput(clone)


def class_config(model: Any) -> Any:
    """Return the configuration of a class-conditional MODEL.

    Raises:
        ValueError: It is another model.
    """
    config = model.model.model_config
    if config.unet_config.get("image_model") != CLASS_MODEL:
        raise ValueError(
            "the model knows no classes: connect a DiT or DiffiT, from Load Diffusion Model or PT-DiT Folder Loader."
        )
    return config
