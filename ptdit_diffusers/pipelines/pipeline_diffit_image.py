"""Pictures from DiffiT's image-space model: noise in, steps of EDM's sampler, pixels out; there is no VAE."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from diffusers import EDMEulerScheduler, ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ptdit_diffusers.core.class_labels import class_ids
from ptdit_diffusers.core.edm import denoised, heun_step, noise_levels, preconditioning, state_dtype
from ptdit_diffusers.models.unet_diffit import DiffiTUNet2DModel

from .class_sampling import Generators, draw_noise
from .package_pipeline import PackagePipeline
from .ptdit_checks import (
    check_batch,
    check_callback_inputs,
    check_count,
    check_generator,
    check_guidance,
    check_output_type,
    require_finite,
)

SOLVERS = ("heun", "scheduler")
SMALL_STEPS, STEPS = 18, 40  # EDM's numbers of steps up to 32 px, and above


class DiffiTImagePipeline(PackagePipeline):
    """Pictures of an unconditional or class-conditional image-space model, such as `DiffiTUNet2DModel`.

    Args:
        unet: The network, which predicts EDM's raw output F.
        scheduler: `EDMEulerScheduler` or `EDMDPMSolverMultistepScheduler` of diffusers. The Heun sampler takes its
            noise levels (`sigma_min`, `sigma_max`, `rho`, `sigma_data`).
        id2label: Class number -> name; several names of one class with commas between.
        guidance_scale: What a call with classes does that does not say it.
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: DiffiTUNet2DModel,
        scheduler: EDMEulerScheduler,
        id2label: Mapping[Any, str] | None = None,
        guidance_scale: float = 1.0,
    ):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)
        self.register_to_config(
            id2label=None if id2label is None else {str(number): label for number, label in id2label.items()},
            guidance_scale=guidance_scale,
        )
        self.image_processor = VaeImageProcessor(vae_scale_factor=1)

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int | None = None,
        solver: str = "heun",
        guidance_scale: float | None = None,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never changed; diffusers' default)
    ) -> ImagePipelineOutput | tuple:
        """Make pictures.

        Args:
            class_labels: Class numbers or names, one or many; None for pictures of any kind.
            height, width: Pixels; default those of the training.
            num_inference_steps: Number of steps; default EDM's, 18 up to 32 px and 40 above.
            solver: "heun": EDM's deterministic sampler, of second order, which runs the network twice in every step
                but the last; "scheduler": the pipeline's scheduler, once in every step.
            guidance_scale: How strongly to follow the class; 1 or less turns guidance off (EDM has none). The default
                is the pipeline's own, and 1 without classes.
            num_images_per_prompt: Pictures per class, or in all without classes.
            generator: Source of the noise, one for all pictures or one for each.
            latents: Starting noise (B, C, height, width) of standard deviation 1, instead of sampled noise.
            output_type: "pil", "np", "pt" or "latent", which are pixels in -1..1 before rounding.
            return_dict: Return an `ImagePipelineOutput`, else a tuple with the pictures.
            callback_on_step_end: Called as f(pipeline, step, timestep, tensors) after each step; what it returns
                replaces tensors of these names. It may set `pipeline._interrupt`.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: An argument is not legal; the message names the nearest legal values.
            RuntimeError: The result holds NaN or infinite values.

        Examples:
            >>> from diffusers import EDMEulerScheduler
            >>> from ptdit_diffusers import DiffiTImagePipeline, DiffiTUNet2DModel
            >>> pipe = DiffiTImagePipeline(DiffiTUNet2DModel.from_preset("cifar10"), EDMEulerScheduler())
            >>> picture = pipe(num_inference_steps=2).images[0]
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        steps = self.default_steps() if num_inference_steps is None else num_inference_steps
        if guidance_scale is None:
            guidance_scale = 1.0 if class_labels is None else self.config.guidance_scale
        check_guidance(guidance_scale, 0.0)
        check_callback_inputs(callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        labels = self.prepare_labels(class_labels, num_images_per_prompt, guidance_scale)
        shape = self.picture_shape(num_images_per_prompt if labels is None else len(labels), height, width)
        self.check_inputs(shape, steps, solver, generator, latents, output_type)

        self._guidance_scale, self._interrupt, self._num_timesteps = guidance_scale, False, steps
        if latents is None:
            latents = draw_noise(shape, generator, self._execution_device)
        run = self.run_heun if solver == "heun" else self.run_scheduler
        latents = latents.to(self._execution_device)
        with self.progress_bar(total=steps) as progress_bar:
            for step, (timestep, update) in enumerate(run(steps, labels)):
                if self._interrupt:
                    break
                latents = update(latents)
                if callback_on_step_end is not None:
                    given = {name: latents for name in callback_on_step_end_tensor_inputs}
                    changed = callback_on_step_end(self, step, timestep, given) or {}
                    latents = changed.get("latents", latents)
                progress_bar.update()
        images = self.to_pictures(latents.float(), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # --- solvers: the timestep of each step, and what the step does --------------------------------------------------

    def run_heun(self, steps: int, labels: Tensor | None) -> Any:
        """Yield (c_noise, step) of EDM's deterministic sampler; pictures are kept in float64 where the device can."""
        config = self.scheduler.config
        levels = noise_levels(steps, config.sigma_min, config.sigma_max, config.rho)
        denoise = partial(self.denoised, labels)

        def update(number: int, pictures: Tensor) -> Tensor:
            pictures = pictures.to(state_dtype(pictures.device)) * (levels[0] if number == 0 else 1)
            return heun_step(denoise, pictures, levels[number], levels[number + 1])

        for number, level in enumerate(levels[:-1]):
            yield preconditioning(torch.tensor(level)).noise, partial(update, number)

    def run_scheduler(self, steps: int, labels: Tensor | None) -> Any:
        """Yield (c_noise, step) of the pipeline's scheduler; pictures are kept in float32."""
        self.scheduler.set_timesteps(steps, device="cpu")

        def update(timestep: Tensor, first: bool, pictures: Tensor) -> Tensor:
            pictures = pictures.float() * (self.scheduler.init_noise_sigma if first else 1)
            scaled = self.scheduler.scale_model_input(pictures, timestep)
            predicted = self.predict(labels, scaled, timestep.to(pictures.device).expand(len(pictures)))
            return self.scheduler.step(predicted, timestep, pictures, return_dict=False)[0]

        for number, timestep in enumerate(self.scheduler.timesteps):
            yield timestep, partial(update, timestep, number == 0)

    def denoised(self, labels: Tensor | None, noisy: Tensor, level: float) -> Tensor:
        """Return the denoised pictures (B, C, H, W) of noisy ones at one noise level."""
        sigma = torch.full((len(noisy),), level, dtype=noisy.dtype, device=noisy.device)
        return denoised(partial(self.predict, labels), noisy, sigma, self.scheduler.config.sigma_data)

    def predict(self, labels: Tensor | None, scaled: Tensor, noise_level: Tensor) -> Tensor:
        """Return the network's raw output (B, C, H, W) in float32, guided if guidance is on."""
        batch = len(scaled)
        if self._guidance_scale > 1:
            scaled, noise_level = torch.cat([scaled] * 2), torch.cat([noise_level] * 2)
            labels = torch.cat([labels, torch.full_like(labels, self.unet.config.num_classes)])
        predicted = self.unet(scaled.to(self.unet.dtype), noise_level.float(), class_labels=labels, return_dict=False)[
            0
        ].float()
        if self._guidance_scale <= 1:
            return predicted
        conditional, unconditional = predicted.split(batch)
        return unconditional + self._guidance_scale * (conditional - unconditional)

    # --- arguments and results ---------------------------------------------------------------------------------------

    def default_size(self) -> tuple[int, int]:
        """Return height and width in pixels of the training."""
        return self.unet.config.sample_size, self.unet.config.sample_size

    def default_steps(self) -> int:
        """Return EDM's number of steps for pictures of this size."""
        return SMALL_STEPS if self.unet.config.sample_size <= 32 else STEPS

    def prepare_labels(self, class_labels: Any, num_images_per_prompt: int, guidance_scale: float) -> Tensor | None:
        """Return class numbers (B,) on the device; None for an unconditional model.

        Raises:
            ValueError: There is no such class, or guidance asks for one.
        """
        check_count("num_images_per_prompt", num_images_per_prompt)
        classes = self.unet.config.num_classes
        if not classes and class_labels is not None:
            raise ValueError("this model is unconditional (num_classes=0); leave class_labels out.")
        if guidance_scale > 1 and class_labels is None:
            raise ValueError(f"guidance_scale={guidance_scale} needs class_labels to guide to; pass them, or 1.")
        null_class = classes and self.unet.config.class_dropout_prob > 0
        if guidance_scale > 1 and not null_class:
            raise ValueError("this model was trained without a null class, so it cannot be guided; pass 1.")
        if class_labels is None and classes and not null_class:
            raise ValueError("this model was trained without a null class; pass class_labels.")
        if not classes:
            return None
        ids = [classes] if class_labels is None else class_ids(class_labels, self.config.id2label, classes)
        return torch.tensor(ids, device=self._execution_device).repeat_interleave(num_images_per_prompt)

    def picture_shape(self, samples: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Return the shape (B, C, H, W) of the pictures; None is the size of the training.

        Raises:
            ValueError: A side does not divide by the window at every stage.
        """
        sides = []
        for name, size, default in zip(("height", "width"), (height, width), self.default_size(), strict=True):
            size = default if size is None else size
            check_count(name, size)
            self.unet.parameters_of.check_side(name, size)
            sides.append(size)
        return samples, self.unet.config.in_channels, *sides

    def check_inputs(
        self,
        shape: tuple[int, ...],
        steps: int,
        solver: str,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
    ) -> None:
        """Check the arguments of a call against the shape (B, C, H, W) of the pictures.

        Raises:
            ValueError: Something does not fit; names the value, the rule and the nearest legal values.
        """
        check_count("num_inference_steps", steps)
        check_generator(generator)
        check_output_type(output_type)
        if solver not in SOLVERS:
            raise ValueError(f"solver={solver!r} is unknown; choose one of {', '.join(SOLVERS)}.")
        if "sigma_data" not in self.scheduler.config:
            raise ValueError(
                f"{type(self.scheduler).__name__} is no scheduler of EDM; use EDMEulerScheduler or "
                "EDMDPMSolverMultistepScheduler."
            )
        if isinstance(generator, list):
            check_batch("generator", len(generator), shape[0], "one generator")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape} for this call, got {tuple(latents.shape)}.")

    def to_pictures(self, pixels: Tensor, output_type: str) -> Any:
        """Turn pixels in -1..1 (B, C, H, W) into what a call returns; "latent" returns them as they are.

        Raises:
            RuntimeError: Pixels hold NaN or infinite values.
        """
        require_finite(pixels, "pixels", self.unet)
        return pixels if output_type == "latent" else self.image_processor.postprocess(pixels, output_type)

    @property
    def guidance_scale(self) -> float:
        """Strength of guidance in the present call."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the present call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt = True`, to stop after its step."""
        return self._interrupt
