"""Image to image with PT-DiT: the steps begin with a noisy copy of an image instead of noise alone."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput
from torch import Tensor

from ptdit_diffusers.core.backbones.windows import Triple

from .ptdit_base import PTDiTPipelineBase, PTDiTPipelineOutput
from .ptdit_checks import check_strength
from .ptdit_images import ImageInputMixin
from .ptdit_request import ImageRequest


class PTDiTImg2ImgPipeline(ImageInputMixin, PTDiTPipelineBase):
    """Image to image with PT-DiT (Qihoo-T2X): changes an image as a prompt says.

    Components and loading are those of `PTDiTPipeline`; `from_pipe` shares the components between the two.

    Args:
        tokenizer, text_encoder, vae, transformer, scheduler: As in `PTDiTPipeline`; the VAE is needed.
    """

    _callback_tensor_inputs = [*PTDiTPipelineBase._callback_tensor_inputs, "image_latents", "noise"]

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        image: PipelineImageInput | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        strength: float = 0.6,
        num_inference_steps: int = 30,
        sigmas: list[float] | None = None,
        timesteps: list[float] | None = None,
        guidance_scale: float = 4.0,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never changed; diffusers' default)
        clean_caption: bool = True,
        max_sequence_length: int = 200,
        window_size: str | Triple = "auto",
        proxy_ratio: str | Triple = "auto",
    ) -> PTDiTPipelineOutput | tuple:
        """Generate images from prompts and images. The arguments that are not listed are those of `PTDiTPipeline`.

        Args:
            prompt: Text, or one text per image.
            image: Image to start from, or one per prompt (or per generated image): PIL images, arrays
                (height, width, 3) from 0 to 1, or a tensor (n, 3, height, width) from 0 to 1 (or -1 to 1).
            height, width: Pixels, multiples of 16; default the size at which the trained windows fit exactly. The
                given images are resized to it.
            strength: Above 0, at most 1: the part of the steps that is run. 1 starts from noise alone, small values
                keep the image nearly as it is.
            latents: Noise (B, C, 1, height / 8, width / 8) to mix in, instead of sampled noise.

        Returns:
            `PTDiTPipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: An argument is not legal; the message names the nearest legal values.
            RuntimeError: The result holds NaN or infinite values.

        Examples:
            >>> import torch
            >>> from ptdit_diffusers import PTDiTImg2ImgPipeline, PTDiTPipeline
            >>> pipe = PTDiTPipeline.from_pretrained("shapes-128")
            >>> image = pipe("a red circle", generator=torch.manual_seed(0)).images[0]
            >>> pipe = PTDiTImg2ImgPipeline.from_pipe(pipe)
            >>> blue = pipe("a blue circle", image, strength=0.8, generator=torch.manual_seed(1)).images[0]
        """
        request = ImageRequest(
            prompt=prompt, image=image, negative_prompt=negative_prompt, height=height, width=width,
            strength=strength, num_inference_steps=num_inference_steps, sigmas=sigmas, timesteps=timesteps,
            guidance_scale=guidance_scale, guidance_rescale=guidance_rescale,
            num_images_per_prompt=num_images_per_prompt, generator=generator, latents=latents,
            prompt_embeds=prompt_embeds, prompt_attention_mask=prompt_attention_mask,
            negative_prompt_embeds=negative_prompt_embeds,
            negative_prompt_attention_mask=negative_prompt_attention_mask, output_type=output_type,
            return_dict=return_dict, attention_kwargs=attention_kwargs, callback_on_step_end=callback_on_step_end,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs, clean_caption=clean_caption,
            max_sequence_length=max_sequence_length, window_size=window_size, proxy_ratio=proxy_ratio,
        )  # fmt: skip
        return self.run(request)

    def generate(self, request: ImageRequest) -> PTDiTPipelineOutput | tuple:
        """Run the steps of a call; the loop begins later than for text to image, with the image mixed with noise."""
        check_strength(request.strength)
        self.begin(request)
        image = self.read_image(request)
        tensors = self.encode_texts(request, self.do_classifier_free_guidance)
        timesteps = self.prepare_schedule(request, request.strength)
        tensors |= self.mix_with_noise(image, self.prepare_noise(request))
        latents = self.denoise(
            request, tensors, timesteps, request.callback_on_step_end, request.callback_on_step_end_tensor_inputs
        )
        return self.output(request, "images", self.decode_latents(latents, request.output_type))
