"""Text to image, to video and to views of an object with PT-DiT."""

from collections.abc import Callable
from typing import Any

import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from torch import Tensor

from ptdit_diffusers.core.backbones.windows import Triple

from .ptdit_base import PTDiTPipelineBase, PTDiTPipelineOutput
from .ptdit_request import GenerationRequest


class PTDiTPipeline(PTDiTPipelineBase):
    """Text to image, to video and to views of an object with PT-DiT (Qihoo-T2X).

    Loading, saving, offloading and LoRA work as in every pipeline of diffusers. `from_pretrained` also takes the short
    name of a model that comes with this package, which needs no internet. `PTDiTImg2ImgPipeline.from_pipe(pipe)` and
    `PTDiTInpaintPipeline.from_pipe(pipe)` make the other pipelines with the same components.

    Args:
        tokenizer: Tokenizer of the text encoder; adds its end token itself.
        text_encoder: T5 encoder. May be None when embeddings are passed.
        vae: Video VAE. May be None with `output_type="latent"`.
        transformer: The denoiser. May be None when only `encode_prompt` is used.
        scheduler: Flow-matching Euler scheduler. With `use_dynamic_shifting` its `base_image_seq_len` is the number of
            tokens per frame at which the time shift is 1.
    """

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_frames: int = 1,
        num_views: int | None = None,
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
        """Generate images (`num_frames=1`), videos or views of an object (`num_views`) from prompts.

        Args:
            prompt: Text, or one text per image.
            negative_prompt: What to avoid, default ""; one text for all prompts or one each. Only lower-cased,
                never cleaned.
            height, width: Pixels, multiples of 16; default the size at which the trained windows fit exactly.
            num_frames: 1 for an image, 4n + 1 for a video; any length, whatever the windows.
            num_views: Instead of frames: images of one object that stands still, at least 2; view i is seen from
                azimuth i * 360 / num_views degrees. The transformer sees them as frames, the VAE as single images.
            num_inference_steps: Euler steps; not used with `sigmas` or `timesteps`.
            sigmas: Noise levels falling from 1 to above 0; still shifted by the scheduler.
            timesteps: Times falling from 1000 to above 0, used as they are; not together with `sigmas`.
            guidance_scale: How strongly to follow the prompt; 1 or less turns guidance off and halves the work.
            guidance_rescale: 0 to 1, how far the standard deviation of the guided prediction is brought back to that
                of the prompt's own prediction (arXiv 2305.08891, section 3.4); softens strong guidance.
            num_images_per_prompt: Images (or videos) per prompt.
            generator: Source of the noise, one for all samples or one for each. Sample i of a batch equals the single
                run with generator i.
            latents: Starting noise (B, C, F, height / 8, width / 8) instead of sampled noise; F is 1, n + 1 for 4n + 1
                frames, or the number of views.
            prompt_embeds, prompt_attention_mask: Embeddings (prompts, L, width) instead of `prompt`, and their
                mask (prompts, L), true where a token counts; no mask means that all count.
            negative_prompt_embeds, negative_prompt_attention_mask: The same for the negative prompt.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return a `PTDiTPipelineOutput`, else a tuple with its one member.
            attention_kwargs: Passed to the transformer; `{"scale": s}` scales a LoRA.
            callback_on_step_end: Called as f(pipeline, step, timestep, tensors) after each step; what it returns
                replaces tensors of these names. It may set `pipeline._interrupt` and `pipeline._guidance_scale`.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.
            clean_caption: Clean the prompt like the training captions (deletes Chinese text, brackets, addresses).
            max_sequence_length: Most text tokens per prompt.
            window_size, proxy_ratio: Tokens per window and per proxy (frames, rows, columns), or "auto".

        Returns:
            `PTDiTPipelineOutput` with `images` for one frame, `frames` for a video or `views`, or a tuple.

        Raises:
            ValueError: An argument is not legal; the message names the nearest legal values.
            RuntimeError: The result holds NaN or infinite values.

        Examples:
            >>> import torch
            >>> from ptdit_diffusers import PTDiTPipeline
            >>> pipe = PTDiTPipeline.from_pretrained("shapes-128")
            >>> image = pipe("a red circle above a blue square", generator=torch.manual_seed(0)).images[0]
        """
        request = GenerationRequest(
            prompt=prompt, negative_prompt=negative_prompt, height=height, width=width, num_frames=num_frames,
            num_views=num_views, num_inference_steps=num_inference_steps, sigmas=sigmas, timesteps=timesteps,
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

    def generate(self, request: GenerationRequest) -> PTDiTPipelineOutput | tuple:
        """Run the steps of a call: check, encode the prompts, sample noise, denoise it, decode the latents."""
        self.begin(request)
        tensors = self.encode_texts(request, self.do_classifier_free_guidance)
        timesteps = self.prepare_schedule(request)
        tensors["latents"] = self.prepare_noise(request)
        latents = self.denoise(
            request, tensors, timesteps, request.callback_on_step_end, request.callback_on_step_end_tensor_inputs
        )
        views = request.num_views is not None
        result = self.decode_latents(latents, request.output_type, views)
        return self.output(request, "views" if views else "images" if request.num_frames == 1 else "frames", result)
