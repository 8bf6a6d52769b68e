"""What a call of any PT-DiT pipeline does: checks, text, times, start, guided steps, decoding.

It must not know block internals, key names or training. Pipelines that start from a picture override `read_pictures`,
`start`, `keep_known` and `finish`.
Letters: B samples (prompts * pictures per prompt), L text tokens, C latent channels, F latent frames, H W latent size.
"""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

from ptdit_diffusers.core.sampling import (
    Triple,
    choose_windows,
    proxy_generators,
    size_conditions,
    static_shift,
    time_shift,
    unshift,
)

from .ptdit_checks import check_callback_inputs, check_settings, check_steps

TEXT_TENSORS = (
    "prompt_embeds",
    "prompt_attention_mask",
    "negative_prompt_embeds",
    "negative_prompt_attention_mask",
)


@dataclass
class GenerationRequest:
    """The arguments of a call under their own names; the pipelines' `__call__` documents them."""

    prompt: str | list[str] | None
    negative_prompt: str | list[str] | None
    height: int | None
    width: int | None
    num_inference_steps: int
    sigmas: list[float] | None
    timesteps: list[float] | None
    guidance_scale: float
    guidance_rescale: float
    num_images_per_prompt: int
    generator: torch.Generator | list[torch.Generator] | None
    latents: torch.Tensor | None
    prompt_embeds: torch.Tensor | None
    prompt_attention_mask: torch.Tensor | None
    negative_prompt_embeds: torch.Tensor | None
    negative_prompt_attention_mask: torch.Tensor | None
    output_type: str
    return_dict: bool
    attention_kwargs: dict[str, Any] | None
    callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None
    callback_on_step_end_tensor_inputs: list[str]
    clean_caption: bool
    max_sequence_length: int
    window_size: str | Triple
    proxy_ratio: str | Triple
    num_frames: int = 1
    num_views: int | None = None
    image: Any = None
    mask_image: Any = None
    strength: float = 1.0
    padding_mask_crop: int | None = None

    def texts(self) -> tuple[torch.Tensor | None, ...]:
        """Embeddings and masks that were passed, in the order of `TEXT_TENSORS`."""
        return tuple(getattr(self, name) for name in TEXT_TENSORS)


class PTDiTDenoisingMixin:
    """From a request to pictures; the pipeline that mixes this in owns components, prompts, decoding and guidance.

    How it guides is in two methods: `guidance_texts(tensors)`, what the network reads, made anew when a callback
    changed something, and `guided_flow(latents, texts, step, options)`, the flow (B, C, F, H, W) to step along.
    """

    _interrupt, _current_timestep = False, None

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the present call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Time of the present step, 0 to 1000; None outside the loop."""
        return self._current_timestep

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """`attention_kwargs` of the present call."""
        return self._attention_kwargs

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to stop after that step and decode what is there."""
        return self._interrupt

    def generate(self, request: GenerationRequest, output_class: type[BaseOutput]) -> BaseOutput | tuple:
        """Serve one request; see the pipelines' `__call__` for what it may hold, returns and raises."""
        self._check_settings(request)
        height, width = request.height, request.width = self.fill_size(request.height, request.width)
        num_frames = self.clip_length(request.num_frames, request.num_views)
        samples = self.check_inputs(
            request.prompt, request.negative_prompt, height, width, num_frames, request.num_images_per_prompt,
            request.generator, request.latents, *request.texts(), request.output_type,
        )  # fmt: skip
        pictures = self.read_pictures(request, samples)
        self._guidance_scale, self._guidance_rescale = request.guidance_scale, request.guidance_rescale
        self._attention_kwargs, self._interrupt, self._current_timestep = request.attention_kwargs, False, None

        device = self._execution_device
        text = self.encode_prompt(
            request.prompt, request.negative_prompt, self.do_classifier_free_guidance, request.num_images_per_prompt,
            device, *request.texts(), request.clean_caption, request.max_sequence_length,
        )  # fmt: skip
        timesteps = self.prepare_timesteps(
            request.num_inference_steps, request.sigmas, height, width, num_frames, request.timesteps,
            request.strength,
        )  # fmt: skip
        shape = self.latent_shape(samples, height, width, num_frames)
        noise = self.prepare_latents(shape, device, request.generator, request.latents)
        tensors = {**dict(zip(TEXT_TENSORS, text, strict=True)), **self.start(pictures, noise)}
        options = self.network_options(request, shape)
        latents = self.denoise(
            tensors, timesteps, options, request.callback_on_step_end, request.callback_on_step_end_tensor_inputs
        )
        views = request.num_views is not None
        result = self.finish(self.decode_latents(latents, request.output_type, views), request, pictures)
        self.maybe_free_model_hooks()
        if not request.return_dict:
            return (result,)
        return output_class(**{"views" if views else "images" if num_frames == 1 else "frames": result})

    def read_pictures(self, request: GenerationRequest, samples: int) -> dict[str, Any]:
        """Check the pictures that were handed in and bring them to the size of the call; none here."""
        return {}

    def start(self, pictures: dict[str, Any], noise: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tensors that the steps begin with, `latents` (B, C, F, H, W) among them; here the noise itself."""
        return {"latents": noise}

    def keep_known(self, tensors: dict[str, torch.Tensor | None], level: torch.Tensor) -> torch.Tensor:
        """Latents after a step; `level` is the noise level they have now, 0 to 1. Nothing is known here."""
        return tensors["latents"]

    def finish(self, result: Any, request: GenerationRequest, pictures: dict[str, Any]) -> Any:
        """Last touch on the decoded pictures; none here."""
        return result

    def _check_settings(self, request: GenerationRequest) -> None:
        callback = request.callback_on_step_end
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            request.callback_on_step_end_tensor_inputs = callback.tensor_inputs
        check_callback_inputs(request.callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        check_settings(
            request.num_inference_steps, request.sigmas, request.timesteps, request.strength,
            request.max_sequence_length, request.window_size, request.proxy_ratio,
        )  # fmt: skip

    def network_options(self, request: GenerationRequest, shape: tuple[int, ...]) -> dict[str, Any]:
        """Arguments of every forward that do not change between the steps."""
        windows = choose_windows(self.transformer, request.window_size, request.proxy_ratio, *shape[-2:])
        sizes = size_conditions(self.transformer, request.height, request.width)
        options = {**windows, **sizes, "attention_kwargs": request.attention_kwargs}
        if self.transformer.proxy_mode == "random":
            options["generator"] = proxy_generators(request.generator, shape[0])
        return options

    def prepare_latents(
        self,
        shape: tuple[int, int, int, int, int],
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Standard normal noise (B, C, F, H, W) in float32, or the `latents` that were given.

        It is drawn sample by sample on the generator's device, so sample i does not depend on the size of the batch.
        """
        if latents is not None:
            return latents.to(device=device, dtype=torch.float32)
        generators = generator if isinstance(generator, list) else [generator] * shape[0]
        return torch.cat([randn_tensor((1, *shape[1:]), one, device, torch.float32) for one in generators])

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        sigmas: list[float] | None,
        height: int,
        width: int,
        num_frames: int,
        timesteps: list[float] | None = None,
        strength: float = 1.0,
    ) -> torch.Tensor:
        """Set the scheduler's steps and return their times (N,), from 1000 down.

        The noise levels are 1 - i / N, or `sigmas`; with `use_dynamic_shifting` they are shifted by `time_shift`.
        `timesteps` are the times themselves, which nothing shifts any more. With `strength` below 1 the first
        (1 - strength) of the steps is left out, as in diffusers' image-to-image pipelines. Height and width are in
        pixels; `num_frames` is the length that `clip_length` gives.

        Raises:
            ValueError: The scheduler cannot be told what was asked for, or no step remains.
        """
        config, accepted = self.scheduler.config, inspect.signature(self.scheduler.set_timesteps).parameters
        shift = {}
        if config.get("use_dynamic_shifting", False):
            token = self.vae_scale_factor_spatial * self.transformer.config.patch_size
            tokens, base = (height // token) * (width // token), config.get("base_image_seq_len", 256)
            ratio = time_shift(tokens, base, num_frames, self.vae_scale_factor_temporal)
            shift["mu"] = 0.0 if timesteps is not None else math.log(ratio)
        if timesteps is not None:  # a scheduler shifts its levels but not given times, so both are made to agree
            fixed = 1.0 if shift else static_shift(config)
            sigmas = [unshift(time / config.num_train_timesteps, fixed) for time in timesteps]
        if "sigmas" in accepted:
            if sigmas is None:
                sigmas = [1 - step / num_inference_steps for step in range(num_inference_steps)]
            self.scheduler.set_timesteps(sigmas=np.array(sigmas), device=self._execution_device, **shift)
        elif sigmas is not None:
            asked = "sigmas" if timesteps is None else "timesteps"
            raise ValueError(
                f"{type(self.scheduler).__name__} makes its own noise levels and takes no `{asked}`; "
                "use num_inference_steps, or FlowMatchEulerDiscreteScheduler."
            )
        else:
            self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device, **shift)
        steps = num_inference_steps if sigmas is None else len(sigmas)
        self._first_step = check_steps(steps, strength) * self.scheduler.order
        self.scheduler.set_begin_index(self._first_step)
        times = self.scheduler.timesteps[self._first_step :]
        self._num_timesteps = len(times)
        return times

    def noise_level(self, step: int) -> torch.Tensor:
        """Noise level before step `step` of this call, 0 to 1: latents are (1 - level) * picture + level * noise."""
        return self.scheduler.sigmas[self._first_step + step].float()

    def predict_flow(
        self,
        latents: torch.Tensor,
        embeds: torch.Tensor,
        mask: torch.Tensor | None,
        step: int,
        options: dict[str, Any],
        context: str = "cond_uncond",
    ) -> torch.Tensor:
        """Flow noise - x0 (n, C, F, H, W) in float32: one forward of the network. Caches keep apart by `context`."""
        place = {"step_index": step, "sigma": float(self.noise_level(step))}
        with self.transformer.cache_context(context, num_inference_steps=self._num_timesteps, **place):
            sample = self.transformer(
                hidden_states=latents.to(self.transformer.dtype),
                encoder_hidden_states=embeds,
                timestep=self._current_timestep.expand(len(latents)),
                encoder_attention_mask=mask,
                return_dict=False,
                **options,
            )[0]
        return self.transformer.flow(sample)

    def denoise(
        self,
        tensors: dict[str, torch.Tensor | None],
        timesteps: torch.Tensor,
        options: dict[str, Any],
        callback: Callable | None,
        callback_inputs: list[str],
    ) -> torch.Tensor:
        """Steps from noise to picture; `tensors` are those that a callback may see and change."""
        texts = self.guidance_texts(tensors)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                flow = self.guided_flow(tensors["latents"], texts, step, options)
                tensors["latents"] = self.scheduler.step(flow, timestep, tensors["latents"], return_dict=False)[0]
                tensors["latents"] = self.keep_known(tensors, self.noise_level(step + 1))
                if callback is not None:
                    changed = callback(self, step, timestep, {name: tensors[name] for name in callback_inputs})
                    tensors.update({name: value for name, value in (changed or {}).items() if name in tensors})
                    texts = self.guidance_texts(tensors)
                progress_bar.update()
        self._current_timestep = None
        return tensors["latents"]
