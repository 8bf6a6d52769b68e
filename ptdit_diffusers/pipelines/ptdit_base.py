"""What the PT-DiT pipelines of one call share: components, loading, saving, classifier-free guidance, output.

Shapes: B samples (prompts * images per prompt), C latent channels, F latent frames, H W latent size.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from torch import Tensor
from transformers import PreTrainedTokenizerBase, T5EncoderModel

from ptdit_diffusers.core.sampling import apply_guidance
from ptdit_diffusers.models.autoencoder_ptdit import AutoencoderKLOpenSoraPlan
from ptdit_diffusers.models.transformer_ptdit import PTDiTTransformer3DModel

from .package_pipeline import PackagePipeline
from .ptdit_checks import ChecksMixin, check_callback_inputs
from .ptdit_denoising import DenoisingMixin, Tensors
from .ptdit_latents import LatentsMixin
from .ptdit_lora import PTDiTLoraLoaderMixin, warn_of_student
from .ptdit_request import GenerationRequest
from .ptdit_schedulers import COPY, exclusive
from .ptdit_text import TEXT_TENSORS, TextMixin, join_text


@dataclass
class PTDiTPipelineOutput(BaseOutput):
    """What a call returns: `images`, or `frames` of a video, or `views` with `num_views`; the others are None.

    Args:
        images: List of B images, array (B, height, width, 3) or tensor (B, 3, height, width), values 0 to 1.
        frames: List of B lists of images, array (B, frames, height, width, 3) or tensor (B, frames, 3, height,
            width), as the video pipelines of diffusers return them.
        views: As `frames`; view i of V is seen from azimuth i * 360 / V degrees. With `output_type="latent"` the field
            holds the latents (B, C, F, H, W).
    """

    images: list[PIL.Image.Image] | np.ndarray | Tensor | None = None
    frames: list[list[PIL.Image.Image]] | np.ndarray | Tensor | None = None
    views: list[list[PIL.Image.Image]] | np.ndarray | Tensor | None = None


class PTDiTPipelineBase(PackagePipeline, ChecksMixin, TextMixin, LatentsMixin, DenoisingMixin, PTDiTLoraLoaderMixin):
    """Components and classifier-free guidance; what a call does is in `generate` of each pipeline.

    Args:
        tokenizer: Tokenizer of the text encoder; adds its end token itself.
        text_encoder: T5 encoder. May be None when embeddings are passed.
        vae: Video VAE. May be None with `output_type="latent"` and no image to start from.
        transformer: The denoiser. May be None when only `encode_prompt` is used.
        scheduler: Flow-matching Euler scheduler. With `use_dynamic_shifting` its `base_image_seq_len` is the number of
            tokens per frame at which the time shift is 1.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _optional_components = []
    _can_halve_guidance = True
    _callback_tensor_inputs = ["latents", *TEXT_TENSORS]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: T5EncoderModel,
        vae: AutoencoderKLOpenSoraPlan,
        transformer: PTDiTTransformer3DModel,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ):
        super().__init__()
        self.register_modules(
            tokenizer=tokenizer, text_encoder=text_encoder, vae=vae, transformer=transformer, scheduler=scheduler
        )

    def run(self, request: GenerationRequest) -> PTDiTPipelineOutput | tuple:
        """Run a call, unless another one with the same scheduler is not finished."""
        with exclusive(self.scheduler, COPY.format(type(self).__name__)):
            return self.generate(request)

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Offload in groups, as in diffusers. T5 gets one embedding layer in place of two with the same weights.

        Groups are offloaded one after the other: that of the second layer would keep what the first one left.
        """
        encoder = getattr(self.text_encoder, "encoder", None)
        if getattr(encoder, "embed_tokens", None) is not None and hasattr(self.text_encoder, "shared"):
            if encoder.embed_tokens.weight is self.text_encoder.shared.weight:
                encoder.embed_tokens = self.text_encoder.shared
        super().enable_group_offload(*args, **kwargs)

    def begin(self, request: GenerationRequest) -> None:
        """Check a request, fill in its sizes, and note what a callback may ask for or change during the call."""
        callback = request.callback_on_step_end
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            request.callback_on_step_end_tensor_inputs = callback.tensor_inputs
        check_callback_inputs(request.callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        self.check_call(request)
        size = request.num_frames, request.height, request.width
        warn_of_student(self.transformer, request.guidance_scale, *size)
        self._guidance_scale, self._guidance_rescale = request.guidance_scale, request.guidance_rescale
        self._attention_kwargs, self._interrupt, self._current_timestep = request.attention_kwargs, False, None

    def output(self, request: GenerationRequest, field: str, result: Any) -> PTDiTPipelineOutput | tuple:
        """Return the result of a call in a field of the output, or as a tuple, and free what offloading holds."""
        self.maybe_free_model_hooks()
        return PTDiTPipelineOutput(**{field: result}) if request.return_dict else (result,)

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """`attention_kwargs` of the present call."""
        return self._attention_kwargs

    @property
    def guidance_scale(self) -> float:
        """Strength of guidance in the present call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def guidance_rescale(self) -> float:
        """`guidance_rescale` of the present call, 0 to 1."""
        return self._guidance_rescale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the negative prompt is used: guidance above 1."""
        return self._guidance_scale > 1

    def guidance_texts(self, tensors: Tensors) -> tuple[Tensor, Tensor | None]:
        """Return the text of one forward in the order [negative, positive], without tokens that all samples mask."""
        names = ("negative_prompt", "prompt") if self.do_classifier_free_guidance else ("prompt",)
        embeds, mask = join_text(
            [tensors[f"{name}_embeds"] for name in names], [tensors[f"{name}_attention_mask"] for name in names]
        )
        return embeds.to(self.transformer.dtype), mask

    def guided_flow(
        self,
        latents: Tensor,
        texts: tuple[Tensor, Tensor | None],
        step: int,
        options: dict[str, Any],
    ) -> Tensor:
        """Return the flow (B, C, F, H, W) of a step, guided if guidance is on, from one forward for all samples.

        Where halves of the devices have one text each, from one forward for the samples of that text.
        """
        embeds, mask = texts
        halves = self.transformer.guidance_halves if self.do_classifier_free_guidance else None
        if halves is not None:
            embeds = embeds.chunk(2)[halves.rank]
            mask = mask if mask is None else mask.chunk(2)[halves.rank]
        flow = self.predict_flow(torch.cat([latents] * (len(embeds) // len(latents))), embeds, mask, step, options)
        if halves is not None:
            flow = halves.gather(flow, [len(latents)] * 2, is_used_by_all=False)
        if not self.do_classifier_free_guidance:
            return flow
        return apply_guidance(flow, self.guidance_scale, self.guidance_rescale)
