"""A guider of diffusers with DiffiT's schedule of guidance, for the modular pipeline of PT-DiT and for others."""

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from torch import Tensor

from ptdit_diffusers.core.diffusion import check_guidance_schedule, guide_channels, power_cosine


class PowerCosineGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose strength grows from 1 at noise to `guidance_scale` at the picture.

    See `core.diffusion.power_cosine`. It reads the timestep, 0 to 1000, of noise-predicting and flow-matching models.

    Args:
        guidance_scale (`float`, defaults to 4.4): strength at timestep 0.
        guidance_power (`float`, defaults to 4.0): exponent, above 0; the larger, the later guidance sets in.
        guidance_channels (`int`, *optional*): how many of the first channels are guided; `None` guides all.
        start (`float`, defaults to 0.0): share of the steps before guidance.
        stop (`float`, defaults to 1.0): share of the steps after which guidance ends.
        enabled (`bool`, defaults to `True`): whether there is any guidance.

    Raises:
        ValueError: the exponent is not a number above 0.
    """

    @register_to_config
    def __init__(
        self,
        guidance_scale: float = 4.4,
        guidance_power: float = 4.0,
        guidance_channels: int | None = None,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
    ):
        super().__init__(guidance_scale, start=start, stop=stop, enabled=enabled)
        check_guidance_schedule("power_cosine", guidance_power)
        self.guidance_power, self.guidance_channels = guidance_power, guidance_channels

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        """Return the guided prediction of the present step."""
        guided = pred_cond
        if self._is_cfg_enabled():
            timestep = torch.as_tensor(self._timestep)
            strength = power_cosine(timestep, self.guidance_scale, self.guidance_power)
            strength = strength.to(pred_cond.device).reshape(-1, *(1 for _ in range(pred_cond.ndim - 1)))
            guided = guide_channels(pred_cond, pred_uncond, strength, self.guidance_channels)
        return GuiderOutput(pred=guided, pred_cond=pred_cond, pred_uncond=pred_uncond)
