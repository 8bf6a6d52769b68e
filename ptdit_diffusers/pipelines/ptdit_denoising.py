"""The steps from noise to latents: their times, what the network gets in each, and the loop.

Shapes: B samples (prompts * images per prompt), C latent channels, F latent frames, H W latent size; height and width
are in pixels.
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from ptdit_diffusers.core.sampling import (
    choose_windows,
    proxy_generators,
    size_conditions,
    time_shift,
    unshift,
)

from .ptdit_checks import check_steps
from .ptdit_parallel import ParallelMixin
from .ptdit_request import GenerationRequest
from .ptdit_schedulers import check_noise_levels, check_own_shift, check_scheduler, own_shift, step_randomness

Tensors = dict[str, Tensor | None]  # by name: the latents, the text, and what else a callback may see and change


class DenoisingMixin(ParallelMixin):
    """Runs the `transformer` and `scheduler` of the pipeline.

    A pipeline says how it guides in two methods: `guidance_texts(tensors)` returns what the network reads, and is
    called again after a callback; `guided_flow(latents, texts, step, options)` returns the flow (B, C, F, H, W) of a
    step.
    """

    _interrupt, _current_timestep = False, None

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the present call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        """Time of the present step, 0 to 1000; None outside the loop."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `_interrupt = True` in a callback to stop after that step and decode the latents as they are."""
        return self._interrupt

    def prepare_schedule(self, call: GenerationRequest, strength: float = 1.0) -> Tensor:
        """Set the scheduler's steps for a checked call and return their times; see `prepare_timesteps`."""
        return self.prepare_timesteps(
            call.num_inference_steps, call.sigmas, call.height, call.width, call.num_frames, call.timesteps, strength
        )

    def prepare_timesteps(
        self,
        num_inference_steps: int,
        sigmas: list[float] | None,
        height: int,
        width: int,
        num_frames: int,
        timesteps: list[float] | None = None,
        strength: float = 1.0,
    ) -> Tensor:
        """Set the scheduler's steps and return their times (N,), from 1000 down.

        The noise levels are 1 - i / N, or `sigmas`; with `use_dynamic_shifting` they are shifted by `time_shift`.
        `timesteps` are the times themselves, which are not shifted. With `strength` below 1 the first (1 - strength)
        of the steps is left out, as in diffusers' image-to-image pipelines. `num_frames` is as `clip_length` returns
        it.

        Raises:
            ValueError: The scheduler does not take such levels or times, or no step remains.
        """
        check_scheduler(self.scheduler)
        config, accepted = self.scheduler.config, inspect.signature(self.scheduler.set_timesteps).parameters
        shift = {}
        if config.get("use_dynamic_shifting", False):
            token = self.vae_scale_factor_spatial * self.transformer.config.patch_size
            tokens, base = (height // token) * (width // token), config.get("base_image_seq_len", 256)
            ratio = time_shift(tokens, base, num_frames, self.vae_scale_factor_temporal)
            if "mu" in accepted:
                shift["mu"] = 0.0 if timesteps is not None else math.log(ratio)
            else:
                check_own_shift(self.scheduler, ratio)
        if timesteps is not None:  # a scheduler shifts its levels but not given times, so both are made to agree
            fixed = 1.0 if shift else own_shift(self.scheduler)
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
        check_noise_levels(self.scheduler)
        steps = num_inference_steps if sigmas is None else len(sigmas)
        self._first_step = check_steps(steps, strength) * self.scheduler.order
        self.scheduler.set_begin_index(self._first_step)
        times = self.scheduler.timesteps[self._first_step :]
        self._num_timesteps = len(times)
        return times

    def noise_level(self, step: int) -> Tensor:
        """Return the noise level before step `step` of this call, 0 to 1.

        Latents are (1 - level) * image + level * noise.
        """
        return self.scheduler.sigmas[self._first_step + step].float()

    def network_options(self, call: GenerationRequest, shape: Sequence[int]) -> dict[str, Any]:
        """Return the arguments of the network that are the same in all steps, for latents of this shape."""
        windows = choose_windows(self.transformer, call.window_size, call.proxy_ratio, *shape[-2:])
        sizes = size_conditions(self.transformer, call.height, call.width)
        options = {**windows, **sizes, "attention_kwargs": call.attention_kwargs}
        if self.transformer.proxy_mode == "random":
            options["generator"] = proxy_generators(call.generator, shape[0])
        return options

    def predict_flow(
        self,
        latents: Tensor,
        embeds: Tensor,
        mask: Tensor | None,
        step: int,
        options: dict[str, Any],
        context: str = "cond_uncond",
    ) -> Tensor:
        """Return the flow noise - x0 (n, C, F, H, W) in float32: one forward of the network.

        Args:
            latents: (n, C, F, H, W) before this step.
            embeds, mask: Text (n, tokens, width), and true where a token counts (n, tokens); None if all do.
            step: Number of the step in this call, from 0.
            options: As `network_options` returns them.
            context: Caches keep predictions of different contexts apart.
        """
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
        call: GenerationRequest,
        tensors: Tensors,
        timesteps: Tensor,
        callback: Callable | None = None,
        callback_inputs: Sequence[str] = (),
        after_step: Callable[[Tensors, Tensor], Tensor] | None = None,
    ) -> Tensor:
        """Step from noise to the latents (B, C, F, H, W) of images: the loop over the steps of a call.

        Args:
            call: What was asked for.
            tensors: `latents`, the text under the names in `TEXT_TENSORS`, and what `after_step` needs.
            timesteps: As `prepare_schedule` returned them.
            callback: Called as f(pipeline, step, timestep, tensors) after each step; what it returns replaces tensors.
            callback_inputs: Names of the tensors that it gets.
            after_step: Called with the tensors and the noise level that they have now; returns the latents to go on
                with.
        """
        options = self.network_options(call, tensors["latents"].shape)
        texts = self.guidance_texts(tensors)
        self.check_agreement(call, tensors, timesteps, options)
        random = step_randomness(self.scheduler, call.generator)
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for step, timestep in enumerate(timesteps):
                if self.interrupt:
                    break
                self._current_timestep = timestep
                flow = self.guided_flow(tensors["latents"], texts, step, options)
                stepped = self.scheduler.step(flow, timestep, tensors["latents"], return_dict=False, **random)
                tensors["latents"] = stepped[0]
                if after_step is not None:
                    tensors["latents"] = after_step(tensors, self.noise_level(step + 1))
                if callback is not None:
                    changed = callback(self, step, timestep, {name: tensors[name] for name in callback_inputs})
                    tensors.update({name: value for name, value in (changed or {}).items() if name in tensors})
                    texts = self.guidance_texts(tensors)
                self.check_step(tensors)
                progress_bar.update()
        self._current_timestep = None
        return tensors["latents"]
