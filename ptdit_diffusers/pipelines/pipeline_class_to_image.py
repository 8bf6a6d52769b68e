"""Pictures of classes: numbers or names in, guided steps of a class-conditional transformer, decoding.

Shapes: B samples (classes * images per class), C latent channels, H W latent size.
"""

import math
import warnings
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import ImagePipelineOutput
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from ptdit_diffusers.core.class_labels import class_ids
from ptdit_diffusers.core.cost import Call
from ptdit_diffusers.core.diffusion import check_guidance_schedule, guide_classes, power_cosine
from ptdit_diffusers.core.embedded import resolve_model
from ptdit_diffusers.models.class_transformer import ClassTransformer2DModel
from ptdit_diffusers.models.transformer_dit import DIFFUSERS_CLASSES, DiT2DModel

from .class_sampling import Generators, Sampler, draw_noise, official_scheduler
from .machine import check_size_of_call
from .package_pipeline import PackagePipeline
from .ptdit_checks import (
    check_batch,
    check_callback_inputs,
    check_count,
    check_generator,
    check_numbers,
    check_output_type,
    check_size,
    is_integer,
    plain_integer,
    require_finite,
    warn_of_black,
)
from .ptdit_lora import PTDiTLoraLoaderMixin
from .ptdit_schedulers import COPY, exclusive


class ClassToImagePipeline(PackagePipeline, PTDiTLoraLoaderMixin):
    """Pictures of classes with DiT, DiffiT and other transformers of `forward(hidden_states, timestep, class_labels)`.

    With the official weights, the default scheduler and the same random numbers it gives the pictures of the official
    script. diffusers' `DiTPipeline` does not: its network has another time embedding, it guides all latent channels,
    and it leaves out the learned variance.

    Args:
        transformer: The network, e.g. `DiT2DModel` or `DiffiT2DModel`.
        vae: Any VAE for images, or a video VAE, to which a picture is one frame. May be None with
            `output_type="latent"`.
        scheduler: A scheduler of diffusers; see `official_scheduler` for the settings of the official samplers.
        id2label: Class number -> name; several names of one class with commas between.
        guidance_channels: How many of the first latent channels are guided; None guides all. The official weights are
            sampled with 3 of 4.
        guidance_scale, guidance_schedule, guidance_power: What a call does that does not say it, see there. The
            official values are 4.0 and "constant" for DiT, 4.4 and "power_cosine" with 4.0 for DiffiT at 256 px, 1.49
            and "constant" for DiffiT at 512 px.
    """

    refuse_large_calls = True  # see ChecksMixin
    model_cpu_offload_seq = "transformer->vae"
    _optional_components = ["vae"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        transformer: ClassTransformer2DModel,
        vae: Any,
        scheduler: Any,
        id2label: Mapping[Any, str] | None = None,
        guidance_channels: int | None = 3,
        guidance_scale: float = 4.0,
        guidance_schedule: str = "constant",
        guidance_power: float = 4.0,
    ):
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        self.register_to_config(
            id2label=None if id2label is None else {str(number): label for number, label in id2label.items()},
            guidance_channels=guidance_channels,
            guidance_scale=guidance_scale,
            guidance_schedule=guidance_schedule,
            guidance_power=guidance_power,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "ClassToImagePipeline":
        """Load a pipeline from a folder, a Hub id, or by the short name of a model that comes with the package.

        A folder of diffusers' `DiTPipeline`, e.g. "facebook/DiT-XL-2-256", gets the exact network, and unless a
        `scheduler` is given the official ancestral sampler instead of the folder's DDIM.

        Args:
            pretrained_model_name_or_path: Folder, OWNER/NAME, or short name.
            kwargs: Options of `DiffusionPipeline.from_pretrained`, e.g. `dtype` or single components.

        Raises:
            ValueError: There is no such model, or its weights are not a DiT.
        """
        source = resolve_model(pretrained_model_name_or_path)
        places = ("cache_dir", "force_download", "proxies", "local_files_only", "token", "revision")
        given = {name: kwargs[name] for name in places if name in kwargs}
        index = cls.load_config(source, **given)
        if index.get("_class_name") not in ("DiTPipeline", *(base.__name__ for base in cls.__mro__)):
            raise ValueError(f"{source} holds a {index.get('_class_name')}, not a class-conditional pipeline.")
        if (index.get("transformer") or (None, None))[1] in DIFFUSERS_CLASSES:
            if "transformer" not in kwargs:
                given |= {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
                dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))  # of all, or of each by its name
                given["dtype"] = dtype.get("transformer") if isinstance(dtype, dict) else dtype
                kwargs["transformer"] = DiT2DModel.from_pretrained(source, subfolder="transformer", **given)
            kwargs.setdefault("scheduler", official_scheduler())
        return super().from_pretrained(source, **kwargs)

    # --- a call ------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | list[int | str] | Tensor,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 250,
        timesteps: list[int] | None = None,
        guidance_scale: float | None = None,
        guidance_channels: int | str | None = None,
        guidance_schedule: str | None = None,
        guidance_power: float | None = None,
        num_images_per_prompt: int = 1,
        eta: float = 0.0,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (never changed; diffusers' default)
    ) -> ImagePipelineOutput | tuple:
        """Make pictures of classes.

        Args:
            class_labels: Class numbers or names, one or many.
            height, width: Pixels; default those of the training.
            num_inference_steps: Number of steps; not used with `timesteps`.
            timesteps: Timesteps falling within 999 to 0, e.g. those of `respaced_timesteps`.
            guidance_scale: How strongly to follow the class; 1 or less turns guidance off and halves the work. The
                default of this and the next three is what the pipeline says.
            guidance_channels: How many of the first latent channels are guided, or "all".
            guidance_schedule: "constant": the same strength in all steps; "power_cosine": it grows from 1 at noise to
                `guidance_scale` at the picture, see `core.diffusion.power_cosine`.
            guidance_power: Exponent of "power_cosine", above 0; the larger, the later guidance sets in.
            num_images_per_prompt: Pictures per class.
            eta: Share of the noise in DDIM, 0 to 1.
            generator: Source of the noise, one for all samples or one for each. Sample i of a batch equals the single
                run with generator i.
            latents: Starting noise (B, C, H, W) instead of sampled one. Latents are kept in float32.
            output_type: "pil", "np", "pt" or "latent".
            return_dict: Return an `ImagePipelineOutput`, else a tuple with the pictures.
            callback_on_step_end: Called as f(pipeline, step, timestep, tensors) after each step; what it returns
                replaces tensors of these names. It may set `pipeline._interrupt` and `pipeline._guidance_scale`.
            callback_on_step_end_tensor_inputs: Names of the tensors that it gets.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple.

        Raises:
            ValueError: An argument is not legal; the message names the nearest legal values.
            RuntimeError: The result holds NaN or infinite values.

        Examples:
            >>> from ptdit_diffusers import ClassToImagePipeline
            >>> pipe = ClassToImagePipeline.from_pretrained("facebook/DiT-XL-2-256")
            >>> picture = pipe("golden retriever", generator=torch.manual_seed(0)).images[0]
        """
        if isinstance(callback_on_step_end, (PipelineCallback, MultiPipelineCallbacks)):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        generator = list(generator) if isinstance(generator, tuple) else generator
        num_inference_steps, images_each = plain_integer(num_inference_steps), plain_integer(num_images_per_prompt)
        check_count("num_images_per_prompt", images_each)
        ids = class_ids(class_labels, self.config.id2label, self.transformer.config.num_classes)
        shape = self.latent_shape(len(ids) * images_each, plain_integer(height), plain_integer(width))
        self.check_inputs(
            shape, num_inference_steps, generator, latents, output_type, callback_on_step_end_tensor_inputs
        )
        scale = self.config.guidance_scale if guidance_scale is None else guidance_scale
        schedule = guidance_schedule or self.config.guidance_schedule
        power = self.config.guidance_power if guidance_power is None else guidance_power
        check_numbers({"guidance_scale": (scale, math.inf), "eta": (eta, 1.0)})
        check_guidance_schedule(schedule, power)
        channels = self.channels_to_guide(guidance_channels)
        if self.refuse_large_calls:
            steps = num_inference_steps if timesteps is None else len(timesteps)
            self.check_cost(shape, len(ids), steps, scale > 1, output_type != "latent")
        with exclusive(self.scheduler, COPY.format(type(self).__name__)):
            self._guidance_scale, self._guidance_channels, self._interrupt = scale, channels, False
            self._guidance_schedule, self._guidance_power = schedule, power
            sampler = Sampler(self.scheduler, num_inference_steps, timesteps, generator, eta)
            self.check_variance(sampler)
            latents = self.prepare_latents(shape, generator, latents)
            labels = torch.tensor(ids, device=self._execution_device).repeat_interleave(images_each)
            latents = self.denoise(latents, labels, sampler, callback_on_step_end, callback_on_step_end_tensor_inputs)
            images = self.decode_latents(latents, output_type)
            self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(
        self,
        latents: Tensor,
        labels: Tensor,
        sampler: Sampler,
        callback: Callable | None,
        callback_inputs: list[str],
    ) -> Tensor:
        """Step from noise (B, C, H, W) to the picture's latents. With guidance there is one trajectory, too."""
        self._num_timesteps = len(sampler.timesteps)
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for number, timestep in enumerate(sampler.timesteps):
                if self.interrupt:
                    break
                predicted = self.predict(latents, timestep, labels, sampler, number)
                copies = 2 if self.do_classifier_free_guidance else 1
                latents = sampler.step(predicted, number, latents, copies)
                if callback is not None:
                    given = {name: latents for name in callback_inputs}
                    latents = (callback(self, number, timestep, given) or {}).get("latents", latents)
                progress_bar.update()
        return latents

    def predict(self, latents: Tensor, timestep: Tensor, labels: Tensor, sampler: Sampler, number: int) -> Tensor:
        """Return the network's output for a step (B, C or with variance 2C, H, W), guided if guidance is on."""
        latents = sampler.scaled(latents, number)
        if self.do_classifier_free_guidance:
            latents = torch.cat([latents, latents])
            labels = torch.cat([labels, torch.full_like(labels, self.transformer.config.num_classes)])
        times = timestep.to(labels.device).expand(len(labels))
        with self.transformer.cache_context("cond_uncond"):
            predicted = self.transformer(latents.to(self.transformer.dtype), times, labels, return_dict=False)[
                0
            ].float()
        if not self.do_classifier_free_guidance:
            return predicted
        return guide_classes(predicted, self.strength_at(timestep), self._guidance_channels)

    def strength_at(self, timestep: Tensor) -> float:
        """Return how strongly the present call guides at a timestep."""
        if self._guidance_schedule == "constant":
            return self.guidance_scale
        return float(power_cosine(timestep, self.guidance_scale, self._guidance_power))

    def prepare_latents(self, shape: tuple[int, ...], generator: Generators, latents: Tensor | None = None) -> Tensor:
        """Return starting noise (B, C, H, W) in float32, at the scheduler's first noise level."""
        if latents is None:
            latents = draw_noise(shape, generator, self._execution_device)
        elif latents.dtype in (torch.float16, torch.bfloat16):
            warnings.warn(
                f"`latents` are {str(latents.dtype).removeprefix('torch.')}; sampling goes on in float32.",
                stacklevel=3,
            )
        latents = latents.to(self._execution_device, torch.float32)
        return latents * getattr(self.scheduler, "init_noise_sigma", 1.0)

    def decode_latents(self, latents: Tensor, output_type: str = "pil") -> Any:
        """Turn latents (B, C, H, W) into pictures; "latent" returns them as they are.

        Raises:
            RuntimeError: Latents or pixels hold NaN or infinite values.
        """
        require_finite(latents, "latents", self.transformer)
        if output_type == "latent":
            return latents
        latents = latents / self.vae.config.scaling_factor + (self.vae.config.get("shift_factor") or 0.0)
        latents = latents.to(self.vae.dtype)
        if self._is_video_vae:
            pixels = self.vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0].float()
        else:
            pixels = self.vae.decode(latents, return_dict=False)[0].float()
        require_finite(pixels, "decoded pixels", self.vae)
        warn_of_black(pixels, self.vae.dtype)
        return self.image_processor.postprocess(pixels, output_type)

    # --- what a call may hold ----------------------------------------------------------------------------------------

    def get_label_ids(self, label: str | list[str]) -> list[int]:
        """Return the class numbers of names, as `DiTPipeline` does."""
        return class_ids(label, self.config.id2label, self.transformer.config.num_classes)

    def latent_shape(self, samples: int, height: int | None, width: int | None) -> tuple[int, int, int, int]:
        """Return the shape (B, C, H, W) of latents for a size in pixels; None is the size of the training.

        Raises:
            ValueError: A size is not a multiple of the pixels of a token, or another one than the model's only one.
        """
        config, factor = self.transformer.config, self.vae_scale_factor
        sides = []
        for name, size, default in zip(("height", "width"), (height, width), self.default_size(), strict=True):
            size = default if size is None else size
            check_size(name, size, factor * config.patch_size, 0, f"VAE {factor} x patch {config.patch_size}")
            if getattr(self.transformer, "is_global", False) and size != default:
                raise ValueError(f"{name}={size}: this model makes {default} x {default} only; nearest: {default}.")
            sides.append(size // factor)
        return samples, config.in_channels, *sides

    def default_size(self) -> tuple[int, int]:
        """Return height and width in pixels of the training."""
        side = self.transformer.config.sample_size * self.vae_scale_factor
        return side, side

    def channels_to_guide(self, given: int | str | None) -> int:
        """Return how many channels are guided: those of the call, else of the pipeline.

        Raises:
            ValueError: There are not so many.
        """
        every = self.transformer.config.in_channels
        channels = self.config.guidance_channels if given is None else given
        if channels in ("all", None):
            return every
        if not is_integer(channels) or not 1 <= channels <= every:
            nearest = min(max(channels, 1), every) if is_integer(channels) else every
            raise ValueError(f'guidance_channels={channels!r} must be 1 to {every} or "all"; nearest: {nearest}.')
        return int(channels)

    def check_inputs(
        self,
        shape: tuple[int, ...],
        num_inference_steps: int,
        generator: Generators,
        latents: Tensor | None,
        output_type: str,
        callback_inputs: list[str],
    ) -> None:
        """Check the arguments of a call against a shape (B, C, H, W) of latents.

        Raises:
            ValueError: Something does not fit; names the value, the rule and the nearest legal values.
        """
        check_count("num_inference_steps", num_inference_steps)
        check_generator(generator)
        check_callback_inputs(callback_inputs, self._callback_tensor_inputs)
        if isinstance(generator, list):
            check_batch("generator", len(generator), shape[0], "one generator")
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` must have shape {shape} for this call, got {tuple(latents.shape)}.")
        check_output_type(output_type)
        if self.vae is None and output_type != "latent":
            raise ValueError(f'output_type={output_type!r} needs a VAE, but this pipeline has none; pass "latent".')

    def check_cost(self, shape: tuple[int, ...], classes: int, steps: int, guided: bool, decoded: bool) -> None:
        """Refuse a checked call that needs more memory than the device has, or more than a day.

        Args:
            shape: Of the latents (B, C, H, W).
            classes: Number of classes; the samples are divided among them.
            steps: Sampling steps.
            guided: Whether each step computes two predictions.
            decoded: Whether the result is pictures.

        Raises:
            ValueError: It does; names the estimate and the nearest sizes.
        """
        height, width = (side * self.vae_scale_factor for side in shape[-2:])
        side = self.transformer.config.patch_size * self.vae_scale_factor
        call = Call(shape[0] // classes, height, width, steps, classes, predictions=1 + guided)
        names = {
            "samples": ("num_images_per_prompt={}" + f" for {classes} classes" * (classes > 1), 1, 1),
            "size": ("height={}, width={}", side, side),
        }
        check_size_of_call(self, call, names, self.vae if decoded else None)

    def check_variance(self, sampler: Sampler) -> None:
        """Check that the network predicts the variance that the scheduler uses, and guides where it can.

        Raises:
            ValueError: It does not, or guidance has no null class.
        """
        config = self.transformer.config
        if sampler.uses_variance and config.out_channels < 2 * config.in_channels:
            raise ValueError(
                f"the scheduler uses a learned variance, but the model predicts none ({config.out_channels} channels "
                f"for {config.in_channels}): use another scheduler, for example "
                'DDPMScheduler.from_config(pipe.scheduler.config, variance_type="fixed_large").'
            )
        if self.do_classifier_free_guidance and config.get("class_dropout_prob", 1) == 0:
            raise ValueError(
                "this model was trained without a null class, so it cannot be guided; pass guidance_scale=1."
            )

    # --- properties --------------------------------------------------------------------------------------------------

    @property
    def guidance_scale(self) -> float:
        """Strength of guidance in the present call; a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the null class is used: guidance above 1."""
        return self._guidance_scale > 1

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the present call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has set `_interrupt = True`, to stop after its step and decode what is there."""
        return self._interrupt

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent cell along one side."""
        if self.vae is None:
            return 8
        if self._is_video_vae:
            return self.vae.spatial_compression_ratio
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @cached_property
    def image_processor(self) -> VaeImageProcessor:
        """Turns pixels into what a call returns."""
        return VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @property
    def _is_video_vae(self) -> bool:
        return hasattr(self.vae, "temporal_compression_ratio")
